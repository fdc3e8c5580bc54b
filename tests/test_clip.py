import json
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from safetensors.torch import load_file, save_file

from otseg import clip as C
from otseg.clip import load_clip, visual_tower
from otseg.encoder import ImageEncoder, run_block
from otseg.text import TEMPLATES, class_embeddings

golden = Path(__file__).parent / "golden"
tiny = dict(
    embed_dim=32,
    quick_gelu=True,
    vision_cfg=dict(image_size=64, layers=2, width=64, head_width=16, patch_size=16),
    text_cfg=dict(context_length=77, vocab_size=49408, width=64, heads=2, layers=2),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Configurations of small architectures, known to open_clip, and a CLIP in three kinds of file."
    path = tmp_path_factory.mktemp("clip")
    for name, cfg in {
        "test-quickgelu": tiny,
        "test": tiny | {"quick_gelu": False},
        "test-vocab": tiny | {"text_cfg": tiny["text_cfg"] | {"vocab_size": 100}},
    }.items():
        (path / f"{name}.json").write_text(json.dumps(cfg))
    for name in "test-quickgelu", "test", "test-vocab":
        open_clip.add_model_config(path / f"{name}.json")
    torch.manual_seed(0)
    clip = load_clip("test-quickgelu", None)
    save_file(clip.state_dict(), path / "clip.safetensors")
    torch.save(clip.state_dict(), path / "clip.pt")
    save_openai(clip, path / "openai.pt")
    return path


@pytest.fixture(scope="module")
def clip(folder):
    return load_clip("test-quickgelu", folder / "clip.safetensors")


def save_openai(clip, path):
    "The TorchScript archive that OpenAI's code writes: half precision weights, sizes as buffers, the mask in each block."
    side = clip.visual.image_size[0]
    for name in "input_resolution", "context_length", "vocab_size":
        if not hasattr(clip, name):
            clip.register_buffer(name, torch.tensor(side))
    for block in clip.transformer.resblocks:
        block.attn_mask = clip.attn_mask
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dtype = clip.visual.conv1.weight.dtype
        inputs = dict(
            encode_image=torch.zeros(1, 3, side, side, dtype=dtype), encode_text=torch.zeros(1, 77, dtype=torch.long)
        )
        torch.jit.trace_module(clip, inputs, check_trace=False).save(str(path))
    for block in clip.transformer.resblocks:
        del block.attn_mask


def golden_encoder(dropout=0.0):
    state = load_file(golden / "official_state_dict.safetensors")
    encoder = ImageEncoder(visual_tower(64, 4, 4, 16, 64, 32), visual_prompts=5, dropout=dropout)
    ours = lambda k: k if k.startswith(("prompt", "deep")) else f"visual.{k}"
    encoder.load_state_dict(
        {ours(k.removeprefix("backbone.")): v for k, v in state.items() if k.startswith("backbone.")}
    )
    return encoder


# the encoder


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
    assert C.resize_positions(pos, (4, 6), (4, 6)) is pos
    ours = C.resize_positions(pos, (4, 6), (7, 5))
    field = F.interpolate(pos[1:].T.reshape(1, 8, 4, 6), size=(7, 5), mode="bilinear", align_corners=False)
    torch.testing.assert_close(ours, torch.cat([pos[:1], field.reshape(8, 35).T]))
    constant = torch.ones(1 + 16, 3)
    torch.testing.assert_close(C.resize_positions(constant, (4, 4), (9, 2)), torch.ones(1 + 18, 3))


def test_native_positions_are_not_touched(monkeypatch):
    encoder = golden_encoder()
    monkeypatch.setattr(F, "interpolate", lambda *a, **k: pytest.fail("interpolated at the native size"))
    encoder(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_without_prompts_it_is_clip(quick_gelu):
    tower, image = visual_tower(48, 3, 3, 8, 32, 16, quick_gelu), torch.randn(2, 3, 32, 32)
    f = ImageEncoder(tower, visual_prompts=0, double_class_token=False)(image)
    torch.testing.assert_close(f.cls, F.normalize(tower(image), dim=-1))
    tower.output_tokens = True  # ln_post of the patches, before the projection
    torch.testing.assert_close(f.patches, F.normalize(tower(image)[1] @ tower.proj, dim=-1))
    twice = ImageEncoder(tower, visual_prompts=0)(image).cls
    assert (twice - f.cls).abs().max() > 1e-3


def test_what_is_trained():
    encoder = ImageEncoder(visual_tower(64, 4, 4, 16, 64, 32), visual_prompts=7).train()
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
    encoder = ImageEncoder(visual_tower(64, 4, 4, 16, 64, 32), visual_prompts=50)
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


def test_images_do_not_see_each_other():
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


def test_attention_is_fused(monkeypatch):
    calls, real = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or real(*a, **k))
    golden_encoder()(torch.randn(1, 3, 64, 64))
    assert len(calls) == 4


@pytest.mark.parametrize("size", [(63, 64), (64, 70), (8, 8)])
def test_images_of_no_whole_patches(size):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} .* 16 x 16"):
        golden_encoder()(torch.randn(1, 3, *size))


def test_towers_that_do_not_fit():
    make = lambda **k: VisionTransformer(
        image_size=32, patch_size=16, width=32, layers=1, heads=2, mlp_ratio=4.0, output_dim=16, **k
    )
    for tower, what in (
        (make(pool_type="avg"), "'avg'"),
        (make(attentional_pool=True, attn_pooler_heads=2), "'attention'"),
        (torch.nn.Conv2d(3, 3, 3), "Conv2d"),
    ):
        with pytest.raises(ValueError, match=what):
            ImageEncoder(tower)
    with pytest.raises(ValueError, match="5 heads do not divide the width 64"):
        visual_tower(64, 1, 5, 16, 64, 32)


# loading


@pytest.mark.parametrize("file", ["clip.safetensors", "clip.pt", "openai.pt"])
def test_files(folder, clip, file):
    again = load_clip("test-quickgelu", folder / file)
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    for name, value in clip.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]) and value.dtype == torch.float32
    tokens, image = open_clip.tokenize(["a dog"]), torch.randn(1, 3, 64, 64)
    assert torch.equal(clip.encode_text(tokens), again.encode_text(tokens)) and torch.equal(
        clip.encode_image(image), again.encode_image(image)
    )


def test_archive_is_read_as_torch_reads_it(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch.jit.load(str(folder / "openai.pt")).state_dict()
    ours = C.read_checkpoint(folder / "openai.pt")
    assert theirs.keys() <= ours.keys() and all(torch.equal(v, ours[k]) for k, v in theirs.items())
    assert all(k.endswith("attn_mask") for k in ours.keys() - theirs.keys())


def test_wrapped_and_prefixed_state(folder, clip):
    torch.save(
        {"epoch": 1, "state_dict": {f"module.{k}": v for k, v in clip.state_dict().items()}}, folder / "wrapped.pt"
    )
    assert torch.equal(load_clip("test-quickgelu", folder / "wrapped.pt").text_projection, clip.text_projection)


def test_seldom_formats(folder, clip):
    torch.save(clip.state_dict(), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_clip("test-quickgelu", folder / "legacy.pt").text_projection, clip.text_projection)
    half = load_clip("test-quickgelu", folder / "clip.pt", precision="bf16")
    assert half.visual.conv1.weight.dtype == torch.bfloat16


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare", "torchscript"])
def test_no_pickle_is_run(folder, tmp_path, kind):
    bomb, file = Bomb(tmp_path / "exploded"), tmp_path / "bomb.pt"
    if kind == "bare":
        file.write_bytes(pickle.dumps({"state_dict": bomb}, 2))
    elif kind == "torchscript":
        with zipfile.ZipFile(folder / "openai.pt") as old, zipfile.ZipFile(file, "w") as new:
            for name in old.namelist():
                new.writestr(name, pickle.dumps(bomb, 2) if name.endswith("/data.pkl") else old.read(name))
    else:
        torch.save({"state_dict": bomb}, file, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ValueError, match="nothing in it was run"):
        load_clip("test-quickgelu", file)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(bomb))
    assert (tmp_path / "exploded").exists()  # the bomb is real


@pytest.mark.parametrize("file", ["clip.safetensors", "clip.pt", "openai.pt"])
def test_damaged_files(folder, tmp_path, file):
    whole = (folder / file).read_bytes()
    for part in whole[: len(whole) // 2], b"", b"not a checkpoint":
        (tmp_path / file).write_bytes(part)
        with pytest.raises(ValueError, match="cannot be read|refused"):
            load_clip("test-quickgelu", tmp_path / file)


def test_files_that_hold_something_else(folder, tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="holds a Tensor"):
        load_clip("test-quickgelu", tmp_path / "tensor.pt")
    state = load_file(folder / "clip.safetensors")
    save_file({k: v for k, v in state.items() if k != "visual.proj"}, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"visual.proj is missing there, \(64, 32\) here$"):
        load_clip("test-quickgelu", tmp_path / "less.safetensors")
    save_file(state | {"more": torch.zeros(2)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=r"more is \(2,\) there, missing here$"):
        load_clip("test-quickgelu", tmp_path / "more.safetensors")


def test_wrong_architecture(folder):
    with pytest.raises(ValueError, match=r"\(64, 3, 16, 16\) there, \(384, 3, 16, 16\) here"):
        load_clip("ViT-S-16", folder / "clip.pt")
    with pytest.raises(ValueError, match="QuickGELU but test computes GELU: use test-quickgelu"):
        load_clip("test", folder / "openai.pt")
    for tag, arch, use in (
        ("openai", "ViT-B-16", "ViT-B-16-quickgelu"),
        ("laion2b_s34b_b88k", "ViT-B-16-quickgelu", "neither"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=use):
            load_clip(arch, tag)


@pytest.mark.parametrize(
    "arch, why",
    [
        ("RN50", "ResNet"),
        ("coca_ViT-B-32", "attentional_pool"),
        ("ViT-B-16-SigLIP", "timm"),
        ("roberta-ViT-B-32", "hf_model_name"),
        ("EVA02-B-16", "timm"),
        ("convnext_base", "timm"),
        ("ViT-L-14-CLIPA", "hf_tokenizer"),
        ("ViT-B/16", "near: ViT-B-16"),
    ],
)
def test_unsupported_architectures(arch, why):
    if arch not in open_clip.list_models() and "/" not in arch:
        pytest.skip("this open_clip has no such architecture")
    with pytest.raises(ValueError, match=why):
        load_clip(arch, "any")


def test_missing_file_and_hub(monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a file .*ViT-B-16.pt.* nor a tag .*openai"):
        load_clip(pretrained=tmp_path / "ViT-B-16.pt")

    def unreachable(*a, **k):
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "download_pretrained", unreachable)
    with pytest.raises(ConnectionError, match="download https://.*ViT-B-16.pt where there is a network"):
        load_clip()


# class embeddings


def test_embeddings(clip):
    names = ["dog", "potted plant", "sky"]
    text = class_embeddings(names, TEMPLATES[:6], clip)
    assert text.shape == (3, 6, 32) and text.dtype == torch.float32 and not text.requires_grad
    one = clip.encode_text(open_clip.tokenize(["a part of a potted plant."]), normalize=True)
    torch.testing.assert_close(text[1, 2], one[0])
    torch.testing.assert_close(text, class_embeddings(names, TEMPLATES[:6], clip, batch=5))
    torch.testing.assert_close(text.flip(0, 1), class_embeddings(names[::-1], TEMPLATES[5::-1], clip))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(text, class_embeddings(names, TEMPLATES[:6], clip))


@pytest.mark.parametrize(
    "names, templates, why",
    [
        ("dog", TEMPLATES, "list of non-empty strings, not 'dog'"),
        (["dog", ""], TEMPLATES, "non-empty"),
        (["dog", 3], TEMPLATES, "non-empty"),
        ([], TEMPLATES, "names is empty"),
        (["dog"], [], "templates is empty"),
        (["dog", "cat", "dog"], TEMPLATES, "3 given, 2 different"),
        (["dog"], ["a photo"], "has 0 places"),
        (["dog"], ["{} and {}"], "has 2 places"),
        (["very " * 80], TEMPLATES, "tokens long but the text tower reads 77"),
    ],
)
def test_bad_texts(clip, names, templates, why):
    with pytest.raises(ValueError, match=why):
        class_embeddings(names, templates, clip)


def test_names_with_braces(clip):
    assert class_embeddings(["a {b}", "{"], TEMPLATES, clip).shape == (2, 8, 32)


def test_other_tokenizers(folder):
    with pytest.raises(ValueError, match="knows 100 tokens but CLIP's tokenizer makes 49408"):
        class_embeddings(["dog"], TEMPLATES, load_clip("test-vocab", None))


def test_cache(clip, tmp_path, monkeypatch):
    text = C.cached_class_embeddings(["dog", "cat"], TEMPLATES, clip, tmp_path / "a" / "b")
    assert torch.equal(text, class_embeddings(["dog", "cat"], TEMPLATES, clip))
    monkeypatch.setattr(C, "class_embeddings", lambda *a: pytest.fail("computed twice"))
    assert torch.equal(text, C.cached_class_embeddings(["dog", "cat"], TEMPLATES, clip, tmp_path / "a" / "b"))
    assert len(list(tmp_path.rglob("*.*"))) == 1


def test_cache_is_never_mixed_up(clip, folder, tmp_path):
    other = load_clip("test-quickgelu", folder / "clip.pt")
    get = lambda names, templates, clip: C.cached_class_embeddings(names, templates, clip, tmp_path)
    first = get(["dog", "cat"], TEMPLATES, clip)
    assert torch.equal(first, get(["dog", "cat"], TEMPLATES, other)) and len(list(tmp_path.iterdir())) == 1
    other.visual.proj.data += 1  # the image tower has no say
    assert torch.equal(first, get(["dog", "cat"], TEMPLATES, other)) and len(list(tmp_path.iterdir())) == 1
    other.text_projection.data += 0.1
    assert not torch.equal(first, get(["dog", "cat"], TEMPLATES, other))
    gelu = load_clip("test", folder / "clip.pt")
    assert not torch.equal(first, get(["dog", "cat"], TEMPLATES, gelu))
    get(["cat", "dog"], TEMPLATES, clip), get(["dog", "cat"], TEMPLATES[:6], clip)
    assert len(list(tmp_path.iterdir())) == 5


def test_files_of_other_classes_are_refused(clip, tmp_path):
    C.cached_class_embeddings(["dog", "cat"], TEMPLATES, clip, tmp_path)
    (file,) = tmp_path.iterdir()
    assert C.read_embeddings(file, ["dog", "cat"], TEMPLATES).shape == (2, 8, 32)
    with pytest.raises(ValueError, match="2 class names but 1 are"):
        C.read_embeddings(file, ["dog"])
    with pytest.raises(ValueError, match="8 templates but 6 are"):
        C.read_embeddings(file, ["dog", "cat"], TEMPLATES[:6])
    with pytest.raises(ValueError, match="number 1 is 'cat' there but 'cow' here"):
        C.read_embeddings(file, ["dog", "cow"])
    save_file({"text": torch.zeros(3, 8, 32)}, file)  # damaged behind our back
    with pytest.raises(ValueError, match="3 class names but 2 are"):
        C.cached_class_embeddings(["dog", "cat"], TEMPLATES, clip, tmp_path)


def test_arrays(tmp_path):
    np.save(tmp_path / "context.npy", np.zeros((59, 8, 512), np.float16))
    assert C.read_embeddings(tmp_path / "context.npy", [f"c{i}" for i in range(59)]).dtype == torch.float32
    with pytest.raises(ValueError, match="59 class names but 20"):
        C.read_embeddings(tmp_path / "context.npy", [f"c{i}" for i in range(20)])
    np.save(tmp_path / "flat.npy", np.zeros((59, 512)))
    with pytest.raises(ValueError, match=r"\(59, 512\)"):
        C.read_embeddings(tmp_path / "flat.npy", ["dog"])
    np.save(tmp_path / "object.npy", np.array([Bomb(tmp_path / "exploded")]), allow_pickle=True)
    with pytest.raises(ValueError):
        C.read_embeddings(tmp_path / "object.npy", ["dog"])
    assert not (tmp_path / "exploded").exists()


@pytest.mark.slow
def test_the_real_size_in_openai_format(tmp_path):
    torch.manual_seed(0)
    clip = load_clip("ViT-B-16-quickgelu", None, precision="fp16")
    save_openai(clip, tmp_path / "ViT-B-16.pt")
    again = load_clip(pretrained=tmp_path / "ViT-B-16.pt")
    assert again.visual.conv1.weight.dtype == torch.float32
    assert torch.equal(again.visual.conv1.weight, clip.visual.conv1.weight.float())
    assert class_embeddings(["dog"], TEMPLATES[:6], again).shape == (1, 6, 512)
    with torch.no_grad():
        f = ImageEncoder(again.visual, visual_prompts=10).eval()(torch.randn(1, 3, 512, 512))
    assert f.grid == (32, 32) and f.patches.shape == (1, 1024, 512) and f.patches.isfinite().all()


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("prompts", [0, 1, 5])
def test_a_block_without_what_becomes_of_the_prompts(quick, prompts):
    "The class token and the patches, and the gradient in all that goes in, are those of the whole block."
    torch.manual_seed(0)
    block = visual_tower(64, 1, 4, 8, 32, 16, quick).double().transformer.resblocks[0]
    x, e = (torch.randn(2, s, 64, dtype=torch.float64, requires_grad=True) for s in (10, prompts))
    ours, theirs = (
        run_block(block, x, e if prompts else None),
        block(torch.cat([x[:, :1], e, x[:, 1:]], 1))[:, [0, *range(1 + prompts, 10 + prompts)]],
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), (x, e)[: 1 + bool(prompts)]) for out in (ours, theirs))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("arch, patch, dim", [("ViT-B-32-quickgelu", 32, 512), ("ViT-L-14-quickgelu", 14, 768)])
def test_other_sizes(arch, patch, dim):
    "Masks of a rectangular image, with the class embeddings of the same CLIP; an image of no whole patches is refused."
    from otseg.model import OTSeg

    clip = load_clip(arch, None)
    model = OTSeg(
        clip.visual, class_embeddings(["dog", "sky"], TEMPLATES[:1], clip), image_size=4 * patch, visual_prompts=3
    ).eval()
    with torch.no_grad():
        masks = model(torch.randn(1, 3, 2 * patch, 3 * patch))
    assert (
        model.text.shape == (2, 1, dim)
        and masks.mps.shape == masks.mpsa.shape == (1, 2, 2, 3)
        and masks.mpsa.isfinite().all()
    )
    with pytest.raises(ValueError, match="no whole number of"):
        model(torch.randn(1, 3, 2 * patch + 1, 3 * patch))
