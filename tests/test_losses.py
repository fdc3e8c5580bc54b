"""The chunked focal and dice loss equals the naive one in value and gradient, and keeps little memory."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import close
from torchvision.ops import sigmoid_focal_loss

from otseg.losses import (
    ALPHA,
    IGNORE,
    MAX_SLOPE_BY_NODES,
    group_by_node_count,
    mask_loss,
    max_slope,
    naive_mask_loss,
    num_masks,
    present_classes,
    training_loss,
)
from otseg.model import Masks


def inputs(kind="mixed", b=2, k=5, size=(4, 6), full=(16, 24), dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(b, k, *size, generator=rng, dtype=torch.float64)
    label = torch.randint(k, (b, *full), generator=rng)
    if kind == "mixed":
        label[torch.rand(label.shape, generator=rng) < 0.2] = IGNORE
    elif kind == "ignored":
        label[:] = IGNORE
    elif kind == "one image ignored":
        label[0] = IGNORE
    elif kind == "one class":
        label[:] = k // 2
    elif kind == "absent":  # the first class everywhere, the last in one image
        label = label.clamp(min=min(1, k - 1))
        label[0][label[0] == k - 1] = IGNORE
    elif kind == "corner":  # a single pixel
        label[:], label[-1, -1, -1] = IGNORE, k - 1
    return logits.to(dtype).requires_grad_(), label


def compare(logits, label, tol=1e-9, **options):
    "Values and gradients of `mask_loss` equal those of `naive_mask_loss`."
    ours, theirs = mask_loss(logits, label, **options), naive_mask_loss(logits, label)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].shape == () and (ours[name] - theirs[name]).abs() <= tol * (1 + theirs[name].abs())
        grads = [
            torch.autograd.grad(loss[name], logits, retain_graph=True)[0]
            for loss in (ours, theirs)
            if loss[name].requires_grad
        ]
        if grads[-1].any():
            close(*grads, tol)
        else:
            assert not grads[0].any()


# the naive loss against its definition and another implementation


def test_naive_focal_loss_is_that_of_torchvision():
    "At the resolution of the label; divided by the number of masks and pixels."
    logits, label = inputs("full", size=(16, 24))
    target = F.one_hot(label, 5).movedim(-1, 1).double()
    want = sigmoid_focal_loss(logits, target, alpha=ALPHA, gamma=2, reduction="sum") / target.flatten(2).any(-1).sum()
    close(naive_mask_loss(logits, label)["focal"], want / (16 * 24), 1e-12)


def test_naive_dice_loss_by_hand():
    "Two pixels, one of the class, p = 1/2 at both: 1 - (2 * 1/2 + 1) / (1 + 1 + 1)."
    loss = naive_mask_loss(torch.zeros(1, 1, 1, 2), torch.tensor([[[0, IGNORE]]]))
    close(loss["dice"], torch.tensor(1 / 3))


# the chunked loss against the naive one


@pytest.mark.parametrize("kind", ["full", "mixed", "ignored", "one image ignored", "one class", "absent", "corner"])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_labels(kind, k):
    compare(*inputs(kind, k=k))


@pytest.mark.parametrize(
    "size, full",
    [
        ((4, 6), (4, 6)),
        ((4, 6), (16, 24)),
        ((3, 5), (21, 15)),
        ((4, 4), (7, 13)),
        ((1, 1), (5, 9)),
        ((2, 7), (2, 70)),
        ((8, 8), (5, 3)),
        ((1, 1), (1, 1)),
    ],
)
def test_resolutions(size, full):
    "Whole and odd magnifications, none, and smaller labels."
    compare(*inputs(size=size, full=full))


@pytest.mark.parametrize("chunk_size", [1, 48, 50, 240, 768, 1000, 1536, 10**6])
def test_chunk_sizes(chunk_size):
    "Chunks of one row, several rows, one mask or several masks; the last chunk may be smaller."
    logits, label = inputs("absent")
    compare(logits, label, chunk_size=chunk_size)


@pytest.mark.parametrize("max_present", [7, 8, 10, 100])
def test_max_present_may_be_too_large(max_present):
    logits, label = inputs("absent")
    assert present_classes(label, 5).sum() == 7 and logits.shape[:2] == (2, 5)
    compare(logits, label, max_present=max_present)


def test_max_present_must_not_be_too_small():
    logits, label = inputs("absent")
    with pytest.raises(ValueError, match="max_present = 6 but label has pixels of 7 masks"):
        mask_loss(logits, label, max_present=6)


@pytest.mark.parametrize("scale", [1, 60])
def test_logits_too_large_for_exp(scale):
    "The two ways to compute a softplus."
    logits, label = inputs(dtype=torch.float32)
    logits = (scale * logits.detach()).requires_grad_()
    assert (logits.abs().max() > 100) == (scale > 1)
    compare(logits, label, 1e-5)


@pytest.mark.parametrize("b", [1, 3])
def test_batch(b):
    compare(*inputs(b=b))


def test_float32():
    logits, label = inputs(dtype=torch.float32)
    compare(logits, label, 1e-5)
    exact = naive_mask_loss(logits.double(), label)
    for name, value in mask_loss(logits, label).items():
        assert value.dtype == torch.float32 and abs(value - exact[name]) < 1e-5 * exact[name]


@pytest.mark.parametrize("size, full", [((2, 3), (5, 7)), ((3, 2), (3, 2))])
def test_gradcheck(size, full):
    logits, label = inputs(k=3, size=size, full=full)
    assert torch.autograd.gradcheck(lambda z: tuple(mask_loss(z, label, chunk_size=20).values()), logits)


# absent masks: fewer points than pixels


@pytest.mark.parametrize("scale", [0.01, 0.05, 0.15, 0.3, 0.6, 1, 1.5, 4, 30])
@pytest.mark.parametrize("shift", [-12, -4, 0, 6])
def test_absent_masks_of_any_slope(scale, shift):
    "Few points are as accurate as all pixels, in the sum and in the gradient of each token."
    rng = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(2, 3, 6, 7, generator=rng) + shift).requires_grad_()
    label = torch.full((2, 96, 84), IGNORE)
    theirs = naive_mask_loss(exact := logits.detach().double().requires_grad_(), label)["focal"]
    want = torch.autograd.grad(theirs, exact)[0]
    ours = mask_loss(logits, label)["focal"]
    got = torch.autograd.grad(ours, logits)[0]
    assert abs(ours - theirs) < 5e-6 * theirs
    assert ((got - want).abs() < 1e-5 * want + 1e-12 * want.max()).all()


def test_steep_masks_get_more_nodes():
    "Masks that are steeper than the table, or contain NaN, get all pixels."
    shape = torch.zeros(1, 4, 4)
    shape[0, 2, 1] = 1
    heights = torch.tensor([0, *MAX_SLOPE_BY_NODES.values(), 100, torch.nan])
    masks = heights[:, None, None] * shape
    assert max_slope(masks)[:-1].tolist() == heights[:-1].tolist()
    found = list(group_by_node_count(masks, torch.arange(len(masks))))
    assert [nodes for nodes, _ in found] == [*MAX_SLOPE_BY_NODES, None]
    assert [chosen.tolist() for _, chosen in found] == [
        [0, 1],
        *([i] for i in range(2, len(MAX_SLOPE_BY_NODES) + 1)),
        [len(masks) - 2, len(masks) - 1],
    ]
    assert [nodes for nodes, _ in group_by_node_count(masks.double(), torch.arange(len(masks)))] == [None]


def test_nan_logits_give_a_nan_loss():
    logits, label = inputs("absent", dtype=torch.float32)
    with torch.no_grad():
        logits[0, 0, 1, 2] = torch.nan
    assert mask_loss(logits, label)["focal"].isnan()


# invariants


def test_ignored_pixels_are_negatives():
    "A larger logit at an ignored pixel has a larger focal loss."
    logits, label = inputs("ignored")
    grad = torch.autograd.grad(mask_loss(logits, label)["focal"], logits)[0]
    assert (grad > 0).all() and mask_loss(logits, label)["dice"] == 0


def test_the_order_of_classes_and_images_does_not_matter():
    logits, label = inputs("mixed")
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = torch.where(label == IGNORE, IGNORE, order.argsort()[label.clamp(max=4)])
    for name, value in mask_loss(logits, label).items():
        close(mask_loss(logits[:, order], moved)[name], value, 1e-12)
        close(mask_loss(logits.flip(0), label.flip(0))[name], value, 1e-12)


def test_a_correct_mask_has_no_loss_and_its_opposite_a_large_one():
    label = torch.arange(4).repeat_interleave(4).reshape(1, 4, 4)
    good = 20.0 * (2 * F.one_hot(label, 4).movedim(-1, 1) - 1)
    best, worst = mask_loss(good, label), mask_loss(-good, label)
    assert all(value < 1e-6 for value in best.values())
    assert worst["dice"] > 0.7 and worst["focal"] > 10


@pytest.mark.parametrize("z", [1e4, -1e4])
def test_large_logits_stay_finite(z):
    logits, label = inputs(dtype=torch.float32)
    logits = torch.full_like(logits, z).requires_grad_()
    loss = mask_loss(logits, label)
    sum(loss.values()).backward()
    assert all(v.isfinite() for v in loss.values()) and logits.grad.isfinite().all()


def test_number_of_masks():
    present = torch.tensor([[True, False, True], [False, False, True]])
    assert num_masks(present) == 3 and num_masks(torch.zeros(2, 3, dtype=torch.bool)) == 1
    logits, label = inputs("corner")
    alone = mask_loss(logits[1:], label[1:])["focal"] + mask_loss(logits[:1], label[:1])["focal"]
    close(mask_loss(logits, label)["focal"], alone)  # one mask in two images


def test_present_classes():
    label = torch.tensor([[[0, 2], [IGNORE, 2]], [[IGNORE, IGNORE], [IGNORE, IGNORE]]])
    assert present_classes(label, 4).tolist() == [[True, False, True, False], [False] * 4]


@pytest.mark.parametrize("as_tensor", [True, False])
def test_parts_of_a_batch_add_up(as_tensor):
    "Divided by the number of masks of the whole batch, the parts sum to its loss and gradient."
    logits, label = inputs("absent", b=4)
    N = num_masks(present_classes(label, 5))
    whole = training_loss(Masks(logits, 2 * logits), label)
    N = N if as_tensor else N.item()
    parts = [training_loss(Masks(z, 2 * z), t, normalizer=N) for z, t in zip(logits.split([1, 3]), label.split([1, 3]))]
    for name in whole:
        close(sum(part[name] for part in parts), whole[name], 1e-9)
    grads = [torch.autograd.grad(sum(sum(loss.values()) for loss in losses), logits)[0] for losses in (parts, [whole])]
    close(*grads, 1e-9)


def test_number_of_masks_is_averaged_over_processes(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda N: N.add_(1))  # the other process has one
    assert num_masks(torch.ones(2, 2, dtype=torch.bool)) == 2.5 and num_masks(torch.zeros(2, 2, dtype=torch.bool)) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    logits, label = inputs(dtype=dtype)
    wide = logits.detach().float().requires_grad_()
    ours, theirs = mask_loss(logits, label), mask_loss(wide, label)
    for name in ours:
        assert ours[name].dtype == torch.float32 and torch.equal(ours[name], theirs[name])
    sum(ours.values()).backward(), sum(theirs.values()).backward()
    assert logits.grad.dtype == dtype and torch.equal(logits.grad, wide.grad.to(dtype))


def test_autocast_changes_nothing():
    logits, label = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cast = mask_loss(logits, label)
    assert all(
        torch.equal(v, cast[name]) and cast[name].dtype == torch.float32 for name, v in mask_loss(logits, label).items()
    )


def test_nothing_of_full_size_is_kept():
    "The memory that the backward pass keeps does not grow with the resolution of the label."

    def saved_numbers(side):
        logits, label = inputs(k=7, size=(4, 4), full=(side, side))
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            loss = mask_loss(logits, label)
        assert all(v.requires_grad for v in loss.values())
        return sum(sizes)

    assert saved_numbers(256) == saved_numbers(16) <= 3 * 2 * 7 * 4 * 4


def test_arguments_are_not_modified():
    logits, label = inputs()
    before = logits.detach().clone(), label.clone()
    sum(mask_loss(logits, label).values()).backward()
    assert torch.equal(logits, before[0]) and torch.equal(label, before[1])


def test_weighted_terms_of_both_paths():
    (mps, label), (mpsa, _) = inputs(), inputs(seed=1)
    terms = training_loss(Masks(mps, mpsa), label, focal_weight=3.0, dice_weight=0.5)
    want = {
        f"{path}_{name}": {"focal": 3.0, "dice": 0.5}[name] * value
        for path, z in (("mps", mps), ("mpsa", mpsa))
        for name, value in mask_loss(z, label).items()
    }
    assert terms == want
    assert training_loss(Masks(mps, mpsa), label)["mps_focal"] == 100 * mask_loss(mps, label)["focal"]


# errors


@pytest.mark.parametrize(
    "label, message",
    [
        (torch.full((2, 8, 8), 5), "label holds class 5 but there are logits for 5 classes"),
        (torch.full((2, 8, 8), 254), "label holds class 254 but there are logits for 5 classes"),
        (torch.full((2, 8, 8), 300), "label holds class 300"),
        (torch.arange(-1, 7).clamp(max=4).expand(2, 8, 8), "label holds class -1"),
        (torch.zeros(3, 8, 8, dtype=torch.long), r"label has shape \(3, 8, 8\) but logits \(2, 5, 4, 6\)"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.long), r"label has shape \(2, 1, 8, 8\)"),
        (torch.zeros(8, 8, dtype=torch.long), r"label has shape \(8, 8\)"),
        (torch.zeros(2, 8, 8), "int64"),
        (torch.zeros(2, 8, 8, dtype=torch.uint8), "int64"),
    ],
)
def test_labels_that_do_not_fit(label, message):
    logits, _ = inputs()
    with pytest.raises(ValueError, match=message):
        mask_loss(logits, label)
