"""What a result depends on belongs to checkpoint, state and record; another CLIP, other words or files are refused."""

import json

import pytest
import torch
import trees
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from otseg.checkpoints import write_tensors
from otseg.cli import main
from otseg.digits import ASSETS
from otseg.identity import MUST_AGREE
from otseg.models import load_model, read_checkpoint
from otseg.recipes import DATASET_RECIPES, resolve
from otseg.training import fit

SHORT = dict(max_iters=2, batch_size=2, warmup_iters=1, val_interval=1, val_images=2)
RECIPE = resolve("folder", **DATASET_RECIPES["digits"] | SHORT)
DIGESTS = {"clip_image", "clip_text", "class_embeddings", "train", "val"}


def run(root, out, recipe=RECIPE, **options):
    return fit(recipe, out, root=root, workers=0, progress=False, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A folder of images, and a run on it."
    base = tmp_path_factory.mktemp("identity")
    trees.write_folder(base / "data")
    return base / "data", base / "inductive", run(base / "data", base / "inductive")


def other_clip(path, tower):
    "Weights of the small CLIP, one tower of them a little changed."
    state = load_file(str(ASSETS / "digits_clip.safetensors"))
    name = "visual.proj" if tower == "image" else "text_projection"
    state[name] = state[name] + 0.01
    save_file(state, path)
    return path


def test_checkpoint_state_and_record_carry_the_digests(trained):
    _, out, record = trained
    for file in (out / "last.safetensors", *(out / "states").iterdir()):
        assert json.loads(json.dumps(load_header(file)["identity"])) == record["identity"]
    assert record["identity"].keys() == DIGESTS and len(set(record["identity"].values())) == 5


def load_header(path):
    with safe_open(path, "pt") as f:
        return json.loads(f.metadata()["otseg"])


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("use", ["predict", "evaluate", "resume", "transductive"])
def test_another_clip_is_refused(trained, tmp_path, capsys, tower, use):
    root, out, record = trained
    weights = other_clip(tmp_path / "other.safetensors", tower)
    checkpoint = out / "last.safetensors"
    expected = f"other {tower} weights of CLIP.*digest {record['identity']['clip_' + tower]} in the file.*clip_weights"
    if use == "resume":
        with pytest.raises(ValueError, match=expected):
            run(root, out, clip_weights=weights)
    elif use == "transductive":
        recipe = resolve("folder", "transductive", **DATASET_RECIPES["digits"] | SHORT)
        with pytest.raises(ValueError, match=expected):
            run(root, tmp_path / "transductive", recipe, init=out / "half.safetensors", clip_weights=weights)
        assert not (tmp_path / "transductive").exists()
    else:
        Image.new("RGB", (40, 40)).save(tmp_path / "photo.png")
        words = [str(tmp_path / "photo.png"), "--checkpoint", str(checkpoint), "--out", str(tmp_path / "masks")]
        words = words if use == "predict" else [str(checkpoint), "--root", str(root)]
        assert main([use, *words, "--clip-weights", str(weights)]) == 2
        message = capsys.readouterr().err
        assert f"other {tower} weights of CLIP" in message and "give the file or tag of its CLIP" in message


def test_an_image_more_is_noticed(trained, tmp_path):
    root = tmp_path / "data"
    trees.write_folder(root)
    run(root, tmp_path / "run")
    trees.write_pair(77, root / "images/train/new.png", root / "labels/train/new.png", (0, 1, 2))
    with pytest.raises(
        ValueError, match="other files of the training images: some were added.*restore the files, or train anew"
    ):
        run(root, tmp_path / "run")
    record = run(root, tmp_path / "run", resume=False)
    assert record["identity"]["train"] != trained[2]["identity"]["train"]


def test_the_same_files_in_another_place(trained, tmp_path):
    trees.write_folder(tmp_path / "elsewhere")
    recipe = resolve("folder", **DATASET_RECIPES["digits"] | SHORT | {"dataset_name": "data"})
    about = json.loads((tmp_path / "elsewhere/dataset.json").read_text())
    (tmp_path / "elsewhere/dataset.json").write_text(json.dumps(about | {"name": "data"}))
    record = run(tmp_path / "elsewhere", tmp_path / "run", recipe)
    assert record["identity"] == trained[2]["identity"]


def test_other_images_may_be_evaluated(trained, tmp_path):
    "Across datasets, words and files differ on purpose."
    _, out, _ = trained
    trees.write_folder(tmp_path / "target", classes=["grass", "page", "seven"], unseen=["seven"])
    words = ["evaluate", str(out / "last.safetensors"), "--target", "folder", "--root", str(tmp_path / "target")]
    assert main([*words, "--record", str(tmp_path / "new/folder/r.json"), "--workers", "0"]) == 0
    record = json.loads((tmp_path / "new/folder/r.json").read_text())
    assert record["identity"]["clip_image"] == read_checkpoint(out / "last.safetensors")[1]["identity"]["clip_image"]
    assert "train" not in MUST_AGREE["other classes"]


def test_other_synonyms_are_other_words(trained, tmp_path):
    root, out, _ = trained
    about = json.loads((root / "dataset.json").read_text())
    try:
        (root / "dataset.json").write_text(json.dumps(about | {"classes": ["brick|grass", "page", "tissue"]}))
        with pytest.raises(ValueError, match="other words of the classes"):
            run(root, out)
    finally:
        (root / "dataset.json").write_text(json.dumps(about))


def test_a_checkpoint_without_digests_still_loads(trained, tmp_path):
    state, _ = read_checkpoint(trained[1] / "last.safetensors")
    header = load_header(trained[1] / "last.safetensors")
    del header["identity"]
    write_tensors(tmp_path / "old.safetensors", state, header)
    model, *_ = load_model(tmp_path / "old.safetensors")
    assert all(torch.equal(w, state[name]) for name, w in model.trainable_state().items())


def test_words_that_the_clip_does_not_know_are_refused_in_training(tmp_path):
    trees.write_folder(tmp_path / "data", classes=["wall", "cup", "spoon"], unseen=["spoon"])
    with pytest.raises(ValueError, match="does not know 'wall'.*use words that it knows, or a full CLIP, for"):
        run(tmp_path / "data", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_validation_image_costs_nothing(tmp_path):
    "The state is on the disk before the validation; once the image is mended, the same command goes on."
    root, out = tmp_path / "data", tmp_path / "run"
    trees.write_folder(root)
    whole = run(root, tmp_path / "whole")
    image = next((root / "images/val").glob("*0.*"))
    sound = image.read_bytes()
    image.write_bytes(sound[: len(sound) // 2])
    with pytest.raises(ValueError, match=image.name) as error:
        fit(RECIPE, out, root=root, workers=1, progress=False)
    assert "Traceback" not in str(error.value)
    assert [file.name for file in (out / "states").iterdir()] == ["00000001.safetensors"]
    image.write_bytes(sound)
    assert run(root, out)["metrics"] == whole["metrics"]
    assert (out / "log.jsonl").read_text() == (tmp_path / "whole/log.jsonl").read_text()
    assert read_checkpoint(out / "best.safetensors")[1]["iteration"] == 1
