"""`otseg.export`: the fixed number of steps converges, and onnxruntime says what PyTorch says."""

import sys
from functools import partial
from math import inf

import numpy as np
import pytest
import torch

from otseg import cli
from otseg.digits import Digits
from otseg.export import OUTPUTS, STEPS, Graph, as_fixed, eliminate, export_onnx, fixed_plan
from otseg.images import normalize
from otseg.ot import sinkhorn
from otseg.predict import load


@pytest.mark.parametrize("n", [1, 2, 6, 8])
def test_elimination(n):
    B, r = torch.randn(4, n, n, generator=torch.Generator().manual_seed(n)), torch.randn(4, n)
    H = B @ B.mT + torch.eye(n)
    assert torch.allclose(H @ eliminate(H, r)[..., None], r[..., None], atol=1e-3)


@pytest.mark.parametrize("n", [1, 2, 6, 8])
@pytest.mark.parametrize("kind", ["even", "shifted", "rare", "equal"])
def test_fixed_steps_converge(n, kind):
    g = torch.Generator().manual_seed(0)
    C = 2 * torch.rand(30, 200, n, generator=g)
    C = {
        "even": C,
        "shifted": C / 2 + torch.rand(30, 1, n, generator=g),
        "rare": (C > 1.95).float() * 2,
        "equal": torch.ones_like(C),
    }[kind]
    T = fixed_plan(C, 0.05)
    assert T.dtype == torch.float32 and torch.allclose(T.sum(-1), torch.tensor(1 / 200), atol=1e-7)
    assert (T - sinkhorn(C, eps=0.05)).abs().max() * 200 * n < 1e-3 and (n * T.sum(-2) - 1).abs().max() < 1e-4
    assert torch.equal(fixed_plan(C, 0.05, STEPS), T)


@pytest.mark.parametrize("rho", [(0.1, inf), (inf, 0.1), (0.3, 0.02), (0.0, inf), (inf, 0.0), (0.0, 0.0)], ids=str)
@pytest.mark.parametrize("kind", ["even", "far"])
def test_fixed_steps_converge_for_relaxed_marginals(rho, kind):
    C = 2 * torch.rand(30, 200, 6, generator=torch.Generator().manual_seed(0))
    C[..., 0] += kind == "far"
    penalties = dict(rho_pixels=rho[0], rho_prompts=rho[1])
    T, want = fixed_plan(C, 0.05, **penalties), sinkhorn(C, eps=0.05, **penalties)
    assert (T - want).abs().max() < 1e-4 * want.max()


def test_the_plan_of_a_model_keeps_its_penalties():
    plan = as_fixed(partial(sinkhorn, rho_pixels=0.1, rho_prompts=inf), STEPS)
    C = 2 * torch.rand(3, 50, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plan(C, eps=0.05), fixed_plan(C, 0.05, rho_pixels=0.1))
    assert as_fixed(torch.clone, STEPS) is torch.clone and as_fixed(sinkhorn, STEPS).func is fixed_plan


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    seg, path = load(device="cpu"), tmp_path_factory.mktemp("onnx") / "new/a.onnx"
    return seg, path, export_onnx(seg, path, "three|two, grass, gravel, nine")


@pytest.mark.slow
def test_onnxruntime_agrees_on_real_images(exported):
    import onnxruntime

    seg, path, errors = exported
    assert max(errors.values()) < 1e-4 and [p.name for p in path.parent.iterdir()] == ["a.onnx"]
    session = onnxruntime.InferenceSession(path)
    assert session.get_modelmeta().custom_metadata_map["classes"].split("\n") == ["three", "grass", "gravel", "nine"]
    graph = Graph(seg, "three|two, grass, gravel, nine", steps=0).eval()
    scenes = Digits("val", 3)
    for i in range(3):
        image = scenes[i]["image"][None, :, 20:68, 30:78].contiguous()
        with torch.no_grad():
            want = graph(image)
        for name, ours, theirs in zip(OUTPUTS, want, session.run(list(OUTPUTS), {"image": image.numpy()})):
            assert np.abs(theirs - ours.numpy()).max() <= 1e-4 * ours.abs().max(), name
        assert np.abs(theirs.sum((2, 3)) - 1 / 6).max() < 1e-4  # the plan's columns


def test_the_graph_is_the_model():
    """What the graph says of one window is what the model's own forward says."""
    seg = load(device="cpu")
    image = Digits("val", 1)[0]["image"][None, :, :48, :48]
    with torch.no_grad():
        prob, mps, mpsa, plan = Graph(seg, None, steps=0).eval()(image)
        masks = seg.model(normalize(image))
    assert torch.allclose(mps, masks.mps, atol=1e-5) and torch.allclose(mpsa, masks.mpsa, atol=1e-5)
    assert torch.allclose(plan, seg.model.plan(normalize(image)), atol=1e-7) and prob.shape == (1, 16, 48, 48)


def test_what_cannot_be_exported_says_why(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert cli.main(["export", "--onnx", str(tmp_path / "a.onnx")]) == 2
    assert "pip install 'otseg[onnx]'" in capsys.readouterr().err
    assert cli.main(["export", "--half", str(tmp_path / "a.safetensors")]) == 2
    assert "--half needs a checkpoint" in capsys.readouterr().err and not list(tmp_path.iterdir())
