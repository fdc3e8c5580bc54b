"""Models and their checkpoints: saved, read back, refused if they are damaged or do not fit."""

import pickle
from dataclasses import replace

import pytest
import torch
from helpers import few_digits
from safetensors.torch import save_file

from otseg.checkpoints import provenance, read_tensors, write_tensors
from otseg.models import (
    MODEL_FIELDS,
    build_model,
    check_same_model,
    load_model,
    load_weights,
    read_checkpoint,
    save_checkpoint,
)
from otseg.recipes import RENAMED_FIELDS, default_recipe, resolve

RECIPE = resolve("digits", max_iters=6, batch_size=4)


@pytest.fixture(scope="module")
def bench():
    return few_digits()


@pytest.fixture(scope="module")
def model(bench):
    "A model in eval mode that no test changes."
    torch.manual_seed(0)
    return build_model(RECIPE, bench).eval()


@pytest.fixture(scope="module")
def image():
    return torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def path(model, bench, tmp_path):
    save_checkpoint(tmp_path / "a.safetensors", model, RECIPE, bench, iteration=3)
    return tmp_path / "a.safetensors"


def test_header_describes_the_weights(path, model, bench):
    state, header = read_checkpoint(path)
    assert header["recipe"] == RECIPE and header["iteration"] == 3 and header["commit"] == provenance()["commit"]
    assert tuple(header["classes"]) == bench.classes and tuple(header["unseen"]) == bench.unseen
    assert state.keys() == model.trainable_state().keys()
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]  # no partial file


def test_model_comes_back(path, model, image, bench):
    torch.manual_seed(1)
    other = build_model(RECIPE, bench).eval()
    expected = model(image).mpsa
    assert not torch.equal(other(image).mpsa, expected)
    assert load_weights(other, path, bench.classes)["iteration"] == 3
    assert torch.equal(other(image).mpsa, expected)
    loaded, recipe, _ = load_model(path)
    assert torch.equal(loaded(image).mpsa, expected) and recipe == RECIPE and not loaded.training


def test_weights_that_are_not_finite_are_not_saved(model, bench, tmp_path):
    broken = build_model(RECIPE, bench)
    broken.descriptor.proj.weight.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match="descriptor.proj.weight is not finite after iteration 7"):
        save_checkpoint(tmp_path / "b.safetensors", broken, RECIPE, bench, iteration=7)
    assert not list(tmp_path.iterdir())


# old versions


def test_old_field_names_are_read(path):
    state, header = read_tensors(path)
    names = {new: old for old, new in RENAMED_FIELDS.items()}
    stored = {names.get(name, name): value for name, value in header["recipe"].items()}
    assert {"prompts", "batch", "warmup", "val_every"} <= stored.keys()
    write_tensors(path, state, header | {"recipe": stored})
    assert read_checkpoint(path)[1]["recipe"] == RECIPE


def test_a_field_that_is_newer_than_the_checkpoint_has_its_default(path):
    state, header = read_tensors(path)
    del header["recipe"]["template_repeats"]
    write_tensors(path, state, header)
    assert read_checkpoint(path)[1]["recipe"] == RECIPE


def test_a_recipe_of_a_newer_version_is_refused(path):
    state, header = read_tensors(path)
    write_tensors(path, state, header | {"recipe": header["recipe"] | {"colour": "red"}})
    with pytest.raises(ValueError, match="recipe that this version of otseg does not know: .*no field 'colour'"):
        read_checkpoint(path)


# damaged files


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-2] ^= 1  # of the last weight
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


def empty(path):
    path.write_bytes(b"")


def replace_by_a_pickle(path):
    path.write_bytes(pickle.dumps({"weights": 1}))


def replace_by_tensors_of_another_program(path):
    save_file({"weight": torch.zeros(3)}, path)


@pytest.mark.parametrize(
    "damage", [truncate, flip_a_bit, empty, replace_by_a_pickle, replace_by_tensors_of_another_program]
)
def test_damaged_checkpoints(path, model, damage):
    damage(path)
    for read in read_checkpoint, load_model, lambda path: load_weights(model, path):
        with pytest.raises(ValueError, match="a.safetensors is (not a checkpoint of otseg|damaged)"):
            read(path)


def test_no_checkpoint(tmp_path):
    for read in read_checkpoint, load_model:
        with pytest.raises(FileNotFoundError, match="no checkpoint at .*b.safetensors"):
            read(tmp_path / "b.safetensors")


# checkpoints that do not fit


def test_checkpoint_of_other_classes(path, model):
    with pytest.raises(ValueError, match="trained for 16 classes, but the dataset has 2;.*'zero'.*'cat'"):
        load_weights(model, path, ("cat", "dog"))


def test_same_classes_in_another_order(path, model, bench):
    "The message names the first class that differs."
    names = [*bench.classes[:14], bench.classes[15], bench.classes[14]]
    with pytest.raises(ValueError, match="number 14, is .*galaxies"):
        load_weights(model, path, names)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(depth=2), r"decoder.layers.1.* is \(.*\) in the file but unknown in the model"),
        (dict(depth=4), r"decoder.layers.2.* is missing in the file but \(.*\) in the model"),
        (
            dict(visual_prompts=5),
            r"deep_prompt_embeddings is \(3, 10, 128\) in the file but \(3, 5, 128\) in the model .*recipe changed",
        ),
    ],
)
def test_checkpoint_of_another_shape(path, bench, change, says):
    "It is refused, and nothing of it is loaded."
    other = build_model(replace(RECIPE, **change), bench)
    before = {name: t.clone() for name, t in other.trainable_state().items()}
    with pytest.raises(ValueError, match=says):
        load_weights(other, path, bench.classes)
    assert all(torch.equal(t, before[name]) for name, t in other.trainable_state().items())


OTHER = dict(
    clip="ViT-B-16",
    attention="softmax",
    depth=2,
    eps=0.1,
    dense="value",
    rho_pixels=0.1,
    rho_prompts=0.0,
    visual_prompts=5,
    num_templates=2,
    template_repeats=2,
    image_size=64,
)


@pytest.mark.parametrize("name", MODEL_FIELDS)
def test_every_field_of_the_model_is_compared(name):
    ours = default_recipe("digits", "inductive")
    check_same_model(replace(ours, seed=7, lr=1e-5), ours, "a.safetensors")
    with pytest.raises(ValueError, match=f"a.safetensors was trained with {name} = .*, but this recipe has"):
        check_same_model(replace(ours, **{name: OTHER[name]}), ours, "a.safetensors")
