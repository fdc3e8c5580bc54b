"""The plain versions are the same functions, and the benchmark notebook runs; no test asserts a time."""

import csv
import json

import pytest
import torch
from helpers import close, papermill

from otseg.bench import (
    SIZES,
    blocks_of_labels,
    check_parameters,
    compare,
    measure,
    plain,
    plain_mask_loss,
    plain_plan,
    plain_training_loss,
    random_model,
    tensor_peak,
)
from otseg.losses import mask_loss, training_loss
from otseg.ot import sinkhorn


def test_plain_transport():
    C = 1 - torch.tanh(torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(0)))
    close(plain_plan(C), sinkhorn(C), 1e-3)


def test_plain_loss():
    logits = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    label = blocks_of_labels(2, 32, 6, 3)
    for name, value in plain_mask_loss(logits, label).items():
        close(mask_loss(logits, label)[name], value)
        close(
            *(torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (mask_loss(logits, label)[name], value)),
            1e-4,
        )


def test_plain_step():
    "Loss and every gradient of the whole step."
    model = random_model(6, 3, 4, 64, "tiny").eval()
    image, label = torch.randn(1, 3, 64, 64), blocks_of_labels(1, 64, 6, 3)
    other = plain(model)
    ours, theirs = (
        sum(training_loss(model(image), label).values()),
        sum(plain_training_loss(other(image), label).values()),
    )
    close(ours, theirs, 1e-4)
    ours.backward(), theirs.backward()
    grads = [torch.cat([w.grad.flatten() for w in m.parameters() if w.requires_grad]) for m in (model, other)]
    close(*grads, 2e-3)


def test_what_is_not_there_is_said():
    row = measure("transport", "ours", "cuda", p=1, m=2, n=2)
    assert torch.cuda.is_available() or row["note"] == "not run: no GPU" and "median" not in row
    with pytest.raises(ValueError, match="task = 'transports' is not one of transport, "):
        measure("transports", "ours")
    (row,) = compare("transport", ("magic",), repeats=1, **SIZES["tiny"]["transport"])
    assert row["note"].startswith("not run: ") and "magic" in row["note"]


def test_memory_of_tensors():
    "What is alive at a time, not what was ever made, nor what was there before."
    megabyte = lambda: torch.ones(2**18)
    there = megabyte()
    assert abs(tensor_peak(lambda: [megabyte() for _ in range(5)], "cpu") - 5) < 0.01
    assert abs(tensor_peak(lambda: [megabyte() is there for _ in range(5)], "cpu") - 1) < 0.01
    assert tensor_peak(lambda: there.sum(), "cpu") < 0.01


@pytest.mark.parametrize(
    "given, says",
    [
        (dict(device="tpu"), "device = 'tpu' but this machine offers"),
        (dict(sizes="big"), "sizes = 'big' is not one of full, tiny"),
        (dict(repeats=0), "repeats = 0"),
        (dict(repeats=2.0), "repeats = 2.0"),
        (dict(repeat=3), "unknown parameter repeat"),
    ],
)
def test_wrong_parameters(given, says):
    with pytest.raises(ValueError, match=says):
        check_parameters({"device": "cpu", "sizes": "tiny", "repeats": 1, "out": None, "before": set()} | given, set())


@pytest.mark.slow
def test_the_notebook(tmp_path):
    done, _ = papermill("benchmark", tmp_path, sizes="tiny", repeats=1, out=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = list(csv.DictReader((tmp_path / "benchmarks/cpu.csv").open()))
    assert {row["task"] for row in rows} == {
        "transport",
        "mask loss",
        "step",
        "window",
        "photo",
        "agreement",
        "loading",
    }
    assert all(row["note"].startswith("not run") or float(row["median"]) > 0 for row in rows)
    assert "papermill nbs/benchmark.ipynb" in json.loads((tmp_path / "benchmarks/cpu.json").read_text())["command"]
    assert {p.name for p in (tmp_path / "figures").glob("*.png")} == {"benchmark_cpu.png", "benchmark_growth_cpu.png"}
