"""Whole runs on a few scenes: record, files, what moves and what stays, settings, resuming with other versions."""

import json
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from helpers import close, few_digits

from otseg import runs as run_module
from otseg import steps, training
from otseg.checkpoints import newest_state, write_state
from otseg.data import EvalView, TrainCrops
from otseg.evaluation import validate
from otseg.images import IGNORE
from otseg.models import build_model, load_model, read_checkpoint
from otseg.recipes import RENAMED_FIELDS, recipe_dict, resolve, run_name
from otseg.steps import loss_terms, lr_at, make_optimizer
from otseg.training import fit

SHORT = dict(max_iters=6, batch_size=4, val_interval=4, val_images=2, warmup_iters=2)
TWO_STEPS = SHORT | dict(max_iters=2)


@pytest.fixture(scope="module")
def bench():
    return few_digits(size=4)


@pytest.fixture(autouse=True)
def few_scenes(bench, monkeypatch):
    monkeypatch.setattr(run_module, "load_recipe_benchmark", lambda *args: bench)


@pytest.fixture(scope="module")
def runs(bench, tmp_path_factory):
    "Per setting, an inductive run and the transductive one that follows it: recipe, record, folder, trained model."
    folder, models, done = tmp_path_factory.mktemp("runs"), [], {}

    def keep_model(*args):
        models.append(build_model(*args))
        return models[-1]

    with pytest.MonkeyPatch.context() as m:
        m.setattr(run_module, "load_recipe_benchmark", lambda *args: bench)
        m.setattr(run_module, "build_model", keep_model)
        for setting in ("inductive", "transductive"):
            recipe = resolve("digits", setting, **SHORT)
            record = fit(recipe, folder / run_name(recipe), progress=False)
            done[setting] = recipe, record, folder / run_name(recipe), models[-1]
    return done


@pytest.mark.parametrize("setting", ["inductive", "transductive"])
def test_record(runs, bench, setting):
    recipe, record, folder, _ = runs[setting]
    assert json.loads((folder / "record.json").read_text()) == record
    expected = {
        "dataset": "digits",
        "split": 0,
        "setting": setting,
        "method": "mpsa",
        "seed": 0,
        "name": run_name(recipe),
        "recipe": recipe_dict(recipe),
    }
    assert expected.items() <= record.items() and record["seconds"] > 0
    assert {"commit", "versions", "device", "started"} <= set(record) and {"python", "torch"} <= set(record["versions"])
    assert set(record["metrics"]) == {"mps", "mpsa", "ensemble", "dense_clip"}
    for scores in record["metrics"].values():
        assert set(scores) == {"pacc", "miou_seen", "miou_unseen", "hiou", "iou"}
        assert tuple(scores["iou"]) == bench.classes
        assert all(v is None or 0 <= v <= 1 for v in [*scores["iou"].values(), scores["pacc"], scores["hiou"]])


@pytest.mark.parametrize("setting", ["inductive", "transductive"])
def test_files(runs, setting):
    recipe, record, folder, _ = runs[setting]
    checkpoints = {"best.safetensors", "half.safetensors", "last.safetensors"}
    assert {p.name for p in folder.iterdir()} == checkpoints | {"log.jsonl", "record.json", "states"}
    assert [read_checkpoint(folder / f"{name}.safetensors")[1]["iteration"] for name in ("half", "last")] == [3, 6]
    log = pd.read_json(folder / "log.jsonl", lines=True)
    losses, scores = log.dropna(subset="mps_focal"), log.dropna(subset="ensemble.pacc")
    assert losses["iteration"].tolist() == [6] and math.isclose(losses["lr"].item(), lr_at(5, recipe))
    assert scores["iteration"].tolist() == [4, 6]
    assert math.isclose(scores["ensemble.pacc"].iloc[-1], record["metrics"]["ensemble"]["pacc"])


def test_the_last_checkpoint_has_the_metrics_of_the_record(runs, bench):
    recipe, record, folder, _ = runs["inductive"]
    model, again, _ = load_model(folder / "last.safetensors")
    assert again == recipe and not model.training
    scores = validate(model, bench, recipe, EvalView(bench.images("val"), recipe))
    for path, s in scores.items():
        assert s["pacc"] == record["metrics"][path]["pacc"] and s["hiou"] == record["metrics"][path]["hiou"]


def test_frozen_weights_and_class_embeddings_do_not_move(runs, bench):
    frozen = bench.clip().visual.state_dict()
    text = build_model(runs["inductive"][0], bench).text
    for *_, model in runs.values():
        assert all(torch.equal(value, frozen[name]) for name, value in model.encoder.visual.state_dict().items())
        assert torch.equal(model.text, text)


def test_all_other_weights_move(runs, bench):
    recipe, _, folder, _ = runs["inductive"]
    torch.manual_seed(recipe.seed)
    start, (end, _) = build_model(recipe, bench).trainable_state(), read_checkpoint(folder / "last.safetensors")
    assert start.keys() == end.keys() and not [name for name in start if torch.equal(start[name], end[name])]


def test_a_transductive_run_starts_from_half_of_the_inductive_one(runs, tmp_path):
    "With a vanishing learning rate, it ends where it started."
    folder = runs["inductive"][2]
    still = resolve("digits", "transductive", **TWO_STEPS | dict(lr=1e-12, min_lr=1e-12, weight_decay=0.0))
    fit(still, tmp_path, init=folder / "half.safetensors", progress=False)
    end, half = (read_checkpoint(path)[0] for path in (tmp_path / "last.safetensors", folder / "half.safetensors"))
    for name in half:
        close(end[name], half[name], 1e-6)


def test_a_transductive_run_needs_its_inductive_run(tmp_path):
    recipe = resolve("digits", "transductive", split=1, seed=3, max_iters=7)
    name = run_name(resolve("digits", "inductive", split=1, seed=3, max_iters=7))
    expected = f"there is no .*{name}/half.safetensors: run the setting 'inductive' first"
    with pytest.raises(FileNotFoundError, match=expected):
        fit(recipe, tmp_path / run_name(recipe))
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*absent.safetensors"):
        fit(recipe, tmp_path / run_name(recipe), init=tmp_path / "absent.safetensors", progress=False)


def test_a_run_does_not_start_from_another_model(runs, tmp_path):
    recipe, _, folder, _ = runs["inductive"]
    with pytest.raises(ValueError, match="half.safetensors was trained with eps = 0.05, but this recipe has 0.1"):
        fit(replace(recipe, eps=0.1), tmp_path, init=folder / "half.safetensors", progress=False)


def test_a_seed_determines_a_run(runs, tmp_path):
    recipe, record, folder, _ = runs["inductive"]
    torch.rand(3)  # the state of the global generator does not matter
    again, _ = (fit(replace(recipe, seed=seed), tmp_path / str(seed), progress=False) for seed in (0, 1))
    state, same, other = (
        read_checkpoint(path / "last.safetensors")[0] for path in (folder, tmp_path / "0", tmp_path / "1")
    )
    assert all(torch.equal(state[name], same[name]) for name in state) and again["metrics"] == record["metrics"]
    random = [name for name in state if "norm" not in name and "bias" not in name]
    assert not any(torch.equal(state[name], other[name]) for name in random)
    log, same_log, other_log = ((path / "log.jsonl").read_text() for path in (folder, tmp_path / "0", tmp_path / "1"))
    assert log == same_log != other_log


def test_a_validation_without_labels_never_wins_and_never_blocks(bench, monkeypatch, tmp_path):
    "Its metrics are null in the log, and best.safetensors is that of the next validation."
    scores = [math.nan, 0.2]

    def validate_once(*args, **options):
        metrics = validate(*args, **options)
        metrics["ensemble"]["hiou"] = scores.pop(0) if scores else 0.1
        return metrics

    monkeypatch.setattr(training, "validate", validate_once)
    fit(resolve("digits", **SHORT | dict(val_interval=2)), tmp_path, progress=False)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    logged = [line["ensemble.hiou"] for line in lines if "ensemble.hiou" in line]
    assert logged == [None, 0.2, 0.1] and read_checkpoint(tmp_path / "best.safetensors")[1]["iteration"] == 4


def test_few_validation_images(tmp_path):
    "Every evaluation uses them, and the record has a name that no table takes for a whole evaluation."
    recipe = resolve("digits", **TWO_STEPS)
    record = fit(recipe, tmp_path, images=1, progress=False)
    assert record["images"] == 1 and record["name"] == f"{run_name(recipe)}@1-images"
    with pytest.raises(ValueError, match="images = 0 must be at least 1"):
        fit(recipe, tmp_path / "none", images=0, progress=False)


@pytest.mark.parametrize("change", ["erased", "merged", "permuted"])
def test_inductive_weights_do_not_depend_on_labels_of_unseen_classes(bench, runs, monkeypatch, tmp_path, change):
    "Bit for bit, whatever the training maps hold where no label may be seen."
    unseen = torch.tensor(bench.unseen)
    table = torch.arange(256)
    table[unseen] = {"erased": torch.tensor(IGNORE), "merged": unseen[0], "permuted": unseen.roll(1)}[change]
    data = [item | {"label": table[item["label"]]} for item in bench.images("train")]
    assert any((item["label"] != table[item["label"]]).any() for item in bench.images("train"))
    images = {"train": data, "val": bench.images("val")}.get
    monkeypatch.setattr(run_module, "load_recipe_benchmark", lambda *args: replace(bench, images=images))
    recipe, _, folder, _ = runs["inductive"]
    fit(recipe, tmp_path, progress=False)
    ours, theirs = (read_checkpoint(path / "last.safetensors")[0] for path in (tmp_path, folder))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_each_step_has_its_mode_learning_rate_and_gradients(monkeypatch, tmp_path):
    "Training mode (also after a validation), the learning rate of the schedule, no gradients of the step before."
    seen, optimizers, seeds = [], [], []

    def spy(net, *args, **options):
        no_gradients = all(p.grad is None or not p.grad.any() for p in net.parameters())
        seen.append((net.training, optimizers[0].param_groups[0]["lr"], no_gradients))
        return loss_terms(net, *args, **options)

    monkeypatch.setattr(steps, "loss_terms", spy)
    monkeypatch.setattr(steps, "make_optimizer", lambda *a: optimizers.append(make_optimizer(*a)) or optimizers[0])
    monkeypatch.setattr(run_module, "TrainCrops", lambda *a: seeds.append(a[1].seed) or TrainCrops(*a))
    recipe = resolve("digits", seed=5, **SHORT)
    fit(recipe, tmp_path, progress=False)
    assert seen == [(True, lr_at(t, recipe), True) for t in range(6)] and seeds == [5]


def test_overrides_change_the_recipe(tmp_path):
    "Here to one step only: its half is its end, and it leaves both checkpoints."
    recipe = resolve("digits", **SHORT)
    record = fit(recipe, tmp_path, progress=False, max_iters=1, seed=5)
    assert record["recipe"] == recipe_dict(replace(recipe, max_iters=1, seed=5))
    assert (tmp_path / "half.safetensors").is_file() and (tmp_path / "last.safetensors").is_file()
    with pytest.raises(ValueError, match="no field 'sed'"):
        fit(recipe, tmp_path, sed=5)


def test_another_precision_in_the_same_process(runs, tmp_path):
    record = fit(resolve("digits", **TWO_STEPS, precision="bf16"), tmp_path, progress=False)
    assert record["recipe"]["precision"] == "bf16"
    weights, _ = read_checkpoint(tmp_path / "last.safetensors")
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in weights.values())


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(tmp_path, monkeypatch):
    """Accelerate's own switch turns on `torch.compile`.

    Without code generation, which would draw dropout masks in another order."""
    recipe = resolve("digits", **TWO_STEPS, dropout=0.0)
    plain = fit(recipe, tmp_path / "plain", progress=False)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")
    compiled = fit(recipe, tmp_path / "compiled", progress=False)
    torch._dynamo.reset()
    assert (plain["compiled"], compiled["compiled"]) == ("no", "aot_eager")
    ours, theirs = (read_checkpoint(tmp_path / name / "last.safetensors")[0] for name in ("compiled", "plain"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        close(ours[name], theirs[name], 1e-4)


# states of other versions


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    "A function that writes a state with a changed header, from which a run resumes; and its recipe and folder."
    recipe = resolve("digits", **SHORT)
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(training, "should_stop", lambda run, stop, t: t == 5)
        fit(recipe, tmp_path, progress=False)
    tensors, header = newest_state(tmp_path / "states")
    assert header["progress"]["t"] == 5
    return recipe, tmp_path, lambda recipe: write_state(tmp_path / "states", 5, tensors, header | {"recipe": recipe})


def test_a_state_with_old_field_names_resumes(runs, interrupted):
    "A run that an older version started ends like one of today, bit for bit."
    recipe, folder, write = interrupted
    old_field = {new: old for old, new in RENAMED_FIELDS.items()}
    fields = {name: value for name, value in recipe_dict(recipe).items() if not name.startswith("rho")}
    write({old_field.get(name, name): value for name, value in fields.items()} | {"marginals": "both"})
    assert fit(recipe, folder, progress=False)["metrics"] == runs["inductive"][1]["metrics"]
    ours, theirs = (read_checkpoint(path / "last.safetensors")[0] for path in (folder, runs["inductive"][2]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_state_that_is_older_than_a_field_has_its_default(interrupted):
    recipe, folder, write = interrupted
    write({name: value for name, value in recipe_dict(recipe).items() if name != "template_repeats"})
    with pytest.raises(ValueError, match="a run with another template_repeats"):
        fit(recipe, folder, progress=False, template_repeats=2)
    assert fit(recipe, folder, progress=False)["recipe"]["template_repeats"] == 1
