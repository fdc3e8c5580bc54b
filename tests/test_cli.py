"""`otseg ...`: many images, one of them bad; and the other commands reach their functions."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from otseg import cli, predict

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def folder_of(path, *names):
    path.mkdir(exist_ok=True)
    for name in names:
        IMAGE.convert("RGB").save(path / name)
    return path


def test_one_bad_image_is_skipped(tmp_path, capsys):
    folder = folder_of(tmp_path / "in", "a.png", "b.jpg", "d.png")
    (folder / "c.jpg").write_bytes((folder / "b.jpg").read_bytes()[:100])
    status = cli.main(
        [
            "predict",
            *map(str, sorted(folder.iterdir())),
            str(tmp_path / "gone.png"),
            "--classes",
            "six, page|tissue",
            "--out",
            str(tmp_path / "out"),
            "--overlay",
        ]
    )
    out, err = capsys.readouterr()
    assert status == 1 and "3 of 5 images segmented" in out and "2 skipped" in out
    assert "c.jpg is damaged" in err and "no image at" in err and "predict: 100%" in err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        f"{x}{s}.png" for x in "abd" for s in ("", "_overlay")
    ]
    assert (np.asarray(Image.open(tmp_path / "out/a.png")) == predict.load()(IMAGE, "six, page|tissue").labels).all()


def test_folder_quiet_coco_and_success(tmp_path, capsys):
    pytest.importorskip("pycocotools")
    folder = folder_of(tmp_path / "in", "a.png")
    (folder / "notes.txt").write_text("not an image, and not meant as one")
    assert cli.main(["predict", str(folder), "--out", str(tmp_path / "out"), "--coco", "--quiet"]) == 0
    assert "predict:" not in capsys.readouterr().err and {p.name for p in (tmp_path / "out").iterdir()} == {
        "a.png",
        "a.json",
    }


def test_masks_never_overwrite(tmp_path):
    a, b = folder_of(tmp_path / "a", "x.png", "x.jpg"), folder_of(tmp_path / "b", "x.png")
    assert [p.name for p in cli.outputs([a], tmp_path / "out").values()] == ["x.jpg.png", "x.png.png"]
    assert [p.name for p in cli.outputs([a, b], tmp_path / "out").values()] == [
        "a_x.jpg.png",
        "a_x.png.png",
        "b_x.png.png",
    ]
    with pytest.raises(ValueError, match="overwrite"):
        cli.outputs([b], b)


@pytest.mark.parametrize(
    "args, says",
    [
        (["--classes", "cat"], "does not know 'cat'"),
        (["--classes", "six,six"], "more than once"),
        (["--checkpoint", "gone.safetensors"], "no checkpoint at"),
        (["--eps", "-1"], "eps = -1"),
        (["--background", "2"], "background = 2"),
    ],
    ids=str,
)
def test_what_is_wrong_for_all_stops_at_once(tmp_path, capsys, args, says):
    folder = folder_of(tmp_path / "in", "a.png")
    assert cli.main(["predict", str(folder), "--out", str(tmp_path / "out"), *args]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_help_version_and_unknown_command(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)
    assert cli.main(["--version"]) == 0 and cli.main(["predikt"]) == 2
    assert "'predikt' is not a command" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_commands_reach_their_functions(name, capsys):
    """Each module has the function, and it takes its arguments: `--help` says what they are."""
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0 and "usage:" in capsys.readouterr().out


def test_console_script():
    script = Path(sys.executable).with_name("otseg")
    assert script.is_file(), "pip install -e . makes it"
    assert "predict" in subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
