"""Relaxed marginals: from softmax to transport, optimality, gradients, hard cases."""

import itertools
import math

import ot as pot
import pytest
import torch
from helpers import close
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import cost, marginal, rand
from torch.autograd import gradcheck

from otseg.ot import sinkhorn

pytestmark = pytest.mark.filterwarnings("error")  # a warning means that a plan did not converge
inf = math.inf
penalties = pytest.mark.parametrize("rho", [(0.1, inf), (inf, 0.1), (0.3, 0.02), (0, 0.1), (0.1, 0), (0, 0)], ids=str)


def relaxed(C, mu=None, nu=None, eps=0.05, rho=(inf, inf), **options):
    return sinkhorn(C, mu, nu, eps, rho_pixels=rho[0], rho_prompts=rho[1], **options)


# the corners


@pytest.mark.parametrize("eps", [0.001, 0.05, 1.0])
@pytest.mark.parametrize("shift", [0, 40])
def test_the_corners_are_softmaxes(eps, shift):
    "A constant that is added to all costs changes no softmax."
    C = cost("random", 3, 60, 6).double()
    over_prompts, over_pixels = (-C / eps).softmax(-1) / 60, (-C / eps).softmax(-2) / 6
    torch.testing.assert_close(relaxed(C + shift, eps=eps, rho=(inf, 0)), over_prompts, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(relaxed(C + shift, eps=eps, rho=(0, inf)), over_pixels, rtol=1e-6, atol=1e-12)
    close(relaxed(C.float(), eps=eps, rho=(inf, 0)).double(), over_prompts, 1e-6)
    close(relaxed(C.float(), eps=eps, rho=(0, inf)).double(), over_pixels, 1e-6)
    torch.testing.assert_close(relaxed(C, eps=eps, rho=(0, 0)), (-C / eps).exp() / 360)


def test_a_large_penalty_keeps_the_marginals():
    C, mu, nu = cost("random", 3, 60, 6).double(), marginal("skewed", 3, 60).double(), marginal("skewed", 3, 6).double()
    want = sinkhorn(C, mu, nu)
    previous = inf
    for rho in (1.0, 100.0, 1e4, 1e6):
        error = (relaxed(C, mu, nu, rho=(rho, rho)) - want).abs().max()
        assert error < previous / 10
        previous = error
    assert previous < 1e-6


def test_neighbours_in_the_family_are_close():
    "No jump at an end: a tiny penalty is almost none, a huge one almost infinite."
    C = cost("random", 3, 60, 6).double()
    tiny, huge = 1e-9, 1e9
    for a, b in (
        ((tiny, inf), (0, inf)),
        ((inf, tiny), (inf, 0)),
        ((huge, 0.1), (inf, 0.1)),
        ((0.1, huge), (0.1, inf)),
    ):
        close(relaxed(C, rho=a), relaxed(C, rho=b), 1e-6)


# optimality


def objective(T, C, mu, nu, eps, rho):
    def kl(x, y):
        return (torch.special.xlogy(x, x / y) - x + y).sum()

    total = (T * C).sum() + eps * kl(T, mu[:, None] * nu)
    for penalty, sums, mass in zip(rho, (T.sum(1), T.sum(0)), (mu, nu)):
        total = total + (penalty * kl(sums, mass) if penalty < inf else 0)
    return total


@penalties
def test_no_plan_nearby_is_better(rho):
    "The objective is written down from its definition. Changes of the plan keep the marginals that are kept."
    C, mu, nu = cost("random", 12, 4).double(), marginal("skewed", 12).double(), marginal("skewed", 4).double()
    T = relaxed(C, mu, nu, rho=rho, tol=1e-13)
    best = objective(T, C, mu, nu, 0.05, rho)
    for seed in range(20):
        change = (rand(12, 4, seed=seed).double() - 0.5) * T
        if rho[0] == inf:
            change -= T * (change.sum(1) / T.sum(1))[:, None]
        if rho[1] == inf:
            change -= T * (change.sum(0) / T.sum(0))
        assert change.abs().max() > 1e-6
        for size in (1e-2, 1e-1):
            assert objective(T + size * change, C, mu, nu, 0.05, rho) > best


@pytest.mark.parametrize("rho", [0.02, 0.3, 5.0])
@pytest.mark.parametrize("eps", [0.02, 0.2])
def test_agrees_with_pot(rho, eps):
    C, mu, nu = cost("random", 30, 5).double(), marginal("skewed", 30).double(), marginal("skewed", 5).double()
    options = dict(method="sinkhorn", numItermax=20_000, stopThr=1e-13, reg_type="kl")
    theirs = pot.unbalanced.sinkhorn_unbalanced(mu.numpy(), nu.numpy(), C.numpy(), eps, rho, **options)
    close(relaxed(C, mu, nu, eps, (rho, rho)), torch.from_numpy(theirs), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["random", "flat", "sharp", "one-hot"])
@pytest.mark.parametrize("masses", ["uniform", "skewed", "zeros"])
def test_hard_cases(dtype, kind, masses):
    """Every pair of penalties with every eps converges, to the plan that a far stricter tolerance gives.

    Costs that are shifted by 50 or 30 times as large are included."""
    mu, nu = marginal(masses, 2, 40).to(dtype), marginal(masses, 2, 5).to(dtype)
    C = torch.stack([c * cost(kind, 2, 40, 5) + d for c, d in ((1, 0), (1, 50), (30, 0))]).to(dtype)
    for eps, *rho in itertools.product((1e-3, 0.05, 10), (0, 1e-3, 0.3, 1e4, inf), (0, 1e-3, 0.3, 1e4)):
        T = relaxed(C, mu, nu, eps, rho)
        exact = relaxed(C.double(), mu.double(), nu.double(), eps, rho, tol=1e-11)
        assert T.isfinite().all() and (T >= 0).all()
        tolerance = 5e-6 if dtype == torch.float32 else 2e-6
        assert (T - exact).abs().max() < tolerance * exact.max() + 1e-12
        if rho[0] == inf:
            close(T.sum(-1), mu.expand(3, 2, 40), 1e-6)


@settings(deadline=None, max_examples=60)
@given(
    m=st.integers(1, 30),
    n=st.integers(1, 8),
    log_eps=st.floats(-7, 3),
    log_rho=st.tuples(st.floats(-9, 9), st.floats(-9, 9)),
    scale=st.floats(0, 50),
    seed=st.integers(0, 1000),
)
def test_any_problem_is_solved(m, n, log_eps, log_rho, scale, seed):
    "The plan satisfies the optimality condition of the prompts, written with its own sums."
    C = scale * rand(m, n, seed=seed).double()
    eps, rho = math.exp(log_eps), tuple(map(math.exp, log_rho))
    T = relaxed(C, eps=eps, rho=rho)
    exact = relaxed(C, eps=eps, rho=rho, tol=1e-10)
    assert (T - exact).abs().max() < 1e-6 * exact.max() + 1e-12
    assert T.sum() <= 1 + 1e-6  # a penalty never creates mass where the costs are not negative


def test_a_problem_does_not_see_its_batch():
    C = torch.cat([cost("random", 3, 40, 5), 40 * cost("sharp", 2, 40, 5)]).double()
    for rho in ((0.1, inf), (inf, 0.1), (0.2, 0.3)):
        together, alone = relaxed(C, rho=rho), torch.stack([relaxed(c, rho=rho) for c in C[3:]])
        torch.testing.assert_close(together[3:], alone, rtol=1e-12, atol=1e-15)


def test_pixels_that_fit_nothing_lose_their_mass():
    C = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]).double()
    T = relaxed(C, rho=(0.05, inf))
    assert T[2].sum() < 0.05 * T[0].sum() and (T.sum(0) - 0.5).abs().max() < 1e-6


def test_marginals_with_different_sums():
    "Allowed if at least one of them is relaxed."
    C, nu = cost("random", 6, 4), torch.full((4,), 0.5)
    close(relaxed(C, nu=nu, rho=(0.1, inf)).sum(0), nu, 1e-6)
    close(relaxed(C, nu=nu, rho=(inf, 0.1)).sum(1), torch.full((6,), 1 / 6), 1e-6)
    with pytest.raises(ValueError, match="a plan needs equal sums"):
        sinkhorn(C, nu=nu)


def test_partial_transport_is_one_more_prompt():
    "A prompt of constant cost takes the share of the pixels that is not transported."
    C, share = cost("random", 50, 4).double(), 0.6
    nu = torch.tensor([share / 4] * 4 + [1 - share], dtype=torch.float64)
    T = sinkhorn(torch.cat([C, torch.zeros(50, 1)], 1), nu=nu, eps=0.002)[:, :4]
    mu = torch.full((50,), 1 / 50, dtype=torch.float64)
    exact = pot.partial.partial_wasserstein(mu.numpy(), nu[:4].numpy(), C.numpy(), m=share)
    assert (T.sum(1) <= mu + 1e-9).all() and abs(T.sum() - share) < 1e-7
    assert abs((T * C).sum() - (torch.from_numpy(exact) * C).sum()) < 0.01 * (T * C).sum()


# gradients


@penalties
@pytest.mark.parametrize("eps", [0.2, 1.0])
def test_gradcheck(rho, eps):
    free = [rand(*s, seed=i).double().requires_grad_() for i, s in enumerate([(2, 5, 3), (2, 5), (2, 3)])]

    def plan(C, mu, nu):
        return relaxed(C, mu.softmax(-1), 0.8 * nu.softmax(-1), eps, rho, tol=1e-13)

    assert gradcheck(plan, free)


@penalties
def test_gradient_in_float32(rho):
    C, weight = cost("random", 4, 50, 6), rand(4, 50, 6)

    def gradient(C):
        C = C.requires_grad_()
        return torch.autograd.grad(50 * 6 * (relaxed(C, rho=rho) * weight.to(C)).sum(), C)[0].double()

    exact = gradient(C.double())
    assert (gradient(C.float()) - exact).abs().max() < 1e-5 * exact.abs().max().clamp_min(1)


# arguments


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rho_pixels=-0.1), "rho_pixels = -0.1: a penalty must be at least 0; inf keeps the marginal"),
        (dict(rho_prompts=math.nan), "rho_prompts = nan"),
        (dict(rho_pixels=0.1, eps=torch.tensor(0.1)), "eps is a tensor: with a rho between 0 and infinity"),
    ],
)
def test_invalid_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn(torch.zeros(6, 4), **options)


@penalties
def test_warns_if_it_did_not_converge(rho):
    C = cost("sharp", 2, 40, 5) * torch.linspace(1, 3, 5)
    if rho[0] == 0 or rho[1] == 0:  # Sinkhorn's step is exact, or there is nothing to solve
        relaxed(C, rho=rho, max_iter=4)
    else:
        with pytest.warns(UserWarning, match="2 of 2 plans did not converge in 1 iterations"):
            relaxed(C, rho=rho, max_iter=1)


@penalties
def test_nan_stays_in_its_problem(rho):
    C = cost("random", 2, 20, 4)
    C[0, 0, 0] = torch.nan
    with pytest.warns(UserWarning, match="1 of 2 plans"):
        T = relaxed(C, rho=rho)
    close(T[1], relaxed(C[1], rho=rho), 1e-6)
    assert T[0].isnan().any()
