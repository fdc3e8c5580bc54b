"""The curve of seen against unseen classes: every point is an ordinary evaluation, the area is that of the curve."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from helpers import K, random_image, small_model

from otseg.data import Benchmark
from otseg.evaluation import validate
from otseg.images import IGNORE
from otseg.recipes import resolve
from otseg.seen_unseen import CALIBRATIONS, ausuc, seen_unseen_curve

BENCH = Benchmark("test", tuple("abcde")[:K], (1, 4), None, None)


def items():
    g = torch.Generator().manual_seed(0)
    for i in range(3):
        label = torch.randint(K, (32, 40), generator=g)
        label[:3] = IGNORE
        yield {"image": random_image(1, 40)[0, :, :32].roll(i, -1), "label": label}


@pytest.fixture
def curve():
    return seen_unseen_curve(small_model(), BENCH, resolve("digits"), list(items()))


@pytest.mark.parametrize("calibration", [-1.0, 0.0, 0.1, 0.35, 1.0])
def test_each_point_is_an_evaluation(curve, calibration):
    recipe = replace(resolve("digits"), calibration=calibration)
    for path, scores in validate(small_model(), BENCH, recipe, list(items())).items():
        point = curve[(curve["path"] == path) & (curve["calibration"] == calibration)].iloc[0]
        for column, key in (("S", "miou_seen"), ("U", "miou_unseen"), ("hIoU", "hiou")):
            assert point[column] == pytest.approx(100 * scores[key], abs=0.5)  # a tie may fall to the other side


def test_at_its_ends_a_side_is_never_predicted(curve):
    ends = curve.groupby("path")
    assert len(curve) == 3 * len(CALIBRATIONS)
    assert (ends.first()["U"] == 0).all() and (ends.last()["S"] == 0).all()
    assert (ends.first()["S"] > 0).all() and (ends.last()["U"] > 0).all()


def test_the_area():
    "A straight line has half of the product of its ends; a model that loses nothing has all of it, bent back or not."
    line = pd.DataFrame({"path": "a", "S": [80.0, 40.0, 0.0], "U": [0.0, 30.0, 60.0]})
    corner = pd.DataFrame({"path": "b", "S": [80.0, 80.0, 0.0], "U": [0.0, 60.0, 60.0]})
    bent = pd.DataFrame({"path": "c", "S": [50.0, 80.0, 80.0, 30.0, 0.0], "U": [0.0, 60.0, 60.0, 20.0, 10.0]})
    areas = ausuc(pd.concat([line, corner, bent]))
    assert areas["a"] == pytest.approx(24.0) and areas["b"] == pytest.approx(48.0) == areas["c"]


def test_without_unseen_classes():
    with pytest.raises(ValueError, match="test has no unseen classes"):
        seen_unseen_curve(small_model(), replace(BENCH, unseen=()), resolve("digits"), list(items()))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_keeps_its_mode(training):
    model, wrong = small_model().train(training), [item | {"label": item["label"] + K} for item in items()]
    seen_unseen_curve(model, BENCH, resolve("digits"), list(items()))
    assert model.training == training
    with pytest.raises(ValueError, match=f"label holds .* but there are {K} classes"):
        seen_unseen_curve(model, BENCH, resolve("digits"), wrong)
    assert model.training == training
