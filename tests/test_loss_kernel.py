"""The loss kernel: same losses and gradients as the plain loss, on a GPU or else in Triton's interpreter."""

import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from helpers import ROOT, close

from otseg import losses
from otseg.loss_kernel import fits
from otseg.losses import IGNORE, mask_loss, naive_mask_loss

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy warns about NaN in the interpreter
device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"  # conftest.py sets it without a GPU


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    "`mask_loss` uses the kernel in the interpreter too."
    monkeypatch.setattr(losses, "kernel_fits", fits)


def random_inputs(b=2, k=3, size=(3, 4), full=(13, 37), scale=3.0):
    logits, label = scale * torch.randn(b, k, *size), torch.randint(k, (b, *full))
    label[0, : full[0] // 3] = IGNORE
    label[0][label[0] == k - 1] = IGNORE  # a class that is absent in the first image
    return logits, label


def compare(logits, label, tol=1e-5, **options):
    ours, exact = logits.to(device).requires_grad_(), logits.double().requires_grad_()
    found, want = mask_loss(ours, label.to(device), **options), naive_mask_loss(exact, label)
    for name in want:
        assert found[name].dtype == torch.float32
        close(found[name].cpu().double(), want[name], tol)
        grads = [torch.autograd.grad(loss[name], x, retain_graph=True)[0] for loss, x in ((found, ours), (want, exact))]
        close(grads[0].cpu().double(), grads[1], tol)


@pytest.mark.parametrize(
    "size, full", [((3, 4), (13, 37)), ((1, 1), (5, 9)), ((4, 4), (4, 4)), ((5, 6), (3, 2)), ((2, 3), (40, 70))]
)
def test_sizes(size, full):
    "Odd magnifications, one token, none, smaller labels, and more rows and columns than a tile has."
    compare(*random_inputs(size=size, full=full))


@pytest.mark.parametrize("scale", [0.01, 60])
def test_small_and_large_logits(scale):
    compare(*random_inputs(scale=scale))


@pytest.mark.parametrize("shift", [-20.0, -9.0])
def test_confident_negatives_are_accurate_relative_to_their_own_size(shift):
    logits, label = random_inputs(scale=0.5)
    label[:] = IGNORE
    found, want = (
        mask_loss((logits + shift).to(device), label.to(device)),
        naive_mask_loss((logits + shift).double(), label),
    )
    assert abs(found["focal"].item() / want["focal"].item() - 1) < 1e-5


def test_bound_of_present_masks_may_be_too_large():
    compare(*random_inputs(), max_present=6)


def test_groups_of_masks(monkeypatch):
    "Groups of one mask, as for gradients that would not fit into memory together."
    monkeypatch.setattr("otseg.loss_kernel.GROUP_NUMBERS", 1)
    compare(*random_inputs(size=(2, 2), full=(5, 6)))


def test_nan_stays_visible():
    logits, label = random_inputs()
    logits[0, 0, 1, 2] = torch.nan
    assert mask_loss(logits.to(device), label.to(device))["focal"].isnan()


def test_other_types_use_the_chunks():
    logits, label = random_inputs()
    assert fits(logits) and not fits(logits.double())
    close(mask_loss(logits.double(), label)["focal"], naive_mask_loss(logits.double(), label)["focal"], 1e-9)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from otseg.loss_kernel import COLUMNS, NUM_WARPS, ROWS, mask_loss_kernel

types = {"label_ptr": "*i64", "chosen_ptr": "*i64", "starts_ptr": "*i32", "token_ptr": "*i32"}
sizes = {name: "i32" for name in "khwHW"}

def kind(name):
    return types.get(name) or sizes.get(name) or ("*fp32" if name.endswith("_ptr") else "constexpr")

names = mask_loss_kernel.arg_names
for present in (False, True):
    values = {"ALPHA": 0.25, "PRESENT": present, "ROWS": ROWS, "COLUMNS": COLUMNS}
    constexprs = {(i,): values[name] for i, name in enumerate(names) if kind(name) == "constexpr"}
    source = ASTSource(mask_loss_kernel, {name: kind(name) for name in names}, constexprs=constexprs)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": NUM_WARPS})
"""


def test_compiles_for_a_gpu(tmp_path):
    "The interpreter accepts more than the compiler, which needs no GPU. A process of its own, without the interpreter."
    if tuple(map(int, version("triton").split(".")[:2])) < (3, 3):
        pytest.skip("triton.compile has another interface before Triton 3.3")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
