"""No traceback for a user's mistake: every command with wrong values for every option, stops, and odd images."""

import inspect
import io
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image

import otseg
from otseg import cli
from otseg.digits import Digits
from otseg.predict import load

SHIPPED = str(Path(otseg.__file__).parent / "assets/digits_otseg.safetensors")
WRONG = ("", "maybe", "-1", "nan", "1e999", "./gone/gone.json", "\N{CAT}", "0")
START = {  # command -> arguments with which it would work on
    "check": ["folder", "gone"],
    "train": ["--dataset", "folder", "--root", "gone"],
    "evaluate": ["gone.safetensors"],
    "predict": ["gone.png"],
    "convert": ["gone.pth", "out.safetensors"],
    "export": ["gone.safetensors", "--onnx", "out.onnx"],
    "tables": ["missing", "t1", "--seeds", "1"],
}


def options_of(command):
    context = typer.Context(typer.main.get_command(cli.app))
    _, found, _ = typer.main.get_command(cli.app).resolve_command(context, [command])
    return [p.opts[0] for p in found.params if p.param_type_name == "option" and p.opts[0] != "--help"]


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OTSEG_DATA", raising=False)
    return tmp_path


@pytest.mark.parametrize("command", START)
def test_wrong_values_for_every_option(command, empty, capsys):
    tried = 0
    for option in options_of(command):
        for value in WRONG:
            status = cli.main([command, *START[command], f"{option}={value}"])
            printed = capsys.readouterr()
            assert status in (0, 1, 2), (option, value)
            assert "Traceback" not in printed.err and "fault of otseg" not in printed.err, (option, value, printed.err)
            assert status != 2 or printed.err.strip(), (option, value)
            tried += 1
    assert tried >= len(WRONG)


@pytest.fixture
def photo(empty):
    pixels = (255 * Digits("val", 1)[0]["image"]).byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save("photo.png")
    return "photo.png"


@pytest.mark.parametrize(
    "args, message",
    [
        (["predict", "photo.png", "--device", "foo"], "device = 'foo' is not on this machine: choose cpu"),
        (["predict", "photo.png", "--out", "photo.png"], "nothing can be written to photo.png"),
        (["predict", "nothing"], "no such file"),
        (["predict", "folder"], "no image in folder (.jpg"),
        (["train", "--dataset", "digits", "--per-device", "-1"], "per_device = -1 must be at least 1"),
        (["train", "--dataset", "digits", "--workers", "-1"], "workers = -1 must be at least 0"),
        (["train", "--dataset", "digits", "--tracker", "paper"], "tracker = 'paper' is not one of none"),
        (["train", "--dataset", "digits", "--photometric=maybe"], "--photometric"),
        (["train", "--dataset", "digits", "--clip-config", "gone.json"], "no clip_config at"),
        (["train", "--dataset", "digits", "--out", "photo.png"], "nothing can be written to photo.png"),
        (["evaluate", SHIPPED, "--record", "photo.png/r.json"], "nothing can be written to photo.png"),
        (["evaluate", SHIPPED, "--workers", "-2"], "workers = -2 must be at least 0"),
        (["export", "--onnx", "a.onnx", "--size", "50", "50"], "multiples of the patch, for example 48 48"),
        (["tables", "missing", "t1", "--seeds", "-1"], "seeds = -1 must be a whole number"),
    ],
    ids=" ".join,
)
def test_one_line_and_status_2(photo, capsys, args, message):
    Path("folder").mkdir()
    assert cli.main(args) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_an_unknown_error_keeps_its_traceback(photo, monkeypatch, capsys):
    monkeypatch.setattr("otseg.predict.load", lambda *args, **options: 1 / 0)
    assert cli.main(["predict", photo]) == 1
    error = capsys.readouterr().err
    assert "ZeroDivisionError" in error and "this is a fault of otseg" in error and "please report it" in error


def start(*args, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "otseg.cli", *args], stderr=subprocess.PIPE, text=True, env={**os.environ}, **options
    )


@pytest.mark.parametrize("command", ["train", "predict"])
def test_ctrl_c(photo, command):
    many = ["photo.png", *(f"{i}.png" for i in range(400))]
    for name in many[1:]:
        os.link("photo.png", name)
    args = [*many, "--out", "masks"] if command == "predict" else ["--dataset", "digits", "--out", "run"]
    process = start(command, *args, stdout=subprocess.DEVNULL)
    begun = Path("masks/photo.png" if command == "predict" else "run/log.jsonl")
    for _ in range(600):
        if begun.is_file() and begun.stat().st_size:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in error
    assert ("the same command continues" if command == "train" else "stopped") in error


def test_a_closed_pipe(empty):
    process = start("tables", "commands", "t4", "--dataset", "coco", "--seeds", "400", stdout=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(60) == 141 and error == ""


# predict as people use it


@pytest.fixture(scope="module")
def seg():
    return load(device="cpu")


def test_open_files_are_images(seg, photo):
    want = seg(photo).labels
    for source in (io.BytesIO(Path(photo).read_bytes()), open(photo, "rb")):
        assert (seg(source).labels == want).all()


@pytest.mark.parametrize("dtype", ["double", "bfloat16", "half"])
def test_other_precisions(photo, dtype):
    seg, want = load(device="cpu"), load(device="cpu")(photo).labels
    getattr(seg.model, dtype)()
    assert (seg(photo).labels == want).mean() > {"double": 0.9999, "bfloat16": 0.93, "half": 0.99}[dtype]
    assert seg(photo, ["three", "small brick"]).labels.max() <= 1


def test_a_segmenter_can_be_pickled(seg, photo):
    assert (pickle.loads(pickle.dumps(seg))(photo).labels == seg(photo).labels).all()


def test_words_are_numbers(seg, photo):
    for wrong in ("sky", True + 1, float("nan")):
        with pytest.raises(ValueError, match="background = .*expected a number from 0 to 1"):
            seg(photo, ["three", "brick"], background=wrong)


def test_coco_results_load(seg, photo, tmp_path):
    coco = pytest.importorskip("pycocotools.coco").COCO()
    result = seg(photo)
    coco.dataset = {
        "images": [{"id": 7, "height": 96, "width": 96}],
        "categories": [{"id": i, "name": name} for i, name in enumerate(result.classes)],
        "annotations": [],
    }
    coco.createIndex()
    loaded = coco.loadRes(str(result.save(tmp_path / "7.json", image_id=7)))
    found = loaded.loadAnns(loaded.getAnnIds(imgIds=[7]))
    assert [a["category_id"] for a in found] == sorted(np.unique(result.labels).tolist())
    assert all(
        0 < a["score"] <= 1 and (loaded.annToMask(a) == (result.labels == a["category_id"])).all() for a in found
    )


@pytest.mark.parametrize("k", [25, 60, 171])
def test_a_legend_leaves_the_photo_readable(photo, k):
    "The photo keeps its size, whatever the number and the length of the names."
    from otseg.predict import Result

    sizes = []
    for count, length in ((3, 4), (k, 60)):
        scores = torch.rand(count, 12, 12, generator=torch.Generator().manual_seed(0))
        names = tuple(f"{i} " + "x" * length for i in range(count))
        figure = Result(Image.open(photo), names, scores).show()
        figure.canvas.draw()
        box = figure.axes[0].get_window_extent()
        sizes.append(box.width * box.height)
        text = [t.get_text() for legend in figure.legends for t in legend.get_texts()]
        assert len(text) <= 31 and (count < 30 or "other" in text[-1])
    assert sizes[1] > 0.8 * sizes[0]


def test_folders_of_folders(photo, tmp_path, capsys):
    (tmp_path / "in/deep").mkdir(parents=True)
    for name in ("a.png", "deep/a.png", "deep/._a.png"):
        os.link(photo, tmp_path / "in" / name)
    assert cli.main(["predict", "in", "--out", "flat", "--quiet"]) == 0
    assert cli.main(["predict", "in", "--out", "all", "--quiet", "--recursive"]) == 0
    assert [len(list(Path(folder).iterdir())) for folder in ("flat", "all")] == [1, 2]


def test_names_of_masks_and_overlays(photo, capsys):
    os.link(photo, "photo_overlay.png")
    assert cli.main(["predict", photo, "photo_overlay.png", "--out", "masks", "--overlay", "--quiet"]) == 0
    assert len(list(Path("masks").iterdir())) == 4


def test_every_command_says_what_it_does():
    assert all(inspect.getdoc(command.callback) for command in cli.app.registered_commands)
