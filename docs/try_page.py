"""The page to try: the shipped small model as ONNX, some scenes and textures, and facts about them."""

import gzip
import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from otseg.digits import CLASSES, SIDE, WINDOW, Digits, load_textures, split_classes
from otseg.export import fix_decoder, write_graph
from otseg.images import normalize
from otseg.inference import window_starts
from otseg.models import DEFAULT_CHECKPOINT, load_model
from otseg.mps import cosine
from otseg.viz import palette

SCENES = (5, 1, 12, 27, 33, 40, 58, 71)  # validation scenes, none of which the model was trained on


class Parts(nn.Module):
    "Cosines of the MPS path and logits of the decoder. The page computes plans and masks from them."

    def __init__(self, model, normalization: str):
        super().__init__()
        self.model, self.normalization = model, normalization
        fix_decoder(model.decoder)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:  # (w, 3, s, s) in [0, 1] -> (w, k, m, n), (w, k, m)
        x, q, _ = self.model.embed(normalize(image, self.normalization))
        return cosine(x, q), self.model.decoder(q, x)


def write_model(path: Path) -> dict:
    "Write the compressed graph. Returns the facts about the model that the page needs."
    from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions

    model, recipe, bench = load_model(DEFAULT_CHECKPOINT)
    corners = [
        (y, x) for y in window_starts(SIDE, WINDOW, recipe.stride) for x in window_starts(SIDE, WINDOW, recipe.stride)
    ]
    raw = path.with_suffix(".partial")
    images = torch.rand(len(corners), 3, WINDOW, WINDOW)
    write_graph(Parts(model, recipe.normalization).eval(), images, raw, ("cosines", "decoder"))
    folded = path.with_suffix(".folded")
    options = SessionOptions()
    options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_BASIC  # a quarter of the nodes: loads faster
    options.optimized_model_filepath = str(folded)
    InferenceSession(str(raw), options, providers=["CPUExecutionProvider"])
    path.write_bytes(gzip.compress(folded.read_bytes(), 9))
    raw.unlink(), folded.unlink()
    colours = (255 * palette(len(CLASSES))).round().astype(int).tolist()
    return {
        "classes": CLASSES,
        "unseen": split_classes(recipe.split)[1],
        "colours": colours,
        "prompts": list(recipe.text_prompts),
        "eps": recipe.eps,
        "side": SIDE,
        "window": WINDOW,
        "patch": model.encoder.visual.patch_size[0],
        "corners": corners,
    }


def write_pictures(folder: Path) -> dict:
    "Write scenes and textures, side by side."
    val = Digits("val", max(SCENES) + 1)
    scenes = torch.cat([val[i]["image"] for i in SCENES], 2)
    textures = torch.cat(
        [torch.from_numpy(zooms[0][:SIDE, :SIDE]).permute(2, 0, 1) for zooms in load_textures("val")], 2
    )
    for name, picture in (("scenes", scenes), ("textures", textures.clamp(0, 1))):
        array = (255 * picture).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(folder / f"{name}.png")
    return {"scenes": len(SCENES), "textures": CLASSES[10:]}


def write_try_page(folder: Path, page: Path):
    "Write all files of the page except the libraries. `page` has its HTML and JavaScript."
    folder.mkdir(parents=True, exist_ok=True)
    about = write_model(folder / "model.onnx.gz") | write_pictures(folder)
    (folder / "about.json").write_text(json.dumps(about))
    for file in page.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
