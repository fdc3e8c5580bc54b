"""Cost of a model and course of its training: the counter by hand, every number of the tables from its record, and the notebooks in a tiny setting."""

import json
import math

import pandas as pd
import pytest
import torch
from helpers import PATCH, ROOT, SIDE, D, papermill, random_image, small_model
from torch import nn

from otseg.bench import flops, random_model
from otseg.encoder import FrozenFeedForward

TABLES, RECORDS = ROOT / "results/tables", ROOT / "results/runs"


# operations


@pytest.mark.parametrize("grad", [False, True])
def test_the_encoder_by_hand(grad):
    "Patches, attention with prompts, feed-forward in its own autograd function, projection: a multiplication and an addition are two."
    model, image = small_model(), random_image(b=2)
    model.requires_grad_(grad)
    width, layers, p, m = 32, 3, 4, (SIDE // PATCH) ** 2
    s = 1 + m
    for block in model.encoder.visual.transformer.resblocks:
        assert block.attn.embed_dim == width
    linear = (
        2 * width**2 * (s + 2 * (s + p) + s + 2 * 4 * s)
    )  # queries, keys and values, output, two layers of four times the width
    attention = 2 * 2 * s * (s + p) * width
    expected = layers * (linear + attention) + 2 * s * width * D
    prompts = layers * p * 2 * width**2  # projected once for the batch
    assert flops(model, image)["encoder"] == 2 * (expected + 2 * m * 3 * PATCH**2 * width) + prompts


def test_parts_are_less_than_all():
    model = random_model(6, 3, 4, 64, "tiny")
    counted = flops(model, torch.randn(1, 3, 64, 64))
    assert 0 < counted["decoder"] < counted["encoder"] and counted["encoder"] + counted["decoder"] < counted["all"]


def test_the_frozen_feed_forward_is_seen():
    r, width = 5, 8

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(width, width), nn.Linear(width, 1)

        def forward(self, x):
            weights = (
                torch.randn(4 * width, width),
                torch.randn(4 * width),
                torch.randn(width, 4 * width),
                torch.randn(width),
            )
            return self.decoder(FrozenFeedForward.apply(self.encoder(x), *weights))

    assert flops(Block(), torch.randn(r, width))["all"] == 2 * r * (width**2 * (1 + 4 + 4) + width)


# the tables


def derived(cost):
    "What a table says of a measured cost, by metric."
    found = {
        "trainable_params_m": cost["trainable"] / 1e6,
        "params_m": cost["parameters"] / 1e6,
        "gflops": cost["flops"]["all"] / 1e9,
        "gmacs": cost["flops"]["all"] / 2e9,
        "encoder_percent": 100 * cost["flops"]["encoder"] / cost["flops"]["all"],
    }
    if "median" in cost.get("window", {}):
        found["fps"] = 1 / cost["window"]["median"]
    if "median" in cost.get("step", {}):
        found |= {
            "step_seconds": cost["step"]["median"],
            "step_peak_mb": cost["step"]["peak"],
            "step_total_mb": cost["step"]["total"],
        }
    return found


def check_costs(results):
    "Every number of the measured tables in a results folder."
    files = [p for p in (results / "tables").glob("t5_efficiency_*.csv") if p.stem != "t5_efficiency_published"]
    for file in files:
        table = pd.read_csv(file)
        for row in table.itertuples():
            cost = json.loads((results / row.record).read_text())["costs"][row.dataset]
            assert math.isclose(row.measured, derived(cost)[row.metric], abs_tol=6e-5), row
            if not math.isnan(row.low):
                assert row.low - 6e-5 <= row.measured <= row.high + 6e-5, row
        record = json.loads((results / table["record"].iloc[0]).read_text())
        assert len(table) == sum(len(derived(cost)) for cost in record["costs"].values())
    return files


def test_measured_numbers_come_from_the_measurement():
    assert check_costs(ROOT / "results")


def test_published_numbers_are_those_of_others():
    table = pd.read_csv(TABLES / "t5_efficiency_published.csv")
    published = pd.read_csv(ROOT / "results/published.csv").query("table == 'efficiency'")
    assert (
        table["published"].tolist() == published["value"].tolist()
        and table["source"].tolist() == published["source"].tolist()
    )


# the notebooks


def run(name, folder, **parameters):
    (folder / "tables").mkdir(exist_ok=True)
    return papermill(f"tables/{name}", folder, out=folder / "results", **parameters)


@pytest.mark.slow
def test_efficiency_is_measured_and_read_again(tmp_path):
    done, executed = run("t5_efficiency", tmp_path)
    assert done.returncode == 0 and "not run: `papermill nbs/tables/t5_efficiency.ipynb" in executed.read_text(), (
        done.stderr[-3000:]
    )
    assert not check_costs(tmp_path / "results")
    done, _ = run("t5_efficiency", tmp_path, measure=True, sizes="tiny", repeats=1)
    assert done.returncode == 0, done.stderr[-3000:]
    (table,) = check_costs(tmp_path / "results")
    assert set(pd.read_csv(table)["dataset"]) == {"COCO-Stuff", "digits"}
    assert (
        "ZegCLIP" not in table.read_text() and "OTSeg" not in (table.parent / "t5_efficiency_published.csv").read_text()
    )
    assert (tmp_path / "results/figures/t5_efficiency_cpu.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, wrong, says",
    [
        ("t5_efficiency", {"repeat": 3}, "unknown parameter repeat"),
    ],
)
def test_a_wrong_parameter_is_refused(tmp_path, name, wrong, says):
    done, _ = run(name, tmp_path, **wrong)
    assert done.returncode != 0 and says in done.stderr
    assert not (tmp_path / "results").exists()
