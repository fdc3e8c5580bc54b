"""Loading CLIP: file formats, untrusted files, architectures."""

import pickle
import time
import warnings
import zipfile

import open_clip
import pytest
import torch
from clips import Bomb, register_architectures, save_openai
from open_clip.transformer import VisionTransformer
from safetensors.torch import load_file, save_file

from otseg.clip import check_visual, load_clip, read_weights, visual_tower
from otseg.encoder import ImageEncoder
from otseg.text import TEMPLATES, class_embeddings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A CLIP in three kinds of file."
    path = tmp_path_factory.mktemp("clip")
    register_architectures(path)
    torch.manual_seed(0)
    clip = load_clip("test-quickgelu", None)
    save_file(clip.state_dict(), path / "clip.safetensors")
    torch.save(clip.state_dict(), path / "clip.pt")
    save_openai(clip, path / "openai.pt")
    return path


@pytest.fixture(scope="module")
def clip(folder):
    return load_clip("test-quickgelu", folder / "clip.safetensors")


# towers


def test_unsupported_towers():
    make = lambda **k: VisionTransformer(
        image_size=32, patch_size=16, width=32, layers=1, heads=2, mlp_ratio=4.0, output_dim=16, **k
    )
    for tower, message in (
        (make(pool_type="avg"), "'avg'"),
        (make(attentional_pool=True, attn_pooler_heads=2), "'attention'"),
        (torch.nn.Conv2d(3, 3, 3), "Conv2d"),
    ):
        for check in (check_visual, ImageEncoder):
            with pytest.raises(ValueError, match=message):
                check(tower)
    with pytest.raises(ValueError, match="5 heads do not divide the width 64"):
        visual_tower(width=64, layers=1, heads=5, patch=16, image_size=64, dim=32)


# files


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


def test_archive_has_the_tensors_that_torch_reads(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch.jit.load(str(folder / "openai.pt")).state_dict()
    ours = read_weights(folder / "openai.pt")
    assert theirs.keys() <= ours.keys() and all(torch.equal(v, ours[k]) for k, v in theirs.items())
    assert all(k.endswith("attn_mask") for k in ours.keys() - theirs.keys())


def test_wrapped_and_prefixed_state(folder, clip):
    torch.save(
        {"epoch": 1, "state_dict": {f"module.{k}": v for k, v in clip.state_dict().items()}}, folder / "wrapped.pt"
    )
    assert torch.equal(load_clip("test-quickgelu", folder / "wrapped.pt").text_projection, clip.text_projection)


def test_legacy_format_and_precision(folder, clip):
    torch.save(clip.state_dict(), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_clip("test-quickgelu", folder / "legacy.pt").text_projection, clip.text_projection)
    half = load_clip("test-quickgelu", folder / "clip.pt", precision="bf16")
    assert half.visual.conv1.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare", "torchscript"])
def test_pickles_are_not_executed(folder, tmp_path, kind):
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
    content = (folder / file).read_bytes()
    for part in content[: len(content) // 2], b"", b"not a checkpoint":
        (tmp_path / file).write_bytes(part)
        with pytest.raises(ValueError, match="cannot be read|is rejected"):
            load_clip("test-quickgelu", tmp_path / file)


def test_files_with_other_content(folder, tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="contains a Tensor, expected a dict"):
        load_clip("test-quickgelu", tmp_path / "tensor.pt")
    state = load_file(folder / "clip.safetensors")
    save_file({k: v for k, v in state.items() if k != "visual.proj"}, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"visual.proj is missing in the file, \(64, 32\) in the model$"):
        load_clip("test-quickgelu", tmp_path / "less.safetensors")
    save_file(state | {"more": torch.zeros(2)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=r"more is \(2,\) in the file, missing in the model$"):
        load_clip("test-quickgelu", tmp_path / "more.safetensors")


# architectures


def test_wrong_architecture(folder):
    with pytest.raises(ValueError, match=r"\(64, 3, 16, 16\) in the file, \(384, 3, 16, 16\) in the model"):
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
        ("ViT-B/16", "similar names: ViT-B-16"),
    ],
)
def test_unsupported_architectures(arch, why):
    if arch not in open_clip.list_models() and "/" not in arch:
        pytest.skip("this open_clip has no such architecture")
    with pytest.raises(ValueError, match=why):
        load_clip(arch, "any")


def test_weights_that_do_not_record_their_activation(folder):
    "They would load either way; the warning names what is assumed, and the architecture to choose instead."
    with pytest.warns(
        UserWarning, match="QuickGELU is assumed, as in test-quickgelu; if .* GELU, choose clip = 'test'"
    ):
        load_clip("test-quickgelu", folder / "clip.safetensors")
    with pytest.warns(
        UserWarning, match="GELU is assumed, as in test; if .* QuickGELU, choose clip = 'test-quickgelu'"
    ):
        load_clip("test", folder / "clip.safetensors")


def test_an_unreachable_server_is_found_in_seconds(monkeypatch, tmp_path):
    started = time.monotonic()
    monkeypatch.setattr("otseg.clip.getproxies", dict)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="give the path of that file as clip_weights"):
        load_clip(cache_dir=str(tmp_path))
    assert time.monotonic() - started < 20


def test_missing_file_and_hub(monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a file .*ViT-B-16.pt.* nor a tag .*openai"):
        load_clip(pretrained=tmp_path / "ViT-B-16.pt")

    def unreachable(*a, **k):
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "download_pretrained", unreachable)
    with pytest.raises(ConnectionError, match="download https://.*ViT-B-16.pt on a machine with network access"):
        load_clip()


@pytest.mark.slow
@torch.no_grad()
def test_the_real_size_in_openai_format(openai_vit_b_16):
    "ViT-B/16 becomes float32, and embeds class names and an image of 512 pixels."
    clip, weights = load_clip(pretrained=openai_vit_b_16), read_weights(openai_vit_b_16)
    assert weights["visual.conv1.weight"].dtype == torch.float16
    assert clip.visual.conv1.weight.dtype == torch.float32
    assert torch.equal(clip.visual.conv1.weight, weights["visual.conv1.weight"].float())
    assert class_embeddings(["dog"], TEMPLATES[:6], clip).shape == (1, 6, 512)
    f = ImageEncoder(clip.visual, visual_prompts=10).eval()(torch.randn(1, 3, 512, 512))
    assert f.grid == (32, 32) and f.patches.shape == (1, 1024, 512) and f.patches.isfinite().all()
