"""The plan: its marginals, its limits, its symmetries, its exact gradient, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import close
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.autograd import gradcheck

from otseg.ot import defer_convergence_checks, for_each_chunk, sinkhorn

golden = Path(__file__).parent / "golden"
meta = json.loads((golden / "meta.json").read_text())
cases = pytest.mark.parametrize("case", "abcd")
pytestmark = pytest.mark.filterwarnings("error")  # a warning: not converged


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def marginal(kind, *shape):
    mass = {
        "uniform": torch.ones(shape),
        "skewed": rand(*shape, seed=1) ** 6 + 1e-4,
        "zeros": (rand(*shape, seed=2) > 0.4).float(),
    }[kind]
    mass[..., 0] += kind == "zeros"  # never nothing but zeros
    return mass / mass.sum(-1, keepdim=True)


def cost(kind, *shape):
    C = 2 * rand(*shape, seed=3)
    return {
        "random": C,
        "flat": C.new_full(shape, 0.7),
        "sharp": C.round(),
        "one-hot": (C == C.amin(-1, keepdim=True)).float() * -2 + 2,
    }[kind]


def load(case):
    tensors = {
        name[2:]: t for name, t in load_file(golden / "sinkhorn.safetensors").items() if name.startswith(f"{case}.")
    }
    return tensors, meta[f"sinkhorn.{case}"]["eps"]


def unrolled(C, mu, nu, eps, steps=400):
    "Sinkhorn's own iteration in the log domain, which autograd differentiates step by step."
    g = torch.zeros_like(nu)
    for _ in range(steps):
        f = eps * (mu.log() - ((g[..., None, :] - C) / eps).logsumexp(-1))
        g = eps * (nu.log() - ((f[..., None] - C) / eps).logsumexp(-2))
    return ((f[..., None] + g[..., None, :] - C) / eps).exp()


# the golden problems


@cases
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-6), (torch.float32, 2e-5)])
def test_converged_plan(case, dtype, tol):
    t, eps = load(case)
    close(sinkhorn(t["cost"].to(dtype), eps=eps).double(), t["plan64"], tol)
    close(sinkhorn(t["cost"].to(dtype), t["mu"], t["nu"], eps=eps).double(), t["plan64_marginals"], tol)


@cases
def test_official_plan(case):
    "The official loop stops early: its plans are less exact than ours."
    t, eps = load(case)
    close(sinkhorn(t["cost"], eps=eps), t["plan"], 5e-4)


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_the_cost(case, dtype):
    t, eps = load(case)
    W, (m, n) = t["weight"].double(), t["cost"].shape[-2:]

    def grad(plan, dtype):
        C = t["cost"].to(dtype).requires_grad_()
        return torch.autograd.grad(m * n * (W.to(dtype) * plan(C)).sum(), C)[0].double()

    ours = grad(lambda C: sinkhorn(C, eps=eps), dtype)
    exact = grad(
        lambda C: unrolled(C, C.new_full((len(C), m), 1 / m), C.new_full((len(C), n), 1 / n), eps), torch.float64
    )
    scale = max(exact.abs().max(), W.abs().max())  # of the weights where one prompt makes the gradient zero
    assert (ours - exact).abs().max() <= 1e-5 * scale
    assert (ours - t["grad_cost"]).abs().max() <= 2e-3 * scale


# what makes it a plan


@pytest.mark.parametrize("eps", [1e-3, 1e-2, 0.05, 1, 10])
@pytest.mark.parametrize("C", ["random", "flat", "sharp", "one-hot"])
@pytest.mark.parametrize(
    "masses", [("uniform", "uniform"), ("skewed", "skewed"), ("zeros", "zeros"), ("uniform", "zeros")], ids="-".join
)
def test_marginals(eps, C, masses):
    mu, nu = marginal(masses[0], 3, 60), marginal(masses[1], 3, 6)
    T = sinkhorn(cost(C, 3, 60, 6), mu, nu, eps)
    assert (T >= 0).all()
    assert (T.sum(-1) - mu).abs().max() < 1e-6 and (T.sum(-2) - nu).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap, noise", [(1, 0), (1.5, 0.1), (1.5, 0.3)])
@pytest.mark.parametrize("n", [4, 6, 8])
def test_groups_that_hardly_exchange_anything(n, gap, noise, dtype):
    "Each pixel far nearer to one prompt: where some prompts' own pixels just fill them, the dual problem is all but singular."
    own = torch.randint(n, (200, 96), generator=torch.Generator().manual_seed(n))
    C = (gap * (1 - F.one_hot(own, n)) + noise * rand(200, 96, n)).to(dtype).requires_grad_()
    T = sinkhorn(C, eps=0.05)
    T.square().sum().backward()
    assert (
        (T.sum(-1) - 1 / 96).abs().max() < 1e-6 and (T.sum(-2) - 1 / n).abs().max() < 1e-6 and C.grad.isfinite().all()
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 9),
    log_eps=st.floats(-2, 1),
    scale=st.floats(0.1, 3),
    sharp=st.integers(0, 4),
    seed=st.integers(0, 10**6),
)
def test_any_problem_is_solved(m, n, log_eps, scale, sharp, seed):
    "The marginals hold and log T + C/eps is a sum of a row and a column potential: there is only one such T."
    eps = 10**log_eps
    C = (2 * scale * rand(m, n, seed=seed, dtype=torch.float64)).requires_grad_()
    mu, nu = (rand(s, seed=seed + s, dtype=torch.float64) ** sharp + 1e-3 for s in (m, n))
    T = sinkhorn(C, mu / mu.sum(), nu / nu.sum(), eps)
    assert (T.sum(-1) - mu / mu.sum()).abs().max() < 1e-6 and (T.sum(-2) - nu / nu.sum()).abs().max() < 1e-6
    Z = T.detach().log() + C.detach() / eps
    assert (Z - Z[:1] - Z[:, :1] + Z[:1, :1]).abs().max() < 1e-7 * (1 + 1 / eps)
    (grad,) = torch.autograd.grad((T * rand(m, n, seed=1)).sum(), C)
    assert grad.isfinite().all() and grad.sum(-1).abs().max() < 1e-6 / eps  # a pixel's whole cost does not matter


def test_large_eps_gives_the_product_of_the_marginals():
    mu, nu = marginal("skewed", 50), marginal("skewed", 6)
    close(sinkhorn(cost("random", 50, 6), mu, nu, eps=1e5), mu[:, None] * nu, 1e-4)


def test_small_eps_gives_the_assignment():
    "With as many pixels as prompts, the best permutation."
    C = cost("random", 5, 5)
    best = min(
        torch.cartesian_prod(*[torch.arange(5)] * 5), key=lambda p: (len(p.unique()) < 5, C[torch.arange(5), p].sum())
    )
    close(sinkhorn(C, eps=1e-4), torch.eye(5)[best] / 5, 1e-5)


def test_agrees_with_pot():
    ot = pytest.importorskip("ot")
    C, mu, nu = cost("random", 30, 4).double(), marginal("skewed", 30).double(), marginal("skewed", 4).double()
    theirs = ot.sinkhorn(
        (mu / mu.sum()).numpy(),
        (nu / nu.sum()).numpy(),
        C.numpy(),
        reg=0.1,
        method="sinkhorn_log",
        stopThr=1e-13,
        numItermax=100_000,
    )
    close(sinkhorn(C, mu / mu.sum(), nu / nu.sum(), eps=0.1), torch.from_numpy(theirs), 1e-8)


@pytest.mark.parametrize("m, n", [(50, 6), (4, 6), (7, 7), (1, 5)])
def test_permutation(m, n):
    C, mu, nu = cost("random", 2, m, n).double(), marginal("skewed", 2, m).double(), marginal("skewed", 2, n).double()
    i, j = torch.randperm(m, generator=torch.Generator().manual_seed(0)), torch.arange(n).flip(0)
    close(sinkhorn(C[:, i][..., j], mu[:, i], nu[:, j]), sinkhorn(C, mu, nu)[:, i][..., j], 1e-7)


def test_transposition():
    "Pixels and prompts are two names for the same thing."
    C, mu, nu = cost("random", 12, 5).double(), marginal("skewed", 12).double(), marginal("skewed", 5).double()
    close(sinkhorn(C.T, nu, mu), sinkhorn(C, mu, nu).T, 1e-6)


@pytest.mark.parametrize("eps", [0.01, 0.05, 1])
def test_only_cost_over_eps_matters_and_no_shift(eps):
    C = cost("random", 3, 50, 6).double()
    T = sinkhorn(C, eps=eps)
    close(sinkhorn(7 * C, eps=7 * eps), T, 1e-6)
    close(sinkhorn(C + 5 * rand(3, 50, 1) - 3 * rand(3, 1, 6, seed=1), eps=eps), T, 1e-6)


def test_mass_scales_the_plan():
    C, mu, nu = cost("random", 20, 4).double(), marginal("skewed", 20).double(), marginal("skewed", 4).double()
    close(sinkhorn(C, 3 * mu, 3 * nu), 3 * sinkhorn(C, mu, nu), 1e-7)


def test_what_has_no_mass_gets_none():
    mu, nu = marginal("zeros", 50), marginal("zeros", 6)
    C = cost("random", 50, 6).requires_grad_()
    T = sinkhorn(C, mu, nu)
    assert (T[mu == 0] == 0).all() and (T[:, nu == 0] == 0).all()
    close(T[mu > 0][:, nu > 0], sinkhorn(C[mu > 0][:, nu > 0], mu[mu > 0], nu[nu > 0]), 1e-6)
    T.square().sum().backward()
    assert C.grad.isfinite().all() and (C.grad[mu == 0] == 0).all() and (C.grad[:, nu == 0] == 0).all()


def test_infinite_cost_forbids_a_pair():
    C = cost("random", 20, 4)
    C[:5, 0] = torch.inf
    C.requires_grad_()
    T = sinkhorn(C)
    T.square().sum().backward()
    assert (T[:5, 0] == 0).all() and (T.sum(-2) - 1 / 4).abs().max() < 1e-6 and C.grad.isfinite().all()


# shapes and dtypes


@pytest.mark.parametrize("lead", [(), (5,), (2, 3, 4)])
@pytest.mark.parametrize("m, n", [(30, 4), (3, 5), (9, 1), (1, 4), (1, 1)])
def test_shapes(lead, m, n):
    C = cost("random", *lead, m, n)
    T = sinkhorn(C)
    assert T.shape == C.shape and T.dtype == C.dtype
    assert (T.sum(-1) - 1 / m).abs().max() < 1e-6 and (T.sum(-2) - 1 / n).abs().max() < 1e-6
    if n == 1:
        close(T, torch.full_like(T, 1 / m), 1e-6)


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 5, 3), (0, 3), (4, 0)])
def test_nothing_to_transport(shape):
    C = torch.zeros(shape, requires_grad=True)
    T = sinkhorn(C)
    assert T.shape == shape
    if T.requires_grad:
        T.sum().backward()
        assert C.grad.shape == shape


def test_marginals_are_broadcast():
    C, mu, nu = cost("random", 2, 3, 20, 4), marginal("skewed", 20), marginal("skewed", 3, 4)
    close(sinkhorn(C, mu, nu), sinkhorn(C, mu.expand(2, 3, 20), nu.expand(2, 3, 4)), 1e-7)


def test_one_marginal_leaves_the_other_uniform():
    C, mu = cost("random", 20, 4), marginal("skewed", 20)
    close(sinkhorn(C, mu), sinkhorn(C, mu, torch.full((4,), 0.25)), 1e-7)


def test_memory_layout_does_not_matter():
    C = cost("random", 3, 40, 5)
    other = C.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not other.is_contiguous() and torch.equal(sinkhorn(other), sinkhorn(C))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_solved_in_float32(dtype):
    C = cost("random", 2, 40, 5).to(dtype)
    T = sinkhorn(C)
    assert T.dtype == dtype and torch.equal(T, sinkhorn(C.float()).to(dtype))


def test_autocast_changes_nothing():
    def solve():
        C = cost("random", 2, 40, 5).requires_grad_()
        T = sinkhorn(C)
        return T.detach(), torch.autograd.grad((T * rand(2, 40, 5)).sum(), C)[0]

    plain = solve()
    with torch.autocast("cpu", torch.bfloat16):
        cast = solve()
    for a, b in zip(cast, plain):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_a_problem_does_not_see_its_batch():
    "Hard and easy problems together give what each gives alone: iterations stop problem by problem."
    C = torch.cat([cost("flat", 1, 40, 5), 30 * cost("sharp", 1, 40, 5), cost("random", 1, 40, 5)])
    for i, T in enumerate(sinkhorn(C, eps=0.05)):
        close(T, sinkhorn(C[i], eps=0.05), 1e-5)


def test_piecewise(monkeypatch):
    "On a CPU a large batch is taken in pieces: the plans, the gradient and the warning are those of the whole."
    C, seen = cost("random", 140, 400, 6), []
    monkeypatch.setattr("torch.get_num_threads", lambda: 10**6)
    whole, grad = sinkhorn(C), gradient(C, 0.05)
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    for_each_chunk(lambda part: seen.append(len(part)), C)
    assert len(seen) == 3 and sum(seen) == 140
    close(sinkhorn(C), whole, 1e-5)
    close(gradient(C, 0.05), grad, 1e-5)
    with pytest.warns(UserWarning, match="140 of 140 plans") as caught:
        sinkhorn(C, max_iter=1)
    assert len(caught) == 1


def test_arguments_are_left_alone():
    args = cost("random", 2, 20, 4), marginal("skewed", 2, 20), marginal("skewed", 2, 4)
    before = [a.clone() for a in args]
    sinkhorn(*args)
    assert all(torch.equal(a, b) for a, b in zip(args, before))


# the gradient


@pytest.mark.parametrize("eps", [0.05, 0.5])
@pytest.mark.parametrize("m, n", [(7, 3), (3, 4), (4, 1)])
def test_gradcheck(eps, m, n):
    "In the cost, in both marginals (through a softmax: mass must be equal), and in the mass."
    C, a, b = (rand(2, *s, seed=i, dtype=torch.float64).requires_grad_() for i, s in enumerate([(m, n), (m,), (n,)]))
    mass = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    plan = lambda C, a, b, mass: sinkhorn(C, mass * a.softmax(-1), mass * b.softmax(-1), eps, tol=1e-14)
    assert gradcheck(plan, (C, a, b, mass), eps=1e-5, atol=1e-6)


def test_gradient_of_broadcast_marginals():
    C = cost("random", 3, 8, 3).double()
    plan = lambda a, b: sinkhorn(C, a.softmax(-1), b.softmax(-1), 0.2, tol=1e-14)
    assert gradcheck(
        plan,
        (rand(8, dtype=torch.float64).requires_grad_(), rand(3, 3, dtype=torch.float64).requires_grad_()),
        eps=1e-5,
        atol=1e-6,
    )


def gradient(C, eps, plan=sinkhorn):
    "Of a weighted sum of the plan, times eps: of order 1 whatever eps."
    C = C.clone().requires_grad_()
    return eps * torch.autograd.grad((C[0].numel() * plan(C, eps=eps) * rand(*C.shape)).sum(), C)[0].double()


@pytest.mark.parametrize("eps", [1e-4, 1e-3, 1e-2, 0.05, 1])
@pytest.mark.parametrize("C", ["random", "one-hot"])
def test_gradient_in_float32(C, eps):
    "Close to that in float64, where prompts are hardly coupled as well."
    C = cost(C, 8, 60, 6)
    assert (gradient(C, eps) - gradient(C.double(), eps)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_prompts_that_exchange_nothing(dtype):
    "Two groups of pixels and prompts far from each other: the gradient that each has alone."
    A, B = cost("random", 2, 1, 20, 4).to(dtype)
    both = torch.full((1, 40, 8), 30.0, dtype=dtype)
    both[:, :20, :4], both[:, 20:, 4:] = A, B
    weight = rand(40, 8, seed=5).to(dtype)

    def grad(C, weight):
        C = C.clone().requires_grad_()
        return torch.autograd.grad((sinkhorn(C, eps=0.05) * weight).sum(), C)[0]

    G = grad(both, weight)
    close(G[:, :20, :4], grad(A, weight[:20, :4]) / 2, 1e-5)
    close(G[:, 20:, 4:], grad(B, weight[20:, 4:]) / 2, 1e-5)
    assert G[:, :20, 4:].abs().max() < 1e-7 > G[:, 20:, :4].abs().max()


def test_the_graph_keeps_the_plan_and_no_iteration():
    def load_or_make_record(eps):
        C, sizes = cost("random", 2, 200, 6).requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            sinkhorn(C, eps=eps)
        return sum(sizes)

    assert load_or_make_record(1e-3) == load_or_make_record(10) <= 1.5 * 2 * 200 * 6


def test_no_second_derivative():
    C = cost("random", 8, 3).requires_grad_()
    (grad,) = torch.autograd.grad(sinkhorn(C).square().sum(), C, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# warnings and errors


@pytest.mark.parametrize(
    "C, options", [(cost("sharp", 2, 40, 5), dict(max_iter=1)), (torch.full((2, 4, 3), torch.nan), {})]
)
def test_warns_where_it_did_not_converge(C, options):
    with pytest.warns(UserWarning, match="2 of 2 plans did not converge in .* iterations at eps = 0.05"):
        sinkhorn(C, **options)


def test_verdicts_later():
    "One warning for all calls since the last one, and at the end of the block; one for each eps."
    sharp = cost("sharp", 2, 40, 5)
    with pytest.warns(UserWarning) as caught:
        with defer_convergence_checks() as verdicts:
            sinkhorn(sharp, max_iter=1), sinkhorn(sharp), sinkhorn(sharp, max_iter=1)
            assert not caught
            verdicts.warn(), verdicts.warn()
            assert [str(w.message)[:42] for w in caught] == ["4 of 4 plans did not converge in 1 iterati"]
            sinkhorn(sharp, max_iter=1), sinkhorn(torch.full((3, 4, 2), torch.nan), eps=0.5)
    assert [str(w.message).split(":")[0][-10:] for w in caught[1:]] == [
        "eps = 0.05",
        " eps = 0.5",
    ] and "error nan" in str(caught[2].message)
    with pytest.warns(UserWarning, match="2 of 2"):
        sinkhorn(sharp, max_iter=1)


def test_verdicts_are_read_where_something_fails():
    with pytest.warns(UserWarning, match="2 of 2"), pytest.raises(KeyError), defer_convergence_checks():
        sinkhorn(cost("sharp", 2, 40, 5), max_iter=1)
        raise KeyError


def test_nan_stays_in_its_problem():
    C = cost("random", 2, 20, 4)
    C[0, 0, 0] = torch.nan
    with pytest.warns(UserWarning, match="1 of 2 plans"):
        T = sinkhorn(C)
    close(T[1], sinkhorn(C[1]), 1e-6)
    assert T[0].isnan().any()


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(eps=0), "eps = 0: .* must be positive"),
        (dict(eps=-1.0), "eps = -1.0"),
        (dict(eps=float("nan")), "eps = nan"),
        (dict(mu=torch.full((5,), 0.2)), r"mu has shape \(5,\) but must end in 6"),
        (dict(nu=torch.full((2, 6), 1 / 6)), r"nu has shape \(2, 6\) but must end in 4"),
        (dict(mu=torch.tensor(1.0)), r"mu has shape \(\)"),
        (dict(mu=torch.full((3, 6), 1 / 6)), r"mu has shape \(3, 6\)"),
        (dict(nu=torch.tensor([0.5, 0.5, 0.5, -0.5])), "nu has a negative entry, -0.5"),
        (dict(mu=torch.full((6,), 0.5)), "mu sums to 3, nu to 1: .* normalise them"),
        (dict(C=torch.zeros(4)), r"C has shape \(4,\)"),
        (dict(C=torch.zeros(2, 6, 4, dtype=torch.int64)), "torch.int64"),
    ],
)
def test_what_is_refused(change, says):
    with pytest.raises(ValueError, match=says):
        sinkhorn(**({"C": torch.zeros(2, 6, 4)} | change))
