"""Descriptions of datasets: what they say, forms of lists, meanings of ids and colours, class names, and repairs."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import trees
from PIL import Image

from otseg.benchmarks import BenchmarkSource, load_benchmark
from otseg.checks import check, draw_pairs, group_faults
from otseg.cli import main
from otseg.descriptions import SHIPPED, described, read_description, split_words, word_groups
from otseg.folders import name_in, open_dataset
from otseg.images import IGNORE, read_image
from otseg.models import load_class_embeddings
from otseg.recipes import resolve, run_name
from otseg.text import TEMPLATES, class_embeddings

H, W = 48, 64


def write_images(root, names, ids, label="labels/{}.png", image="images/{}.jpg"):
    "An image for each name, and a label map with the array `ids`."
    for i, name in enumerate(names):
        for pattern, pixels in (
            (image, np.random.default_rng(i).integers(0, 255, (*ids.shape[:2], 3), dtype=np.uint8)),
            (label, ids),
        ):
            path = root / pattern.format(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)


def quadrants(a, b, c, d):
    "Four blocks with these ids."
    return np.kron(np.array([[a, b], [c, d]]), np.ones((H // 2, W // 2), int)).astype(np.uint8)


def describe(root, **about):
    (root / "dataset.json").write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
    return root


ONE_PART = {"images": "images/{}.jpg", "labels": "labels/{}.png"}
BOTH = {"train": ONE_PART, "val": ONE_PART}


# descriptions


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_descriptions(name):
    about = described(name)
    assert about.name == name and about.source and len(about.palette) == len(about.names)


@pytest.mark.parametrize(
    "about, says",
    [
        ("[]", "input should be an object"),
        ("{", "it is not JSON"),
        ('{"classes": "wall"}', "classes = wall: input should be a valid (list|array)"),
        ('{"classes": ["wall", 3]}', "classes.1 = 3: input should be a valid string"),
        ('{"classes": ["wall", ""]}', "expected strings that are not empty"),
        ('{"classes": []}', "at least 1 item"),
        ('{"classes": ["a", "a"]}', "'a' occurs more than once"),
        ('{"classes": ["a"], "unseen": ["b"]}', "unseen names 'b', which is not among the classes a"),
        ('{"classes": ["a"], "unsene": ["a"]}', "there is no field 'unsene'"),
        ('{"classes": ["a"], "background": 0}', 'background is "ignore" or a class name'),
        ('{"classes": ["a"], "first": 1, "ids": {"0": "a"}}', "ids and first exclude each other"),
        ('{"classes": ["a"], "ids": {"x": "a"}}', "ids.x.* = x: input should be a valid integer"),
        ('{"classes": ["a"], "ids": {"70000": "a"}}', "less than or equal to 65535"),
        ('{"classes": ["a"], "colors": {"a": [0, 0, 300]}}', "= 300: input should be less than or equal to 255"),
        ('{"classes": ["a", "b"], "colors": {"a": "#000000", "b": [0, 0, 0]}}', r"colour \[0, 0, 0\] has two meanings"),
        ('{"classes": ["a"], "train": {"images": "x/*.png", "labels": "{}"}}', "a pattern contains {} once"),
        ('{"classes": ["a"], "train": {"images": "../{}", "labels": "{}"}}', "a path below the root is needed"),
        ('{"classes": ["a"], "train": {"images": "/x/{}", "labels": "{}"}}', "a path below the root is needed"),
        (json.dumps({"classes": [str(i) for i in range(251)]}), "at most 250 items"),
    ],
)
def test_wrong_descriptions(tmp_path, about, says):
    "The error names the file, the field and the value, in one line."
    (tmp_path / "dataset.json").write_text(about)
    with pytest.raises(ValueError, match=says) as error:
        read_description(tmp_path / "dataset.json")
    assert str(error.value).startswith(str(tmp_path / "dataset.json")) and "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("language", ["C", "POSIX"])
def test_descriptions_are_utf_8(tmp_path, encoding, language):
    "Whatever the language of the machine."
    text = json.dumps({"classes": ["café", "thé"]}, ensure_ascii=False)
    (tmp_path / "dataset.json").write_text(text, encoding)
    code = "import sys; from otseg.descriptions import *; print(ascii(read_description(sys.argv[1]).names))"
    environment = os.environ | {"LC_ALL": language, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    shown = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "dataset.json")], env=environment, capture_output=True, text=True
    )
    assert shown.stdout.strip() == ascii(("café", "thé")), shown.stderr


def test_latin_1_is_named(tmp_path):
    (tmp_path / "dataset.json").write_bytes('{"classes": ["café"]}'.encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_description(tmp_path / "dataset.json")


# class names


@pytest.mark.parametrize("names", [["Cat", "cat"], ["café", "cafe\u0301"], ["a  b", " a b"], ["Straße", "STRASSE"]])
def test_spellings_of_one_word(names):
    with pytest.raises(ValueError, match="occurs more than once"):
        word_groups(names)


def test_names_with_commas():
    assert split_words('"salt, pepper", cup') == split_words('["salt, pepper", "cup"]') == ["salt, pepper", "cup"]
    assert word_groups('"salt, pepper|spice", cup') == {"salt, pepper": ["salt, pepper", "spice"], "cup": ["cup"]}
    with pytest.raises(ValueError, match="is not a JSON list"):
        split_words('["cup"')


def test_names_with_commas_can_be_unseen(tmp_path):
    write_images(tmp_path, ["a"], quadrants(0, 1, 1, 0))
    describe(tmp_path, classes=["wall", "salt, pepper"], **BOTH)
    assert load_benchmark(BenchmarkSource("folder", root=tmp_path, unseen='"Salt, pepper"')).unseen == (1,)


def test_synonyms_are_averaged(tmp_path):
    "As in prediction: the normalised mean of the words; a class with one word keeps its embedding bit for bit."
    write_images(tmp_path, ["a"], quadrants(0, 1, 1, 0))
    describe(tmp_path, classes=["zero|one", "two"], **BOTH)
    bench = load_benchmark(BenchmarkSource("folder", root=tmp_path, clip="digits_clip"))
    recipe = resolve("folder", clip="digits_clip", num_templates=2)
    text = load_class_embeddings(recipe, bench, clip := bench.clip())
    words = class_embeddings(["zero", "one", "two"], TEMPLATES[:2], clip)
    mean = torch.nn.functional.normalize(words[:2].mean(0), dim=-1)
    assert bench.classes == ("zero", "two") and torch.equal(text[1], words[2])
    assert torch.allclose(text[0], mean, atol=1e-6)


def test_the_name_of_a_dataset_is_that_of_its_runs(tmp_path):
    root = tmp_path / "my kitchen"
    write_images(root, ["a"], quadrants(0, 1, 1, 0))
    describe(root, classes=["wall", "cup"], **BOTH)
    assert load_benchmark(BenchmarkSource("folder", root=root)).name == "my kitchen"
    assert run_name(resolve("folder", dataset_name="my kitchen")) == "my_kitchen0-inductive-mpsa-seed0"


# patterns and lists


@pytest.mark.parametrize(
    "path, pattern, name",
    [
        ("images/a.jpg", "images/{}.jpg", "a"),
        ("images/a.JPG", "images/{}.jpg", "a"),
        ("images/town/a_left.png", "images/{}_left.png", "town/a"),
        ("a.tif", "{}", "a"),
        ("images/a.b.webp", "images/{}", "a.b"),
        ("images/a.txt", "images/{}", None),
        ("images/.jpg", "images/{}.jpg", None),
        ("other/a.jpg", "images/{}.jpg", None),
    ],
)
def test_names_in_patterns(path, pattern, name):
    assert name_in(path, pattern) == name


def test_folders_in_names(tmp_path):
    "As in Cityscapes; files of other kinds beside the label maps do not matter."
    trees.write_cityscapes(tmp_path)
    files = open_dataset("cityscapes", tmp_path).load("train").files
    assert [image.parent.name for image, _ in files] == ["aachen", "aachen", "bremen", "ulm"]
    assert all(image.name.split("_left")[0] == label.name.split("_gtFine")[0] for image, label in files)


LISTS = {
    "names": "b\na\n",
    "windows": "\ufeffb\r\n\r\na\r\n",
    "endings": "b.jpg\na.JPG\n",
    "flags": "b  1\na -1\n",
    "paths": "images/b.jpg\n/images/a.jpg\n",
    "columns": "images/b.jpg labels/b.png\nimages/a.jpg  labels/a.png\n",
    "slashes": "/images/b.jpg /labels/b.png\n/images/a.jpg /labels/a.png",
    "absolute": "{root}/images/b.jpg\n{root}/images/a.jpg {root}/labels/a.png\n",
    "backslashes": "images\\b.jpg\nimages\\a.jpg\n",
}


@pytest.mark.parametrize("form", LISTS)
def test_forms_of_lists(tmp_path, form):
    write_images(tmp_path, ["a", "b", "c"], quadrants(0, 1, 1, 0))
    (tmp_path / "images/a.jpg").rename(tmp_path / "images/a.JPG")
    (tmp_path / "list.txt").write_text(LISTS[form].format(root=tmp_path), encoding="utf-8", newline="")
    part = ONE_PART | {"list": "list.txt"}
    describe(tmp_path, classes=["wall", "cup"], train=part, val=part)
    files = open_dataset("folder", tmp_path).load("train").files
    assert [(image.stem, label.stem) for image, label in files] == [("b", "b"), ("a", "a")]


def test_names_with_blanks_in_a_list(tmp_path):
    write_images(tmp_path, ["my photo 1", "my photo"], quadrants(0, 1, 1, 0))
    (tmp_path / "list.txt").write_text("my photo\nmy photo 1.jpg\n")
    part = ONE_PART | {"list": "list.txt"}
    describe(tmp_path, classes=["wall", "cup"], train=part, val=part)
    assert [p.stem for p, _ in open_dataset("folder", tmp_path).load("val").files] == ["my photo", "my photo 1"]


@pytest.mark.parametrize(
    "text, says",
    [
        ("a\nz\n", "1 of 2 images are missing, the first for z"),
        ("a b c d\n", "line 1 of .*list.txt is 'a b c d'"),
        ("images/a.jpg labels/z.png\n", "1 of 1 label maps are missing, the first for .*a.jpg"),
    ],
)
def test_wrong_lists(tmp_path, text, says):
    write_images(tmp_path, ["a"], quadrants(0, 1, 1, 0))
    (tmp_path / "list.txt").write_text(text)
    part = ONE_PART | {"list": "list.txt"}
    describe(tmp_path, classes=["wall", "cup"], train=part, val=part)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        open_dataset("folder", tmp_path).load("train")


def test_labels_of_the_second_column_stay_inside(tmp_path):
    write_images(tmp_path / "in", ["a"], quadrants(0, 1, 1, 0))
    write_images(tmp_path, ["a"], quadrants(0, 1, 1, 0))
    part = ONE_PART | {"list": "list.txt"}
    describe(tmp_path / "in", classes=["wall", "cup"], train=part, val=part)
    (tmp_path / "in/list.txt").write_text("images/a.jpg ../labels/a.png\n")
    with pytest.raises(ValueError, match="outside of"):
        open_dataset("folder", tmp_path / "in").load("train")


def test_links_need_a_word(tmp_path):
    write_images(tmp_path / "disk", ["a"], quadrants(0, 1, 1, 0))
    root = tmp_path / "mine"
    root.mkdir()
    for kind in ("images", "labels"):
        (root / kind).symlink_to(tmp_path / "disk" / kind)
    about = {"classes": ["wall", "cup"]} | BOTH
    describe(root, **about)
    with pytest.raises(ValueError, match='"links": true'):
        open_dataset("folder", root).load("train")
    describe(root, links=True, **about)
    assert len(open_dataset("folder", root).load("train")) == 1


def test_links_in_a_circle(tmp_path):
    write_images(tmp_path, ["a"], quadrants(0, 1, 1, 0))
    (tmp_path / "images/again").symlink_to(tmp_path / "images")
    describe(tmp_path, classes=["wall", "cup"], **BOTH)
    assert len(open_dataset("folder", tmp_path).load("train")) == 1


def test_voc_with_the_list_of_added_images(tmp_path):
    "voc_aug.py writes trainaug.txt, and aug.txt without the images of train.txt."
    trees.write_voc(tmp_path)
    lists = tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation"
    (lists / "trainaug.txt").rename(lists / "aug.txt")
    assert len(open_dataset("voc", tmp_path).load("train")) == 8


def test_coco_in_the_layout_of_the_documentation(tmp_path):
    trees.write_coco(tmp_path)
    root = tmp_path / "coco_stuff164k"
    (root / "images").mkdir()
    for split in ("train2017", "val2017"):
        (root / split).rename(root / "images" / split)
    assert len(open_dataset("coco", tmp_path).load("train")) == 4


def test_a_description_elsewhere(tmp_path):
    "A dataset stays where it is, and its description lies beside the experiment."
    for s in ("train", "val"):
        labels, images = f"CamVid/{s}annot/{{}}.png", f"CamVid/{s}/{{}}.png"
        write_images(tmp_path, "abcd", quadrants(0, 3, 10, 11), labels, images)
    (tmp_path / "mine.json").write_text(
        json.dumps(
            {"classes": ["sky", "road"], "ids": {"0": "sky", "3": "road", "10": "road"}, "ignore": [11]}
            | {s: {"images": f"{s}/{{}}.png", "labels": f"{s}annot/{{}}.png"} for s in ("train", "val")}
        )
    )
    bench = load_benchmark(BenchmarkSource("folder", root=tmp_path / "CamVid", description=tmp_path / "mine.json"))
    assert bench.name == "mine" and len(bench.images("val")) == 4
    assert {*torch.cat([bench.images("train")[i]["label"].flatten() for i in range(4)]).tolist()} == {0, 1, IGNORE}
    shipped = load_benchmark(BenchmarkSource("folder", root=tmp_path, description="camvid"))
    assert shipped.name == "camvid" and shipped.classes[10] == "bicyclist"
    with pytest.raises(ValueError, match="camvid has its own description"):
        open_dataset("camvid", tmp_path, tmp_path / "mine.json")


# meanings of label maps


def labels_of(root):
    return open_dataset("folder", root).load("train")[0]["label"]


def test_ids_through_a_table(tmp_path):
    "Several ids may share a class, 255 may be one, and ids above 255 are possible."
    write_images(tmp_path, ["a"], quadrants(0, 255, 7, 9))
    describe(tmp_path, classes=["wall", "cup"], ids={"0": "wall", "255": "cup", "7": "wall"}, ignore=[9], **BOTH)
    assert labels_of(tmp_path)[:: H // 2, :: W // 2].tolist() == [[0, 1], [0, IGNORE]]
    Image.fromarray(quadrants(0, 1, 1, 0).astype(np.uint16) * 1000).save(tmp_path / "labels/a.png")
    describe(tmp_path, classes=["wall", "cup"], ids={"0": "wall", "1000": "cup"}, **BOTH)
    assert labels_of(tmp_path)[:: H // 2, :: W // 2].tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA"])
def test_label_maps_in_colours(tmp_path, mode):
    colors = np.array([(128, 128, 128), (128, 0, 0), (192, 192, 128), (0, 0, 0)], np.uint8)
    write_images(tmp_path, ["a"], colors[quadrants(0, 1, 2, 3)])
    Image.open(tmp_path / "labels/a.png").convert(mode, palette=Image.Palette.ADAPTIVE).save(tmp_path / "labels/a.png")
    about = {"wall": "#808080", "cup": [[128, 0, 0], [192, 192, 128]]}
    describe(tmp_path, classes=["wall", "cup"], colors=about, ignore=[[0, 0, 0]], **BOTH)
    assert labels_of(tmp_path)[:: H // 2, :: W // 2].tolist() == [[0, 1], [1, IGNORE]]
    describe(tmp_path, classes=["wall", "cup"], colors=about, **BOTH)
    with pytest.raises(ValueError, match=r"a.png: it has 1 colours without a class, such as \[0, 0, 0\]"):
        labels_of(tmp_path)


# the check


def check_of(root, **about):
    describe(root, **about)
    return check("folder", root)


def test_masks_of_0_and_255(tmp_path):
    "The remedy is right: with it, both classes occur."
    write_images(tmp_path, ["a", "b"], quadrants(0, 255, 255, 0))
    found, problems = check_of(tmp_path, classes=["table", "cup"], **BOTH)
    assert any("50% of the pixels have no class (id 255: 50%)" in line for line in found)
    assert all("never occur in 2 label maps: cup; if 255 is 'cup', write \"ids\"" in line for line in problems)
    assert check_of(tmp_path, classes=["table", "cup"], ids={"0": "table", "255": "cup"}, **BOTH)[1] == []


def test_a_void_id_is_no_reason_to_shift(tmp_path):
    "Ids 0 to 10 and 11 for void: 0 occurs, so the labels do not count from 1."
    write_images(tmp_path / "CamVid", ["train/a", "val/a"], quadrants(0, 3, 10, 11), "{}.png", "{}.jpg")
    parts = {s: {"images": f"{s}/{{}}.jpg", "labels": f"{s}/{{}}.png"} for s in ("train", "val")}
    _, problems = check_of(tmp_path / "CamVid", classes=list(described("camvid").names), **parts)
    assert problems and all("have the ids 11" in line and "to ignore in the description" in line for line in problems)
    assert not any("count from 1" in line for line in problems)


def test_files_that_are_left_out(tmp_path):
    write_images(tmp_path, ["a"], quadrants(0, 1, 1, 0))
    for name in ("._a.jpg", ".DS_Store", "Thumbs.db", "notes.txt", "b.svg"):
        (tmp_path / "images" / name).write_bytes(b"\0\5\26\7")
    found, problems = check_of(tmp_path, classes=["wall", "cup"], **BOTH)
    assert problems == [] and "train: 2 files beside the images are left out: 1 .svg, 1 .txt" in [
        line.replace("1 .txt, 1 .svg", "1 .svg, 1 .txt") for line in found
    ]


def test_one_name_twice(tmp_path):
    write_images(tmp_path, ["a"], quadrants(0, 1, 1, 0))
    Image.new("RGB", (W, H)).save(tmp_path / "images/a.png")
    part = ONE_PART | {"images": "images/{}"}
    _, problems = check_of(tmp_path, classes=["wall", "cup"], train=part, val=part)
    assert all("share a name" in line and "a.jpg" in line and "a.png" in line for line in problems) and problems
    with pytest.raises(ValueError, match="share a name"):
        open_dataset("folder", tmp_path).load("train")


def turn_images(root, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for path in root.glob("images/*.jpg"):
        Image.open(path).save(path, exif=exif)


@pytest.mark.parametrize("orientation, says", [(3, "EXIF orientation, the first is a.jpg with 3"), (6, "tion 6")])
def test_orientations_are_named(tmp_path, orientation, says):
    write_images(tmp_path, ["a", "b"], quadrants(0, 1, 1, 1))
    turn_images(tmp_path, orientation)
    _, problems = check_of(tmp_path, classes=["wall", "cup"], **BOTH)
    assert len(problems) == 2 and all(says in line for line in problems)


def test_a_fault_of_all_files_is_one_line():
    faults = [f"/data/{i}.png is {i} x 4 pixels" for i in range(90)] + ["/data/x.png is damaged"]
    assert group_faults(faults, 100) == [
        "90 of 100 opened pairs: /data/0.png is 0 x 4 pixels",
        "1 of 100 opened pairs: /data/x.png is damaged",
    ]


def test_the_picture(tmp_path):
    "Pixels of a class have its colour over the image; others keep the image."
    write_images(tmp_path, list("abcde"), quadrants(0, 1, 255, 0))
    describe(tmp_path, classes=["wall", "cup"], palette=["#ff0000", "#00ff00"], **BOTH)
    figure = draw_pairs(open_dataset("folder", tmp_path))
    drawn = [ax for ax in figure.axes if ax.images]
    assert len(drawn) == 8 and [text.get_text() for text in figure.legends[0].get_texts()] == ["wall", "cup"]
    shown, image = drawn[0].images[0].get_array(), read_image(tmp_path / "images/a.jpg").permute(1, 2, 0).numpy()
    assert np.allclose(shown[H // 2 :, : W // 2], image[H // 2 :, : W // 2])
    assert (shown[: H // 2, : W // 2, 0] >= 0.55).all() and (shown[: H // 2, : W // 2, 1] <= 0.45).all()


# repairs


@pytest.mark.parametrize("orientation", range(2, 9))
def test_repaired_orientations(tmp_path, orientation):
    "Where height and width change places, the label map is turned with its image: a marked corner stays together."
    root, ids = tmp_path / "raw", quadrants(1, 0, 0, 0)
    write_images(root, ["a"], ids)
    Image.fromarray(255 * ids).convert("RGB").save(root / "images/a.jpg", quality=100)  # the image shows its labels
    turn_images(root, orientation)
    describe(root, classes=["wall", "cup"], **BOTH)
    before = sorted((p.relative_to(root), p.read_bytes()) for p in root.rglob("*") if p.is_file())
    assert main(["check", "folder", str(root), "--fix", str(tmp_path / "new")]) == 0
    assert before == sorted((p.relative_to(root), p.read_bytes()) for p in root.rglob("*") if p.is_file())
    item = open_dataset("folder", tmp_path / "new").load("train")[0]
    fits = torch.equal((item["image"][0] > 0.5).long(), item["label"])
    assert fits == (orientation > 4)


def test_repaired_formats(tmp_path):
    "Colours become ids, 16 bits become 8, plain images stay as they are, and what cannot be read is named."
    root, colors = tmp_path / "raw", np.array([(9, 9, 9), (1, 2, 3)], np.uint8)
    write_images(root, ["a", "b", "c"], colors[quadrants(0, 1, 1, 0)])
    Image.fromarray(np.full((H, W), 257 * 77, np.uint16)).save(root / "images/b.png")
    (root / "images/b.jpg").unlink()
    (root / "images/c.jpg").write_bytes(b"damaged")
    part = ONE_PART | {"images": "images/{}"}
    about = {"colors": {"wall": [9, 9, 9], "cup": [1, 2, 3]}, "train": part, "val": part}
    describe(root, classes=["wall", "cup|mug"], unseen=["cup"], **about)
    assert main(["check", "folder", str(root), "--fix", str(tmp_path / "no"), "--dry-run"]) == 1
    assert not (tmp_path / "no").exists()
    assert main(["check", "folder", str(root), "--fix", str(tmp_path / "new")]) == 1
    disk = open_dataset("folder", tmp_path / "new")
    assert disk.about.words["cup"] == ["cup", "mug"] and disk.about.unseen_indices == (1,) and disk.about.name == "raw"
    assert (tmp_path / "new/images/train/a.jpg").read_bytes() == (root / "images/a.jpg").read_bytes()
    assert [p.name for p, _ in disk.load("val").files] == ["a.jpg", "b.png"]
    assert torch.equal(disk.load("val")[1]["image"], torch.full((3, H, W), 77 / 255))
    assert torch.equal(disk.load("val")[0]["label"], torch.from_numpy(quadrants(0, 1, 1, 0)).long())


@pytest.mark.parametrize("out", ["raw", "raw/copy", ".", "full"])
def test_a_copy_never_touches_other_files(tmp_path, out, capsys):
    write_images(tmp_path / "raw", ["a"], quadrants(0, 1, 1, 0))
    describe(tmp_path / "raw", classes=["wall", "cup"], **BOTH)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    files = sorted(tmp_path.rglob("*"))
    assert main(["check", "folder", str(tmp_path / "raw"), "--fix", str(tmp_path / out)]) == 2
    assert "choose another" in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == files
