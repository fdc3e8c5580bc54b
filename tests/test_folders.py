"""Datasets on disk: what is found, what is read, what is refused, and what the check says."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import trees
from PIL import Image
from torchvision.transforms.v2.functional import adjust_hue

from otseg.benchmarks import BenchmarkSource, load_benchmark
from otseg.checks import check
from otseg.cli import main
from otseg.data import EvalView, TrainCrops, generator, photometric_distortion, scale_saturation, shift_hue
from otseg.descriptions import Description
from otseg.folders import id_table, open_dataset
from otseg.images import IGNORE, Unreadable, fit_size, read_image, read_label, resize, resize_label, resize_part
from otseg.recipes import resolve
from otseg.steps import lr_at

COUNTS = dict.fromkeys(trees.WRITERS, (4, 4)) | {"voc": (8, 4)}
CLASSES = {"voc": (20, 5), "context": (59, 10), "coco": (171, 15), "ade": (150, 0), "folder": (3, 1)}
CLASSES |= {"cityscapes": (19, 0), "camvid": (11, 0)}


def open_one(forest, dataset):
    return load_benchmark(BenchmarkSource(dataset, root=forest / "mine" if dataset == "folder" else forest))


# what is found


@pytest.mark.parametrize("dataset", trees.WRITERS)
def test_every_layout(forest, dataset):
    "Numbers of images, names, unseen classes; labels in 0..k-1 or 255, of the size of their image."
    bench = open_one(forest, dataset)
    assert (len(bench.classes), len(bench.unseen)) == CLASSES[dataset]
    assert (len(bench.images("train")), len(bench.images("val"))) == COUNTS[dataset]
    for split in ("train", "val"):
        for item in (data := bench.images(split)) and [data[i] for i in range(len(data))]:
            assert (
                item["image"].shape == (3, *item["label"].shape)
                and item["image"].dtype == torch.float32
                and 0 <= item["image"].min() <= item["image"].max() <= 1
            )
            assert item["label"].dtype == torch.int64 and set(item["label"].unique().tolist()) <= {
                *range(len(bench.classes)),
                IGNORE,
            }


@pytest.mark.parametrize("dataset, first", [("voc", 1), ("context", 1), ("coco", 0), ("ade", 1)])
def test_ids(forest, dataset, first):
    "Every id of the file becomes its class."
    data = open_one(forest, dataset).images("val")
    for i in range(3):
        ids, label = read_label(data.files[i][1]), data[i]["label"]
        none = (ids == 255) | (ids < first)
        assert torch.equal(label[~none], ids[~none] - first) and (label[none] == IGNORE).all()


def test_voc_in_every_place(forest, monkeypatch):
    "The dataset's folder, the one above it, and the environment variable."
    own = forest / "VOCdevkit/VOC2012"
    assert open_dataset("voc", own).root == open_dataset("voc", forest).root == own
    monkeypatch.setenv("OTSEG_DATA", str(forest))
    assert open_dataset("voc").root == own and len(load_benchmark(BenchmarkSource("voc")).images("val")) == 4


def test_nowhere(tmp_path, monkeypatch):
    monkeypatch.delenv("OTSEG_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="where is the dataset 'coco'.*OTSEG_DATA"):
        load_benchmark(BenchmarkSource("coco")).images("train")
    with pytest.raises(
        FileNotFoundError, match="looked for .*VOCdevkit/VOC2012/SegmentationClass.*How to get it: VOC 2012"
    ):
        load_benchmark(BenchmarkSource("voc", root=tmp_path)).images("train")
    with pytest.raises(FileNotFoundError, match="dataset.json"):
        load_benchmark(BenchmarkSource("folder", root=tmp_path))


def test_context_lists_in_either_place(forest, tmp_path):
    trees.write_context(tmp_path)
    root = tmp_path / "VOCdevkit/VOC2010"
    (root / "ImageSets/SegmentationContext").mkdir(parents=True)
    for name in ("train.txt", "val.txt"):
        (root / name).rename(root / "ImageSets/SegmentationContext" / name)
    assert len(load_benchmark(BenchmarkSource("context", root=tmp_path)).images("train")) == 4


def test_unseen_by_name():
    assert load_benchmark(BenchmarkSource("voc", unseen="cat, aeroplane")).unseen == (0, 7)
    with pytest.raises(ValueError, match="unseen class 'cart' is not one of the dataset's 20: aeroplane, bicycle"):
        load_benchmark(BenchmarkSource("voc", unseen="cat, cart"))


# a folder of one's own


@pytest.mark.parametrize(
    "background, ids, classes, lowest",
    [
        (None, (0, 1, 2), ("brick", "page", "tissue"), 0),
        ("ignore", (0, 1, 2, 3), ("brick", "page", "tissue"), 0),
        ("other things", (0, 1, 2, 3), ("other things", "brick", "page", "tissue"), 0),
    ],
)
def test_background(tmp_path, background, ids, classes, lowest):
    trees.write_folder(tmp_path, ids, **({"background": background} if background else {}))
    bench = load_benchmark(BenchmarkSource("folder", root=tmp_path))
    assert bench.classes == classes and bench.unseen == (classes.index("tissue"),)
    raw, label = read_label(bench.images("val").files[0][1]), bench.images("val")[0]["label"]
    shift = int(background == "ignore")
    assert torch.equal(label[raw < 255], torch.where(raw < shift, IGNORE, raw - shift)[raw < 255])


# what is read


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "P", "1", "LA", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    ending = "jpg" if mode == "CMYK" else "png"
    base = Image.fromarray((np.arange(60).reshape(6, 10) * 4).astype(np.uint8))
    (Image.fromarray(np.arange(60, dtype=np.uint16).reshape(6, 10)) if mode == "I;16" else base.convert(mode)).save(
        tmp_path / f"a.{ending}"
    )
    assert read_image(tmp_path / f"a.{ending}").shape == (3, 6, 10)


def test_exif_turns_an_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (3, 20, 10)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: p.write_bytes(p.read_bytes()[:300]),
        lambda p: p.write_bytes(b""),
        lambda p: p.write_text("not an image"),
        lambda p: p.unlink(),
    ],
    ids=["truncated", "empty", "text", "missing"],
)
def test_unreadable_files(forest, tmp_path, spoil):
    trees.write_folder(tmp_path, size=(200, 300))
    data = load_benchmark(BenchmarkSource("folder", root=tmp_path)).images("val")
    for path, read in zip(data.files[1], (read_image, read_label)):
        spoil(path)
        with pytest.raises((Unreadable, FileNotFoundError), match=f"{path.name} cannot be read as"):
            read(path)


def test_colours_are_no_ids(tmp_path):
    trees.write_folder(tmp_path)
    data = load_benchmark(BenchmarkSource("folder", root=tmp_path)).images("val")
    Image.open(data.files[0][1]).convert("RGB").save(data.files[0][1])
    with pytest.raises(ValueError, match="is a RGB picture, but one channel of class ids is expected.*colors"):
        data[0]


def test_sizes_must_agree(tmp_path):
    trees.write_folder(tmp_path)
    data = load_benchmark(BenchmarkSource("folder", root=tmp_path)).images("val")
    Image.new("L", (5, 7)).save(data.files[0][1])
    with pytest.raises(ValueError, match=r"photo 0.jpg is 40 x 90 pixels but photo 0.png is 7 x 5 pixels"):
        data[0]


def test_raw_ids_of_coco_stuff(tmp_path):
    trees.write_coco(tmp_path, ids=(0, 90, 181))
    data = load_benchmark(BenchmarkSource("coco", root=tmp_path)).images("val")
    with pytest.raises(
        ValueError, match="181, which are no class: these are ids of the raw release.*coco_stuff164k.py"
    ):
        [data[i] for i in range(4)]


@pytest.mark.parametrize("k, first", [(3, 0), (20, 1), (250, 0)])
def test_id_table(k, first):
    table = id_table(Description(classes=[f"class {i}" for i in range(k)], first=first)).tolist()
    assert table[first : first + k] == list(range(k)) and table[255] == IGNORE and table[:first] == [IGNORE] * first
    assert set(table[first + k : 255]) <= {-1}


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b"])
def test_lists_stay_inside(forest, tmp_path, name):
    trees.write_voc(tmp_path)
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").write_text(f"{name}\n")
    with pytest.raises(FileNotFoundError, match=f"1 of 1 images are missing, the first for {re.escape(name)}"):
        load_benchmark(BenchmarkSource("voc", root=tmp_path)).images("val")


# the check


@pytest.mark.parametrize("dataset", trees.WRITERS)
def test_check_of_a_sound_dataset(forest, dataset):
    "Of the released ones, all that is wrong with a miniature is the number of its images and classes."
    found, problems = check(dataset, forest / "mine" if dataset == "folder" else forest)
    assert f"{CLASSES[dataset][0]} classes, {CLASSES[dataset][1]} of them unseen" in found[0]
    small = [line for line in problems if "the released dataset has" in line or "classes never occur" in line]
    assert problems == small and bool(problems) == (dataset != "folder")


def spoil_ids(ids):
    return lambda root: trees.write_folder(root, ids)


def remove(pattern):
    return lambda root: [p.unlink() for p in sorted(root.glob(pattern))[:1]]


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda root: None, None),
        (remove("labels/train/*.png"), "train: 1 of 4 label maps are missing, the first for .*photo 0.jpg"),
        (lambda root: [p.unlink() for p in root.glob("images/val/*")], "val: no pairs of images and label maps"),
        (
            spoil_ids((1, 2, 3)),
            'have the ids 3, which are no class: if the labels count from 1, and 1 is .brick., write "first": 1',
        ),
        (
            lambda root: trees.write_folder(root, (1, 2), n=20),
            "class 'brick', occurs in none of 20 label maps",
        ),
        (spoil_ids((0, 1, 77)), "have the ids 77, which are no class: 0 to 2 are the 3 classes"),
        (lambda root: Image.new("RGB", (37, 61)).save(root / "labels/val/photo 0.png"), "is a RGB picture"),
        (
            lambda root: Image.new("L", (5, 5)).save(root / "labels/val/photo 0.png"),
            "an image and its label map have one size",
        ),
        (lambda root: (root / "images/val/photo 0.jpg").write_bytes(b"x"), "photo 0.jpg cannot be read as an image"),
        (
            lambda root: [Image.new("L", Image.open(p).size, 255).save(p) for p in root.glob("labels/val/*")],
            "val: no pixel of the sample has a class",
        ),
        (lambda root: (root / "dataset.json").write_text("[]"), "dataset.json: input should be an object"),
        (lambda root: (root / "dataset.json").unlink(), "no dataset 'folder'"),
    ],
)
def test_check_names_the_fault(tmp_path, spoil, says):
    trees.write_folder(tmp_path)
    spoil(tmp_path)
    _, problems = check("folder", tmp_path)
    assert not problems if says is None else any(re.search(says, line) for line in problems), problems


@pytest.mark.parametrize("n", [2, 24])
def test_reduced_labels_of_ade(tmp_path, n):
    "The release has no 255: two label maps are enough to be sure."
    trees.write_ade(tmp_path, ids=(0, 1, 149), n=n, void=255)
    assert any("the id 255" in line and "reduced by one already" in line for line in check("ade", tmp_path)[1])


def test_labels_that_may_be_reduced(tmp_path):
    "A folder of one's own may contain 255, so the check says how many label maps it saw."
    trees.write_folder(tmp_path, ids=(1, 2), n=8, first=1)
    (line,) = [line for line in check("folder", tmp_path)[1] if line.startswith("train: the id 0")]
    assert "in none of 8 label maps; this is no proof" in line and "reduced by one already?" in line


def test_check_from_the_shell(forest, tmp_path):
    run = lambda *args: subprocess.run(
        [sys.executable, "-m", "otseg.cli", "check", *map(str, args)], capture_output=True, text=True
    )
    good = run("folder", forest / "mine")
    assert good.returncode == 0 and "all is well" in good.stdout and "Traceback" not in good.stderr
    bad = run("voc", tmp_path)
    assert (
        bad.returncode == 1 and "PROBLEM no dataset 'voc': looked for" in bad.stdout and "Traceback" not in bad.stderr
    )
    assert main(["check", "cocoa"]) == 2


# the pipelines, against their numbers


@pytest.mark.parametrize(
    "size, short, long, want",
    [
        ((375, 500), 512, 0, (512, 683)),
        ((500, 375), 512, 0, (683, 512)),
        ((512, 512), 512, 0, (512, 512)),
        ((480, 640), 512, 0, (512, 683)),
        ((427, 640), 512, 0, (512, 767)),
        ((333, 500), 520, 0, (520, 781)),
        ((100, 1000), 512, 0, (512, 5120)),
        ((100, 1000), 512, 2048, (205, 2048)),
        ((1000, 100), 512, 2048, (2048, 205)),
        ((375, 500), 256, 1024, (256, 341)),
        ((375, 500), 1024, 4096, (1024, 1365)),
        ((375, 500), 520, 520, (390, 520)),
        ((1, 3000), 512, 2048, (1, 2048)),
    ],
)
def test_sizes(size, short, long, want):
    "size = int(side * f + 0.5) with f = min(L / max(h, w), s / min(h, w))."
    assert fit_size(size, short, long) == want


@pytest.mark.parametrize(
    "dataset, fields",
    [
        (
            "voc",
            dict(
                image_size=512,
                stride=426,
                max_iters=20_000,
                visual_prompts=10,
                num_templates=6,
                train_short_side=512,
                train_long_side=2048,
                test_short_side=512,
                test_long_side=0,
            ),
        ),
        (
            "context",
            dict(
                image_size=480,
                stride=80,
                max_iters=40_000,
                visual_prompts=10,
                num_templates=8,
                train_short_side=520,
                train_long_side=520,
                test_short_side=520,
                test_long_side=0,
            ),
        ),
        (
            "coco",
            dict(
                image_size=512,
                stride=426,
                max_iters=80_000,
                visual_prompts=100,
                num_templates=8,
                train_short_side=512,
                train_long_side=2048,
                test_short_side=512,
                test_long_side=0,
            ),
        ),
    ],
)
def test_recipes_of_the_paper(dataset, fields):
    common = dict(
        batch_size=16,
        lr=2e-4,
        weight_decay=0.01,
        warmup_iters=1500,
        min_lr=1e-6,
        poly_power=0.9,
        focal_weight=100.0,
        dice_weight=1.0,
        min_scale=0.5,
        max_scale=2.0,
        flip_prob=0.5,
        photometric=True,
        normalization="imagenet",
        depth=3,
        eps=0.05,
        dropout=0.1,
        clip="ViT-B-16-quickgelu",
    )
    inductive, transductive, full = (
        vars(resolve(dataset, s)) for s in ("inductive", "transductive", "fully_supervised")
    )
    assert (fields | common | {"calibration": 0.1}).items() <= inductive.items()
    assert (
        transductive["max_iters"] * 2 == inductive["max_iters"]
        and transductive["calibration"] == full["calibration"] == 0
    )
    assert transductive["stride"] == (420 if dataset == "context" else inductive["stride"])
    assert vars(resolve("ade"))["normalization"] == "clip" and vars(resolve("ade"))["test_long_side"] == 2048


@pytest.mark.parametrize("T", [20_000, 80_000])
def test_learning_rates(T):
    recipe = resolve("voc", max_iters=T)
    poly = lambda t: (2e-4 - 1e-6) * (1 - t / T) ** 0.9 + 1e-6
    want = {
        0: poly(0) * 1e-6,
        1: poly(1) * (1 - (1499 / 1500) * (1 - 1e-6)),
        1499: poly(1499) * (1 - (1 / 1500) * (1 - 1e-6)),
        1500: poly(1500),
        T // 2: poly(T // 2),
        T - 1: poly(T - 1),
    }
    for t, lr in want.items():
        assert lr_at(t, recipe) == pytest.approx(lr, rel=1e-12)


def test_training_view(forest):
    "One size; filled with the mean and without label; flips and scales happen; a key determines it."
    recipe = resolve("voc", image_size=64, stride=64, train_short_side=48, train_long_side=96)
    crops = TrainCrops(open_one(forest, "voc").images("train"), recipe, torch.arange(256))
    views = [crops[epoch, 0] for epoch in range(12)]
    assert all(
        v["image"].shape == (3, 64, 64) and v["label"].shape == (64, 64) and v["image"].isfinite().all() for v in views
    )
    short = [v for v in views if (v["label"][-1] == IGNORE).all() and (v["image"][:, -1] == 0).all()]
    assert short and len({v["image"].sum().item() for v in views}) == 12
    assert torch.equal(crops[3, 0]["image"], views[3]["image"])


def test_image_and_label_move_together():
    "If labels are drawn as colours, each pixel of a view has the label of its colour, except at blurred edges."

    class Drawn(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, i):
            label = torch.zeros(60, 80, dtype=torch.long)
            label[20:50, 10:40], label[5:30, 50:75] = 1, 2
            return {"image": (label / 2).expand(3, -1, -1), "label": label}

    crops = TrainCrops(
        Drawn(),
        resolve(
            "voc",
            image_size=48,
            stride=48,
            train_short_side=60,
            train_long_side=120,
            photometric=False,
            normalization="clip",
        ),
        torch.arange(256),
    )
    from otseg.images import NORMALIZATIONS

    (mean, *_), (std, *_) = NORMALIZATIONS["clip"]
    for epoch in range(20):
        view = crops[epoch, 0]
        inside = view["label"] != IGNORE
        shade = (view["image"][0] * std + mean) * 2
        assert ((shade.round() == view["label"]) | ~inside).float().mean() > 0.9


def test_testing_view(forest):
    recipe = resolve("voc", test_short_side=96)
    data = open_one(forest, "voc").images("val")
    for i in range(3):
        view, item = EvalView(data, recipe)[i], data[i]
        assert (
            torch.equal(view["label"], item["label"])
            and view["image"].shape[1:] == fit_size(item["label"].shape, 96)
            and min(view["image"].shape[1:]) == 96
        )


@pytest.mark.parametrize("size", [(48, 48), (7, 90), (61, 37)])
def test_labels_are_never_mixed(size):
    label = torch.tensor([0, 3, IGNORE])[torch.randint(3, (30, 40), generator=generator(0))]
    assert resize_label(label, size).shape == size and set(resize_label(label, size).unique().tolist()) <= {
        0,
        3,
        IGNORE,
    }
    assert resize(torch.rand(3, 30, 40), size).shape == (3, *size)


def test_saturation_is_that_of_hsv():
    import colorsys

    image = torch.rand(3, 4, 5, generator=generator(0))
    for a in (0.5, 1.0, 1.5):
        ours = scale_saturation(image, a)
        for y in range(4):
            for x in range(5):
                h, s, v = colorsys.rgb_to_hsv(*image[:, y, x].tolist())
                want = torch.tensor(colorsys.hsv_to_rgb(h, min(a * s, 1), v))
                assert torch.allclose(ours[:, y, x], want, atol=1e-5)


@pytest.mark.parametrize("degrees", [-18.0, -3.0, 0.0, 7.0, 18.0])
def test_hue_is_that_of_hsv(degrees):
    "Also of grey, black and pure colours, to a thousandth of a step of 8 bits."
    image = torch.rand(3, 20, 30, generator=generator(0))
    image[:, 0], image[:, 1], image[0, 2:4], image[1, 3:5] = 0.3, 0, 1, 1
    assert (shift_hue(image, degrees) - adjust_hue(image, degrees / 360)).abs().max() < 4e-6


def test_a_part_of_a_resized_image():
    "Equal to the part of the whole, far below a step of 8 bits, for enlarged and reduced images of any shape."
    draw = lambda high: torch.randint(1, high, (2,), generator=rng).tolist()
    for rng in map(generator, range(60)):
        size, image = draw(300), torch.rand(3, *draw(200), generator=rng)
        part = tuple(slice(side // 3, side // 3 + 50) for side in size)
        difference = resize_part(image, size, part) - resize(image, size)[:, part[0], part[1]]
        assert difference.abs().max() < 1e-4


def test_distortion():
    "It stays in range, happens about as often as it should, and leaves about 1 in 16 alone."
    image = torch.rand(3, 8, 8, generator=generator(0)) * 0.6 + 0.2
    many = [photometric_distortion(image, generator(i)) for i in range(400)]
    assert all(0 <= m.min() and m.max() <= 1 for m in many)
    untouched = sum(torch.allclose(m, image, atol=1e-6) for m in many)
    assert 10 <= untouched <= 45


def test_an_unreadable_image_is_replaced(tmp_path):
    trees.write_folder(tmp_path)
    data = load_benchmark(BenchmarkSource("folder", root=tmp_path)).images("train")
    data.files[1][0].write_bytes(b"")
    crops = TrainCrops(data, resolve("folder", image_size=48, stride=48, train_short_side=48), torch.arange(256))
    with pytest.warns(UserWarning, match="cannot be read as an image.*the next image takes its place"):
        assert crops[0, 1]["skipped"] == 1
    assert crops[0, 0]["skipped"] == 0
    for image, _ in data.files:
        image.write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="10 images in a row cannot be read"):
        crops[0, 0]
