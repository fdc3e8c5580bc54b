"""The command line: every command, its exit status and its messages."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY
from PIL import Image

from otseg import cli, predict
from otseg.mask_files import mask_paths
from otseg.recipes import Recipe

COMMANDS = ("check", "train", "evaluate", "predict", "convert", "export", "push", "tables")
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def folder_of(path, *names):
    path.mkdir(exist_ok=True)
    for name in names:
        IMAGE.convert("RGB").save(path / name)
    return path


# predict


def test_predict_skips_an_unreadable_image(tmp_path, capsys):
    folder = folder_of(tmp_path / "in", "a.png", "b.jpg", "d.png")
    (folder / "c.jpg").write_bytes((folder / "b.jpg").read_bytes()[:100])
    files = [*map(str, sorted(folder.iterdir())), str(tmp_path / "gone.png")]
    words = "six, page|tissue"
    status = cli.main(["predict", *files, "--classes", words, "--out", str(tmp_path / "out"), "--overlay"])
    out, err = capsys.readouterr()
    assert status == 1 and "3 of 5 images segmented" in out and "2 skipped" in out
    assert "c.jpg cannot be read as an image" in err and "there is no such file" in err and "predict: 100%" in err
    expected = [f"{x}{s}.png" for x in "abd" for s in ("", "_overlay")]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == expected
    assert (np.asarray(Image.open(tmp_path / "out/a.png")) == predict.load()(IMAGE, words).labels).all()


def test_predict_reads_folders_and_writes_coco(tmp_path, capsys):
    pytest.importorskip("pycocotools")
    folder = folder_of(tmp_path / "in", "a.png")
    (folder / "notes.txt").write_text("not an image")
    assert cli.main(["predict", str(folder), "--out", str(tmp_path / "out"), "--coco", "--quiet"]) == 0
    assert "predict:" not in capsys.readouterr().err
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.png", "a.json"}


def test_masks_never_overwrite(tmp_path):
    a, b = folder_of(tmp_path / "a", "x.png", "x.jpg"), folder_of(tmp_path / "b", "x.png")
    names = lambda images: [mask.name for mask in mask_paths(images, tmp_path / "out").values()]
    assert names([a]) == ["x.jpg.png", "x.png.png"]
    assert names([a, b]) == ["a_x.jpg.png", "a_x.png.png", "b_x.png.png"]
    with pytest.raises(ValueError, match="overwrite"):
        mask_paths([b], b)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--classes", "cat"], "does not know 'cat'"),
        (["--classes", "six,six"], "more than once"),
        (["--checkpoint", "gone.safetensors"], "no checkpoint at"),
        (["--eps", "-1"], "eps = -1"),
        (["--background", "2"], "background = 2"),
    ],
    ids=str,
)
def test_predict_stops_at_a_mistake_that_concerns_every_image(tmp_path, capsys, args, message):
    folder = folder_of(tmp_path / "in", "a.png")
    assert cli.main(["predict", str(folder), "--out", str(tmp_path / "out"), *args]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


# train and evaluate


def test_train_continues_and_evaluate_measures(few_scenes, tmp_path, capsys):
    out = tmp_path / "run"
    options = [f"--{name}={value}" for name, value in TINY.items()]  # names with underscores
    assert cli.main(["train", "--dataset=digits", f"--out={out}", *options]) == 0
    assert "| ensemble |" in capsys.readouterr().out
    hyphens = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    assert cli.main(["train", "--dataset=digits", f"--out={out}", *hyphens]) == 0
    record = str(tmp_path / "record.json")
    assert cli.main(["evaluate", str(out / "last.safetensors"), "--images=2", f"--record={record}"]) == 0
    assert "| dense_clip |" in capsys.readouterr().out and Path(record).is_file()


def test_train_takes_every_field_of_a_recipe(capsys):
    assert cli.main(["train", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')} " in printed for name in Recipe.__pydantic_fields__)


# every command


@pytest.mark.parametrize(
    "args, message",
    [
        (["train"], "--dataset"),
        (["train", "--dataset=digit"], "no recipe for dataset = 'digit'"),
        (["train", "--dataset=digits", "--eps=0"], "eps = 0.0"),
        (["train", "--dataset=digits", "--max-iters=x"], "--max-iters"),
        (["train", "--dataset=digits", "--learning-rate=1"], "--learning-rate"),
        (["check", "digits"], "dataset = 'digits' is not one of ade, camvid, cityscapes, coco, context, voc, folder"),
        (["evaluate", "gone.safetensors"], "gone.safetensors"),
        (["convert", "gone.pth", "a.safetensors"], "gone.pth"),
        (["export"], "give either --onnx OUT.onnx or --half OUT.safetensors"),
        (["export", "--onnx=a", "--half=b"], "give either --onnx OUT.onnx or --half OUT.safetensors"),
        (["export", "--half=a.safetensors"], "--half needs a checkpoint"),
        (["tables", "missing", "t9"], "table = 't9'"),
        (["tables", "mising", "t1"], "'missing'"),
        (["predikt"], "'predikt'"),
    ],
    ids=" ".join,
)
def test_a_user_s_mistake_is_one_message_and_status_2(args, message, capsys):
    assert cli.main(args) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_check_ends_with_status_1_if_there_are_problems(tmp_path, capsys):
    assert cli.main(["check", "voc", str(tmp_path)]) == 1
    assert "PROBLEM no dataset 'voc'" in capsys.readouterr().out


@pytest.mark.parametrize("error, status", [(SystemExit("stopped"), 1), (KeyboardInterrupt("stopped"), 130)], ids=repr)
def test_a_stopped_training_says_how_to_continue(error, status, monkeypatch, capsys):
    def stopped(*args, **options):
        raise error

    monkeypatch.setattr(import_module("otseg.training"), "fit", stopped)
    assert cli.main(["train", "--dataset=digits"]) == status
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name, capsys):
    assert cli.main([name, "--help"]) == 0
    assert f"Usage: otseg {name} " in capsys.readouterr().out


def test_help_names_every_reading_of_the_patches(capsys):
    assert cli.main(["predict", "--help"]) == 0
    assert {*import_module("otseg.encoder").DENSE, "last", "earlier"} <= {*re.findall(r"\w+", capsys.readouterr().out)}


def test_help_and_version(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out.strip() == import_module("otseg").__version__


def test_the_installed_script_starts_without_pytorch():
    script = Path(sys.executable).with_name("otseg")
    assert script.is_file(), "pip install -e . makes it"
    assert "predict" in subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
    code = "import sys; from otseg.cli import main; main(['predict', '--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
