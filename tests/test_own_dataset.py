"""One's own dataset and one's own CLIP, from the shell: every setting, across datasets, and the tables; twice."""

import json

import open_clip
import pytest
import torch
import trees
from helpers import run_cells
from safetensors.torch import save_file

from otseg.cli import main
from otseg.clip import load_clip, register_clip
from otseg.models import read_checkpoint

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
TINY = dict(max_iters=2, batch_size=2, warmup_iters=1, val_interval=2, val_images=1, depth=1, num_templates=2)
SETTINGS = ("inductive", "transductive", "fully_supervised")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Two described datasets with equal class names, a CLIP of one's own, and a run of every setting on each dataset."
    home = tmp_path_factory.mktemp("own")
    (home / "own_vit.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    save_file(load_clip(register_clip(home / "own_vit.json"), None).state_dict(), home / "own_vit.safetensors")
    for seed, name in enumerate(("town", "coast")):
        trees.write_folder(home / name, size=(40 + 8 * seed, 56), classes=["wall", "cup", "spoon"], unseen=["spoon"])
        for setting in SETTINGS:
            options = [f"--{key}={value}" for key, value in (TINY | clip_of(home) | where(home, name)).items()]
            out = f"--out={home}/runs/{name}-{setting}"
            init = [f"--init={home}/runs/{name}-inductive/half.safetensors"] if setting == "transductive" else []
            assert main(["train", f"--setting={setting}", out, "--workers=0", "--images=2", *options, *init]) == 0
    return home


def clip_of(home):
    return {"clip-config": home / "own_vit.json", "clip-weights": home / "own_vit.safetensors"}


def where(home, name):
    return {"dataset": "folder", "root": home / name}


def record_of(home, name, setting):
    return json.loads((home / f"runs/{name}-{setting}/record.json").read_text())


def test_runs_have_the_names_of_their_datasets(home):
    records = [record_of(home, name, setting) for name in ("town", "coast") for setting in SETTINGS]
    assert len({r["name"] for r in records}) == 6 and {r["dataset"] for r in records} == {"town", "coast"}
    assert records[0]["identity"]["train"] != records[3]["identity"]["train"]
    assert records[0]["identity"]["clip_image"] == records[3]["identity"]["clip_image"]
    recipe = records[0]["recipe"]
    assert (recipe["clip"], recipe["image_size"], recipe["train_short_side"]) == ("own_vit", 32, 32)


def test_another_dataset_in_the_same_folder_is_refused(home, capsys):
    options = [f"--{key}={value}" for key, value in (TINY | clip_of(home) | where(home, "coast")).items()]
    assert main(["train", f"--out={home}/runs/town-inductive", "--workers=0", *options]) == 2
    assert "holds a run with another dataset_name" in capsys.readouterr().err


def test_across_datasets(home, capsys):
    "The target's own unseen classes, no calibration, both names, mIoU; the checkpoint brings its architecture."
    checkpoint = home / "runs/town-inductive/last.safetensors"
    _, header = read_checkpoint(checkpoint)
    assert header["clip_config"]["embed_dim"] == 16 and "own_vit" in open_clip.list_models()
    weights = f"--clip-weights={home}/own_vit.safetensors"
    place = [f"--{key.replace('dataset', 'target')}={value}" for key, value in where(home, "coast").items()]
    words = [*place, weights, f"--record={home}/across.json", "--workers=0"]
    assert main(["evaluate", str(checkpoint), *words]) == 0
    printed = capsys.readouterr().out
    assert "town on coast" in printed and "mIoU" in printed
    record = json.loads((home / "across.json").read_text())
    assert record["recipe"]["calibration"] == 0 and (record["dataset"], record["target"]) == ("town", "coast")


def test_supervised_runs_show_miou_alone(home, capsys):
    checkpoint = str(home / "runs/town-fully_supervised/last.safetensors")
    words = [f"--root={home}/town", f"--clip-weights={home}/own_vit.safetensors", "--workers=0"]
    assert main(["evaluate", checkpoint, *words]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "| ensemble |" in line)
    pacc, s, u, hiou, miou = [cell.strip() for cell in row.strip("|").split("|")][-5:]
    assert (s, u, hiou) == ("–", "–", "–") and float(pacc) > 0 and float(miou) >= 0


@pytest.mark.parametrize("name", ["town", "coast"])
def test_table_of_a_described_dataset(home, name):
    given = dict(dataset="folder", root=str(home / name), seeds=1, records=str(home / "records"), out=str(home / "out"))
    (home / "records").mkdir(exist_ok=True)
    names = run_cells("tables/t1_zero_shot", **given, clip="own_vit").names
    long = names["long"]
    assert names["plans"]["folder"]["run"].str.startswith(name).all()
    assert "mIoU" in set(long["metric"]) and (long["runs"] == 0).all()


def test_the_small_model_asks_for_its_own_words(home, capsys):
    options = [f"--{key}={value}" for key, value in (TINY | where(home, "town")).items()]
    assert main(["train", f"--out={home}/runs/no", "--clip=digits_clip", "--workers=0", *options]) == 2
    assert "does not know 'wall'" in capsys.readouterr().err
