"""The fused kernels: in Triton's interpreter the plans and gradients of the tensor code, and code that compiles for a GPU."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
INTERPRETED = """
import sys
import torch
import otseg.ot
from otseg.kernel import fits, gradient_fused, solve_fused
from otseg.ot import defer_convergence_checks, plan_gradient, sinkhorn, solve_plan
sys.path.insert(0, "tests")
from test_ot import cost, marginal, gradient
torch.manual_seed(0)

# the kernels alone
for m, n, eps, kind, masses in ((60, 6, 0.05, "random", "uniform"), (60, 6, 10.0, "sharp", "skewed"), (64, 8, 0.05, "sharp", "zeros"), (1, 4, 0.05, "random", "skewed"),
                                (9, 1, 10.0, "random", "zeros"), (3, 5, 0.05, "sharp", "zeros"), (3, 5, 0.01, "random", "skewed"), (12, 3, 1e-3, "random", "skewed")):
    C, mu, nu = cost(kind, 2, m, n).mT.contiguous(), marginal(masses, 2, m), marginal(masses, 2, n)
    assert fits(C)
    T, done = solve_fused(C, mu, nu, eps, 100, 1e-6)
    want, _ = solve_plan(C, mu, nu, eps, 100, 1e-6)
    assert done.all() and T.isfinite().all(), (m, n, eps)
    assert (T.sum(1) - mu).abs().max() < 1e-6 and (T.sum(2) - nu).abs().max() < 1e-6, (m, n, eps)
    assert (T - want).abs().max() < 1e-5 * want.max(), (m, n, eps)
    G = torch.randn(2, n, m)
    for ours, theirs, unit in zip(gradient_fused(want, G, eps), plan_gradient(want, G, eps), (eps, 1, 1)):
        assert unit * (ours - theirs).abs().max() < 1e-5, (m, n, eps)

# behind the same function: one problem of three climbs the ladder, and the gradient is the same
C = torch.cat([cost("random", 2, 40, 5), 30 * cost("random", 1, 40, 5)])
plain = sinkhorn(C), gradient(C, 0.05)
otseg.ot.kernel_fits = fits
fused = sinkhorn(C), gradient(C, 0.05)
for a, b in zip(fused, plain):
    assert (a - b).abs().max() < 2e-5 * b.abs().max()
assert torch.equal(sinkhorn(C.mT.contiguous().mT), sinkhorn(C))
assert sinkhorn(C.bfloat16()).dtype == torch.bfloat16 and sinkhorn(C.double()).dtype == torch.float64 and sinkhorn(C[:0]).shape == (0, 40, 5)
assert not fits(C.double()) and not fits(torch.empty(1, 17, 40)) and not fits(torch.empty(1, 8, 2049)) and fits(torch.empty(1, 8, 2048))

# groups that exchange nothing: each has its own gradient, a difference of terms of the order of T / eps
both = torch.full((1, 20, 4), 30.0)
both[:, :10, :2], both[:, 10:, 2:] = A, B = cost("random", 2, 1, 10, 2)
def grad(C, weight):
    C = C.clone().requires_grad_()
    return torch.autograd.grad((sinkhorn(C, eps=0.05) * weight).sum(), C)[0]
weight = torch.rand(20, 4)
whole, alone = grad(both, weight), grad(A, weight[:10, :2]) / 2
assert (whole[:, :10, :2] - alone).abs().max() < 5e-7 * sinkhorn(both, eps=0.05).max() / 0.05

# not converged, and NaN
import pytest
with pytest.warns(UserWarning, match="3 of 3 plans did not converge in 1 iterations"):
    sinkhorn(C, max_iter=1)
C[0, 0, 0] = torch.nan
with pytest.warns(UserWarning, match="1 of 3 plans"):
    T = sinkhorn(C, max_iter=12)
assert T[0].isnan().any() and T[1:].isfinite().all()

# the paper's own problems
from test_ot import load
for case in "abcd":
    t, eps = load(case)
    T = sinkhorn(t["cost"].float(), eps=eps)
    assert (T - t["plan64"]).abs().max() < 2e-5 * t["plan64"].max()

# what shape tracing is told is what the operators do
args = torch.rand(2, 3, 8), torch.full((2, 8), 1 / 8), torch.full((2, 3), 1 / 3)
torch.library.opcheck(solve_fused, (*args, 0.05, 100, 1e-6), test_utils=("test_schema", "test_faketensor"))
torch.library.opcheck(gradient_fused, (args[0], args[0], 0.05), test_utils=("test_schema", "test_faketensor"))
print("all right")
"""
COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from otseg.kernel import gradient_kernel, plan_kernel

plan = ["*fp32"] * 4 + ["*i32", "i32", "i32", "fp32", "i32", "fp32", "fp32", "fp32", "constexpr", "constexpr", "constexpr"]
gradient = ["*fp32"] * 5 + ["i32", "i32", "fp32", "fp32", "constexpr", "constexpr"]
for M, N, warps in ((1024, 8, 8), (1, 1, 1)):
    for kernel, kinds, more in ((plan_kernel, plan, {"LADDER": False}), (plan_kernel, plan, {"LADDER": True}), (gradient_kernel, gradient, {})):
        names = kernel.arg_names
        source = ASTSource(kernel, dict(zip(names, kinds)), constexprs={(names.index(name),): v for name, v in ({"M": M, "N": N} | more).items()})
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
print("all right")
"""


def run(code, **env):
    root = os.path.dirname(os.path.dirname(__file__))
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


@pytest.mark.slow
def test_interpreted():
    done = run(INTERPRETED, TRITON_INTERPRET="1")
    assert done.stdout.endswith("all right\n"), done.stderr[-3000:]


@pytest.mark.slow
def test_compiles_for_a_gpu(tmp_path):
    "Without one at hand: the interpreter accepts more than the compiler."
    from importlib.metadata import version

    if tuple(map(int, version("triton").split(".")[:2])) < (3, 3):
        pytest.skip("the compiler's interface was another one")
    done = run(COMPILED, TRITON_CACHE_DIR=str(tmp_path))
    assert done.stdout.endswith("all right\n"), done.stderr[-3000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    from test_ot import cost, marginal

    from otseg.kernel import gradient_fused, solve_fused
    from otseg.ot import plan_gradient, solve_plan

    for m, n, eps in ((1024, 8, 0.05), (900, 8, 0.05), (1024, 8, 2e-3), (2048, 8, 0.05), (60, 6, 0.05), (9, 1, 0.05)):
        C, mu, nu = (
            cost("random", 30, m, n).mT.contiguous().cuda(),
            marginal("skewed", 30, m).cuda(),
            marginal("skewed", 30, n).cuda(),
        )
        (T, done), (want, _) = solve_fused(C, mu, nu, eps, 100, 1e-6), solve_plan(C, mu, nu, eps, 100, 1e-6)
        assert done.all() and (T.sum(2) - nu).abs().max() < 1e-6 and (T - want).abs().max() < 1e-5 * want.max()
        for ours, theirs, unit in zip(gradient_fused(T, C, eps), plan_gradient(T, C, eps), (eps, 1, 1)):
            assert unit * (ours - theirs).abs().max() < 1e-5
