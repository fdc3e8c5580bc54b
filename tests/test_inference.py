"""Sliding windows, both paths and the calibration: against their definition, window by window."""

import pytest
import torch
import torch.nn.functional as F
from helpers import PATCH, SIDE, K, close, evaluate, random_image, random_text, small_model

from otseg.images import IGNORE, normalize
from otseg.inference import PATH_WEIGHTS, predict_paths, predict_probs, window_masks, window_starts
from otseg.metrics import zs3_metrics

SEEN, UNSEEN = (0, 2, 3), (1, 4)


def window_prob(model, image, weight=0.5):
    "Probability of one window whose sides are whole patches."
    masks = model(image)
    logits = weight * masks.mpsa + (1 - weight) * masks.mps
    return F.interpolate(logits, size=image.shape[-2:], mode="bilinear", align_corners=False).sigmoid()


# windows


@pytest.mark.parametrize("stride", [1, 3, 7, 10])
@pytest.mark.parametrize("length", [1, 9, 10, 11, 17, 20, 40, 41])
def test_windows_cover_everything(length, stride):
    "Multiples of the stride, and one that ends at the border."
    starts = window_starts(length, 10, stride)
    covered = {p for start in starts for p in range(start, start + 10)}
    assert covered >= set(range(length)) and starts == sorted(set(starts))
    assert starts[-1] == max(length - 10, 0) and all(start % stride == 0 for start in starts[:-1])
    assert starts == [min(i * stride, starts[-1]) for i in range(len(starts))]  # and none too many


def test_paper_s_windows():
    assert (
        window_starts(512, 512, 426) == [0]
        and window_starts(683, 512, 426) == [0, 171]
        and window_starts(1000, 512, 426) == [0, 426, 488]
    )


@pytest.mark.parametrize("stride", [0, -1, 11])
def test_no_gaps_between_windows(stride):
    with pytest.raises(ValueError, match=f"stride = {stride} with window = 10"):
        window_starts(30, 10, stride)
    with pytest.raises(ValueError, match=f"stride = {stride} with window = 10"):
        predict_probs(small_model(), random_image(), window=10, stride=stride)


@torch.no_grad()
def test_sliding_window_is_the_definition():
    "Probabilities, not logits, averaged where windows overlap."
    model, image = small_model(), random_image(2, 48, 72)
    total, count = torch.zeros(2, K, 48, 72), torch.zeros(48, 72)
    for y in (0, 16):
        for x in (0, 24, 40):
            total[..., y : y + SIDE, x : x + SIDE] += window_prob(model, image[..., y : y + SIDE, x : x + SIDE])
            count[y : y + SIDE, x : x + SIDE] += 1
    close(predict_probs(model, image, stride=24), total / count)


def test_model_s_own_window():
    "By default the training size, with strides of five sixths."
    model, image = small_model(), random_image(1, 60, 80)
    assert torch.equal(
        predict_probs(model, image), predict_probs(model, image, window=SIDE, stride=round(SIDE * 5 / 6))
    )


def test_batches_of_windows_change_nothing():
    model, image, sizes = small_model(), random_image(2, 64, 48), []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    with torch.no_grad():
        many, single = (window_masks(model, image, SIDE, 16, batch=batch) for batch in (8, 1))
    assert sizes == [8, 4] + 12 * [1]
    assert many[0] == single[0] == [(y, x) for y in (0, 16, 32) for x in (0, 16)]
    for a, b in zip(many[1], single[1]):
        assert a.shape == (6, 2, K, SIDE // PATCH, SIDE // PATCH)
        close(a, b, 1e-4)


def test_an_image_does_not_see_its_batch():
    model, image = small_model(), random_image(2, 40, 48)
    close(predict_probs(model, image)[1:], predict_probs(model, image[1:]), 1e-4)


@pytest.mark.parametrize("h, w", [(16, 24), (24, 64), (64, 8)])
@torch.no_grad()
def test_image_smaller_than_the_window(h, w):
    "A short side is one window of its own size."
    model, image = small_model(), random_image(1, h, w)
    starts = [0, 32] if max(h, w) > SIDE else [0]
    parts = [window_prob(model, image[..., :, x : x + SIDE] if w > h else image[..., x : x + SIDE, :]) for x in starts]
    close(predict_probs(model, image, stride=SIDE), torch.cat(parts, 3 if w > h else 2))


@pytest.mark.parametrize("h, w", [(1, 1), (33, 32), (13, 57), (50, 50)])
def test_sides_need_not_be_whole_patches(h, w):
    prob = predict_probs(small_model(), random_image(1, h, w))
    assert prob.shape == (1, K, h, w) and prob.isfinite().all() and (0 <= prob).all() and (prob <= 1).all()


# paths, calibration, size


@pytest.mark.parametrize("path", PATH_WEIGHTS)
@torch.no_grad()
def test_weight_of_the_paths(path):
    model, image = small_model(), random_image()
    close(
        predict_probs(model, image, mpsa_weight=PATH_WEIGHTS[path]),
        window_prob(model, image, {"mps": 0, "mpsa": 1, "ensemble": 0.5}[path]),
    )


def test_calibration_lowers_seen_classes_alone():
    model, image = small_model(), random_image(1, 40, 40)
    plain = predict_probs(model, image)
    for calibration in (0.1, 0.3):
        low = predict_probs(model, image, seen=SEEN, calibration=calibration)
        assert torch.equal(low[:, SEEN], plain[:, SEEN] - calibration) and torch.equal(low[:, UNSEEN], plain[:, UNSEEN])
    assert torch.equal(predict_probs(model, image, seen=SEEN), predict_probs(model, image, seen=SEEN, calibration=0.1))
    assert torch.equal(predict_probs(model, image, seen=None, calibration=0.9), plain) and torch.equal(
        predict_probs(model, image, seen=()), plain
    )
    assert torch.equal(
        predict_probs(model, image, seen=iter(SEEN)), predict_probs(model, image, seen=torch.tensor(SEEN))
    )


@pytest.mark.parametrize("size", [(40, 48), (17, 91), (1, 1), (1300, 1500)])
def test_size(size):
    model, image = small_model(), random_image(1, 40, 48)
    small = predict_probs(model, image, seen=SEEN)
    want = F.interpolate(small, size=size, mode="bilinear", align_corners=False)
    close(predict_probs(model, image, seen=SEEN, size=size), want)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(seen=SEEN, calibration=0.2),
        dict(window=24, stride=8),
        dict(size=(50, 70)),
        dict(seen=SEEN, size=(1300, 1500)),
    ],
    ids=str,
)
def test_label_maps_are_the_arg_max_of_the_probabilities(options):
    model, image = small_model(), random_image(2, 40, 48)
    for path, pred in predict_paths(model, image, **options).items():
        assert torch.equal(pred, predict_probs(model, image, mpsa_weight=PATH_WEIGHTS[path], **options).argmax(1))


def test_seen_may_be_any_iterable():
    "An iterator serves every path and every image, not the first alone."
    model, options = small_model(), dict(calibration=0.3)
    once, twice = (predict_paths(model, random_image(), seen=seen, **options) for seen in (SEEN, iter(SEEN)))
    assert all(torch.equal(once[path], twice[path]) for path in once)


def test_some_paths():
    assert list(predict_paths(small_model(), random_image(), paths=("mpsa",))) == ["mpsa"]
    with pytest.raises(ValueError, match="path .*'both'.* mps, mpsa, ensemble"):
        predict_paths(small_model(), random_image(), paths=("both",))


def test_nothing_is_left_behind():
    "No graph, no change of mode, image or weights."
    model, image = small_model(), random_image(1, 40, 40)
    before, state = image.clone(), {name: t.clone() for name, t in model.state_dict().items()}
    for training in (True, False):
        model.train(training)
        prob = predict_probs(model, image, seen=SEEN)
        assert not prob.requires_grad and model.training == training and model.decoder.training == training
    assert torch.equal(image, before) and all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


# a whole dataset


def dataset(sizes=((40, 48), (32, 32), (20, 70)), label_sizes=None):
    rng = torch.Generator().manual_seed(0)
    items = []
    for size, label_size in zip(sizes, label_sizes or sizes):
        label = torch.randint(K, label_size, generator=rng)
        label[:2] = IGNORE
        items.append({"image": torch.rand(3, *size, generator=rng), "label": label})
    return items


@pytest.mark.parametrize("label_sizes", [None, ((80, 96), (16, 16), (33, 99))])
@pytest.mark.parametrize("calibration", [0.0, 0.2])
def test_evaluate_by_hand(label_sizes, calibration):
    "One confusion matrix over all images, predictions at the label's size."
    model, data = small_model(), dataset(label_sizes=label_sizes)
    scores = evaluate(model, data, UNSEEN, calibration, stride=16)
    for path, weight in PATH_WEIGHTS.items():
        matrix = torch.zeros(K, K, dtype=torch.long)
        for item in data:
            prob = predict_probs(
                model, normalize(item["image"])[None], SEEN, calibration, weight, stride=16, size=item["label"].shape
            )
            for truth, pred in zip(item["label"].flatten().tolist(), prob[0].argmax(0).flatten().tolist()):
                if truth != IGNORE:
                    matrix[truth, pred] += 1
        want = zs3_metrics(matrix, SEEN, UNSEEN)
        assert torch.equal(scores[path].pop("iou"), want.pop("iou")) and scores[path] == want
    assert list(scores) == list(PATH_WEIGHTS)


def test_evaluate_without_dropout_and_gives_the_mode_back():
    model, data = small_model(), dataset()
    calm = evaluate(model, data, UNSEEN)
    stirred = evaluate(model.train(), data, UNSEEN)
    assert (
        model.training
        and model.decoder.training
        and all(torch.equal(calm[path]["iou"], stirred[path]["iou"]) for path in calm)
    )
    evaluate(model.eval(), data, UNSEEN, paths=("mps",))
    assert not model.training


def test_the_mode_comes_back_after_an_error():
    model = small_model().train()
    with pytest.raises(ValueError, match="99"):
        evaluate(model, [{"image": torch.rand(3, 32, 32), "label": torch.full((32, 32), 99)}], UNSEEN)
    assert model.training


def test_other_classes():
    "Class embeddings decide how many classes there are."
    text = random_text(2, seed=4)
    scores = evaluate(
        small_model(text=text), [{"image": torch.rand(3, 32, 32), "label": torch.ones(32, 32, dtype=torch.long)}], (1,)
    )
    assert all(len(s["iou"]) == 2 for s in scores.values())
