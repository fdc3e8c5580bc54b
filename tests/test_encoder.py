"""The image encoder: official features, position embeddings, visual prompts, precision."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from otseg.clip import visual_tower
from otseg.encoder import ImageEncoder, resize_positions, run_block

golden = Path(__file__).parent / "golden"
TOWER = dict(width=64, layers=4, heads=4, patch=16, image_size=64, dim=32)  # of the golden checkpoint


def golden_encoder(dropout=0.0):
    state = load_file(golden / "official_state_dict.safetensors")
    encoder = ImageEncoder(visual_tower(**TOWER), visual_prompts=5, dropout=dropout)
    ours = lambda k: k if k.startswith(("prompt", "deep")) else f"visual.{k}"
    encoder.load_state_dict(
        {ours(k.removeprefix("backbone.")): v for k, v in state.items() if k.startswith("backbone.")}
    )
    return encoder


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("file", ["converged_model", "model"])
def test_official_features(file, grad):
    data = load_file(golden / f"{file}.safetensors")
    with torch.set_grad_enabled(grad):
        f = golden_encoder()(data["image"])
    assert f.grid == (4, 4)
    for ours, theirs in (f.patches, data["backbone.patch"].flatten(2).mT), (f.cls, data["backbone.cls"]):
        assert (ours - theirs).abs().max() < 2e-6 * theirs.abs().max()


@pytest.mark.parametrize("size", [(64, 64), (16, 16), (32, 96), (96, 32), (112, 80)])
def test_any_grid(size):
    encoder = golden_encoder()
    f = encoder(torch.randn(2, 3, *size))
    h, w = size[0] // 16, size[1] // 16
    assert f.grid == (h, w) and f.patches.shape == (2, h * w, 32) and f.cls.shape == (2, 32)
    torch.testing.assert_close(f.patches.norm(dim=-1), torch.ones(2, h * w))
    torch.testing.assert_close(f.cls.norm(dim=-1), torch.ones(2))


def test_positions():
    pos = torch.randn(1 + 4 * 6, 8)
    assert resize_positions(pos, (4, 6), (4, 6)) is pos
    ours = resize_positions(pos, (4, 6), (7, 5))
    field = F.interpolate(pos[1:].T.reshape(1, 8, 4, 6), size=(7, 5), mode="bilinear", align_corners=False)
    torch.testing.assert_close(ours, torch.cat([pos[:1], field.reshape(8, 35).T]))
    constant = torch.ones(1 + 16, 3)
    torch.testing.assert_close(resize_positions(constant, (4, 4), (9, 2)), torch.ones(1 + 18, 3))


def test_native_positions_are_not_interpolated(monkeypatch):
    encoder = golden_encoder()
    monkeypatch.setattr(F, "interpolate", lambda *a, **k: pytest.fail("interpolated at the native size"))
    encoder(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_without_prompts_it_is_clip(quick_gelu):
    image = torch.randn(2, 3, 32, 32)
    tower = visual_tower(width=48, layers=3, heads=3, patch=8, image_size=32, dim=16, quick_gelu=quick_gelu)
    f = ImageEncoder(tower, visual_prompts=0, double_class_token=False)(image)
    torch.testing.assert_close(f.cls, F.normalize(tower(image), dim=-1))
    tower.output_tokens = True  # ln_post of the patches, before the projection
    torch.testing.assert_close(f.patches, F.normalize(tower(image)[1] @ tower.proj, dim=-1))
    twice = ImageEncoder(tower, visual_prompts=0)(image).cls
    assert (twice - f.cls).abs().max() > 1e-3


def test_only_the_prompt_parameters_are_trained():
    encoder = ImageEncoder(visual_tower(**TOWER), visual_prompts=7).train()
    names = {n for n, p in encoder.named_parameters() if p.requires_grad}
    assert names == {
        "prompt_embeddings",
        "deep_prompt_embeddings",
        "prompt_proj.weight",
        "prompt_proj.bias",
        "prompt_norm.weight",
        "prompt_norm.bias",
    }
    assert encoder.prompt_embeddings.shape == (1, 7, 64) and encoder.deep_prompt_embeddings.shape == (3, 7, 64)
    f = encoder(torch.randn(2, 3, 64, 48))
    (f.patches.sum() + f.cls.square()[:, :5].sum()).backward()
    for name, p in encoder.named_parameters():
        assert (p.grad is not None) == (name in names)
        if name in names:
            per_block = p.grad.flatten(1) if "embeddings" in name else p.grad.flatten()[None]
            assert (per_block.abs().sum(1) > 0).all(), name


def test_initial_prompts():
    torch.manual_seed(0)
    encoder = ImageEncoder(visual_tower(**TOWER), visual_prompts=50)
    v = (6 / (3 * 16**2 + 64)) ** 0.5
    for p in encoder.prompt_embeddings, encoder.deep_prompt_embeddings:
        assert 0.99 * v < p.max() <= v and -v <= p.min() < -0.99 * v
    assert abs(encoder.prompt_proj.weight.std() - (2 / 64) ** 0.5) < 0.01
    assert encoder.prompt_norm.eps == 1e-6


def test_dropout_only_in_training():
    encoder, image = golden_encoder(dropout=0.1), torch.randn(2, 3, 64, 64)
    encoder.eval()
    assert torch.equal(encoder(image).patches, encoder(image).patches)
    encoder.train()
    assert not torch.equal(encoder(image).patches, encoder(image).patches)


def test_images_are_independent():
    encoder, image = golden_encoder().eval(), torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(encoder(image).patches[1:2], encoder(image[1:2]).patches)


def test_dtypes():
    encoder, image = golden_encoder(), torch.randn(2, 3, 64, 64)
    full = encoder(image)
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(image)
    assert half.patches.dtype == torch.float32 and (half.patches * full.patches).sum(-1).min() > 0.999
    double = encoder.double()(image.double())
    assert double.patches.dtype == torch.float64 and (double.patches - full.patches).abs().max() < 1e-5
    half = encoder.bfloat16()(image.bfloat16())
    assert half.cls.dtype == torch.bfloat16 and (half.cls.float() * full.cls).sum(-1).min() > 0.995


def test_attention_matrix_is_not_stored():
    "Autograd keeps no tensor with a row for each token and a column for each key."
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
        golden_encoder()(torch.randn(1, 3, 128, 128))
    queries, keys = 1 + 64, 1 + 64 + 5
    assert shapes and not [s for s in shapes if tuple(s[-2:]) == (queries, keys)]


@torch.no_grad()
def test_blocks_may_be_computed_by_another_function():
    "The plain computation, prompts among the tokens, gives the same features."

    def plain_block(block, x, prompts):
        y = block(torch.cat([x[:, :1], prompts, x[:, 1:]], 1))
        return torch.cat([y[:, :1], y[:, 1 + prompts.shape[1] :]], 1)

    encoder, image = golden_encoder().eval(), torch.randn(2, 3, 64, 48)
    plain = ImageEncoder(encoder.visual, visual_prompts=5, apply_block=plain_block).eval()
    plain.load_state_dict(encoder.state_dict())
    for a, b in zip(encoder(image)[:2], plain(image)[:2]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(63, 64), (64, 70), (8, 8)])
def test_sides_must_be_multiples_of_the_patch(size):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} .* 16 x 16"):
        golden_encoder()(torch.randn(1, 3, *size))


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("prompts", [0, 1, 5])
def test_run_block_equals_open_clip(quick_gelu, prompts):
    "Class token, patches and gradients equal those of open_clip's block with the prompts among the tokens."
    torch.manual_seed(0)
    block = visual_tower(**TOWER | dict(layers=1), quick_gelu=quick_gelu).double().transformer.resblocks[0]
    x, e = (torch.randn(2, s, 64, dtype=torch.float64, requires_grad=True) for s in (10, prompts))
    ours, theirs = (
        run_block(block, x, e if prompts else None),
        block(torch.cat([x[:, :1], e, x[:, 1:]], 1))[:, [0, *range(1 + prompts, 10 + prompts)]],
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), (x, e)[: 1 + bool(prompts)]) for out in (ours, theirs))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
