"""What a model costs: the counter of operations against formulas, and Table 5 against its record."""

import json
import math

import pandas as pd
import pytest
import torch
from helpers import PATCH, ROOT, SIDE, D, random_image, run_cells, small_model
from torch import nn

from otseg.bench import flops
from otseg.encoder import FrozenFeedForward
from otseg.tasks import random_model

NOTEBOOK, RESULTS = "tables/t5_efficiency", ROOT / "results"


# operations


@pytest.mark.parametrize("grad", [False, True])
def test_operations_of_the_encoder(grad):
    "Patch embedding, attention with prompts, feed-forward in its own autograd function, and projection."
    model, image = small_model(), random_image(b=2)
    model.requires_grad_(grad)
    width, layers, p, m = 32, 3, 4, (SIDE // PATCH) ** 2
    s = 1 + m
    for block in model.encoder.visual.transformer.resblocks:
        assert block.attn.embed_dim == width
    # queries, keys and values, output, two layers of four times the width
    linear = 2 * width**2 * (s + 2 * (s + p) + s + 2 * 4 * s)
    attention = 2 * 2 * s * (s + p) * width
    expected = layers * (linear + attention) + 2 * s * width * D
    prompts = layers * p * 2 * width**2  # projected once for the batch
    assert flops(model, image)["encoder"] == 2 * (expected + 2 * m * 3 * PATCH**2 * width) + prompts


def test_encoder_and_decoder_are_parts_of_the_model():
    model = random_model(6, 3, 4, 64, "tiny")
    counted = flops(model, torch.randn(1, 3, 64, 64))
    assert 0 < counted["decoder"] < counted["encoder"] and counted["encoder"] + counted["decoder"] < counted["all"]


def test_the_frozen_feed_forward_is_counted():
    r, width = 5, 8

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(width, width), nn.Linear(width, 1)

        def forward(self, x):
            shapes = (4 * width, width), (4 * width,), (width, 4 * width), (width,)
            return self.decoder(FrozenFeedForward.apply(self.encoder(x), *map(torch.randn, shapes)))

    assert flops(Block(), torch.randn(r, width))["all"] == 2 * r * (width**2 * (1 + 4 + 4) + width)


# the table


def expected_numbers(cost):
    "Numbers of the table for one measured cost, by metric."
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
        step = cost["step"]
        found |= {"step_seconds": step["median"], "step_peak_mb": step["peak"], "step_total_mb": step["total"]}
    return found


def check_costs(results):
    "Check every number of the measured tables in a results folder. Returns the files of the tables."
    files = [p for p in (results / "tables").glob("t5_efficiency_*.csv") if p.stem != "t5_efficiency_published"]
    for file in files:
        table = pd.read_csv(file)
        for row in table.itertuples():
            cost = json.loads((results / row.record).read_text())["costs"][row.dataset]
            assert math.isclose(row.measured, expected_numbers(cost)[row.metric], abs_tol=6e-5), row
            if not math.isnan(row.low):
                assert row.low - 6e-5 <= row.measured <= row.high + 6e-5, row
        record = json.loads((results / table["record"].iloc[0]).read_text())
        assert len(table) == sum(len(expected_numbers(cost)) for cost in record["costs"].values())
    return files


def test_committed_numbers_agree_with_the_committed_record():
    assert check_costs(RESULTS)


def test_published_numbers_are_copied_without_change():
    table = pd.read_csv(RESULTS / "tables/t5_efficiency_published.csv")
    published = pd.read_csv(RESULTS / "published.csv").query("table == 'efficiency'")
    assert table["published"].tolist() == published["value"].tolist()
    assert table["source"].tolist() == published["source"].tolist()


def test_without_a_record_the_table_is_not_run(tmp_path):
    run = run_cells(NOTEBOOK, out=tmp_path)
    assert "not run: `papermill nbs/tables/t5_efficiency.ipynb" in run.text and run.names["findings"] == []
    assert not check_costs(tmp_path) and not list(tmp_path.rglob("*.png"))


@pytest.mark.slow
def test_efficiency_is_measured_and_read_again(tmp_path, monkeypatch):
    "In this process: test_speed starts new ones."
    monkeypatch.setattr("otseg.bench.in_new_process", lambda f, *args, **options: f(*args, **options))
    measured = run_cells(NOTEBOOK, out=tmp_path, measure=True, sizes="tiny", repeats=1)
    (table,) = check_costs(tmp_path)
    assert set(pd.read_csv(table)["dataset"]) == {"COCO-Stuff", "digits"}
    published = (tmp_path / "tables/t5_efficiency_published.csv").read_text()
    assert "ZegCLIP" not in table.read_text() and "OTSeg" not in published
    assert (tmp_path / "figures/t5_efficiency_cpu.png").is_file()
    text = table.read_text()
    again = run_cells(NOTEBOOK, out=tmp_path)
    assert table.read_text() == text and again.names["findings"] == measured.names["findings"]


@pytest.mark.parametrize("published_is, nearer", [("multiply-adds", "gmacs"), ("operations", "gflops")])
def test_the_verdict_follows_the_numbers(tmp_path, published_is, nearer):
    "A model with as many multiply-adds, or operations, as published."
    record = json.loads((RESULTS / "benchmarks/efficiency_cpu.json").read_text())
    published = pd.read_csv(RESULTS / "published.csv").query("table == 'efficiency' and metric == 'gflops'")
    value = published.set_index("dataset")["value"]["voc"]
    record["costs"]["VOC"]["flops"]["all"] = 1.1e9 * value * (2 if nearer == "gmacs" else 1)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/efficiency_cpu.json").write_text(json.dumps(record))
    run = run_cells(NOTEBOOK, out=tmp_path)
    assert run.names["compared"].loc["VOC", "nearer operations"] == nearer
    assert any(
        text.startswith("VOC: a window") and f"nearer to the {published_is}" in text for text in run.names["findings"]
    )


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"repeat": 3}, "unknown parameter repeat"),
        ({"measure": "yes"}, "measure = 'yes' must be True or False"),
        ({"sizes": "small"}, "sizes = 'small' is not one of full, tiny"),
    ],
)
def test_a_wrong_parameter_is_an_error(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        run_cells(NOTEBOOK, out=tmp_path / "results", **wrong)
    assert not (tmp_path / "results").exists()
