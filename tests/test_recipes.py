"""The table of settings: complete, and closed to what does not exist."""

from dataclasses import FrozenInstanceError, asdict, fields, replace

import pytest

from otseg.benchmarks import DATASETS, load_benchmark
from otseg.mpsa import ATTENTIONS
from otseg.recipes import RECIPES, SETTINGS, Recipe, recipe_changes, resolve, run_name
from otseg.steps import lr_at
from otseg.text import TEMPLATES


def test_every_dataset_has_every_setting():
    assert set(RECIPES) == {(dataset, setting) for dataset in DATASETS for setting in SETTINGS}


@pytest.mark.parametrize("key", RECIPES, ids="-".join)
def test_recipes_can_be_run(key):
    recipe = RECIPES[key]
    assert (recipe.dataset, recipe.setting) == key and recipe == resolve(*key)
    assert (
        recipe.attention in ATTENTIONS
        and recipe.precision in ("no", "bf16", "fp16")
        and 0 < recipe.num_templates <= len(TEMPLATES)
    )
    assert 0 < recipe.stride <= recipe.image_size and recipe.warmup_iters < recipe.max_iters and recipe.eps > 0
    if recipe.dataset != "folder":  # it is looked for at once
        assert load_benchmark(BenchmarkSource(recipe.dataset, recipe.split)).name == recipe.dataset
    assert 0 < lr_at(0, recipe) < lr_at(recipe.max_iters - 1, recipe) < lr_at(recipe.warmup_iters, recipe) <= recipe.lr


def test_settings_differ_in_few_fields():
    "The transductive half follows the inductive one with the same model and images."
    a, b = (asdict(resolve("digits", setting)) for setting in ("inductive", "transductive"))
    assert {name for name in a if a[name] != b[name]} <= {
        "setting",
        "max_iters",
        "lr",
        "warmup",
        "min_lr",
        "calibration",
        "val_interval",
    }


def test_recipes_are_frozen():
    with pytest.raises(FrozenInstanceError):
        resolve("digits").lr = 1.0


def test_changes():
    recipe = resolve("digits", "inductive", lr=1, seed=3, init_from_clip=True)
    assert recipe == replace(RECIPES["digits", "inductive"], lr=1, seed=3, init_from_clip=True)
    assert (
        resolve("digits", **{name: v for name, v in asdict(recipe).items() if name not in ("dataset", "setting")})
        == recipe
    )


@pytest.mark.parametrize(
    "args, changes, says",
    [
        (("cocoa",), {}, "no recipe for dataset = 'cocoa', setting = 'inductive'; there is digits / inductive"),
        (("digits", "supervised"), {}, "setting = 'supervised'.*digits / fully_supervised"),
        (("digits",), {"learning_rate": 1e-3}, "no field 'learning_rate'; it has dataset, .* lr,"),
        (("digits",), {"seed": 1.0}, "seed = 1.0 is a float but a recipe's seed is a int"),
        (("digits",), {"seed": True}, "seed = True is a bool"),
        (("digits",), {"lr": "1e-3"}, "lr = '1e-3' is a str but a recipe's lr is a float"),
        (("digits",), {"lr": True}, "lr = True is a bool"),
        (("digits",), {"attention": None}, "attention = None is a NoneType"),
        (("digits",), {"identity": 1}, "identity = 1 is a int"),
    ],
)
def test_unknown_names_and_types(args, changes, says):
    with pytest.raises(ValueError, match=says):
        resolve(*args, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "flash"},
        {"precision": "fp8"},
        {"templates": 0},
        {"templates": len(TEMPLATES) + 1},
        {"eps": 0.0},
        {"max_iters": 0},
        {"batch": 0},
        {"stride": 49},
        {"stride": 0},
        {"val_interval": 0},
        {"val_images": 0},
        {"depth": 0},
        {"warmup": -1},
        {"dropout": 1.5},
        {"prompts": -1},
    ],
    ids=str,
)
def test_values_that_no_run_can_have(changes):
    "Refused before anything is read or trained."
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=f"{name} = {value!r}"):
        resolve("digits", **changes)


# names of runs


@pytest.mark.parametrize("setting", SETTINGS)
def test_names_of_the_table(setting):
    assert (
        run_name(resolve("digits", setting, split=2, seed=7, attention="uniform")) == f"digits2-{setting}-uniform-seed7"
    )


def test_every_field_reaches_the_name():
    "Two runs with different recipes never share a folder."
    base = resolve("digits")
    other = {
        str: lambda v: {"inductive": "transductive"}.get(v, v + "x"),
        bool: lambda v: not v,
        int: lambda v: v + 1,
        float: lambda v: v + 0.01,
    }
    changed = [
        replace(base, **{f.name: other[type(getattr(base, f.name))](getattr(base, f.name))})
        for f in fields(Recipe)
        if f.name != "dataset"
    ]
    names = [run_name(r) for r in [base, *changed]]
    assert len(set(names)) == len(names) and names == [run_name(r) for r in [base, *changed]]


def test_equal_recipes_have_one_name():
    assert resolve("digits", lr=1) == resolve("digits", lr=1.0) and run_name(resolve("digits", lr=1)) == run_name(
        resolve("digits", lr=1.0)
    )


# parameters of a notebook


def test_a_notebook_s_parameters():
    before = {"before", "Path", "_"}
    namespace = dict.fromkeys(before) | {
        "dataset": "digits",
        "setting": "all",
        "out": None,
        "seed": 3,
        "max_iters": None,
        "_hidden": 1,
    }
    assert recipe_changes(namespace, before, ("dataset", "setting", "out")) == {"seed": 3}
    with pytest.raises(
        ValueError, match="unknown parameter sed; this notebook takes dataset, setting, out, and .* seed"
    ):
        recipe_changes(namespace | {"sed": 3}, before, ("dataset", "setting", "out"))
