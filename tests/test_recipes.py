"""Recipes: defaults for every dataset and setting, validation, names of runs, parameters of notebooks."""

import math
from dataclasses import FrozenInstanceError, asdict, fields, replace

import pytest

from otseg.benchmarks import DATASETS, BenchmarkSource, load_benchmark
from otseg.recipes import (
    RECIPES,
    RENAMED_FIELDS,
    SETTINGS,
    Recipe,
    change,
    check_parameters,
    recipe_changes,
    resolve,
    run_name,
    upgrade_fields,
)
from otseg.steps import lr_at
from otseg.text import TEMPLATES

# defaults


def test_every_dataset_has_every_setting():
    assert set(RECIPES) == {(dataset, setting) for dataset in DATASETS for setting in SETTINGS}


@pytest.mark.parametrize("key", RECIPES, ids="-".join)
def test_default_recipe_is_consistent(key):
    recipe = RECIPES[key]
    assert (recipe.dataset, recipe.setting) == key and recipe == resolve(*key)
    assert recipe.warmup_iters < recipe.max_iters and len(recipe.text_prompts) == recipe.num_templates
    if recipe.dataset != "folder":  # the benchmark of a folder needs the folder
        assert load_benchmark(BenchmarkSource(recipe.dataset, recipe.split)).name == recipe.dataset
    assert 0 < lr_at(0, recipe) < lr_at(recipe.max_iters - 1, recipe) < lr_at(recipe.warmup_iters, recipe) <= recipe.lr


def test_transductive_recipe_has_the_model_and_images_of_the_inductive_one():
    a, b = (asdict(resolve("digits", setting)) for setting in ("inductive", "transductive"))
    may_differ = {"setting", "max_iters", "lr", "warmup_iters", "min_lr", "calibration", "val_interval"}
    assert {name for name in a if a[name] != b[name]} <= may_differ


def test_text_prompts_repeat_the_templates():
    recipe = resolve("digits", num_templates=2, template_repeats=3)
    assert recipe.text_prompts == tuple(TEMPLATES[:2]) * 3


# changes


def test_recipe_is_frozen():
    with pytest.raises(FrozenInstanceError):
        resolve("digits").lr = 1.0


def test_changes():
    recipe = resolve("digits", "inductive", lr=1, seed=3, init_from_clip=True)
    assert recipe == replace(RECIPES["digits", "inductive"], lr=1, seed=3, init_from_clip=True)
    assert recipe == change(RECIPES["digits", "inductive"], lr=1, seed=3)
    own = {name: value for name, value in asdict(recipe).items() if name not in ("dataset", "setting")}
    assert resolve("digits", **own) == recipe


@pytest.mark.parametrize(
    "args, changes, message",
    [
        (("cocoa",), {}, "no recipe for dataset = 'cocoa', setting = 'inductive'; there is digits / inductive"),
        (("digits", "supervised"), {}, "setting = 'supervised'.*digits / fully_supervised"),
        (("digits",), {"learning_rate": 1e-3}, "no field 'learning_rate'; it has dataset, .* lr,"),
        (("digits",), {"seed": 1.0}, "seed = 1.0: .* integer"),
        (("digits",), {"seed": True}, "seed = True: .* integer"),
        (("digits",), {"lr": "fast"}, "lr = 'fast': .* number"),
        (("digits",), {"lr": True}, "lr = True: .* number"),
        (("digits",), {"attention": None}, "attention = None: .* string"),
        (("digits",), {"init_from_clip": 1}, "init_from_clip = 1: .* boolean"),
    ],
)
def test_unknown_names_and_wrong_types(args, changes, message):
    with pytest.raises(ValueError, match=message):
        resolve(*args, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "flash"},
        {"dense": "clip"},
        {"dense": "earlier-0"},
        {"rho_pixels": -0.1},
        {"rho_prompts": math.nan},
        {"normalization": "none"},
        {"precision": "fp8"},
        {"num_templates": 0},
        {"num_templates": len(TEMPLATES) + 1},
        {"eps": 0.0},
        {"max_iters": 0},
        {"batch_size": 0},
        {"stride": 49},
        {"stride": 0},
        {"val_interval": 0},
        {"val_images": 0},
        {"depth": 0},
        {"depth": 101},
        {"warmup_iters": -1},
        {"dropout": 1.5},
        {"dropout": 1.0},
        {"flip_prob": 1.1},
        {"visual_prompts": -1},
        {"visual_prompts": 10_001},
        {"image_size": 10_001},
        {"max_scale": 0.4},
    ],
    ids=str,
)
def test_values_outside_their_limits(changes):
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=f"{name} = {value!r}"):
        resolve("digits", **changes)


# former names


def test_former_names_lead_to_present_ones():
    names = {field.name for field in fields(Recipe)}
    assert {name for new in RENAMED_FIELDS.values() for name in new.split(" or ")} <= names
    for old, new in RENAMED_FIELDS.items():
        assert old not in {field.name for field in fields(Recipe)}
        with pytest.raises(ValueError, match=f"'{old}' is now called '{new}'"):
            resolve("digits", **{old: 1})


def test_upgrade_of_a_former_recipe():
    present = asdict(resolve("digits", "inductive", rho_prompts=0, batch_size=4))
    former = {new: old for old, new in RENAMED_FIELDS.items()}
    old = {former.get(name, name): value for name, value in present.items() if not name.startswith("rho")}
    for plan in ({"marginals": "pixels"}, {"plan": "softmax_prompts"}):
        assert upgrade_fields(old | plan) | {"rho_pixels": math.inf} == present == upgrade_fields(present)


# names of runs


@pytest.mark.parametrize("setting", SETTINGS)
def test_run_names_of_the_tables(setting):
    recipe = resolve("digits", setting, split=2, seed=7, attention="uniform")
    assert run_name(recipe) == f"digits2-{setting}-uniform-seed7"


OTHER_VALUE = {
    "dataset": "voc",
    "setting": "transductive",
    "unseen": "one",
    "dataset_name": "kitchen",
    "clip": "ViT-B-16",
    "attention": "softmax",
    "dense": "clear",
    "rho_pixels": 0.5,
    "rho_prompts": 0.5,
    "precision": "bf16",
    "normalization": "clip",
    "crop_labels": "all",
}  # of the fields that are text or infinite


def test_different_recipes_have_different_names():
    base = resolve("digits")
    names = [run_name(base)]
    for field in fields(Recipe):
        value = getattr(base, field.name)
        other = {bool: lambda v: not v, int: lambda v: v + (-1 if field.name == "stride" else 1)}  # noqa: B023
        changed = OTHER_VALUE.get(field.name) or other.get(type(value), lambda v: v + 0.01)(value)
        names.append(run_name(replace(base, **{field.name: changed})))
    assert len(set(names)) == len(names) == 1 + len(fields(Recipe))


def test_equal_recipes_have_one_name():
    whole, decimal = resolve("digits", lr=1), resolve("digits", lr=1.0)
    assert whole == decimal and run_name(whole) == run_name(decimal)


# parameters of a notebook


def test_parameters_of_a_notebook():
    before = {"before", "Path", "_"}
    parameters = {"dataset": "digits", "setting": "all", "out": None, "seed": 3, "max_iters": None, "_hidden": 1}
    namespace, entry = dict.fromkeys(before) | parameters, ("dataset", "setting", "out")
    assert recipe_changes(namespace, before, entry) == {"seed": 3}
    with pytest.raises(ValueError, match="unknown parameter sed; this notebook takes dataset, setting, out, .* seed"):
        recipe_changes(namespace | {"sed": 3}, before, entry)
    with pytest.raises(ValueError, match="unknown parameter warmup; 'warmup' is now called 'warmup_iters'"):
        recipe_changes(namespace | {"warmup": 3}, before, entry)
    with pytest.raises(
        ValueError, match="unknown parameter max_iters, seed, setting; this notebook takes dataset, out"
    ):
        check_parameters(namespace, before, ("dataset", "out"))
