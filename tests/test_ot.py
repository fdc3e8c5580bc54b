"""Transport plans: marginals, limits, symmetries, exact gradients, warnings and errors."""

import pytest
import torch
import torch.nn.functional as F
from helpers import close
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import cost, gradient, load_golden, marginal, rand, two_groups
from torch.autograd import gradcheck

from otseg.newton import CHUNK_NUMBERS, for_each_chunk, sinkhorn_loop
from otseg.ot import defer_convergence_checks, sinkhorn

cases = pytest.mark.parametrize("case", "abcd")
pytestmark = pytest.mark.filterwarnings("error")  # a warning means that a plan did not converge


# golden problems of the official code


@cases
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-6), (torch.float32, 2e-5)])
def test_converged_plan(case, dtype, tol):
    t, eps = load_golden(case)
    close(sinkhorn(t["cost"].to(dtype), eps=eps).double(), t["plan64"], tol)
    close(sinkhorn(t["cost"].to(dtype), t["mu"], t["nu"], eps=eps).double(), t["plan64_marginals"], tol)


@cases
def test_official_plan(case):
    "The official loop stops early, so its plans are less exact. The plain reference reproduces them."
    t, eps = load_golden(case)
    close(sinkhorn(t["cost"], eps=eps), t["plan"], 5e-4)
    close(sinkhorn_loop(t["cost"], eps=eps), t["plan"], 1e-5)


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_the_cost(case, dtype):
    t, eps = load_golden(case)
    W, (m, n) = t["weight"].double(), t["cost"].shape[-2:]

    def grad(dtype, plan, **options):
        C = t["cost"].to(dtype).requires_grad_()
        return torch.autograd.grad(m * n * (W.to(dtype) * plan(C, eps=eps, **options)).sum(), C)[0].double()

    ours, exact = grad(dtype, sinkhorn), grad(torch.float64, sinkhorn_loop, max_iter=400, tol=0)
    scale = max(exact.abs().max(), W.abs().max())  # with a single prompt the gradient is zero
    assert (ours - exact).abs().max() <= 1e-5 * scale
    assert (ours - t["grad_cost"]).abs().max() <= 2e-3 * scale


# properties of a plan


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
    "Each pixel is much nearer to one prompt. If its pixels just fill a prompt, the dual Hessian is nearly singular."
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
    "The marginals hold, and log T + C/eps is a sum of one potential for each axis: only one T has both properties."
    eps = 10**log_eps
    C = (2 * scale * rand(m, n, seed=seed, dtype=torch.float64)).requires_grad_()
    mu, nu = (rand(s, seed=seed + s, dtype=torch.float64) ** sharp + 1e-3 for s in (m, n))
    T = sinkhorn(C, mu / mu.sum(), nu / nu.sum(), eps)
    assert (T.sum(-1) - mu / mu.sum()).abs().max() < 1e-6 and (T.sum(-2) - nu / nu.sum()).abs().max() < 1e-6
    Z = T.detach().log() + C.detach() / eps
    assert (Z - Z[:1] - Z[:, :1] + Z[:1, :1]).abs().max() < 1e-7 * (1 + 1 / eps)
    (grad,) = torch.autograd.grad((T * rand(m, n, seed=1)).sum(), C)
    assert (
        grad.isfinite().all() and grad.sum(-1).abs().max() < 1e-6 / eps
    )  # a constant added to the costs of a pixel has no effect


def test_large_eps_gives_the_product_of_the_marginals():
    mu, nu = marginal("skewed", 50), marginal("skewed", 6)
    close(sinkhorn(cost("random", 50, 6), mu, nu, eps=1e5), mu[:, None] * nu, 1e-4)


def test_small_eps_gives_the_assignment():
    "With as many pixels as prompts, the plan is the best permutation."
    C = cost("random", 5, 5)
    best = min(
        torch.cartesian_prod(*[torch.arange(5)] * 5), key=lambda p: (len(p.unique()) < 5, C[torch.arange(5), p].sum())
    )
    close(sinkhorn(C, eps=1e-4), torch.eye(5)[best] / 5, 1e-5)


def test_agrees_with_pot():
    pot = pytest.importorskip("ot")
    C, mu, nu = cost("random", 30, 4).double(), marginal("skewed", 30).double(), marginal("skewed", 4).double()
    mu, nu = mu / mu.sum(), nu / nu.sum()
    options = dict(reg=0.1, method="sinkhorn_log", stopThr=1e-13, numItermax=100_000)
    theirs = torch.from_numpy(pot.sinkhorn(mu.numpy(), nu.numpy(), C.numpy(), **options))
    close(sinkhorn(C, mu, nu, eps=0.1), theirs, 1e-8)
    close(sinkhorn_loop(C, mu, nu, eps=0.1, max_iter=5000, tol=0), theirs, 1e-8)


@pytest.mark.parametrize("m, n", [(50, 6), (4, 6), (7, 7), (1, 5)])
def test_permutation(m, n):
    C, mu, nu = cost("random", 2, m, n).double(), marginal("skewed", 2, m).double(), marginal("skewed", 2, n).double()
    i, j = torch.randperm(m, generator=torch.Generator().manual_seed(0)), torch.arange(n).flip(0)
    close(sinkhorn(C[:, i][..., j], mu[:, i], nu[:, j]), sinkhorn(C, mu, nu)[:, i][..., j], 1e-7)


def test_transposition():
    "Exchanging the pixel axis and the prompt axis transposes the plan."
    C, mu, nu = cost("random", 12, 5).double(), marginal("skewed", 12).double(), marginal("skewed", 5).double()
    close(sinkhorn(C.T, nu, mu), sinkhorn(C, mu, nu).T, 1e-6)


@pytest.mark.parametrize("eps", [0.01, 0.05, 1])
def test_only_cost_over_eps_matters_and_shifts_do_not(eps):
    C = cost("random", 3, 50, 6).double()
    T = sinkhorn(C, eps=eps)
    close(sinkhorn(7 * C, eps=7 * eps), T, 1e-6)
    close(sinkhorn(C + 5 * rand(3, 50, 1) - 3 * rand(3, 1, 6, seed=1), eps=eps), T, 1e-6)


def test_mass_scales_the_plan():
    C, mu, nu = cost("random", 20, 4).double(), marginal("skewed", 20).double(), marginal("skewed", 4).double()
    close(sinkhorn(C, 3 * mu, 3 * nu), 3 * sinkhorn(C, mu, nu), 1e-7)


def test_pixels_and_prompts_without_mass():
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
    "Hard and easy problems in one batch have the same plans as alone: iterations stop problem by problem."
    C = torch.cat([cost("flat", 1, 40, 5), 30 * cost("sharp", 1, 40, 5), cost("random", 1, 40, 5)])
    for i, T in enumerate(sinkhorn(C, eps=0.05)):
        close(T, sinkhorn(C[i], eps=0.05), 1e-5)


def test_chunks(monkeypatch):
    "A CPU solves a large batch in chunks: plans, gradient and warning are those of the whole batch."
    C, sizes = cost("random", 7, 400, 6), []
    whole, grad = sinkhorn(C), gradient(C, 0.05)
    monkeypatch.setattr("otseg.newton.CHUNK_NUMBERS", 3 * C[0].numel())
    for_each_chunk(lambda part: sizes.append(len(part)), C)
    assert sizes == [3, 3, 1]
    close(sinkhorn(C), whole, 1e-5)
    close(gradient(C, 0.05), grad, 1e-5)
    with pytest.warns(UserWarning, match="7 of 7 plans") as caught:
        sinkhorn(C, max_iter=1)
    assert len(caught) == 1


def test_a_chunk_grows_with_the_threads(monkeypatch):
    C, sizes = torch.empty(10, 1, CHUNK_NUMBERS // 2), []
    for threads in (1, 3, 100):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        for_each_chunk(lambda part: sizes.append(len(part)), C)
    assert sizes == [2] * 5 + [6, 4] + [10]


def test_arguments_are_not_modified():
    args = cost("random", 2, 20, 4), marginal("skewed", 2, 20), marginal("skewed", 2, 4)
    before = [a.clone() for a in args]
    sinkhorn(*args)
    assert all(torch.equal(a, b) for a, b in zip(args, before))


# the gradient


@pytest.mark.parametrize("eps", [0.05, 0.5])
@pytest.mark.parametrize("m, n", [(7, 3), (3, 4), (4, 1)])
def test_gradcheck(eps, m, n):
    "For the cost, for both marginals (through a softmax, since their sums must be equal), and for the mass."
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


@pytest.mark.parametrize("eps", [1e-4, 1e-3, 1e-2, 0.05, 1])
@pytest.mark.parametrize("C", ["random", "one-hot"])
def test_gradient_in_float32(C, eps):
    "The float32 gradient is close to the float64 gradient, also where prompts are hardly coupled."
    C = cost(C, 8, 60, 6)
    assert (gradient(C, eps) - gradient(C.double(), eps)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_uncoupled_groups(dtype):
    "Two groups of pixels and prompts that are far from each other have the gradients that each has alone."
    A, B = cost("random", 2, 20, 4).to(dtype)
    both = two_groups(A, B)
    weight = rand(40, 8, seed=5).to(dtype)

    def grad(C, weight):
        C = C.clone().requires_grad_()
        return torch.autograd.grad((sinkhorn(C, eps=0.05) * weight).sum(), C)[0]

    G = grad(both, weight)
    close(G[:20, :4], grad(A, weight[:20, :4]) / 2, 1e-5)
    close(G[20:, 4:], grad(B, weight[20:, 4:]) / 2, 1e-5)
    assert G[:20, 4:].abs().max() < 1e-7 > G[20:, :4].abs().max()


def test_the_graph_stores_the_plan_and_no_iteration():
    def saved_numbers(eps):
        C, sizes = cost("random", 2, 200, 6).requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            sinkhorn(C, eps=eps)
        return sum(sizes)

    assert saved_numbers(1e-3) == saved_numbers(10) <= 1.5 * 2 * 200 * 6


# warnings and errors


@pytest.mark.parametrize(
    "C, options", [(cost("sharp", 2, 40, 5), dict(max_iter=1)), (torch.full((2, 4, 3), torch.nan), {})]
)
def test_warns_if_it_did_not_converge(C, options):
    with pytest.warns(UserWarning, match="2 of 2 plans did not converge in .* iterations at eps = 0.05") as caught:
        sinkhorn(C, **options)
    assert caught[0].filename == __file__


def test_deferred_checks():
    "One warning for all solves since the last check, and one on exit; separate warnings for different eps."
    sharp = cost("sharp", 2, 40, 5)
    with pytest.warns(UserWarning) as caught:
        with defer_convergence_checks() as report:
            sinkhorn(sharp, max_iter=1), sinkhorn(sharp), sinkhorn(sharp, max_iter=1)
            assert not caught
            report.warn(), report.warn()
            assert ["4 of 4 plans did not converge in 1 iter" in str(w.message) for w in caught] == [True]
            sinkhorn(sharp, max_iter=1), sinkhorn(torch.full((3, 4, 2), torch.nan), eps=0.5)
    last, nan = (str(w.message) for w in caught[1:])
    assert "at eps = 0.05:" in last and "at eps = 0.5:" in nan and "error nan" in nan
    with pytest.warns(UserWarning, match="2 of 2"):
        sinkhorn(sharp, max_iter=1)


def test_deferred_checks_run_when_the_block_fails():
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
    "change, message",
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
def test_invalid_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn(**({"C": torch.zeros(2, 6, 4)} | change))
