"""The fused kernel: in Triton's interpreter the plans of the tensor code, and code that compiles for a GPU."""
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
from otseg.kernel import fits, solve_fused
from otseg.ot import sinkhorn, solve_plan
sys.path.insert(0, "tests")
from test_ot import cost, marginal, gradient

# the kernel alone
for m, n in ((60, 6), (64, 8), (1, 4), (9, 1), (3, 5)):
    for eps in (0.05, 10.0):
        for kind in ("random", "sharp"):
            for masses in (("uniform", "uniform"), ("skewed", "skewed"), ("zeros", "zeros")):
                C = cost(kind, 2, m, n).mT.contiguous()
                mu, nu = marginal(masses[0], 2, m), marginal(masses[1], 2, n)
                assert fits(C)
                T, done = solve_fused(C, mu, nu, eps, 100, 1e-6)
                want, _ = solve_plan(C, mu, nu, eps, 100, 1e-6)
                assert done.all() and T.isfinite().all(), (m, n, eps, kind, masses)
                assert (T.sum(1) - mu).abs().max() < 1e-6 and (T.sum(2) - nu).abs().max() < 1e-6, (m, n, eps, kind, masses)
                assert (T - want).abs().max() < 1e-5 * want.max(), (m, n, eps, kind, masses)

# behind the same function: what it hands back is done by the tensor code, and the gradient is the same
C = torch.cat([cost("random", 2, 40, 5), 30 * cost("random", 1, 40, 5)])
plain = sinkhorn(C), gradient(C, 0.05)
otseg.ot.kernel_fits = fits
assert not solve_fused(C.mT.contiguous(), *(torch.full((3, s), 1 / s) for s in (40, 5)), 0.05, 100, 1e-6)[1][2]
fused = sinkhorn(C), gradient(C, 0.05)
for a, b in zip(fused, plain):
    assert (a - b).abs().max() < 2e-5 * b.abs().max()
assert torch.equal(sinkhorn(C.mT.contiguous().mT), sinkhorn(C))
assert sinkhorn(C.bfloat16()).dtype == torch.bfloat16 and sinkhorn(C.double()).dtype == torch.float64 and sinkhorn(C[:0]).shape == (0, 40, 5)
assert not fits(C.double()) and not fits(torch.empty(1, 17, 40)) and not fits(torch.empty(1, 8, 2049)) and fits(torch.empty(1, 8, 2048))

# not converged, and NaN
import pytest
with pytest.warns(UserWarning, match="3 of 3 plans did not converge in 1 iterations"):
    sinkhorn(C, max_iter=1)
C[0, 0, 0] = torch.nan
with pytest.warns(UserWarning, match="1 of 3 plans"):
    T = sinkhorn(C)
assert T[0].isnan().any() and T[1:].isfinite().all()

# the paper's own problems
from test_ot import load
for case in "abcd":
    t, eps = load(case)
    T = sinkhorn(t["cost"].float(), eps=eps)
    assert (T - t["plan64"]).abs().max() < 2e-5 * t["plan64"].max()
print("all right")
"""
COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from otseg.kernel import plan_kernel

kinds = ["*fp32"] * 4 + ["*i32", "i32", "i32", "fp32", "i32", "fp32", "fp32", "fp32", "constexpr", "constexpr"]
signature = dict(zip(plan_kernel.arg_names, kinds))
for M, N, warps in ((1024, 8, 8), (1, 1, 1)):
    source = ASTSource(plan_kernel, signature, constexprs={(12,): M, (13,): N})
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
print("all right")
"""


def run(code, **env):
    root = os.path.dirname(os.path.dirname(__file__))
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def test_interpreted():
    done = run(INTERPRETED, TRITON_INTERPRET="1")
    assert done.stdout.endswith("all right\n"), done.stderr[-3000:]


def test_compiles_for_a_gpu(tmp_path):
    "Without one at hand: the interpreter accepts more than the compiler."
    from importlib.metadata import version

    if tuple(map(int, version("triton").split(".")[:2])) < (3, 3):
        pytest.skip("the compiler's interface was another one")
    done = run(COMPILED, TRITON_CACHE_DIR=str(tmp_path))
    assert done.stdout.endswith("all right\n"), done.stderr[-3000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    from otseg.kernel import solve_fused
    from otseg.ot import solve_plan
    from test_ot import cost, marginal

    for m, n in ((1024, 8), (900, 8), (60, 6), (9, 1)):
        C, mu, nu = cost("random", 30, m, n).mT.contiguous().cuda(), marginal("skewed", 30, m).cuda(), marginal("skewed", 30, n).cuda()
        (T, done), (want, _) = solve_fused(C, mu, nu, 0.05, 100, 1e-6), solve_plan(C, mu, nu, 0.05, 100, 1e-6)
        assert done.all() and (T.sum(2) - nu).abs().max() < 1e-6 and (T - want).abs().max() < 1e-5 * want.max()
