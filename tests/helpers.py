"""What several test files share: comparison by scale, and a small model with random weights."""

import torch
import torch.nn.functional as F

from otseg.clip import visual_tower
from otseg.data import Benchmark
from otseg.evaluation import validate
from otseg.images import normalize
from otseg.inference import PATH_WEIGHTS
from otseg.model import OTSeg
from otseg.recipes import resolve

PATCH, SIDE, D = 8, 32, 16  # of the small CLIP: patch and native image in pixels, embedding
K, N = 5, 3  # its classes and prompts


def close(ours, theirs, tol=1e-5):
    "Equal up to `tol` of the largest value."
    assert ours.shape == theirs.shape
    error, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert error <= tol * scale, f"{error:.2e} apart, {tol} of {scale:.2e} allowed"


def random_text(k=K, n=N, seed=0):
    return F.normalize(torch.randn(k, n, D, generator=torch.Generator().manual_seed(seed)), dim=-1)


def random_image(b=2, h=SIDE, w=SIDE, seed=0):
    return torch.randn(b, 3, h, w, generator=torch.Generator().manual_seed(seed))


def small_model(kind=OTSeg, **options):
    "The same weights at each call, in eval mode."
    torch.manual_seed(0)
    visual = visual_tower(width=32, layers=3, heads=2, patch=PATCH, image_size=SIDE, dim=D)
    options = {"text": random_text(), "image_size": SIDE} | ({"visual_prompts": 4} if kind is OTSeg else {}) | options
    return kind(visual, **options).eval()


def evaluate(model, data, unseen, calibration=0.0, stride=None, paths=tuple(PATH_WEIGHTS)):
    "Metrics of raw images {'image': (3, H, W) in [0, 1], 'label'} at their own size, through the validation of training."
    bench = Benchmark("test", tuple(map(str, range(len(model.text)))), unseen, None, None)
    recipe = resolve(
        "digits", image_size=model.image_size, stride=stride or round(model.image_size * 5 / 6), calibration=calibration
    )
    return validate(model, bench, recipe, [item | {"image": normalize(item["image"])} for item in data], paths=paths)
