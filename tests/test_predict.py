"""`otseg.predict` and `otseg.explain`: any images and words give the right mask, or an error with the reason."""

import json
import subprocess
import sys
import warnings
import zlib

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from helpers import PATCH, SIDE, D, papermill, run_cells, small_model
from PIL import Image
from safetensors import safe_open

import otseg
from otseg import predict
from otseg.descriptions import word_groups
from otseg.digits import CLASSES, Digits, digits_clip
from otseg.explain import Panel, explain
from otseg.identity import clip_identity
from otseg.images import normalize, open_image
from otseg.inference import predict_probs
from otseg.models import DEFAULT_CHECKPOINT
from otseg.predict import Result, Segmenter, resize_for_model, with_words
from otseg.recipes import resolve
from otseg.text import TEMPLATES, class_embeddings

SCENES = Digits("val", 4)


@pytest.fixture(scope="module")
def seg():
    return otseg.load(device="cpu")


@pytest.fixture(scope="module")
def free():
    """A small random model with CLIP's whole vocabulary. It knows all words, but its masks are meaningless."""
    torch.manual_seed(0)
    text = dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1)
    clip = (
        open_clip.CLIP(D, dict(image_size=SIDE, patch_size=PATCH, width=32, layers=3, head_width=16), text)
        .eval()
        .requires_grad_(False)
    )
    recipe = resolve("folder", image_size=SIDE, stride=24, test_short_side=SIDE, num_templates=2, calibration=0.0)
    return Segmenter(small_model(text=F.normalize(torch.randn(1, 2, D), dim=-1)), recipe, clip)


def photo(w=40, h=30, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))


# images


def test_every_way_to_pass_an_image_gives_the_same_mask(seg, tmp_path):
    x = SCENES[0]["image"]
    image = open_image(x)
    image.save(path := tmp_path / "a b.png")
    array = np.asarray(image)
    ways = [
        path,
        str(path),
        path.as_uri(),
        image,
        array,
        array / 255,
        x,
        (255 * x).byte(),
        x.half(),
        torch.from_numpy(array.copy()),
    ]
    first = seg(x, CLASSES).labels
    for way in ways:
        assert (seg(way, CLASSES).labels == first).mean() > 0.999  # half precision rounds
    for many in (ways[:2], tuple(ways[:2]), torch.stack([x, x]), np.stack([array, array])):
        assert [(r.labels == first).all() for r in seg(many, CLASSES)] == [True, True]
    assert seg([], CLASSES) == []


def test_exif_rotation_is_honoured(free, tmp_path):
    image = photo(40, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotated by 90 degrees
    image.save(path := tmp_path / "a.png", exif=exif)
    r = free(path, ["cat", "dog"])
    assert r.image.size == (30, 40) and r.labels.shape == (40, 30)
    assert (r.labels == free(image.rotate(-90, expand=True), ["cat", "dog"]).labels).all()


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "F"]
)
def test_image_modes_become_rgb(mode):
    grey = np.linspace(0, 255, 35, dtype=np.uint8).reshape(5, 7)
    if mode == "F":
        image = Image.fromarray(grey.astype(np.float32) / 255)
    elif mode in ("I", "I;16"):
        image = Image.fromarray(grey.astype(np.uint16) * 257)
        image = image.convert("I") if mode == "I" else image
        assert image.mode == mode
    else:
        image = (
            Image.fromarray(grey).convert("RGB").convert(mode)
            if mode not in ("LA", "PA")
            else Image.fromarray(grey).convert("LA").convert(mode)
        )
    rgb = open_image(image)
    assert rgb.mode == "RGB" and rgb.size == (7, 5)
    if mode not in ("1", "P", "LAB", "YCbCr"):
        assert np.abs(np.asarray(rgb).astype(int) - grey[..., None]).max() <= 1


def test_16_bit_file_and_transparency(tmp_path):
    a = np.linspace(0, 65535, 12, dtype=np.uint16).reshape(3, 4)
    Image.fromarray(a).save(tmp_path / "a.png")
    assert (np.asarray(open_image(tmp_path / "a.png"))[..., 0] == a >> 8).all()
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    half.putpixel((0, 0), (0, 0, 255, 255))
    assert open_image(half).getpixel((0, 0)) == (0, 0, 255) and open_image(half).getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (20000, 30), (2000, 3), (33, 47)])
def test_masks_have_the_size_of_the_photo(free, size):
    r = free(photo(*size), "cat, dog, sky")
    assert (
        r.labels.shape == size[::-1]
        and r.areas.pixels.sum() == size[0] * size[1]
        and r.probability("cat").shape == size[::-1]
    )
    assert max(r.scores.shape[-2:]) <= 4 * SIDE


def test_a_wide_photo_is_averaged_not_sampled():
    """Stripes finer than the model's pixels become their mean instead of a false pattern."""
    stripes = np.zeros((300, 6000, 3), np.uint8)
    stripes[:, ::2] = 200
    x = resize_for_model(Image.fromarray(stripes), 30)
    assert x.shape == (1, 3, 6, 120) and (x - 100 / 255).abs().max() < 0.01


def bomb(path):
    """A PNG of a few bytes whose header declares 30000 x 30000 pixels."""
    chunk = lambda kind, data: len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    header = (30000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )


def test_bad_files(tmp_path):
    (tmp_path / "text.jpg").write_text("no image at all")
    (tmp_path / "empty.png").write_bytes(b"")
    photo(300, 200).save(tmp_path / "whole.jpg")
    photo(300, 200).save(tmp_path / "whole.png")
    for kind in ("jpg", "png"):
        data = (tmp_path / f"whole.{kind}").read_bytes()
        (tmp_path / f"cut.{kind}").write_bytes(data[: len(data) // 2])
    bomb(tmp_path / "bomb.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, says in {
            "text.jpg": "does not know its format",
            "empty.png": "does not know its format",
            "cut.jpg": "damaged",
            "cut.png": "damaged",
            "bomb.png": "179 million pixels",
        }.items():
            with pytest.raises(ValueError, match=rf"{name}.*{says}"):
                open_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="gone.jpg cannot be read as an image: there is no such file"):
        open_image(tmp_path / "gone.jpg")


@pytest.mark.parametrize(
    "source, says",
    [
        ("https://example.org/a.jpg", "not on this machine"),
        ("file://elsewhere/a.jpg", "not on this machine"),
        (".", "is a folder"),
        (3, "cannot be a int"),
        (np.zeros((3, 3), complex), "type complex128"),
        (np.zeros((0, 3)), "shape"),
        (torch.zeros(2, 5, 5), "shape"),
        (np.full((2, 2), np.nan), "nan"),
        (torch.full((3, 2, 2), -1.0), "-1 to -1"),
        (np.full((2, 2), 70_000), "0 to 65535"),
        (np.full((2, 2), 300.0), "0 to 255"),
        (Image.new("RGB", (0, 4)), "no pixels"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_wrong_sources_are_refused(source, says):
    with pytest.raises(ValueError, match=says):
        open_image(source)


# words


@pytest.mark.parametrize(
    "classes, says",
    [
        ([], "empty"),
        ("", "classes is empty"),
        (["cat", "cat"], "'cat' occurs more than once"),
        (["cat", " Cat "], "more than once"),
        (["cat", ""], "expected strings"),
        (["cat", 3], "3 has the words"),
        ({"cat": []}, "has the words"),
        ({"sofa": ["couch"], "settee": ["couch"]}, "'couch'"),
        ("sofa|couch,sofa", "'sofa'"),
        (7, "expected a list of names"),
        (["cat", "x" * 600], "77"),
        (["cat", "very " * 90 + "long"], "77"),
    ],
    ids=str,
)
def test_bad_words_are_refused(free, classes, says):
    with pytest.raises(ValueError, match=says):
        free(photo(), classes)


def test_formats_of_classes():
    groups = {"cat": ["cat"], "sofa": ["sofa", "couch"]}
    assert word_groups(" cat ,sofa|couch") == word_groups({"cat": "cat", "sofa": ("sofa", "couch")}) == groups
    assert word_groups(n for n in ("a", "b")) == {"a": ["a"], "b": ["b"]}


def test_emoji_and_other_scripts(free):
    r = free(photo(), ["🐈", "犬", "naïve café", "a {} b", "cat, dog"])
    assert r.classes == ("🐈", "犬", "naïve café", "a {} b", "cat, dog")
    r._repr_png_()


def test_500_names(free, tmp_path):
    names = [f"{a} {b}" for a in "red blue green old new big small wet dry hot".split() for b in map(str, range(50))]
    r = free(photo(60, 50), names)
    assert r.labels.dtype == np.uint16 and r.labels.max() < 500
    r._repr_png_()
    assert (np.asarray(Image.open(r.save(tmp_path / "a.png"))) == r.labels).all()


def test_synonyms_are_the_normalised_mean(free):
    e = class_embeddings(["sofa", "couch"], TEMPLATES[:2], free.clip)
    assert torch.allclose(free.embeddings({"sofa": ["sofa", "couch"]})[0], F.normalize(e.mean(0), dim=-1), atol=1e-6)
    assert torch.allclose(free.embeddings({"a": ["sofa"]}), e[:1], atol=1e-6)


def test_new_words_are_embedded_once(free, tmp_path, monkeypatch):
    fresh = Segmenter(free.model, free.recipe, free.clip, cache=tmp_path)
    free_text = fresh.embeddings(word_groups("lamp, door"))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    monkeypatch.setattr(predict, "cached_class_embeddings", None)  # calling it again would fail
    assert torch.equal(fresh.embeddings(word_groups("door, lamp")), free_text.flip(0))


def test_the_small_clip_refuses_unknown_words(seg):
    for word in ("cat", "seventeen", "🐈"):
        with pytest.raises(ValueError, match="30 of CLIP's 49408 rows"):
            seg(photo(), ["three", word])
    assert seg(photo(), ["three five", "galaxies"]).labels.shape == (30, 40)


# masks


def test_prediction_equals_that_of_the_inference_module(seg):
    """On a benchmark scene: without resizing, with the stored class embeddings."""
    x = SCENES[1]["image"]
    expected = predict_probs(seg.model, normalize(x)[None], stride=24)[0]
    r = seg(x, calibration=0.0)
    assert torch.allclose(r.scores, expected, atol=1e-5) and (r.labels == expected.argmax(0).numpy()).all()
    assert np.allclose(r.probabilities, expected, atol=1e-5) and np.allclose(
        r.probability("six"), expected[6], atol=1e-5
    )


def test_shipped_model_knows_its_benchmark(seg):
    right = [(seg(item["image"]).labels == item["label"].numpy()).mean() for item in SCENES]
    assert np.mean(right) > 0.8
    header = json.loads(safe_open(DEFAULT_CHECKPOINT, "pt").metadata()["otseg"])
    ours = clip_identity(digits_clip())
    assert {name: header["identity"][name] for name in ours} == ours, (
        "the shipped model was trained with another small CLIP: train, then run "
        "`otseg export CHECKPOINT --half otseg/assets/digits_otseg.safetensors`"
    )
    assert header["recipe"]["crop_labels"] == "training"


def test_calibration_lowers_seen_classes_by_name(seg):
    plain, lowered = (seg(SCENES[0]["image"], "eight, brick, three", calibration=c).scores for c in (0.0, 0.3))
    assert seg.seen.isdisjoint({"seven", "eight", "nine", "gravel"})
    assert torch.allclose(lowered[0], plain[0]) and torch.allclose(lowered[1:], plain[1:] - 0.3, atol=1e-6)


def test_background_top_and_areas(free):
    image = photo()
    r = free(image, "cat, dog, sky")
    low, high = r.probabilities.max(0).min(), r.probabilities.max(0).max()
    cut = float(low + high) / 2
    b = free(image, "cat, dog, sky", background=cut)
    assert b.names == ("cat", "dog", "sky", "background")
    assert (b.labels == np.where(r.probabilities.max(0) < cut, 3, r.labels)).all()
    labels, probs = r.top(3)
    assert (
        (labels[0] == r.labels).all()
        and np.allclose(np.take_along_axis(r.probabilities, labels, 0), probs)
        and (np.diff(probs, axis=0) <= 0).all()
    )
    assert r.areas.fraction.sum() == pytest.approx(1) and r.areas.pixels["cat"] == (r.labels == 0).sum()
    for wrong, says in (
        (dict(background=1.2), "background = 1.2"),
        (dict(mpsa_weight=-1), "mpsa_weight = -1"),
        (dict(calibration=2), "calibration = 2"),
        (dict(eps=0), "eps = 0"),
    ):
        with pytest.raises(ValueError, match=says):
            free(image, "cat, dog", **wrong)
    with pytest.raises(ValueError, match="top 4 of 3"):
        r.top(4)
    with pytest.raises(ValueError, match="'background' is both a class and a threshold"):
        free(image, "cat, background", background=0.5)
    with pytest.raises(ValueError, match="'cow' is not one of"):
        r.probability("cow")


def test_too_many_probabilities_are_refused():
    r = Result(Image.new("RGB", (20000, 2000)), tuple(map(str, range(40))), torch.zeros(40, 2, 20))
    with pytest.raises(ValueError, match="6 GB"):
        _ = r.probabilities


def test_files(free, tmp_path):
    masks = pytest.importorskip("pycocotools.mask")
    r = free(photo(), "cat, dog, sky", background=0.5)
    mask = Image.open(r.save(tmp_path / "new/a.png"))
    assert mask.mode == "P" and (np.asarray(mask) == r.labels).all()
    found = json.loads(r.save(tmp_path / "a.json").read_text())
    for a in found:
        assert (masks.decode(a["segmentation"]) == (r.labels == a["category_id"])).all() and a[
            "area"
        ] == r.areas.pixels[a["category"]]
    with pytest.raises(ValueError, match="expected .png or .json"):
        r.save(tmp_path / "a.jpg")


def test_without_pycocotools(free, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ImportError, match="pip install pycocotools"):
        free(photo(), "cat, dog").save(tmp_path / "a.json")


def test_palette_of_the_dataset(free):
    own = Segmenter(free.model, free.recipe, free.clip, ("cat",), (), [(10, 20, 30)])
    assert (own(photo(), ["cat"]).colours == np.array([[10, 20, 30]]) / 255).all() and own(
        photo(), ["cat", "dog"]
    ).colours is None


def test_with_words_shares_weights_and_changes_nothing(free):
    before = {name: t.clone() for name, t in free.model.state_dict().items()}
    new = with_words(free.model, torch.randn(3, 2, D), eps=0.3)
    assert new.encoder is free.model.encoder and next(new.decoder.parameters()) is next(free.model.decoder.parameters())
    assert (new.eps, new.decoder.score.eps, free.model.eps, free.model.decoder.score.eps) == (0.3, 0.3, 0.05, 0.05)
    assert all(torch.equal(t, before[name]) for name, t in free.model.state_dict().items())


def test_explanation_and_panel(seg):
    pytest.importorskip("ipywidgets")
    fig = explain(seg, SCENES[0]["image"], "zero, grass, brick", ["grass"], eps=0.1)
    assert [a.get_title() for a in fig.axes[1:7]] == [t.replace(" of ", "\nof ") for t in TEMPLATES[:6]]
    with pytest.raises(ValueError, match="'cow'"):
        explain(seg, SCENES[0]["image"], "zero, grass", ["cow"])
    box = Panel(seg, {"one": SCENES[0]["image"], "two": SCENES[1]["image"]}, "three, six, grass, gravel, brick")
    controls, pictures = [*box.controls.values()], [box.picture]
    for control, value in zip(controls, ("two", "six, eight, page, gravel", 0.5, 1.0, 0.4)):
        control.value = value
        pictures.append(box.picture)
    assert len(set(pictures)) == len(pictures) and not box.message.value
    controls[1].value = "cat <b>"
    assert "cat &lt;b>" in box.message.value and box.picture == pictures[-1]


def test_the_picture_of_the_panel_is_no_widget(seg, monkeypatch):
    "It stays when the kernel, and with it every widget, is gone."
    pytest.importorskip("ipywidgets")
    import IPython.display

    shown = []

    class Handle:
        update = shown.append

    monkeypatch.setattr(IPython.display, "display", lambda thing, **_: shown.append(thing) or Handle)
    box = Panel(seg, {"one": SCENES[0]["image"]}, "three, six")
    box._ipython_display_()
    box.controls["classes"].value = "grass, brick"
    controls, first, second = shown
    assert controls is box.box and first.data != second.data == box.picture


# loading


def test_load_refuses_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        otseg.load(tmp_path / "gone.safetensors")
    (tmp_path / "odd.pth").write_bytes(b"odd")
    with pytest.raises(ValueError, match="odd.pth"):
        otseg.load(tmp_path / "odd.pth")
    with pytest.raises(AttributeError, match="lod"):
        _ = otseg.lod


def test_import_does_not_load_torch():
    code = "import sys, otseg; assert 'torch' not in sys.modules; otseg.load; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def official(tmp_path):
    """A small model with the parameter names of the official code, and its CLIP."""
    from otseg.official import official_name

    torch.manual_seed(1)
    arch = {
        "embed_dim": D,
        "quick_gelu": True,
        "vision_cfg": dict(image_size=SIDE, patch_size=PATCH, width=64, layers=3, head_width=64),
        "text_cfg": dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1),
    }
    (tmp_path / "otseg-test-arch.json").write_text(json.dumps(arch))
    open_clip.add_model_config(tmp_path / "otseg-test-arch.json")
    clip = open_clip.create_model("otseg-test-arch")
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    model = otseg.predict.OTSeg(clip.visual, torch.randn(20, 6, D), image_size=SIDE, visual_prompts=4)
    state = {official_name(name): t for name, t in model.state_dict().items() if name != "text"}
    state["decode_head.loss_decode.criterion.empty_weight"] = torch.ones(16)  # one more than the 15 trained classes
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "iter.pth")
    return tmp_path


def test_official_checkpoints(official, monkeypatch):
    recipe = predict.official_recipe(official / "iter.pth", clip="otseg-test-arch")
    monkeypatch.setattr(predict, "official_recipe", lambda path: recipe)
    seg = otseg.load(official / "iter.pth", official / "clip.pt", "cpu")
    assert len(seg.classes) == 20 and (
        seg.recipe.dataset,
        seg.recipe.setting,
        seg.recipe.num_templates,
        seg.recipe.calibration,
    ) == ("voc", "inductive", 6, 0.1)
    assert "pottedplant" not in seg.seen and "cat" in seg.seen and len(seg.seen) == 15
    seg.model.image_size, seg.short, seg.recipe = SIDE, SIDE, resolve("voc", image_size=SIDE, stride=24)
    assert seg(photo(), "cat, lamp").labels.shape == (30, 40)


# the entry notebook


@pytest.mark.slow
def test_notebook_runs_with_its_defaults_in_any_folder(tmp_path):
    done, _ = papermill("predict", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_notebook_segments_files(tmp_path):
    photo(50, 40).save(tmp_path / "a.png")
    photo(40, 50, 1).save(tmp_path / "b.png")
    run = run_cells(
        "predict",
        images=f"{tmp_path}/a.png,{tmp_path}/b.png",
        classes="three, six|nine, page",
        eps=0.1,
        mpsa_weight=0.3,
        calibration=0.1,
        background=0.2,
        explained="three",
        out=tmp_path / "masks",
    )
    sizes = {p.name: Image.open(p).size for p in (tmp_path / "masks").iterdir()}
    assert sizes == {"a.png": (50, 40), "b.png": (40, 50)}
    assert [r.names for r in run.names["results"].values()] == [("three", "six", "page", "background")] * 2


@pytest.mark.parametrize(
    "wrong, error, says",
    [
        ({"image": "a.jpg"}, ValueError, "unknown parameter image; this notebook takes images, "),
        ({"weight": 0.5}, ValueError, "unknown parameter weight; .* mpsa_weight"),
        ({"images": "gone.jpg"}, FileNotFoundError, "gone.jpg cannot be read as an image: there is no such file"),
        ({"classes": "cat"}, ValueError, "does not know 'cat'"),
    ],
    ids=str,
)
def test_notebook_refuses(wrong, error, says):
    with pytest.raises(error, match=says):
        run_cells("predict", **wrong)
