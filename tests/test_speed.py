"""The plain versions compute the numbers of the package, and the benchmark notebook runs. No test asserts a time."""

import csv
import gc
import json

import pytest
import torch
from helpers import close, run_cells

from otseg.bench import check_options, compare_methods, measure, tensor_peak
from otseg.losses import mask_loss, naive_mask_loss, training_loss
from otseg.newton import sinkhorn_loop
from otseg.ot import sinkhorn
from otseg.tasks import (
    PLAIN_PARTS,
    SIZES,
    TASKS,
    loading_task,
    random_model,
    striped_labels,
    tensor_code_plan,
    transport_task,
)

TINY = dict(k=6, n=3, visual_prompts=4, side=64, tower="tiny")


# plain versions


@pytest.mark.parametrize("plan, tol", [(sinkhorn_loop, 1e-3), (tensor_code_plan, 1e-5)])
def test_plain_transport(plan, tol):
    "Plan and gradient."
    C = 1 - torch.tanh(torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(0)))
    weight, C = torch.randn(3, 50, 4), C.requires_grad_()
    plans = [solve(C) for solve in (plan, sinkhorn)]
    close(*plans, tol)
    close(*(torch.autograd.grad((T * weight).sum(), C)[0] for T in plans), 10 * tol)


def test_plain_loss():
    logits = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    label = striped_labels(2, 32, 6, present=3)
    ours, plain = mask_loss(logits, label), naive_mask_loss(logits, label)
    for name in plain:
        close(ours[name], plain[name])
        close(*(torch.autograd.grad(loss[name], logits, retain_graph=True)[0] for loss in (ours, plain)), 1e-4)


def test_plain_step():
    "Loss and every gradient of the whole step."
    ours, plain = random_model(**TINY).eval(), random_model(**TINY, **PLAIN_PARTS).eval()
    image, label = torch.randn(1, 3, 64, 64), striped_labels(1, 64, 6, present=3)
    losses = (
        sum(training_loss(ours(image), label).values()),
        sum(training_loss(plain(image), label, loss=naive_mask_loss).values()),
    )
    close(*losses, 1e-4)
    sum(losses).backward()
    grads = [torch.cat([w.grad.flatten() for w in m.parameters() if w.requires_grad]) for m in (ours, plain)]
    close(*grads, 2e-3)


# measuring


def test_a_row_that_is_not_run_says_why():
    row = measure("transport", "ours", "cuda", p=1, m=2, n=2)
    assert torch.cuda.is_available() or row["note"] == "not run: no GPU" and "median" not in row
    with pytest.raises(ValueError, match="task = 'transports' is not one of transport, "):
        measure("transports", "ours")
    (row,) = compare_methods("transport", ("magic",), repeats=1, **SIZES["tiny"]["transport"])
    assert row["note"].startswith("not run: ValueError: method = 'magic' is not one of ours, plain, ")


def test_a_failed_task_does_not_stop_the_others():
    rows = compare_methods("transport", {"plain": {"m": "many"}, "ours": {}}, repeats=1, p=2, m=8, n=2)
    assert rows[0]["note"].startswith("not run: TypeError") and rows[1]["note"] == "" and rows[1]["median"] > 0


def test_memory_of_tensors():
    "The largest size at one time, without freed tensors and without tensors from before."

    def megabyte():
        return torch.ones(2**18)

    earlier = megabyte()
    assert abs(tensor_peak(lambda: [megabyte() for _ in range(5)], "cpu") - 5) < 0.01
    assert abs(tensor_peak(lambda: [megabyte() is earlier for _ in range(5)], "cpu") - 1) < 0.01
    assert tensor_peak(lambda: earlier.sum(), "cpu") < 0.01


def test_every_task_has_sizes_and_refuses_an_unknown_method():
    assert all(set(TASKS) <= set(sizes) for sizes in SIZES.values())
    with pytest.raises(ValueError, match="method = 'fast' is not one of ours"):
        transport_task("fast", "cpu", p=1, m=2, n=2)
    with pytest.raises(ValueError, match="'cuda' is not one of cpu"):
        loading_task("ours", "cuda", images=1, size=(48, 64), side=32)


# the notebook


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(device="tpu"), "device = 'tpu' but this machine offers"),
        (dict(sizes="big"), "sizes = 'big' is not one of full, tiny"),
        (dict(repeats=0), "repeats = 0"),
        (dict(repeats=2.0), "repeats = 2.0"),
    ],
)
def test_wrong_options(given, message):
    with pytest.raises(ValueError, match=message):
        check_options(**dict(device="cpu", sizes="tiny", repeats=1) | given)


def test_an_unknown_parameter_of_the_notebook(tmp_path):
    with pytest.raises(ValueError, match="unknown parameter repeat; this notebook takes device, sizes, repeats, name"):
        run_cells("benchmark", repeat=3, out=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of POT, GeomLoss and torchvision
def test_the_notebook(tmp_path, monkeypatch):
    "All tasks, in this process: the tests above start new ones."
    monkeypatch.setattr("otseg.bench.in_new_process", lambda f, *args, **options: f(*args, **options))
    gc.freeze()  # each measurement collects garbage, which takes 0.2 s with all modules of the tests
    try:
        run_cells("benchmark", sizes="tiny", repeats=1, out=tmp_path)
    finally:
        gc.unfreeze()
    rows = list(csv.DictReader((tmp_path / "benchmarks/cpu.csv").open()))
    assert {row["task"] for row in rows} == set(TASKS)
    expected = ("not run: no GPU", " is not installed", "this CPU has no instructions for bf16")
    assert all(row["note"].endswith(expected) if row["note"] else float(row["median"]) > 0 for row in rows)
    assert "papermill nbs/benchmark.ipynb" in json.loads((tmp_path / "benchmarks/cpu.json").read_text())["command"]
    assert {p.name for p in (tmp_path / "figures").glob("*.png")} == {"benchmark_cpu.png", "benchmark_growth_cpu.png"}
