"""Transport inside other functions: torch.func, derivatives of any order, tensor eps, empty batches, torch.compile."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from helpers import close
from problems import cost, marginal, rand
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from otseg.ot import defer_convergence_checks, sinkhorn

pytestmark = pytest.mark.filterwarnings("error", "ignore:`torch.jit")  # the second is PyTorch's, in forward mode
inf = math.inf
penalties = pytest.mark.parametrize(
    "rho", [(inf, inf), (0.2, inf), (inf, 0.2), (0.3, 0.4), (0, 0.3), (0.3, 0)], ids=str
)


def plan(C, mu=None, nu=None, eps=0.3, rho=(inf, inf)):
    return sinkhorn(C, mu, nu, eps, tol=1e-14, rho_pixels=rho[0], rho_prompts=rho[1])


def small(*shape, seed=0):
    return rand(*shape, seed=seed).double()


def linear_loss(rho=(inf, inf)):
    weight = small(4, 3, seed=9)
    return lambda C: (weight * plan(C, rho=rho)).sum()


# torch.func


@penalties
def test_vmap_adds_a_batch_axis(rho):
    C, mu, nu = small(5, 2, 4, 3), small(4).softmax(-1), small(5, 3).softmax(-1)
    close(vmap(lambda c: plan(c, rho=rho))(C), plan(C, rho=rho))
    want = plan(C, mu, nu[:, None], rho=rho)
    close(vmap(lambda c, nu: plan(c, mu, nu, rho=rho))(C, nu), want)
    close(
        vmap(lambda c, nu: plan(c, mu, nu, rho=rho), in_dims=(3, 1), out_dims=2)(C.movedim(0, 3), nu.T),
        want.movedim(0, 2),
    )
    close(vmap(vmap(lambda c: plan(c, rho=rho)))(C), plan(C, rho=rho))


def test_vmap_over_one_marginal_only():
    C, nu = small(4, 3), small(5, 3).softmax(-1)
    close(vmap(lambda nu: plan(C, nu=nu))(nu), plan(C.expand(5, 4, 3), nu=nu))


def test_vmap_checks_and_warns_like_a_batch():
    C = cost("sharp", 3, 40, 5)
    with pytest.warns(UserWarning, match="3 of 3 plans did not converge") as caught:
        vmap(lambda c: sinkhorn(c, max_iter=1))(C)
    assert caught[0].filename == __file__
    with pytest.raises(ValueError, match="nu has a negative entry"):
        vmap(lambda nu: sinkhorn(C[0], nu=nu))(torch.tensor([[0.5, 0.5, 0.5, -0.25, -0.25]] * 2))
    with defer_convergence_checks() as report:
        vmap(sinkhorn)(C)
        assert len(report.found) == 1


@penalties
def test_jacobians_agree_in_both_modes(rho):
    C, mu, nu = small(4, 3), small(4, seed=1).softmax(-1), small(3, seed=2).softmax(-1)
    for argument in range(3):

        def function(C, mu, nu):
            return plan(C, mu.softmax(-1), nu.softmax(-1), rho=rho)

        forward, reverse = (jac(function, argnums=argument)(C, mu, nu) for jac in (jacfwd, jacrev))
        close(forward, reverse)
        assert reverse.abs().max() > 1e-3 or (argument == 2 and rho[1] == 0)


@penalties
def test_grad_of_each_problem_under_vmap(rho):
    C, loss = small(5, 4, 3), linear_loss(rho)
    leaf = C.clone().requires_grad_()
    (want,) = torch.autograd.grad(sum(loss(c) for c in leaf), leaf)
    close(vmap(grad(loss))(C), want)


@penalties
def test_gradgradcheck(rho):
    free = [small(*s, seed=i).requires_grad_() for i, s in enumerate([(2, 4, 3), (2, 4), (2, 3)])]

    def function(C, mu, nu):
        return plan(C, mu.softmax(-1), 0.9 * nu.softmax(-1) if rho != (inf, inf) else nu.softmax(-1), rho=rho)

    assert gradcheck(function, free, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, free)


@penalties
@pytest.mark.parametrize("outer, inner", [(jacfwd, jacrev), (jacrev, jacrev), (jacrev, jacfwd), (jacfwd, jacfwd)])
def test_hessian_in_every_order_of_modes(rho, outer, inner):
    "Also for a loss that is linear in the plan: its second derivative is not zero. The reference is a difference."
    C, loss, h = small(4, 3), linear_loss(rho), 1e-5
    H, direction = outer(inner(loss))(C).flatten(2).flatten(0, 1), small(12, seed=3)
    steps = [grad(loss)(C + s * h * direction.view(4, 3)).flatten() for s in (1, -1)]
    torch.testing.assert_close(H @ direction, (steps[0] - steps[1]) / (2 * h), rtol=1e-5, atol=1e-8)
    assert H.abs().max() > 1e-3
    close(H, H.T)


@pytest.mark.parametrize("modes", list(itertools.product((jacfwd, jacrev), repeat=3)))
def test_third_derivative(modes):
    outer, middle, inner = modes
    loss, C, step = linear_loss(), small(4, 3), torch.zeros(4, 3).double()
    step[1, 2] = 1e-4
    third = outer(middle(inner(loss)))(C)[0, 0, 0, 0, 1, 2]
    difference = (hessian(loss)(C + step) - hessian(loss)(C - step))[0, 0, 0, 0] / 2e-4
    assert third.abs() > 1e-3 and (third - difference).abs() < 1e-6


def test_second_derivative_in_float32():
    C, loss, weight = cost("random", 4, 3), linear_loss(), small(4, 3, seed=9)

    def weighted(C):
        return (weight.to(C) * sinkhorn(C, eps=0.3)).sum()

    close(hessian(weighted)(C.float()).double(), hessian(loss)(C.double()), 1e-4)


def test_gradient_penalty_trains():
    "The usual form: a second backward pass through a gradient."
    C = small(2, 4, 3).requires_grad_()
    (g,) = torch.autograd.grad(plan(C).square().sum(), C, create_graph=True)
    g.square().sum().backward()
    want = jacrev(lambda C: grad(lambda C: plan(C).square().sum())(C).square().sum())(C.detach())
    close(C.grad, want)


# eps as a tensor


@pytest.mark.parametrize("rho", [(inf, inf), (0, inf), (inf, 0)], ids=str)
def test_gradient_of_eps(rho):
    "One eps for all problems, or one for each."
    C = small(3, 2, 4, 3)
    for eps in (torch.tensor(0.3), torch.tensor([0.2, 0.5]), torch.tensor([[0.2], [0.3], [0.9]])):
        eps = eps.double().requires_grad_()
        assert gradcheck(lambda eps: plan(C, eps=eps, rho=rho), eps)
        assert gradgradcheck(lambda eps: plan(C, eps=eps, rho=rho).square(), eps)
        each = eps.detach().expand(3, 2)
        want = torch.stack([torch.stack([plan(c, eps=e.item(), rho=rho) for c, e in zip(*p)]) for p in zip(C, each)])
        close(plan(C, eps=eps, rho=rho), want)
    close(vmap(lambda c, e: plan(c, eps=e, rho=rho))(C[:, 0], each[:, 0]), plan(C[:, 0], eps=each[:, 0], rho=rho))


@pytest.mark.parametrize(
    "eps, message",
    [
        (torch.ones(3), r"eps has shape \(3,\) but must broadcast to \(2,\)"),
        (torch.ones(1, 2), r"eps has shape \(1, 2\) but must broadcast to \(2,\)"),
    ],
)
def test_shape_of_eps(eps, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn(torch.zeros(2, 6, 4), eps=eps)


@pytest.mark.parametrize("eps", [0.0, -1.0, math.nan])
def test_a_tensor_that_is_not_positive(eps):
    "Its problem becomes NaN with a warning; the others are solved."
    C = cost("random", 2, 20, 4)
    with pytest.warns(UserWarning, match="1 of 2 plans did not converge"):
        T = sinkhorn(C, eps=torch.tensor([eps, 0.05]))
    assert T[0].isnan().all()
    close(T[1], sinkhorn(C[1]), 1e-5)


# edges


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0), (0, 0)])
def test_empty_batches_stay_in_the_graph(shape):
    C = torch.rand(shape, requires_grad=True)
    mu, nu = (torch.rand(*shape[:-2], s, requires_grad=True) for s in shape[-2:])
    for rho in ((inf, inf), (0.1, 0)):
        T = plan(C, mu, nu, rho=rho)
        assert T.shape == shape
        grads = torch.autograd.grad(T.sum(), (C, mu, nu))
        assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, (C, mu, nu)))
    assert plan(C, eps=torch.tensor(0.1)).shape == shape


def test_layouts_and_types():
    C = cost("random", 2, 20, 4)
    expanded = C[:1].expand(3, 20, 4).clone().requires_grad_()
    strided = C[:1].repeat(3, 2, 1)[:, :20], C[:1].repeat(3, 1, 1).mT.contiguous().mT
    assert all(torch.equal(sinkhorn(view), sinkhorn(view.contiguous())) for view in strided)
    close(sinkhorn(C[:1].expand(3, 20, 4)), sinkhorn(expanded).detach())
    leaf = C[:1].clone().requires_grad_()
    sinkhorn(leaf.expand(3, 20, 4)).square().sum().backward()
    sinkhorn(expanded).square().sum().backward()
    close(leaf.grad[0], expanded.grad.sum(0), 1e-4)
    for dtype in (torch.float16, torch.bfloat16):
        for rho in ((inf, inf), (0.1, 0.2)):
            T = sinkhorn(C.to(dtype), rho_pixels=rho[0], rho_prompts=rho[1])
            want = sinkhorn(C.to(dtype).float(), rho_pixels=rho[0], rho_prompts=rho[1])
            assert T.dtype == dtype and (T.float() - want).abs().max() < 1e-3


@pytest.mark.parametrize("masses", ["uniform", "zeros"])
def test_pixels_without_mass_have_no_second_derivative(masses):
    C, mu, weight = small(6, 3), marginal(masses, 6).double(), small(6, 3, seed=2)
    H = hessian(lambda C: (weight * plan(C, mu)).sum())(C)
    assert H.isfinite().all() and not H[mu == 0].any()


@pytest.mark.parametrize("rho", [(inf, inf), (0.2, inf), (inf, 0.2)], ids=str)
def test_compiles_as_one_graph(rho):
    C, mu, weight = cost("random", 2, 20, 4).requires_grad_(), rand(20).softmax(-1).requires_grad_(), rand(2, 20, 4)

    def loss(C, mu):
        return (sinkhorn(C, mu, rho_pixels=rho[0], rho_prompts=rho[1]) * weight).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    close(compiled(C, mu), loss(C, mu))
    for ours, want in zip(torch.autograd.grad(compiled(C, mu), (C, mu)), torch.autograd.grad(loss(C, mu), (C, mu))):
        close(ours, want)


# alone


def test_imports_nothing_but_torch():
    "Nor a part of PyTorch that takes long to import."
    code = """
import sys, torch
before = set(sys.modules)
import otseg.ot
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names)), "torch._dynamo" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "['otseg'] False"
