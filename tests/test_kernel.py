"""The fused kernels: same plans and gradients as the tensor code, on a GPU or else in Triton's interpreter."""

import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from helpers import ROOT, close
from problems import cost, gradient, load_golden, marginal, rand, two_groups

from otseg import ot
from otseg.kernel import fits, gradient_fused, solve_fused
from otseg.newton import RIDGE, plan_gradient, solve_plan
from otseg.ot import KERNEL_CONSTANTS, sinkhorn

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy warns about NaN in the interpreter
device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"  # conftest.py sets it without a GPU


@pytest.fixture
def fused(monkeypatch):
    "`sinkhorn` uses the kernels in the interpreter too."
    monkeypatch.setattr(ot, "kernel_fits", fits)


def compare(C, mu, nu, eps):
    "Kernels and tensor code agree for costs (p, n, m)."
    assert fits(C)
    args = C.to(device), mu.to(device), nu.to(device), eps
    (T, errors), (want, _) = solve_fused(*args, 100, 1e-6, **KERNEL_CONSTANTS), solve_plan(*args)
    assert (errors == 0).all() and T.isfinite().all()
    assert (T.sum(1).cpu() - mu).abs().max() < 1e-6 and (T.sum(2).cpu() - nu).abs().max() < 1e-6
    close(T, want, 1e-5)
    grad = torch.randn(C.shape).to(device)
    gradients = zip(gradient_fused(want, grad, eps, RIDGE), plan_gradient(want, grad, eps))
    for unit, (ours, theirs) in zip((eps, 1, 1), gradients):  # the gradient of the cost is of order 1 / eps
        assert unit * (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize(
    "m, n, eps, kind, masses",
    [
        (60, 6, 0.05, "random", "uniform"),
        (60, 6, 10.0, "sharp", "skewed"),
        (64, 8, 0.05, "sharp", "zeros"),
        (1, 4, 0.05, "random", "skewed"),
        (9, 1, 10.0, "random", "zeros"),
        (3, 5, 0.05, "sharp", "zeros"),
        (3, 5, 0.01, "random", "skewed"),
        (12, 3, 1e-3, "random", "skewed"),
    ],
)
def test_kernels_agree_with_the_tensor_code(m, n, eps, kind, masses):
    compare(cost(kind, 2, m, n).mT.contiguous(), marginal(masses, 2, m), marginal(masses, 2, n), eps)


@pytest.mark.skipif(device == "cpu", reason="no GPU")
@pytest.mark.parametrize(
    "m, n, eps", [(1024, 8, 0.05), (900, 8, 0.05), (1024, 8, 2e-3), (2048, 8, 0.05), (60, 6, 0.05), (9, 1, 0.05)]
)
def test_large_problems_on_a_gpu(m, n, eps):
    compare(cost("random", 30, m, n).mT.contiguous(), marginal("skewed", 30, m), marginal("skewed", 30, n), eps)


def test_sinkhorn_with_several_levels_for_one_problem(fused, monkeypatch):
    "Two problems need one level of eps, the third needs several: plans and gradient are those of the tensor code."
    C = torch.cat([cost("random", 2, 20, 3), 30 * cost("random", 1, 20, 3)]).to(device)
    T, grad = sinkhorn(C), gradient(C, 0.05)
    monkeypatch.setattr(ot, "kernel_fits", lambda C: False)
    close(T, sinkhorn(C), 2e-5)
    close(grad, gradient(C, 0.05), 2e-5)


def test_layout_and_dtypes(fused):
    C = cost("random", 2, 12, 3).to(device)
    assert torch.equal(sinkhorn(C.mT.contiguous().mT), sinkhorn(C))
    for dtype in (torch.bfloat16, torch.float64):
        assert sinkhorn(C.to(dtype)).dtype == dtype
    assert sinkhorn(C[:0]).shape == (0, 12, 3)


@pytest.mark.parametrize("n, m, fit", [(8, 5000, True), (16, 1024, True), (17, 40, False)])
def test_size_limits(n, m, fit):
    assert fits(torch.empty(1, n, m)) == fit and not fits(torch.empty(1, n, m, dtype=torch.float64))


def test_gradient_of_uncoupled_groups(fused):
    "Each group has the gradient that it has alone. It is a difference of terms of order T / eps."
    A, B = cost("random", 2, 10, 2).to(device)
    both, weight = two_groups(A, B), rand(20, 4).to(device)

    def grad(C, weight):
        C = C.clone().requires_grad_()
        return torch.autograd.grad((sinkhorn(C) * weight).sum(), C)[0]

    error = grad(both, weight)[:10, :2] - grad(A, weight[:10, :2]) / 2
    assert error.abs().max() < 5e-7 * sinkhorn(both).max() / 0.05


def test_warns_if_it_did_not_converge(fused):
    C = torch.cat([cost("random", 2, 12, 3), 30 * cost("random", 1, 12, 3)]).to(device)
    with pytest.warns(UserWarning, match="3 of 3 plans did not converge in 1 iterations"):
        sinkhorn(C, max_iter=1)


def test_nan_stays_in_its_problem(fused):
    C = torch.cat([cost("random", 2, 12, 3), 30 * cost("random", 1, 12, 3)]).to(device)
    C[0, 0, 0] = torch.nan
    with pytest.warns(UserWarning, match="1 of 3 plans"):
        T = sinkhorn(C, max_iter=12)
    assert T[0].isnan().any() and T[1:].isfinite().all()


@pytest.mark.parametrize("case", "abcd")
def test_golden_problems(fused, case):
    t, eps = load_golden(case)
    close(sinkhorn(t["cost"].float().to(device), eps=eps).cpu().double(), t["plan64"], 2e-5)


def test_operators_are_registered_correctly():
    "Schema and shape rule of both operators match what they do."
    C, mu, nu = rand(2, 3, 8).to(device), marginal("uniform", 2, 8).to(device), marginal("uniform", 2, 3).to(device)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(solve_fused, (C, mu, nu, 0.05, 100, 1e-6), KERNEL_CONSTANTS, test_utils=tests)
    torch.library.opcheck(gradient_fused, (C, C, 0.05, RIDGE), test_utils=tests)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from otseg.kernel import gradient_kernel, plan_kernel
from otseg.ot import KERNEL_CONSTANTS

constants = {name.upper(): value for name, value in KERNEL_CONSTANTS.items()}
integers, numbers = ("m", "n", "max_iter"), ("inv_eps", "tol", "marginal_tol")

def kind(name):
    if name.endswith("_ptr"):
        return "*i32" if name == "done_ptr" else "*fp32"
    return "i32" if name in integers else "fp32" if name in numbers else "constexpr"

one, several = {"EPS_LEVELS": False}, {"EPS_LEVELS": True}
for M, N, warps in ((128, 4, 1), (1, 1, 1)):  # 4 prompts: compiling takes as long as the elimination is long
    for kernel, more in ((plan_kernel, one), (plan_kernel, several), (gradient_kernel, {})):
        names, values = kernel.arg_names, constants | more | {"M": M, "N": N}
        constexprs = {(i,): values[name] for i, name in enumerate(names) if kind(name) == "constexpr"}
        source = ASTSource(kernel, {name: kind(name) for name in names}, constexprs=constexprs)
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
"""


@pytest.mark.slow
def test_compiles_for_a_gpu(tmp_path):
    "The interpreter accepts more than the compiler, which needs no GPU. A process of its own, without the interpreter."
    if tuple(map(int, version("triton").split(".")[:2])) < (3, 3):
        pytest.skip("triton.compile has another interface before Triton 3.3")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
