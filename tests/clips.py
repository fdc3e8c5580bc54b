"""A tiny CLIP architecture, OpenAI's file format, and a pickle that would execute code."""

import json
import os
import warnings

import open_clip
import torch

TINY = dict(
    embed_dim=32,
    quick_gelu=True,
    vision_cfg=dict(image_size=64, layers=2, width=64, head_width=16, patch_size=16),
    text_cfg=dict(context_length=77, vocab_size=49408, width=64, heads=2, layers=2),
)
ARCHITECTURES = {
    "test-quickgelu": TINY,
    "test": TINY | {"quick_gelu": False},
    "test-vocab": TINY | {"text_cfg": TINY["text_cfg"] | {"vocab_size": 100}},
}


def register_architectures(folder):
    "Write the configurations of ARCHITECTURES into a folder and register them with open_clip."
    for name, config in ARCHITECTURES.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")


def save_openai(clip, path):
    "Write the TorchScript archive that OpenAI's code writes, with sizes as buffers and the mask in each block."
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


class Bomb:
    "Creates a folder when it is unpickled."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
