"""The assembled model: gradients, inputs, copies, and the baseline without training."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import PATCH, SIDE, D, K, N, close, random_image, random_text, small_model

from otseg.clip import load_clip
from otseg.model import DenseCLIP, OTSeg, RelationshipDescriptor
from otseg.mps import score_map
from otseg.mpsa import ATTENTIONS, uniform_plan
from otseg.ot import sinkhorn
from otseg.text import TEMPLATES, class_embeddings

attentions = pytest.mark.parametrize("attention", ATTENTIONS)
init_from_clip = pytest.mark.parametrize("init_from_clip", [False, True])


# the descriptor


def test_descriptor_equals_its_definition():
    "q = Linear([cls * text ; text]), in this order."
    torch.manual_seed(0)
    descriptor, cls, text = RelationshipDescriptor(D), torch.randn(2, D), random_text()
    pair = torch.cat([cls[:, None, None] * text, text.expand(2, K, N, D)], -1)
    close(descriptor(cls, text), descriptor.proj(pair))


def test_descriptor_can_start_from_the_text():
    text = random_text()
    assert torch.equal(RelationshipDescriptor(D, init_from_clip=True)(torch.randn(2, D), text), text.expand(2, K, N, D))


# the model


@attentions
@pytest.mark.parametrize("depth", [1, 3])
def test_trainable_parameters_and_no_others_receive_gradients(attention, depth):
    model = small_model(attention=attention, depth=depth).train()
    masks = model(random_image())
    (masks.mps.square().sum() + masks.mpsa.square().sum()).backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == (not name.startswith("encoder.visual."))
        if p.requires_grad:
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
        else:
            assert p.grad is None, name
    assert model.text.grad is None


def test_each_path_trains_its_parts():
    "The loss of the MPS path trains the encoder and the descriptor, and not the decoder."
    model = small_model()
    model(random_image()).mps.square().sum().backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without == {name for name, _ in model.named_parameters() if name.startswith("decoder.")}


@torch.no_grad()
def test_paths_share_features_and_queries():
    model, image = small_model(), random_image()
    f = model.encoder(image)
    q = model.descriptor(f.cls, model.text)
    masks = model(image)
    assert masks.mps.shape == masks.mpsa.shape == (2, K, *f.grid)
    assert torch.equal(masks.mps.flatten(2), score_map(f.patches, q)) and torch.equal(
        masks.mpsa.flatten(2), model.decoder(q, f.patches)
    )


@torch.no_grad()
def test_initialised_from_clip_the_mps_path_scores_the_class_embeddings():
    model, image = small_model(init_from_clip=True), random_image()
    patches = model.encoder(image).patches
    close(model(image).mps.flatten(2), score_map(patches, model.text.expand(2, K, N, D)))


@torch.no_grad()
def test_eps_reaches_both_paths():
    image = random_image()
    a, b = small_model()(image), small_model(eps=1.0)(image)
    assert not torch.allclose(a.mps, b.mps) and not torch.allclose(a.mpsa, b.mpsa)


def softmax_over_pixels(C, eps):
    return (-C / eps).softmax(-2) / C.shape[-1]


@torch.no_grad()
def test_plan_may_be_a_function():
    "Both paths use the function."
    image = random_image()
    relaxed, attention = small_model(plan=partial(sinkhorn, rho_pixels=0.0)), small_model(plan=softmax_over_pixels)
    for a, b in zip(relaxed(image), attention(image)):
        close(a, b, 1e-4)
    uniform, decoder = small_model(plan=uniform_plan), small_model(attention="uniform")
    assert torch.equal(uniform(image).mpsa, decoder(image).mpsa)
    assert torch.equal(uniform.plan(image), torch.full_like(uniform.plan(image), 1 / (N * (SIDE // PATCH) ** 2)))


@pytest.mark.parametrize("kind", [OTSeg, DenseCLIP])
def test_options_are_keywords(kind):
    "A number in the third place is an error, and no image size by accident."
    with pytest.raises(TypeError, match="positional"):
        kind(small_model().encoder.visual, random_text(), 32)


@pytest.mark.parametrize("h, w", [(SIDE, SIDE), (2 * SIDE, SIDE), (PATCH, 3 * PATCH), (5 * PATCH, 3 * PATCH)])
@torch.no_grad()
def test_any_grid_of_patches(h, w):
    masks = small_model()(random_image(1, h, w))
    assert masks.mps.shape == masks.mpsa.shape == (1, K, h // PATCH, w // PATCH) and masks.mpsa.isfinite().all()


def test_sides_must_be_multiples_of_the_patch():
    with pytest.raises(ValueError, match="33 x 32 pixels"):
        small_model()(random_image(1, 33, 32))


# class embeddings


@pytest.mark.parametrize("k, n", [(1, N), (9, N), (K, 1), (2, 7)])
@torch.no_grad()
def test_other_classes_at_each_call(k, n):
    model, image, text = small_model(), random_image(), random_text(k, n, seed=1)
    masks = model(image, text)
    assert masks.mps.shape == masks.mpsa.shape == (2, k, SIDE // PATCH, SIDE // PATCH)
    assert all(torch.equal(a, b) for a, b in zip(masks, small_model(text=text)(image)))


@torch.no_grad()
def test_classes_are_independent():
    model, image = small_model(), random_image()
    some = [3, 0]
    for a, b in zip(model(image, model.text[some]), model(image)):
        close(a, b[:, some])


@pytest.mark.parametrize("kind", [OTSeg, DenseCLIP])
@pytest.mark.parametrize("shape", [(K, D), (K, N, D + 1), (2, K, N, D)])
def test_text_of_the_wrong_shape(kind, shape):
    text, message = (
        torch.zeros(shape),
        rf"text has shape \({', '.join(map(str, shape))}\) but this model needs \(k, n, {D}\)",
    )
    with pytest.raises(ValueError, match=message):
        small_model(kind, text=text)
    with pytest.raises(ValueError, match=message):
        small_model(kind)(random_image(), text)


def test_arguments_are_not_changed():
    text, image, other = random_text(), random_image(), random_text(2)
    before = [t.clone() for t in (text, image, other)]
    model = small_model(text=text)
    model.train()(image, other)
    model.text.zero_()
    assert all(torch.equal(a, b) for a, b in zip((text, image, other), before))


# modes and copies


@attentions
def test_training_mode_changes_only_dropout(attention):
    image = random_image()
    model = small_model(attention=attention)
    first, second = model(image), model(image)
    assert torch.equal(first.mpsa, second.mpsa) and torch.equal(first.mps, second.mps)
    model.train()
    assert not torch.equal(model(image).mps, first.mps) and not torch.equal(model(image).mpsa, first.mpsa)
    without = small_model(attention=attention, dropout=0.0)
    for a, b in zip(without(image), without.train()(image)):
        assert torch.equal(a, b)


@init_from_clip
@attentions
def test_state_dict_and_copies_keep_the_output(attention, init_from_clip):
    image, model = random_image(), small_model(attention=attention, init_from_clip=init_from_clip)
    with torch.no_grad():
        for p in model.trainable_state().values():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    want = model(image).mpsa
    other = small_model(attention=attention, init_from_clip=init_from_clip, text=random_text(seed=3))
    assert not torch.allclose(other(image).mpsa, want)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(image).mpsa, want) and torch.equal(copy.deepcopy(model)(image).mpsa, want)


def test_trainable_state():
    "Names and values of exactly the trained parameters, as detached views."
    model = small_model()
    state = model.trainable_state()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert state.keys() == parameters.keys() and all(
        s.data_ptr() == parameters[n].data_ptr() and not s.requires_grad for n, s in state.items()
    )
    assert {name.split(".")[0] for name in state} == {"encoder", "descriptor", "decoder"} and not any(
        "visual" in name for name in state
    )


def test_autocast():
    "Close to full precision; gradients in the weights' dtype."
    model, image = small_model(), random_image()
    with torch.autocast("cpu", torch.bfloat16):
        masks = model(image)
    sum(m.float().square().sum() for m in masks).backward()
    for a, b in zip(masks, model(image)):
        close(a.float(), b, 0.1)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# the baseline


@torch.no_grad()
def test_dense_clip():
    "Cosine with the mean class embedding, for both paths; no parameter is trained."
    clip, image = small_model(DenseCLIP), random_image()
    masks, f = clip(image), clip.encoder(image)
    mean = torch.stack([sum(prompts) for prompts in clip.text])
    want = torch.cosine_similarity(f.patches[:, None], mean[None, :, None], dim=-1)  # (b, k, m)
    close(masks.mps.flatten(2), want)
    close(f.cls, F.normalize(clip.encoder.visual(image), dim=-1))  # CLIP's own output
    assert torch.equal(masks.mps, masks.mpsa) and not any(p.requires_grad for p in clip.parameters())
    some = random_text(2, 7, seed=1)
    assert torch.equal(clip(image, some).mps, small_model(DenseCLIP, text=some)(image).mps)


# other architectures


@pytest.mark.slow
@pytest.mark.parametrize("arch, patch, dim", [("ViT-B-32-quickgelu", 32, 512), ("ViT-L-14-quickgelu", 14, 768)])
@torch.no_grad()
def test_other_architectures(arch, patch, dim):
    "Masks of a rectangular image, with the class embeddings of the same CLIP."
    clip = load_clip(arch, None)
    text = class_embeddings(["dog", "sky"], TEMPLATES[:1], clip)
    model = OTSeg(clip.visual, text, image_size=4 * patch, visual_prompts=3).eval()
    masks = model(torch.randn(1, 3, 2 * patch, 3 * patch))
    assert model.text.shape == (2, 1, dim) and masks.mpsa.isfinite().all()
    assert masks.mps.shape == masks.mpsa.shape == (1, 2, 2, 3)
    with pytest.raises(ValueError, match="not a whole number of"):
        model(torch.randn(1, 3, 2 * patch + 1, 3 * patch))
