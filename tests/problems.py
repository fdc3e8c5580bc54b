"""Transport problems for the tests of solver and kernels."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from otseg.ot import sinkhorn

GOLDEN = Path(__file__).parent / "golden"


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def marginal(kind, *shape):
    "Masses that sum to 1 along the last axis: uniform, skewed, or with zeros."
    mass = {
        "uniform": torch.ones(shape),
        "skewed": rand(*shape, seed=1) ** 6 + 1e-4,
        "zeros": (rand(*shape, seed=2) > 0.4).float(),
    }[kind]
    mass[..., 0] += kind == "zeros"  # at least one entry has mass
    return mass / mass.sum(-1, keepdim=True)


def cost(kind, *shape):
    "Costs (..., m, n) between 0 and 2."
    C = 2 * rand(*shape, seed=3)
    return {
        "random": C,
        "flat": C.new_full(shape, 0.7),
        "sharp": C.round(),
        "one-hot": (C == C.amin(-1, keepdim=True)).float() * -2 + 2,
    }[kind]


def gradient(C, eps, plan=sinkhorn):
    "Gradient of a weighted sum of the plan, times eps: of order 1 for every eps. On the CPU, in float64."
    C = C.clone().requires_grad_()
    loss = (C[0].numel() * plan(C, eps=eps) * rand(*C.shape).to(C.device)).sum()
    return eps * torch.autograd.grad(loss, C)[0].double().cpu()


def two_groups(first, second, far=30.0):
    "One cost of two groups of pixels and prompts that are far from each other, with the costs first and second (m, n)."
    inside = torch.block_diag(torch.ones_like(first), torch.ones_like(second)) == 1
    return torch.where(inside, torch.block_diag(first, second), far)


def load_golden(case):
    "Tensors of a golden problem of the official code, and its eps."
    tensors = load_file(GOLDEN / "sinkhorn.safetensors")
    eps = json.loads((GOLDEN / "meta.json").read_text())[f"sinkhorn.{case}"]["eps"]
    return {name[2:]: t for name, t in tensors.items() if name.startswith(f"{case}.")}, eps
