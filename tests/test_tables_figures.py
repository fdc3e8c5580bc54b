"""`nbs/tables/f1_prompts` and `f2_qualitative`: maps prompt by prompt, masks side by side, and what both say where a run is missing."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from test_notebooks import TINY, papermill

from otseg.checkpoints import read_tensors, write_tensors
from otseg.explain import window_maps
from otseg.models import DEFAULT_CHECKPOINT
from otseg.predict import load
from otseg.recipes import resolve, run_name
from otseg.tables import ROWS
from otseg.viz import prompt_rows


def figure_notebook(name, folder, **parameters):
    "Run nbs/tables/NAME.ipynb with all its folders in one; what came of it, and the text of its outputs."
    (folder / "tables").mkdir(exist_ok=True)
    done, executed = papermill(
        f"tables/{name}", folder, cwd=folder, **dict.fromkeys(("out", "records", "runs"), folder) | parameters
    )
    if done.returncode:
        return done, ""
    outputs = [o for cell in json.loads(executed.read_text())["cells"] for o in cell.get("outputs", [])]
    return done, "\n".join("".join(o.get("data", {}).get("text/markdown", "")) for o in outputs)


def test_shares_of_the_last_layer_are_relative_to_an_even_one():
    seg = load(device="cpu")
    maps = window_maps(seg.model, torch.randn(1, 3, 48, 48), [3, 11], 24)
    assert maps["shares"].shape == maps["plan"].shape and (maps["shares"].mean((-2, -1)) - 1).abs().max() < 0.1


def test_rows_of_prompts_share_scales_and_may_be_short():
    image, maps = torch.rand(3, 8, 8), torch.rand(3, 8, 8)
    figure = prompt_rows(
        [("a", "mass", "", image, 4 * maps, "", maps[0]), ("b", "mass", "", image, maps[:1], "", maps[0])], list("xyz")
    )
    scales = {
        ax.images[0].get_clim() for ax in figure.axes[:10] if ax.images and ax.images[0].get_cmap().name == "cividis"
    }
    assert len(scales) == 1 and [ax.axison for ax in figure.axes[5:10]] == [True, True, False, False, True]


def pretend(folder, setting="inductive", **changes):
    "A checkpoint of another run with the shipped weights: softmax attention has the same projections."
    recipe = resolve("digits", setting, **changes)
    state, about = read_tensors(DEFAULT_CHECKPOINT)
    file = folder / run_name(recipe) / "last.safetensors"
    file.parent.mkdir(parents=True)
    write_tensors(file, state, about | {"recipe": asdict(recipe), "templates": recipe.text_prompts})


@pytest.mark.slow
def test_prompts_with_and_without_mpsa(tmp_path):
    pretend(tmp_path, attention="softmax", **TINY)
    done, text = figure_notebook("f1_prompts", tmp_path, setting="inductive", images="0", run_missing=True, **TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "not run" not in text and "last layer, MPSA" in text and "last layer, softmax" in text
    assert len(list(tmp_path.glob("*.json"))) == 1 and Image.open(tmp_path / "f1_prompts_digits.png").width > 300


@pytest.mark.slow
def test_prompts_of_own_photos(tmp_path):
    "The shipped model, two photos of different shapes, words that are not all of its classes; half a figure replaces no whole one."
    (tmp_path / "f1_prompts_digits.png").write_text("a whole figure")
    for name, shape in {"a.png": (60, 110, 3), "b.png": (130, 90, 3)}.items():
        Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / name)
    done, text = figure_notebook(
        "f1_prompts",
        tmp_path,
        images=f"{tmp_path}/a.png,{tmp_path}/b.png",
        classes="three,eight|zero,grass",
        shown="grass,eight",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "digits0-transductive-softmax-seed0" in text and "not run: `papermill nbs/train.ipynb" in text
    assert all(f"{name}, image {photo}" in text for name in ("grass", "eight (unseen)") for photo in ("a.png", "b.png"))
    assert (tmp_path / "f1_prompts_digits.png").read_text() == "a whole figure"


@pytest.mark.slow
def test_masks_of_the_variants(tmp_path):
    for changes in (ROWS["t3"][0][1], ROWS["t3"][1][1], {}):
        pretend(tmp_path, **changes)
    (tmp_path / "f2_qualitative_digits.png").write_text("an older figure")
    done, text = figure_notebook("f2_qualitative", tmp_path, settings="inductive", images=1, worst=1, among=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "not run" not in text and all(
        f"| inductive | {column} |" in text
        for column in ("CLIP", "softmax, one prompt", "softmax, n prompts", "MPSA", "MPSA, ensemble")
    )
    assert "the largest mistake" in text and Image.open(tmp_path / "f2_qualitative_digits.png").width > 300


@pytest.mark.slow
def test_masks_without_any_run(tmp_path):
    done, text = figure_notebook("f2_qualitative", tmp_path, dataset="voc")
    assert done.returncode == 0, done.stderr[-3000:]
    assert text.count("not run: `papermill nbs/train.ipynb") == 6 and not list(tmp_path.glob("*.png"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, wrong, says",
    [
        ("f1_prompts", {"images": "0,a.png"}, "numbers of validation images or files"),
        ("f2_qualitative", {"setting": "inductive"}, "unknown parameter setting"),
    ],
)
def test_figures_refuse_a_wrong_parameter(tmp_path, name, wrong, says):
    done, _ = figure_notebook(name, tmp_path, **wrong)
    assert done.returncode != 0 and says in done.stderr
