"""Reduced precision changes no plan, and nothing needs float64 on a device that lacks it."""

import pytest
import torch
from helpers import close, random_image, small_model
from test_devices import small_trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from otseg import ot
from otseg.inference import predict_probs
from otseg.mps import cosine, exact_product, score_map
from otseg.newton import exact_float32_products
from otseg.ot import sinkhorn
from otseg.steps import training_step

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default}


def tf32(t):
    "A float32 tensor rounded to the 10 bits of mantissa of TF32."
    if not isinstance(t, torch.Tensor) or t.dtype != torch.float32:
        return t
    bits = t.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


class EmulatedTF32(TorchDispatchMode):
    "Rounds the factors of float32 products, as a GPU does, unless the precision is 'highest' at that moment."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS and torch.get_float32_matmul_precision() != "highest":
            args = tuple(tf32(a) for a in args)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reduced():
    "Users may allow TF32."
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def embeddings():
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 50, 16, generator=g), torch.randn(2, 5, 4, 16, generator=g)


def test_the_emulation_rounds(reduced):
    A = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
    with EmulatedTF32():
        rounded = A @ A
        with exact_float32_products():
            exact = A @ A
    assert torch.equal(exact, A @ A)
    error = (rounded - exact).abs().max() / exact.abs().max()
    assert 1e-5 < error < 1e-2


@pytest.mark.parametrize("eps", [0.05, 0.001])
def test_tf32_changes_no_plan(reduced, open_operators, eps):
    x, q = embeddings()
    C = 1 - cosine(x, q)
    want, S = sinkhorn(C, eps=eps), score_map(x, q, eps)
    weight = torch.randn(C.shape, generator=torch.Generator().manual_seed(1))
    with EmulatedTF32():
        assert torch.equal(sinkhorn(C, eps=eps), want) and torch.equal(score_map(x, q, eps), S)

    def gradient():
        cost = C.clone().requires_grad_()
        (sinkhorn(cost, eps=eps) * weight).sum().backward()
        return cost.grad

    want = gradient()
    with EmulatedTF32():
        assert torch.equal(gradient(), want)


def test_precision_is_restored_after_an_error(reduced):
    with pytest.raises(ZeroDivisionError), exact_float32_products():
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="older PyTorch")
def test_the_newer_flags_are_respected():
    "After one of them is set, PyTorch refuses to read the older setting."
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    want = sinkhorn(1 - cosine(*embeddings()))
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        with exact_float32_products():
            assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert torch.equal(sinkhorn(1 - cosine(*embeddings())), want)
    finally:
        for backend, value in zip(backends, before):
            backend.fp32_precision = value
        torch.set_float32_matmul_precision("highest")


def test_compiled_product():
    "One graph, the same value and gradient."
    A, B = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (2, 4, 5)))
    compiled = torch.compile(exact_product, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(A, B), A @ B)
    ours = torch.autograd.grad(compiled(A, B).square().sum(), (A, B))
    torch.testing.assert_close(ours, torch.autograd.grad((A @ B).square().sum(), (A, B)))


# devices without float64


class NoFloat64(TorchDispatchMode):
    "A pretended device without float64: an operation that makes such a tensor fails."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.dtype == torch.float64]
        assert not made, f"{func} makes a float64 tensor"
        return out


@pytest.fixture
def device_without_float64(monkeypatch, open_operators):
    "The CPU pretends to be such a device, except where the package moves to the CPU by itself."
    on_cpu = ot.on_cpu

    def leaving_the_mode(f):
        def call(*args, **options):
            with torch.utils._python_dispatch._disable_current_modes():
                return f(*args, **options)

        return on_cpu(call)

    monkeypatch.setattr(ot, "NO_FLOAT64", ("cpu",))
    monkeypatch.setattr(ot, "on_cpu", leaving_the_mode)


def test_no_float64_is_detected(open_operators):
    with pytest.raises(AssertionError, match="float64"), NoFloat64():
        sinkhorn(1 - cosine(*embeddings()))


@pytest.mark.parametrize("eps", [0.05, 0.001])
def test_transport_without_float64(device_without_float64, eps):
    C = 1 - cosine(*embeddings())
    with NoFloat64():
        cost = C.clone().requires_grad_()
        T = sinkhorn(cost, eps=eps)
        (T * C).sum().backward()
    assert (T.sum(-1) - 1 / 50).abs().max() < 1e-6 and (T.sum(-2) - 1 / 4).abs().max() < 1e-6
    assert cost.grad.isfinite().all()


@pytest.mark.parametrize("setting", ["inductive", "transductive"])
def test_training_step_without_float64(device_without_float64, setting):
    trainer, batch = small_trainer("cpu", setting)
    training_step(trainer, batch, 0)  # matrices of the loss are made once, on the CPU
    with NoFloat64():
        total = training_step(trainer, batch, 1)
    assert total.isfinite().all()


def test_prediction_without_float64(device_without_float64):
    model, image = small_model(), random_image(1, 40, 48)
    with NoFloat64():
        prob = predict_probs(model, image, seen=(0, 2), size=(50, 60))
    close(prob, predict_probs(small_model(), image, seen=(0, 2), size=(50, 60)))
