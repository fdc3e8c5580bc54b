"""Every device computes what the CPU does, and nothing falls back to it."""

from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from helpers import K, N, close, evaluate, random_image, random_text, small_model
from torch.utils._python_dispatch import TorchDispatchMode

from otseg import kernel, ot
from otseg.data import UNLABELLED, Benchmark
from otseg.images import IGNORE, normalize
from otseg.inference import predict_paths, predict_probs
from otseg.losses import training_loss
from otseg.model import DenseCLIP, OTSeg
from otseg.mpsa import ATTENTIONS
from otseg.ot import sinkhorn
from otseg.recipes import resolve
from otseg.steps import make_optimizer, pseudo_label
from otseg.training import Run, step

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]
devices = pytest.mark.parametrize("device", DEVICES)


def labels(b=2, side=32):
    label = torch.randint(K, (b, side, side), generator=torch.Generator().manual_seed(0))
    label[:, :4] = IGNORE
    return label


def forward_and_back(device, attention):
    "Masks, loss terms and gradients of a training step without dropout, on the CPU for comparison."
    model = small_model(attention=attention, dropout=0.0).to(device).train()
    masks = model(random_image().to(device))
    terms = training_loss(masks, labels().to(device))
    sum(terms.values()).backward()
    out = (
        dict(zip(masks._fields, masks))
        | terms
        | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    )
    assert all(t.device.type == device for t in out.values())
    return {name: t.detach().cpu() for name, t in out.items()}


@devices
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_training_step(device, attention):
    ours, want = forward_and_back(device, attention), forward_and_back("cpu", attention)
    for name in want:
        close(ours[name], want[name], 1e-3)


@devices
@pytest.mark.parametrize("eps", [1e-3, 0.05, 1])
def test_plan(device, eps):
    C = 2 * torch.rand(3, 60, 6, generator=torch.Generator().manual_seed(0))
    T = sinkhorn(C.to(device), eps=eps)
    assert T.device.type == device
    close(T.cpu(), sinkhorn(C, eps=eps), 1e-4)


@devices
def test_prediction(device):
    model, image, text = small_model().to(device), random_image(1, 40, 48).to(device), random_text(7, N).to(device)
    prob = predict_probs(model, image, seen=(0, 2), size=(50, 60))
    assert prob.device.type == device and prob.shape == (1, K, 50, 60)
    close(prob.cpu(), predict_probs(small_model(), image.cpu(), seen=(0, 2), size=(50, 60)), 1e-4)
    assert all(pred.device.type == device for pred in predict_paths(model, image).values())
    assert (
        model(image, text).mps.device.type == device
        and model.trainable_state()["descriptor.proj.weight"].device.type == device
    )


@devices
def test_evaluation(device):
    "Images and labels come from the CPU."
    data = [{"image": torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(1)), "label": labels(1, 40)[0]}]
    for kind in (OTSeg, DenseCLIP):
        ours, want = (evaluate(small_model(kind).to(d), data, (1, 3, 4)) for d in (device, "cpu"))
        assert abs(ours["ensemble"]["pacc"] - want["ensemble"]["pacc"]) < 0.01


@devices
def test_labels_and_images(device):
    label = labels().masked_fill(labels() == 1, UNLABELLED).to(device)
    filled = pseudo_label(small_model().to(device)(random_image().to(device)), label, (1, 4))
    assert filled.device.type == device and not (filled == UNLABELLED).any()
    assert normalize(torch.rand(3, 4, 4, device=device)).device.type == device


class NoTensorOf(TorchDispatchMode):
    "Fails where an operation makes a tensor on a device."

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            assert not isinstance(t, torch.Tensor) or t.device.type != self.device, (
                f"{func} makes a tensor on {self.device}"
            )
        return out


def test_no_tensor_of_another_device():
    "The meta device stands for any but the CPU, on which nothing is made. (The transport reads values, so not for it.)"
    model, image = small_model(attention="softmax").to("meta"), random_image(2, 40, 48).to("meta")
    with NoTensorOf("cpu"):
        f = model.encoder(image)
        masks = model.decoder(model.descriptor(f.cls, model.text), f.patches)
        masks.sum().backward()
    assert masks.device.type == "meta" and masks.shape == (2, K, 30)


# a training step asks the device nothing


def a_run(device, setting, attention="mpsa", per_device=2):
    "A run of the small model on a device, and a batch for it."
    recipe, unseen = resolve("digits", setting, batch_size=4, attention=attention), (1, 4)
    model = small_model(attention=attention).to(device)
    text = model.text[[0, 2, 3]] if setting == "inductive" else model.text
    run = Run(
        recipe,
        Benchmark("test", tuple("abcde"), unseen, None, None),
        None,
        Accelerator(cpu=device != "cuda"),
        model,
        model,
        make_optimizer(model, recipe),
        None,
        None,
        per_device,
        0,
        False,
        text,
        torch.tensor(unseen).to(device),
    )
    label = torch.cat([labels(4), torch.full((4, 2, 32), UNLABELLED)], 1) % (
        len(text) if setting == "inductive" else 256
    )
    present_labels = torch.stack([t.flatten().bincount(minlength=256) > 0 for t in label])
    return run, {
        "image": random_image(4, 34).to(device)[..., :32, :],
        "label": label[:, :32].to(device),
        "present_labels": present_labels,
    }


class NoTransfer(TorchDispatchMode):
    "Fails where numbers go from the CPU to a device or back, as they do for `.item()`, `if`, and copies."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        of = lambda x: {t.device.type for t in torch.utils._pytree.tree_leaves(x) if isinstance(t, torch.Tensor)}
        before, after = of((args, kwargs)), of(out)
        assert not before or after <= before, f"{func} makes a tensor on {after} of one on {before}"
        assert func is not torch.ops.aten.copy_.default or len(before) == 1, f"{func} copies between {before}"
        return out


def test_no_transfer_is_noticed():
    "Questions are refused by the meta device, copies by the mode."
    x = torch.empty(3, device="meta")
    copies = {lambda: torch.zeros(3).to("meta"): "makes a tensor on", lambda: x.copy_(torch.zeros(3)): "copies between"}
    for copy in copies:
        copy()
    with NoTransfer():
        (x * torch.tensor(2.0)).softmax(0)
        for ask in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.nonzero()):
            with pytest.raises(RuntimeError, match="meta"):
                ask()
        for copy, says in copies.items():
            with pytest.raises(AssertionError, match=says):
                copy()


steps = pytest.mark.parametrize(
    "setting, attention, per_device",
    [
        ("inductive", "mpsa", 4),
        ("transductive", "mpsa", 2),
        ("fully_supervised", "uniform", 1),
        ("transductive", "softmax", 4),
    ],
)


@steps
def test_a_step_does_not_wait(monkeypatch, setting, attention, per_device):
    "The meta device stands for a GPU: it has no values that somebody could ask for. The kernels' shape rules stand for the kernels."
    pytest.importorskip("triton")
    monkeypatch.setattr(ot, "kernel_fits", kernel.fits)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # unknown there
    run, batch = a_run("meta", setting, attention, per_device)
    with ot.defer_convergence_checks() as verdicts:
        step(run, batch, 0)  # what is made once is made
        with monkeypatch.context() as m, NoTransfer():
            m.setattr(torch, "tensor", None)  # of Python's numbers: a copy, which the meta device leaves out
            total = step(run, batch, 1)
        assert len(verdicts.found) == {"mpsa": 4, "uniform": 1, "softmax": 1}[attention] * (4 // per_device) * 2
        verdicts.found.clear()
    assert total.device.type == "meta" and total.shape == (4,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@steps
def test_a_step_on_a_gpu_does_not_wait(setting, attention, per_device):
    run, batch = a_run("cuda", setting, attention, per_device)
    with ot.defer_convergence_checks():
        step(run, batch, 0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            total = step(run, batch, 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert total.isfinite().all()
