"""Readings of the patches of a frozen CLIP, and segmentation without training."""

import pytest
import torch
import torch.nn.functional as F
from clips import save_openai
from helpers import close
from PIL import Image

import otseg
from otseg import cli
from otseg.clip import load_clip, visual_tower
from otseg.digits import CLASSES, Digits
from otseg.encoder import DENSE, ImageEncoder, neighbourhood
from otseg.model import DenseCLIP, TrainingFree
from otseg.mps import score_map

READINGS = ("last", "earlier", "earlier-2", *DENSE)
readings = pytest.mark.parametrize("dense", READINGS)
prompts = pytest.mark.parametrize("visual_prompts", [0, 3])


@pytest.fixture
def tower():
    return visual_tower(width=32, layers=3, heads=4, patch=8, image_size=32, dim=16)


def encoder(tower, dense, visual_prompts=0, **options):
    torch.manual_seed(1)
    return ImageEncoder(tower, visual_prompts=visual_prompts, dense=dense, **options).eval()


def heads(block, x):
    "Queries, keys, values (b, heads, tokens, channels), from PyTorch's own parameters."
    y = block.ln_1(x)
    parts = (y @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).chunk(3, -1)
    return [t.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2) for t in parts]


def by_definition(block, x, dense, grid):
    "The table of `04_encoder`, written with explicit attention matrices, for tokens without visual prompts."
    q, k, v = heads(block, x)
    root = q.shape[-1] ** 0.5
    qq, kk = q @ q.mT / root, k @ k.mT / root
    if dense == "neighbour":
        place = torch.tensor([(i, j) for i in range(grid[0]) for j in range(grid[1])]).float()
        kk = kk + F.pad((-(torch.cdist(place, place) ** 2) / 50).exp(), (1, 0, 1, 0))
    A = {
        "value": torch.eye(x.shape[1]).expand_as(qq),
        "self_self": qq.softmax(-1) + kk.softmax(-1),
        "neighbour": kk.softmax(-1),
        "clear": qq.softmax(-1),
    }[dense]
    out = block.attn.out_proj((A @ v).transpose(1, 2).flatten(2))
    if dense in ("neighbour", "clear"):
        return out[:, 1:]
    y = x + out
    return (y + block.mlp(block.ln_2(y)))[:, 1:]


@pytest.mark.parametrize("dense", DENSE)
def test_readings_equal_their_definitions(tower, dense):
    image = torch.randn(2, 3, 32, 48)
    ours = encoder(tower, dense)
    x, grid = ours.embed(image)
    for block in tower.transformer.resblocks[:-1]:
        x = block(x)
    patches = by_definition(tower.transformer.resblocks[-1], x, dense, grid)
    close(ours(image).patches, F.normalize(tower.ln_post(patches) @ tower.proj, dim=-1), 1e-5)


@pytest.mark.parametrize("before", [1, 2, 3])
def test_earlier_blocks(tower, before):
    image = torch.randn(1, 3, 32, 32)
    dense = "earlier" if before == 1 else f"earlier-{before}"
    ours = encoder(tower, dense)
    x, _ = ours.embed(image)
    for block in tower.transformer.resblocks[: 3 - before]:
        x = block(x)
    close(ours(image).patches, F.normalize(tower.ln_post(x[:, 1:]) @ tower.proj, dim=-1), 1e-5)
    with pytest.raises(ValueError, match="dense = 'earlier-4': the tower has only 3 blocks"):
        encoder(tower, "earlier-4")


@readings
@prompts
def test_the_class_token_is_that_of_the_last_block(tower, dense, visual_prompts):
    image = torch.randn(2, 3, 32, 48)
    ours, ordinary = (encoder(tower, name, visual_prompts)(image) for name in (dense, "last"))
    assert torch.equal(ours.cls, ordinary.cls) and ours.grid == (4, 6)
    assert ours.patches.shape == ordinary.patches.shape
    assert torch.equal(ours.patches, ordinary.patches) == (dense == "last")


@readings
def test_visual_prompts_are_trained(tower, dense):
    ours = encoder(tower, dense, visual_prompts=3)
    ours(torch.randn(1, 3, 32, 32)).patches.sum().backward()
    assert ours.prompt_embeddings.grad.abs().max() > 0
    reaches_last = dense in ("last", "self_self", "neighbour", "clear")
    assert (ours.deep_prompt_embeddings.grad[-1].abs().max() > 0) == reaches_last


def test_the_neighbourhood():
    bias = neighbourhood((3, 4), 15, torch.zeros(1))
    assert bias.shape == (13, 15) and not bias[0].any() and not bias[:, 0].any() and not bias[:, 13:].any()
    assert torch.equal(bias[1:, 1:13].diagonal(), torch.ones(12)) and torch.equal(bias[1:, 1:13], bias[1:, 1:13].T)


def test_other_blocks_are_refused(tower):
    class Other(torch.nn.Module):
        def forward(self, x):
            return x

    tower.transformer.resblocks[-1] = Other()
    image = torch.randn(1, 3, 32, 32)
    assert encoder(tower, "earlier")(image).patches.isfinite().all()
    with pytest.raises(ValueError, match="last block is a Other: use dense = 'last' or 'earlier'"):
        encoder(tower, "clear")(image)


# without training


@readings
def test_training_free_is_the_score_of_clip(tower, dense):
    text = F.normalize(torch.randn(5, 4, 16), dim=-1)
    image = torch.randn(2, 3, 32, 48)
    model = TrainingFree(tower, text, image_size=32, dense=dense)
    patches = encoder(tower, dense, double_class_token=False)(image).patches
    score = score_map(patches, text.expand(2, -1, -1, -1)) / 4
    prob = model(image).mps.sigmoid()
    close(prob.flatten(2), (100 * score).softmax(1), 1e-3)
    dense_clip = DenseCLIP(tower, text, image_size=32, dense=dense)(image).mps
    close(dense_clip.flatten(2), (F.normalize(text.mean(1), dim=-1) @ patches.mT), 1e-5)


def test_all_words_of_a_full_clip(tmp_path, monkeypatch):
    "From a local file, without a download: one call, any words, synonyms, a background, and an explanation."
    torch.manual_seed(0)
    path = tmp_path / "ViT-B-16.pt"
    save_openai(load_clip("ViT-B-16-quickgelu", None, precision="fp16"), path)
    seg = otseg.load(clip="ViT-B-16-quickgelu", clip_weights=path, dense="neighbour", device="cpu")
    assert seg.recipe.image_size == 224 and seg.recipe.stride == 112 and seg.recipe.test_short_side == 336
    assert seg.recipe.normalization == "clip" and seg.recipe.calibration == 0
    photo = Image.new("RGB", (120, 80), "red")
    result = seg(photo, "cat, sofa|couch, wall", background=0.2)
    assert result.names == ("cat", "sofa", "wall", "background") and result.labels.shape == (80, 120)
    sums = sum(result.probability(name) for name in result.classes)
    assert abs(sums - 1).max() < 1e-3
    with pytest.raises(ValueError, match="a checkpoint names its own CLIP; pass one"):
        otseg.load("model.safetensors", clip="ViT-B-16-quickgelu")
    with pytest.raises(ValueError, match="pass some"):
        seg(photo)


def test_it_segments_the_scenes():
    scenes = Digits("val", 3)
    correct = {}
    for dense in ("last", "value", "earlier"):
        seg = otseg.load(clip="digits_clip", dense=dense, device="cpu")
        labels = [
            (seg(scene["image"], CLASSES).labels, scene["label"].numpy()) for scene in map(scenes.__getitem__, range(3))
        ]
        correct[dense] = sum((ours == truth).mean() for ours, truth in labels) / 3
    assert correct["last"] < correct["value"] < correct["earlier"] and correct["earlier"] > 0.5


def test_the_command(tmp_path, capsys):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (60, 50), "white").save(photo)
    options = ["predict", str(photo), "--out", str(tmp_path / "masks"), "--quiet"]
    cli.main([*options, "--classes", "one,grass", "--clip", "digits_clip", "--dense", "earlier"])
    assert (tmp_path / "masks/photo.png").is_file()
    assert cli.main([*options, "--classes", "sofa"]) == 2
    assert "without training: --clip ViT-B-16-quickgelu" in capsys.readouterr().err
