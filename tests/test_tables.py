"""`otseg.tables`: which runs a table wants, what the records say together, and that every number in results/tables has a record."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import random_image, small_model

from otseg.cli import main
from otseg.metrics import METRICS
from otseg.mpsa import ATTENTIONS
from otseg.recipes import RECIPES, resolve, run_name
from otseg.tables import (
    NOT_RUN,
    ROWS,
    commands,
    comparisons,
    distance,
    diversity,
    load_or_make_record,
    missing,
    paired,
    prompt_shares,
    published,
    runs_for_table,
    scores,
    summary,
    to_wide,
    train,
)
from otseg.training import inductive_of

ROOT = Path(__file__).parents[1]
DATASETS = sorted({dataset for dataset, _ in RECIPES})


def record(run, hiou=0.5, unseen=0.4):
    "A record with one path and one class."
    return {
        "name": run,
        "metrics": {
            "ensemble": {"pacc": 0.9, "miou_seen": 0.6, "miou_unseen": unseen, "hiou": hiou, "iou": {"a": 0.5}}
        },
    }


def write(folder, *records):
    for r in records:
        (folder / f"{r['name']}.json").write_text(json.dumps(r))


@pytest.mark.parametrize("table", ROWS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_rows_of_a_table_are_runs_of_their_own(table, dataset):
    runs = runs_for_table(table, dataset, seeds=range(2))
    factors = runs["factor"].nunique() if "factor" in runs else 1
    default = runs["run"].value_counts()
    assert default.max() <= factors and {"setting", "split", "seed", "run", "recipe"} <= {*runs}
    assert all(run_name(recipe) == run for run, recipe in zip(runs["run"], runs["recipe"]))


@pytest.mark.parametrize(
    "given, says",
    [
        (dict(table="t9"), "table = 't9' is not one of t1, t3, t4"),
        (dict(settings=("zero",)), "setting = 'zero'"),
        (dict(dataset="cityscapes"), "dataset = 'cityscapes'"),
        (dict(max_iter=3), "no field 'max_iter'"),
        (dict(max_iters=0), "max_iters = 0"),
    ],
)
def test_wrong_wishes(given, says):
    with pytest.raises(ValueError, match=says):
        runs_for_table(**dict(table="t1", dataset="digits") | given)


def runs_of(command):
    "Names of the runs that a papermill command trains, as train.ipynb reads its parameters."
    words = shlex.split(command)
    given = dict(zip(words[4::3], words[5::3]))
    assert words[:2] == ["papermill", "nbs/train.ipynb"] and set(words[3::3]) == {"-p"}
    setting, dataset = given.pop("setting"), given.pop("dataset")
    default = resolve(dataset)
    changes = {name: type(getattr(default, name))(value) for name, value in given.items() if name != "root"}
    return [
        run_name(resolve(dataset, s, **changes))
        for s in (("inductive", "transductive") if setting == "all" else (setting,))
    ]


@pytest.mark.parametrize("table", ROWS)
def test_commands_make_what_is_missing_and_need_each_other_not(table, tmp_path):
    runs = runs_for_table(table, "coco", seeds=range(2), max_iters=1000)
    write(tmp_path, record(runs["run"][0]))
    lines = commands(runs, tmp_path, root="/data with a space")
    made = [name for line in lines for name in runs_of(line)]
    assert len(made) == len(set(made)) and set(made) >= {run_name(r) for r in missing(runs, tmp_path)} == set(
        runs["run"]
    ) - {runs["run"][0]}
    assert all("'/data with a space'" in line for line in lines)


def test_a_transductive_run_alone_brings_its_start_along(tmp_path):
    (line,) = commands(runs_for_table("t1", "voc", ("transductive",), (3,)).tail(1), tmp_path)
    assert runs_of(line) == ["voc0-inductive-mpsa-seed3", "voc0-transductive-mpsa-seed3"]


def test_train_starts_where_it_can(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(
        "otseg.tables.fit", lambda recipe, out, **_: done.append(recipe.setting) or record(run_name(recipe))
    )
    recipe = resolve("digits", "transductive", eps=0.1)
    assert train(recipe, tmp_path, tmp_path / "records") == load_or_make_record(
        run_name(recipe), folder=tmp_path / "records"
    )
    assert done == ["inductive", "transductive"] and load_or_make_record(
        run_name(inductive_of(recipe)), folder=tmp_path / "records"
    )
    half = tmp_path / run_name(inductive_of(recipe)) / "half.safetensors"
    half.parent.mkdir(), half.touch()
    train(recipe, tmp_path, tmp_path / "records")
    assert done == ["inductive", "transductive", "transductive"]


def test_a_record_is_made_once(tmp_path):
    assert load_or_make_record("a", folder=tmp_path) is None
    assert (
        load_or_make_record("a", lambda: {"value": 1}, tmp_path)
        == load_or_make_record("a", lambda: {"value": 2}, tmp_path)
        == {"value": 1}
    )
    with pytest.raises(RuntimeError):
        load_or_make_record("b", lambda: (_ for _ in ()).throw(RuntimeError()), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_mean_deviation_and_what_was_not_run(tmp_path):
    runs = runs_for_table("t1", "digits", ("inductive",), range(3))
    names = runs.query("decoder == 'mpsa'")["run"]
    write(tmp_path, record(names.iloc[0], 0.5, None), record(names.iloc[1], 0.7, None))
    long = summary(scores(runs, ("ensemble",), tmp_path), ["decoder", "path"])
    row = long.query("decoder == 'mpsa' and metric == 'hIoU'").iloc[0]
    assert (
        np.isclose(row["mean"], 60)
        and np.isclose(row["sd"], 200**0.5)
        and row["runs"] == 2
        and row["records"] == ";".join(names[:2])
    )
    table = to_wide(long)
    assert table.loc[("mpsa", "ensemble")].tolist() == ["90.0 ± 0.0", "60.0 ± 0.0", "–", "60.0 ± 14.1", 2]
    assert table.loc[("softmax", "ensemble")].tolist() == [NOT_RUN] * 4 + [0]


def frame(**values):
    return pd.DataFrame(
        [{"decoder": name, "seed": s, "hIoU": v} for name, side in values.items() for s, v in enumerate(side)]
    )


def test_pairs():
    found = paired(frame(a=[3.0, 5.0, 4.0], b=[1.0, 2.0, 3.0]), "decoder", "a", "b")
    assert found["difference"] == pytest.approx(2) and found["wins"] == 3 and found["pairs"] == 3
    half = 4.302653 * 1 / 3**0.5  # Student's t for two degrees of freedom, deviation 1
    assert (found["low"], found["high"]) == pytest.approx((2 - half, 2 + half)) and found["text"].endswith(
        "3 of 3 seeds: not told apart"
    )
    back = paired(frame(a=[3.0, 5.0, 4.0], b=[1.0, 2.0, 3.0]), "decoder", "b", "a")
    assert back["difference"] == -found["difference"] and back["p"] == pytest.approx(found["p"]) and back["wins"] == 0
    assert paired(frame(a=[3.0, 3.1, 3.2], b=[1.0, 1.2, 1.1]), "decoder", "a", "b")["text"].endswith(": better")
    assert paired(frame(a=[3.0, 3.1, 3.2], b=[1.0, 1.2, 1.1]), "decoder", "b", "a")["text"].endswith(": worse")


def test_only_pairs_count():
    found = paired(frame(a=[3.0, 5.0, np.nan, 9.0], b=[1.0, 2.0, 3.0]), "decoder", "a", "b")
    assert found["pairs"] == 2 and found["difference"] == pytest.approx(2.5)
    assert paired(frame(a=[3.0], b=[1.0]), "decoder", "a", "b")["text"] == NOT_RUN
    with pytest.raises(ValueError, match="several runs with the same seed"):
        paired(pd.concat([frame(a=[1.0], b=[1.0])] * 2), "decoder", "a", "b")


def test_equal_sides_are_not_told_apart():
    assert "not told apart" in paired(frame(a=[1.0, 2.0, 3.0], b=[1.0, 2.0, 3.0]), "decoder", "a", "b")["text"]


def test_every_row_is_compared_with_the_base():
    table = comparisons(frame(a=[3.0, 5.0], b=[1.0, 2.0], c=[0.0, 9.0]), "decoder", "b", ("hIoU",))
    assert [*table.index] == ["a", "c"] and table.loc["a", "hIoU"].startswith("+2.5 [")


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_shares_of_every_decoder(attention):
    shares = prompt_shares(small_model(attention=attention), random_image(1))
    assert [*shares] == ["mps", "layer 1", "layer 2", "layer 3"]
    for name, T in shares.items():
        torch.testing.assert_close(T.sum(-2), torch.ones_like(T[:, 0]))
        assert 0 <= distance(T) <= 1 and 0 <= diversity(T) <= 1
        swapped = T[..., torch.randperm(T.shape[-1])]
        assert distance(swapped) == pytest.approx(distance(T)) and diversity(swapped) == pytest.approx(diversity(T))
    if attention == "uniform":
        assert distance(shares["layer 1"]) < 1e-6 < distance(shares["mps"])


def test_one_prompt_has_one_plan():
    model = small_model()
    shares = prompt_shares(small_model(text=model.text[:, :1]), random_image(1))
    assert all(distance(T) == pytest.approx(0, abs=1e-5) and np.isnan(diversity(T)) for T in shares.values())


@pytest.mark.parametrize("dataset", ["voc", "context", "coco"])
def test_published_rows_are_all_there_with_their_source(dataset):
    rows, table = pd.read_csv(ROOT / "results/published.csv"), published(dataset)
    rows = rows[(rows["dataset"] == dataset) & rows["metric"].isin(METRICS)]
    assert table[list(METRICS.values())].notna().sum().sum() == len(rows) and table["source"].str.len().gt(5).all()
    assert {*published(dataset, "inductive")["method"]} == {*rows[rows["setting"] == "inductive"]["method"]}


def test_command_line(capsys, tmp_path):
    main(
        [
            "commands",
            "t1",
            "--dataset",
            "voc",
            "--settings",
            "inductive,transductive",
            "--seeds",
            "2",
            "--root",
            "/data",
            "--records",
            str(tmp_path),
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(len(runs_of(line)) == 2 for line in lines)
    main(["missing", "t1", "--dataset", "voc", "--settings", "inductive", "--seeds", "1", "--records", str(tmp_path)])
    assert capsys.readouterr().out.split() == ["voc0-inductive-softmax-seed0", "voc0-inductive-mpsa-seed0"]
    with pytest.raises(SystemExit, match="error: .*'zero'"):
        main(["missing", "t1", "--settings", "zero"])


TITLES = {title: key for key, title in METRICS.items()}
NUMBERS = sorted(
    p for p in (ROOT / "results/tables").glob("*.csv") if "records" in p.read_text().splitlines()[0].split(",")
)


def number(record, path, metric):
    "A number of a record: metrics in percent, plans as they are."
    if "plans" in record:
        return record["plans"][path][metric]
    if metric == "mIoU":
        return 100 * np.mean([v for v in record["metrics"][path]["iou"].values() if v is not None])
    return 100 * record["metrics"][path][TITLES[metric]]


@pytest.mark.parametrize("file", NUMBERS, ids=lambda p: p.stem)
def test_every_number_is_that_of_its_records(file):
    table = pd.read_csv(
        file, dtype={"path": str, "records": str}, keep_default_na=False, na_values={"mean": "", "sd": ""}
    )
    assert len(table) and (table["mean"].isna() == (table["runs"] == 0)).all()
    for row in table[table["runs"] > 0].itertuples():
        each = [number(load_or_make_record(record), row.path, row.metric) for record in row.records.split(";")]
        assert len(each) == row.runs and np.isclose(np.mean(each), row.mean, atol=1e-4)
        assert len(each) == 1 or np.isclose(np.std(each, ddof=1), row.sd, atol=1e-4)


@pytest.mark.parametrize("file", NUMBERS, ids=lambda p: p.stem)
def test_what_people_read_is_what_was_computed(file):
    "Each `mean ± sd` of the Markdown is a row of the CSV."
    several = pd.read_csv(file).query("runs > 1")
    there = {
        f"{mean:.{digits}f} ± {sd:.{digits}f}"
        for mean, sd in several[["mean", "sd"]].itertuples(index=False)
        for digits in (1, 3)
    }
    assert set(re.findall(r"-?[\d.]+ ± [\d.]+", file.with_suffix(".md").read_text())) <= there


def test_every_table_is_looked_at():
    "What is not from records is published, from a log or from a measurement, and tested beside its notebook."
    others = {p.stem for p in (ROOT / "results/tables").glob("*.csv")} - {p.stem for p in NUMBERS}
    assert all(name.endswith("_published") or name.startswith(("t5_efficiency_", "f3_training_")) for name in others)
