"""Every device computes the same as the CPU, and nothing runs on the CPU instead; a step never synchronises a GPU.

Comparisons need a GPU and are skipped without one. The meta device, which has shapes but no values, stands for a GPU
where only the placement of tensors matters."""

from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from helpers import K, N, close, evaluate, random_image, random_text, small_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from otseg import kernel, ot
from otseg.data import UNLABELLED, Benchmark
from otseg.images import IGNORE, normalize
from otseg.inference import predict_paths, predict_probs
from otseg.losses import training_loss
from otseg.model import DenseCLIP, OTSeg
from otseg.mpsa import ATTENTIONS
from otseg.ot import sinkhorn
from otseg.recipes import resolve
from otseg.steps import Trainer, make_optimizer, pseudo_label, training_step

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
UNSEEN = (1, 4)


def random_label(b=2, side=32):
    label = torch.randint(K, (b, side, side), generator=torch.Generator().manual_seed(0))
    label[:, :4] = IGNORE
    return label


# the GPU computes what the CPU computes


def forward_and_backward(device, attention):
    "Masks, loss terms and gradients without dropout, moved to the CPU."
    model = small_model(attention=attention, dropout=0.0).to(device).train()
    masks = model(random_image().to(device))
    terms = training_loss(masks, random_label().to(device))
    sum(terms.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    out = masks._asdict() | terms | gradients
    assert all(t.device.type == device for t in out.values())
    return {name: t.detach().cpu() for name, t in out.items()}


@needs_gpu
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_training(attention):
    ours, expected = forward_and_backward("cuda", attention), forward_and_backward("cpu", attention)
    for name in expected:
        close(ours[name], expected[name], 1e-3)


@needs_gpu
@pytest.mark.parametrize("eps", [1e-3, 0.05, 1])
def test_plan(eps):
    C = 2 * torch.rand(3, 60, 6, generator=torch.Generator().manual_seed(0))
    T = sinkhorn(C.cuda(), eps=eps)
    assert T.device.type == "cuda"
    close(T.cpu(), sinkhorn(C, eps=eps), 1e-4)


@needs_gpu
def test_prediction():
    model, image, text = small_model().cuda(), random_image(1, 40, 48).cuda(), random_text(7, N).cuda()
    prob = predict_probs(model, image, seen=(0, 2), size=(50, 60))
    assert prob.device.type == "cuda" and prob.shape == (1, K, 50, 60)
    close(prob.cpu(), predict_probs(small_model(), image.cpu(), seen=(0, 2), size=(50, 60)), 1e-4)
    assert all(pred.device.type == "cuda" for pred in predict_paths(model, image).values())
    assert model(image, text).mps.device.type == "cuda"
    assert model.trainable_state()["descriptor.proj.weight"].device.type == "cuda"


@needs_gpu
@pytest.mark.parametrize("kind", [OTSeg, DenseCLIP])
def test_evaluation(kind):
    "Images and labels come from the CPU."
    image = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(1))
    data = [{"image": image, "label": random_label(1, 40)[0]}]
    ours, expected = (evaluate(small_model(kind).to(device), data, (1, 3, 4)) for device in ("cuda", "cpu"))
    assert abs(ours["ensemble"]["pacc"] - expected["ensemble"]["pacc"]) < 0.01


@needs_gpu
def test_labels_and_images():
    label = random_label().masked_fill(random_label() == 1, UNLABELLED).cuda()
    filled = pseudo_label(small_model().cuda()(random_image().cuda()), label, UNSEEN)
    assert filled.device.type == "cuda" and not (filled == UNLABELLED).any()
    assert normalize(torch.rand(3, 4, 4, device="cuda")).device.type == "cuda"


# nothing is computed on another device


def device_types(x) -> set[str]:
    return {t.device.type for t in tree_leaves(x) if isinstance(t, torch.Tensor)}


class NoTensorOn(TorchDispatchMode):
    "Fails if an operation returns a tensor on a device."

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert self.device not in device_types(out), f"{func} makes a tensor on {self.device}"
        return out


def test_no_tensor_on_another_device():
    "Softmax attention only: the transport solver reads values, which the meta device does not have."
    model, image = small_model(attention="softmax").to("meta"), random_image(2, 40, 48).to("meta")
    with NoTensorOn("cpu"):
        f = model.encoder(image)
        masks = model.decoder(model.descriptor(f.cls, model.text), f.patches)
        masks.sum().backward()
    assert masks.device.type == "meta" and masks.shape == (2, K, 30)


# a training step never synchronises


def small_trainer(device, setting, attention="mpsa", per_device=2):
    "A trainer of the small model on a device, and a batch for it."
    recipe = resolve("digits", setting, batch_size=4, attention=attention)
    model = small_model(attention=attention).to(device)
    inductive = setting == "inductive"
    text = model.text[[0, 2, 3]] if inductive else model.text
    trainer = Trainer(
        recipe=recipe,
        bench=Benchmark("test", tuple("abcde"), UNSEEN, None, None),
        accelerator=Accelerator(cpu=device != "cuda"),
        model=model,
        net=model,
        opt=make_optimizer(model, recipe),
        text=text,
        unseen=torch.tensor(UNSEEN).to(device),
        per_device=per_device,
    )
    label = torch.cat([random_label(4), torch.full((4, 2, 32), UNLABELLED)], 1) % (len(text) if inductive else 256)
    present_labels = torch.stack([t.flatten().bincount(minlength=256) > 0 for t in label])
    image = random_image(4, 34).to(device)[..., :32, :]
    return trainer, {"image": image, "label": label[:, :32].to(device), "present_labels": present_labels}


class NoTransfer(TorchDispatchMode):
    "Fails if an operation copies values between the CPU and a device, as `.item()`, `if` and `.to` do."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        before, after = device_types((args, kwargs)), device_types(out)
        assert not before or after <= before, f"{func} makes a tensor on {after} of one on {before}"
        assert func is not torch.ops.aten.copy_.default or len(before) == 1, f"{func} copies between {before}"
        return out


def test_no_transfer_detects_transfers():
    "The meta device itself refuses to give values; the mode refuses copies."
    x = torch.empty(3, device="meta")
    copies = {lambda: torch.zeros(3).to("meta"): "makes a tensor on", lambda: x.copy_(torch.zeros(3)): "copies between"}
    for copy in copies:
        copy()
    with NoTransfer():
        (x * torch.tensor(2.0)).softmax(0)
        for read_value in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.nonzero()):
            with pytest.raises(RuntimeError, match="meta"):
                read_value()
        for copy, says in copies.items():
            with pytest.raises(AssertionError, match=says):
                copy()


variants = pytest.mark.parametrize(
    "setting, attention, per_device",
    [
        ("inductive", "mpsa", 4),
        ("transductive", "mpsa", 2),
        ("fully_supervised", "uniform", 1),
        ("transductive", "softmax", 4),
    ],
)
PLANS_PER_FORWARD = {"mpsa": 4, "uniform": 1, "softmax": 1}  # of the small model: one of MPS, three decoder layers


@variants
def test_a_step_does_not_synchronise(monkeypatch, open_operators, setting, attention, per_device):
    "On the meta device, with the rules by which a GPU decides for the kernels. All convergence checks are deferred."
    pytest.importorskip("triton")
    monkeypatch.setattr(ot, "kernel_fits", kernel.fits)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # the meta device does not support it
    trainer, batch = small_trainer("meta", setting, attention, per_device)
    with ot.defer_convergence_checks() as report:
        training_step(trainer, batch, 0)  # fills caches, which may copy
        with monkeypatch.context() as m, NoTransfer():
            m.setattr(torch, "tensor", None)  # a tensor of Python numbers is a copy that the meta device does not show
            total = training_step(trainer, batch, 1)
        assert len(report.found) == PLANS_PER_FORWARD[attention] * (4 // per_device) * 2
        report.found.clear()
    assert total.device.type == "meta" and total.shape == (4,)


@needs_gpu
@variants
def test_a_step_on_a_gpu_does_not_synchronise(setting, attention, per_device):
    trainer, batch = small_trainer("cuda", setting, attention, per_device)
    with ot.defer_convergence_checks():
        training_step(trainer, batch, 0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            total = training_step(trainer, batch, 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert total.isfinite().all()
