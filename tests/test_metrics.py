"""`otseg.metrics` against a loop over pixels that is too slow to be wrong."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otseg.metrics import confusion, zs3_metrics

SCORES = "pacc", "miou_seen", "miou_unseen", "hiou"


def brute_force(pred, label, k, seen, unseen):
    pairs = [(p, t) for p, t in zip(pred.flatten().tolist(), label.flatten().tolist()) if t != 255]
    iou = []
    for i in range(k):
        union = sum(i in pair for pair in pairs)
        iou.append(sum(pair == (i, i) for pair in pairs) / union if union else math.nan)

    def mean(classes):
        known = [iou[i] for i in classes if not math.isnan(iou[i])]
        return sum(known) / len(known) if known else math.nan

    s, u = mean(seen), mean(unseen)
    return dict(
        pacc=sum(p == t for p, t in pairs) / len(pairs) if pairs else math.nan,
        miou_seen=s,
        miou_unseen=u,
        hiou=0.0 if s + u == 0 else 2 * s * u / (s + u),
        iou=iou,
    )


def assert_same(ours, reference):
    for name in SCORES:
        assert ours[name] == pytest.approx(reference[name], rel=1e-12, nan_ok=True), name
    assert ours["iou"].dtype == torch.float64
    assert ours["iou"].tolist() == pytest.approx(reference["iou"], rel=1e-12, nan_ok=True)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_agrees_with_a_loop_over_pixels(data):
    """Few pixels and many classes, so that absent classes, empty sides and ignored maps all occur."""
    k = data.draw(st.integers(1, 7), "k")
    size = data.draw(st.integers(1, 12), "pixels")
    present = st.sampled_from(data.draw(st.lists(st.integers(0, k - 1), min_size=1, unique=True)))
    label = torch.tensor(data.draw(st.lists(present | st.just(255), min_size=size, max_size=size)))
    pred = torch.tensor(data.draw(st.lists(st.integers(0, k - 1), min_size=size, max_size=size)))
    cut = data.draw(st.integers(0, k), "cut")
    seen, unseen = range(cut), range(cut, k)
    assert_same(zs3_metrics(confusion(pred, label, k), seen, unseen), brute_force(pred, label, k, seen, unseen))


def test_random_maps_of_several_images():
    g = torch.Generator().manual_seed(0)
    pred, label = torch.randint(14, (2, 3, 20, 17), generator=g)
    label[:, :4] = 255
    seen, unseen = [0, 2, 4, 6, 8, 10, 12, 13], [1, 3, 5]  # classes on neither side count for pacc and iou only
    c = confusion(pred, label, 14)
    assert c.dtype == torch.int64 and c.sum() == 3 * 16 * 17
    assert torch.equal(c, sum(confusion(p, t, 14) for p, t in zip(pred, label)))
    assert_same(zs3_metrics(c, seen, unseen), brute_force(pred, label, 14, seen, unseen))


def test_rows_are_the_truth():
    assert confusion([[1, 1, 0]], [[0, 0, 255]], 2).tolist() == [[0, 2], [0, 0]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_types_other_labels_and_untouched_arguments(dtype):
    pred, label = torch.tensor([[0, 1, 1]], dtype=dtype), torch.tensor([[0, 1, 2]], dtype=dtype)
    before = pred.clone(), label.clone()
    assert confusion(pred, label, 2, ignore=2).tolist() == [[1, 0], [0, 1]]
    assert torch.equal(pred, before[0]) and torch.equal(label, before[1])


def test_all_ignored():
    r = zs3_metrics(confusion(torch.zeros(4, 4), torch.full((4, 4), 255), 3), [0, 1], [2])
    assert all(math.isnan(r[name]) for name in SCORES) and r["iou"].isnan().all()


def test_fully_supervised_has_no_unseen_side():
    r = zs3_metrics([[3, 1], [0, 4]], [0, 1], [])
    assert (
        r["miou_seen"] == pytest.approx((3 / 4 + 4 / 5) / 2) and math.isnan(r["miou_unseen"]) and math.isnan(r["hiou"])
    )


def test_blind_to_unseen_classes_is_zero_and_not_nan():
    assert zs3_metrics([[3, 0], [2, 0]], [0], [1])["hiou"] == 0
    assert zs3_metrics([[0, 1], [1, 0]], [0], [1])["hiou"] == 0


def test_large_counts_stay_exact():
    """float32 cannot hold 2**24 + 1; a test set has more pixels than that."""
    r = zs3_metrics(torch.tensor([[2**24 + 1, 0], [1, 2**24]]), [0], [1])
    assert r["iou"][0].item() == (2**24 + 1) / (2**24 + 2)


@pytest.mark.parametrize(
    "pred, label, words",
    [
        ([0, 1], [0, 1, 1], ["(2,)", "(3,)"]),
        ([0, 3], [0, 1], ["pred", "3", "3 classes"]),
        ([-1, 0], [0, 1], ["pred", "-1"]),
        ([0, 1], [0, 181], ["label", "181", "3 classes", "255"]),
        ([0, 1], [0, -1], ["label", "-1"]),
    ],
)
def test_confusion_refuses(pred, label, words):
    with pytest.raises(ValueError) as e:
        confusion(torch.tensor(pred), torch.tensor(label), 3)
    assert all(w in str(e.value) for w in words)


@pytest.mark.parametrize(
    "shape, seen, unseen, words",
    [
        ((3, 3), [0, 1], [1, 2], ["[1]", "both seen and unseen"]),
        ((3, 3), [0, 3], [1], ["seen", "3 classes"]),
        ((3, 3), [0], [-1], ["unseen", "-1"]),
        ((3, 3), [0, 0], [1], ["seen", "twice"]),
        ((3, 2), [0], [1], ["(3, 2)"]),
    ],
)
def test_metrics_refuse(shape, seen, unseen, words):
    with pytest.raises(ValueError) as e:
        zs3_metrics(torch.ones(shape), seen, unseen)
    assert all(w in str(e.value) for w in words)


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_torchmetrics(seed):
    """Another library's count of the same, image by image, with absent classes and ignored pixels."""
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    rng, k = torch.Generator().manual_seed(seed), 6
    iou, accuracy = (
        MulticlassJaccardIndex(k, average="none", ignore_index=255),
        MulticlassAccuracy(k, average="micro", ignore_index=255),
    )
    total = torch.zeros(k, k, dtype=torch.long)
    for _ in range(4):
        label, pred = torch.randint(4, (2, 9, 11), generator=rng), torch.randint(5, (2, 9, 11), generator=rng)
        label[torch.rand(label.shape, generator=rng) < 0.2] = 255
        iou.update(pred, label), accuracy.update(pred, label)
        total += confusion(pred, label, k)
    ours = zs3_metrics(total, (0, 1, 2), (3, 4, 5))
    assert ours["pacc"] == pytest.approx(accuracy.compute().item(), abs=1e-6)
    known = ~ours["iou"].isnan()  # a class without any pixel is 0 there and left out here
    assert torch.allclose(ours["iou"][known].float(), iou.compute()[known], atol=1e-6) and known.tolist() == [
        True
    ] * 5 + [False]


def test_a_background_of_ones_own():
    """It is a class like the others: counted where it is one, left out where it is ignored."""
    label, pred = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 0])
    as_class = zs3_metrics(confusion(pred, label, 3), (0, 1), (2,))
    assert as_class["iou"].tolist() == [1 / 3, 1 / 2, 0] and as_class["pacc"] == 0.5
    ignored = zs3_metrics(confusion(pred[label > 0].clamp_min(1) - 1, label[label > 0] - 1, 2), (0,), (1,))
    assert ignored["pacc"] == 0.5
