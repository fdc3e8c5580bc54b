import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from otseg.cli import main
from otseg.data import UNLABELLED, label_table
from otseg.inference import predict_probs
from otseg.losses import mask_loss, training_loss
from otseg.official import convert, load_official, official_config, official_name, official_report, read_official
from otseg.recipes import Recipe
from otseg.steps import lr_at, make_optimizer, pseudo_label
from otseg.text import read_embeddings

golden = Path(__file__).parent / "golden"
checkpoint = golden / "official_checkpoint.pth"
meta = json.loads((golden / "meta.json").read_text())
k, side, seen = meta["config"]["classes"], meta["config"]["img"], meta["config"]["seen"]
unseen = tuple(sorted(set(range(k)) - set(seen)))
FILES = {
    "converged_model": 2e-5,
    "model": 5e-4,
}  # tolerance relative to each tensor's scale: exact plan, official early stop


@pytest.fixture(params=FILES, ids=["converged", "early stop"])
def data(request):
    "Inputs and outputs of the official code; `tol` is the tolerance that its plans allow."
    return load_file(golden / f"{request.param}.safetensors") | {"tol": FILES[request.param]}


def load(text=None):
    text = load_file(golden / "model.safetensors")["text"] if text is None else text
    return load_official(checkpoint, text, image_size=side, heads=meta["config"]["heads"])


def close(ours, theirs, tol):
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= tol * theirs.abs().max()


def enlarge(masks):
    return F.interpolate(masks, size=(side, side), mode="bilinear", align_corners=False)


def state_dict():
    return torch.load(checkpoint, weights_only=True)["state_dict"]


# parity through the contract


@torch.no_grad()
def test_masks(data):
    masks = load()(data["image"])
    close(enlarge(masks.mps), data["all.mps_masks"], data["tol"])
    close(enlarge(masks.mpsa), data["all.mpsa_masks"], data["tol"])


@torch.no_grad()
def test_parts(data):
    model = load()
    f = model.encoder(data["image"])
    close(f.patches, data["backbone.patch"].flatten(2).mT, 2e-5)
    close(f.cls, data["backbone.cls"], 2e-5)
    q = model.descriptor(f.cls, data["text"])
    close(q, data["relationship.q"], 2e-5)
    out, score = model.decoder.layers[0].attn(q, f.patches)
    close(out, data["mpsa0.out"].permute(2, 0, 1, 3), data["tol"])
    close(score, data["mpsa0.score"], data["tol"])


def test_probabilities(data):
    model = load()
    close(predict_probs(model, data["image"], seen=seen, calibration=0.1), data["inductive.prob"], data["tol"])
    close(predict_probs(model, data["image"], seen=None), data["transductive.prob"], data["tol"])


def test_sliding_window(data):
    options = dict(seen=seen, calibration=0.1, window=side, stride=meta["config"]["stride"][0])
    model, image = load(), data["slide.image"]
    close(predict_probs(model, image, **options), data["slide.prob"], data["tol"])
    size = tuple(data["slide.prob_rescaled"].shape[-2:])
    close(predict_probs(model, image, size=size, **options), data["slide.prob_rescaled"], data["tol"])


def check_terms(terms, data, step):
    names = {
        "mpsa_focal": "decode.loss_mask",
        "mpsa_dice": "decode.loss_dice",
        "mps_focal": "score.loss_mask",
        "mps_dice": "score.loss_dice",
    }
    for ours, theirs in names.items():
        close(terms[ours], data[f"{step}.{theirs}"], data["tol"])


def inductive_terms(model, data):
    label = label_table(k, seen, renumber=True)[data["label"][:, 0]]
    return training_loss(model(data["image"], data["text"][seen]), label)


def test_inductive_losses(data):
    check_terms(inductive_terms(load(), data), data, "train")


def test_losses_through_the_contract(data):
    masks, label = load()(data["image"], data["text"][seen]), label_table(k, seen, renumber=True)[data["label"][:, 0]]
    for path, name in (masks.mpsa, "decode"), (masks.mps, "score"):
        loss, full = mask_loss(path, label), mask_loss(enlarge(path), label)
        close(100 * loss["focal"], data[f"train.{name}.loss_mask"], data["tol"])
        close(loss["dice"], data[f"train.{name}.loss_dice"], data["tol"])
        close(full["focal"], loss["focal"], 2e-5), close(full["dice"], loss["dice"], 2e-5)


def test_transductive_step(data):
    masks = load()(data["image"])
    label = pseudo_label(masks, label_table(k, seen, unseen_as=UNLABELLED)[data["label"][:, 0]], unseen)
    assert torch.equal(label, data["self_training.pseudo_labels"][:, 0])
    check_terms(training_loss(masks, label), data, "self_training")


@pytest.mark.parametrize("kind, tol", [("converged", 1e-4), ("official", 5e-4)])
def test_gradients(kind, tol):
    data = load_file(golden / {"converged": "converged_model.safetensors", "official": "model.safetensors"}[kind])
    grads, model = load_file(golden / f"{kind}_grads.safetensors"), load()
    sum(inductive_terms(model, data).values()).backward()
    ours = {official_name(name): p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert ours.keys() == grads.keys()  # every trainable tensor, and no other
    for name, grad in grads.items():
        close(ours[name], grad, tol)


def test_six_steps_of_adamw(data):
    t = meta["trace"]
    (lr,) = {g["lr"] for g in t["groups"]}
    recipe = Recipe(
        "golden",
        "inductive",
        max_iters=t["max_iters"],
        warmup_iters=t["warmup_iters"],
        lr=lr,
        weight_decay=t["weight_decay"],
        min_lr=t["min_lr"],
        power=t["power"],
    )
    model = load()  # in eval mode: the golden run has no dropout
    opt = make_optimizer(model, recipe)
    for step, (loss, rate) in enumerate(zip(data["trace.loss"], data["trace.lr_first_group"])):
        for group in opt.param_groups:
            group["lr"] = lr_at(step, recipe)
        assert math.isclose(lr_at(step, recipe), rate.item(), rel_tol=1e-9)
        total = sum(inductive_terms(model, data).values())
        close(total.double(), loss, data["tol"])
        opt.zero_grad()
        total.backward()
        opt.step()
    ours = {official_name(name): p.detach() for name, p in model.named_parameters()}
    for name, value in data.items():
        if str(name).startswith("trace.final."):
            close(ours[name.removeprefix("trace.final.")], value, data["tol"])


# reading


def test_configuration():
    state, config = read_official(checkpoint)
    c = meta["config"]
    want = dict(
        width=c["width"],
        layers=c["layers"],
        patch=c["patch"],
        grid=side // c["patch"],
        dim=c["dim"],
        visual_prompts=c["ntok"],
        depth=3,
        trained=len(seen),
    )
    assert (
        want.items() <= config.items() and config["classes"] == [f"c{i}" for i in range(k)] and config["iteration"] == 5
    )
    model = load()
    assert state.keys() == model.state_dict().keys() - {"text"} and all(
        torch.equal(v, model.state_dict()[n]) for n, v in state.items()
    )


def test_sources_agree(tmp_path):
    want, config = read_official(checkpoint)
    raw = load_file(golden / "official_state_dict.safetensors")
    torch.save({f"module.{n}": v.half() if n == "backbone.proj" else v for n, v in raw.items()}, tmp_path / "bare.pth")
    for source in (
        checkpoint,
        str(checkpoint),
        raw,
        {"state_dict": raw},
        golden / "official_state_dict.safetensors",
        tmp_path / "bare.pth",
    ):
        state, c = read_official(source)
        assert state.keys() == want.keys() and all(v.dtype == torch.float32 for v in state.values())
        assert all(torch.equal(v, want[n]) or n == "encoder.visual.proj" for n, v in state.items())
        assert c["width"] == config["width"] and c["trained"] == config["trained"]


def test_every_tensor_is_accounted_for():
    report = official_report(checkpoint)
    assert sorted(report["tensor"]) == sorted(state_dict()) and set(report["status"]) == {"used", "ignored"}
    ignored = report[report["status"] == "ignored"]["tensor"]
    for name in ignored:
        last = (
            name.startswith("decode_head.decoder_1.layers.2.")
            and "multihead_attn.q" not in name
            and "multihead_attn.k" not in name
        )
        assert (
            last
            or name.startswith(("text_encoder.", "decode_head.loss_decode."))
            or ".self_attn." in name
            or ".norm1." in name
        ), name
    trained = {official_name(n) for n, p in load().named_parameters() if p.requires_grad}
    assert trained == set(
        load_file(golden / "converged_grads.safetensors")
    )  # used and trained = what gets a gradient there


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda s: s.pop("backbone.prompt_norm.weight"), r"backbone.prompt_norm.weight \(64,\) is missing"),
        (lambda s: s.pop("backbone.transformer.resblocks.2.ln_1.bias"), r"resblocks.2.ln_1.bias \(64,\) is missing"),
        (
            lambda s: s.pop("decode_head.decoder_1.layers.1.multihead_attn.v.weight"),
            "layers.1.multihead_attn.v.weight .* is missing",
        ),
        (
            lambda s: s.update({"decode_head.input_proj_1.weight": torch.zeros(32, 32)}),
            "input_proj_1.weight .* is unknown",
        ),
        (lambda s: s.update({"auxiliary_head.conv.weight": torch.zeros(3)}), "auxiliary_head.* is unknown"),
        (
            lambda s: s.update({"backbone.prompt_proj.bias": torch.zeros(65)}),
            r"\(65,\) is misfit \(the model needs \(64,\)\)",
        ),
        (
            lambda s: s.update({"backbone.deep_prompt_embeddings": torch.zeros(3, 6, 64)}),
            r"\(3, 6, 64\) is misfit \(the model needs \(3, 5, 64\)\)",
        ),
        (lambda s: s.update({"backbone.positional_embedding": torch.zeros(19, 64)}), "has 19 rows"),
        (lambda s: s.update({"backbone.proj": "weights"}), "a str under 'backbone.proj'"),
        (lambda s: s.clear(), "not the weights of an official OTSeg"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(change, why):
    state = dict(state_dict())
    change(state)
    with pytest.raises(ValueError, match=why):
        read_official({"state_dict": state})


def test_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        read_official(tmp_path / "absent.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        read_official(tmp_path / "absent.safetensors")
    (tmp_path / "cut.pth").write_bytes(checkpoint.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="may be truncated"):
        read_official(tmp_path / "cut.pth")
    torch.save({"state_dict": {"visual.conv1.weight": torch.zeros(3)}}, tmp_path / "clip.pth")
    with pytest.raises(ValueError, match="they begin with visual.conv1.weight"):
        read_official(tmp_path / "clip.pth")


def test_code_in_a_pickle_is_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"meta": Bomb(), "state_dict": state_dict()}, tmp_path / "bomb.pth")
    for read in read_official, official_report:
        with pytest.raises(ValueError, match="nothing in it was run"):
            read(tmp_path / "bomb.pth")
    assert not (tmp_path / "exploded").exists()


def test_sizes_of_the_released_files():
    shapes = {
        "backbone.conv1.weight": (768, 3, 16, 16),
        "backbone.positional_embedding": (1025, 768),
        "backbone.proj": (768, 512),
        "backbone.prompt_embeddings": (1, 100, 768),
        "decode_head.loss_decode.criterion.empty_weight": (157,),
        **{f"backbone.transformer.resblocks.{i}.ln_1.bias": (768,) for i in range(12)},
        **{f"decode_head.decoder_1.layers.{i}.norm1.bias": (512,) for i in range(3)},
    }
    c = official_config({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert c == dict(
        width=768,
        layers=12,
        heads=12,
        patch=16,
        grid=32,
        dim=512,
        visual_prompts=100,
        depth=3,
        trained=156,
        classes=None,
        iteration=None,
    )


def test_arguments_are_not_modified():
    state = state_dict()
    before = {name: value.clone() for name, value in state.items()}
    ours, _ = read_official(state)
    assert state.keys() == before.keys() and all(torch.equal(v, before[n]) for n, v in state.items())


def test_heads_must_divide_the_width(tmp_path):
    with pytest.raises(ValueError, match="5 heads do not divide the width 64"):
        convert(checkpoint, tmp_path / "out.safetensors", heads=5)
    assert not list(tmp_path.iterdir())


def test_conversion(tmp_path):
    text = np.random.default_rng(0).normal(size=(k, 6, 32)).astype(np.float32)
    np.save(tmp_path / "text.npy", text)
    config = convert(checkpoint, tmp_path / "a" / "out.safetensors", tmp_path / "text.npy", heads=4)
    state, again = read_official(tmp_path / "a" / "out.safetensors")
    assert again == config and config["heads"] == 4
    assert all(torch.equal(v, state[n]) for n, v in read_official(checkpoint)[0].items())
    assert np.array_equal(read_embeddings(tmp_path / "a" / "out.safetensors", config["classes"]), text)
    with pytest.raises(ValueError, match="number 0 is 'c0' in the file but 'dog' is given"):
        read_embeddings(tmp_path / "a" / "out.safetensors", ["dog"] + config["classes"][1:])
    image = load_file(golden / "model.safetensors")["image"]
    model = load_official(tmp_path / "a" / "out.safetensors", torch.from_numpy(text), image_size=side, heads=4)
    assert torch.equal(model(image).mpsa, load(text=torch.from_numpy(text))(image).mpsa)


@pytest.mark.parametrize(
    "shape, why",
    [((59, 8, 32), "59 class names but 7 are given"), ((k, 6, 512), "size 512 but the checkpoint's is 32")],
)
def test_conversion_with_other_text(tmp_path, shape, why):
    np.save(tmp_path / "text.npy", np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match=why):
        convert(checkpoint, tmp_path / "out.safetensors", tmp_path / "text.npy")
    assert not (tmp_path / "out.safetensors").exists()


def test_from_the_shell(tmp_path):
    command = [sys.executable, "-m", "otseg.cli", "convert", checkpoint, tmp_path / "out.safetensors", "--heads", "4"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        "used" in done.stdout
        and "self-attention" in done.stdout
        and "trained 5" in done.stdout
        and (tmp_path / "out.safetensors").is_file()
    )


def test_the_shell_names_tensors_that_do_not_fit(tmp_path, capsys):
    torch.save({n: v for n, v in state_dict().items() if "prompt_norm" not in n}, tmp_path / "less.pth")

    def convert_to(source, name):
        return main(["convert", str(source), str(tmp_path / name)])

    assert convert_to(tmp_path / "less.pth", "out.safetensors") == 2
    out, err = capsys.readouterr()
    assert "backbone.prompt_norm.bias" in out and "2 tensors do not fit" in err
    assert not (tmp_path / "out.safetensors").exists()
    assert convert_to(tmp_path / "absent.pth", "out.safetensors") == 2
    assert "no checkpoint at" in capsys.readouterr().err
    assert convert_to(checkpoint, "out.pth") == 2
    assert "ends in .safetensors" in capsys.readouterr().err
