"""Training steps: learning rate, labels of each setting, pseudo labels, losses, optimiser, precision."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import few_digits
from torch.utils.data import default_collate

from otseg import steps
from otseg.data import UNLABELLED, TrainCrops
from otseg.images import IGNORE, normalize
from otseg.inference import predict_paths
from otseg.model import Masks
from otseg.models import build_model
from otseg.recipes import SETTINGS, Recipe, resolve
from otseg.steps import loss_terms, lr_at, make_optimizer, max_present_masks, pseudo_label, training_classes_and_labels


@pytest.fixture(scope="module")
def bench():
    return few_digits()


@pytest.fixture(scope="module")
def batch(bench):
    "Crops of four scenes with all their labels."
    items = [bench.images("train")[i] for i in range(4)]
    label = torch.stack([item["label"][24:72, 24:72] for item in items])
    return {"image": normalize(torch.stack([item["image"][:, 24:72, 24:72] for item in items])), "label": label}


@pytest.mark.parametrize(
    "recipe",
    [resolve("digits"), Recipe("x", "inductive"), Recipe("x", "inductive", warmup_iters=0, max_iters=50)],
    ids=["digits", "paper", "no warm-up"],
)
def test_learning_rate(recipe):
    "Polynomial decay times a linear ramp that begins at 1e-6."
    T, W, peak, floor = recipe.max_iters, recipe.warmup_iters, recipe.lr, recipe.min_lr
    for t in {0, 1, W - 1, W, W + 1, T // 2, T - 1} - {-1}:
        decay = (peak - floor) * (1 - t / T) ** 0.9 + floor
        ramp = 1 - (1 - t / W) * (1 - 1e-6) if t < W else 1
        assert math.isclose(lr_at(t, recipe), decay * ramp, rel_tol=1e-12)
    rates = [lr_at(t, recipe) for t in range(T)]
    assert rates.index(max(rates)) == W and rates[W:] == sorted(rates[W:], reverse=True) and min(rates) > 0


def test_optimizer_has_all_trainable_tensors_in_one_group(bench):
    recipe = resolve("digits", weight_decay=0.3)
    model = build_model(recipe, bench)
    (group,) = make_optimizer(model, recipe).param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters() if p.requires_grad}
    assert group["weight_decay"] == 0.3


def test_pseudo_labels():
    "The best unseen class of both paths together, at full resolution, at unlabelled pixels only."
    rng = torch.Generator().manual_seed(0)
    masks = Masks(*(torch.randn(2, 6, 3, 4, generator=rng).requires_grad_() for _ in range(2)))
    unseen, label = (1, 4), torch.tensor([0, 2, 5, IGNORE, UNLABELLED])[torch.randint(5, (2, 9, 12), generator=rng)]
    before = label.clone()
    filled = pseudo_label(masks, label, unseen)
    full = [F.interpolate(z.detach(), size=(9, 12), mode="bilinear") for z in masks]
    prob = (0.5 * full[0] + 0.5 * full[1]).sigmoid()
    expected = torch.where(prob[:, 4] > prob[:, 1], 4, 1)
    assert torch.equal(filled, torch.where(label == UNLABELLED, expected, label))
    assert len(filled[label == UNLABELLED].unique()) == 2
    assert torch.equal(label, before) and filled.dtype == torch.int64 and not filled.requires_grad


@pytest.mark.parametrize("setting", SETTINGS)
def test_max_present_masks_is_an_upper_bound(bench, setting):
    "And a tight one: pseudo labels add at most the unseen classes of each image."
    recipe = resolve("digits", setting)
    rows, table = training_classes_and_labels(setting, bench)
    data = TrainCrops(bench.images("train"), recipe, table)
    batch = default_collate([data[0, i] for i in range(8)])
    for present_labels, label in zip(batch["present_labels"], batch["label"]):
        assert torch.equal(present_labels.nonzero()[:, 0], label.unique())
    label = pseudo_label(build_model(recipe, bench)(batch["image"]), batch["label"], bench.unseen)
    present = sum(len(set(image.unique().tolist()) - {IGNORE}) for image in label)
    slack = len(label) * len(bench.unseen) if setting == "transductive" else 0
    assert present <= max_present_masks(batch["present_labels"], len(rows), bench.unseen) <= present + slack


def test_labels_of_each_setting(bench):
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
def test_hidden_labels_do_not_influence_the_loss(bench, batch, setting):
    "Other labels on pixels of unseen classes change the loss in the fully supervised setting only."
    recipe = resolve("digits", setting)
    rows, table = training_classes_and_labels(setting, bench)
    model = build_model(recipe, bench).eval()
    swap = torch.arange(256)
    swap[list(bench.unseen)] = torch.tensor(bench.unseen).roll(1)
    swapped = swap[batch["label"]]
    assert not torch.equal(swapped, batch["label"])
    losses = [
        loss_terms(model, batch | {"label": table[label]}, model.text[rows], recipe, bench.unseen)[0]
        for label in (batch["label"], swapped)
    ]
    assert (losses[0] == losses[1]) == (setting != "fully_supervised")


@pytest.mark.parametrize("attention", ["mpsa", "softmax"])
def test_one_batch_can_be_overfitted(bench, batch, attention):
    recipe = resolve("digits", "fully_supervised", attention=attention, lr=3e-3, dropout=0.0)
    model = build_model(recipe, bench)
    opt = make_optimizer(model, recipe)

    def error_rate():
        return (predict_paths(model, batch["image"])["ensemble"] != batch["label"]).float().mean()

    before, losses = error_rate(), []
    for _ in range(20):
        loss = sum(loss_terms(model, batch, model.text, recipe, ())[0].values())
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]
    assert error_rate() < 0.7 * before


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has every precision")
def test_precisions_of_a_cpu(monkeypatch):
    with pytest.raises(ValueError, match="precision = 'fp16' needs a GPU"):
        steps.check_precision("fp16")
    for emulated in (True, False):
        monkeypatch.setattr(steps, "bf16_is_emulated", lambda emulated=emulated: emulated)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steps.check_precision("bf16")
            steps.check_precision("no")
        assert ["many times slower than float32" in str(w.message) for w in caught] == [True] * emulated
