"""`otseg.tables`: runs of a table, records, means over seeds, and the records behind every committed number."""

import json
import re
import shlex

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT

from otseg.cli import main
from otseg.metrics import METRICS
from otseg.models import inductive_recipe
from otseg.recipes import RECIPES, resolve, run_name
from otseg.tables import (
    NOT_RUN,
    ROWS,
    commands,
    mean_and_sd,
    missing,
    missing_note,
    output_folder,
    published_table,
    read_record,
    record_folders,
    run_scores,
    runs_for_table,
    split_names,
    to_wide,
    train_run,
    write_record,
)

RECORDS = ROOT / "results/runs"
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
def test_rows_of_a_table_are_different_runs(table, dataset):
    runs = runs_for_table(table, dataset, seeds=range(2))
    factors = runs["factor"].nunique() if "factor" in runs else 1
    default = runs["run"].value_counts()
    assert default.max() <= factors and {"setting", "split", "seed", "run", "recipe"} <= {*runs}
    assert all(run_name(recipe) == run for run, recipe in zip(runs["run"], runs["recipe"]))


@pytest.mark.parametrize(
    "given, says",
    [
        (dict(table="t9"), "table = 't9' is not one of t1, t3, t4, t6"),
        (dict(settings=("zero",)), "setting = 'zero'"),
        (dict(dataset="mapillary"), "dataset = 'mapillary'"),
        (dict(max_iter=3), "no field 'max_iter'"),
        (dict(max_iters=0), "max_iters = 0"),
        (dict(attention="mpsa"), "attention cannot be changed: table t1 varies attention, seed, split"),
        (dict(table="t4", eps=0.1), "eps cannot be changed"),
    ],
)
def test_wrong_arguments(given, says):
    with pytest.raises(ValueError, match=says):
        runs_for_table(**dict(table="t1", dataset="digits") | given)


def runs_of(command):
    "Names of the runs that a papermill command trains, as train.ipynb reads its parameters."
    words = shlex.split(command)
    given = dict(zip(words[4::3], words[5::3]))
    assert words[:2] == ["papermill", "nbs/train.ipynb"] and set(words[3::3]) == {"-p"}
    setting, dataset = given.pop("setting"), given.pop("dataset")
    default = resolve(dataset)
    changes = {
        name: type(getattr(default, name))(value) for name, value in given.items() if name not in ("root", "records")
    }
    return [
        run_name(resolve(dataset, s, **changes))
        for s in (("inductive", "transductive") if setting == "all" else (setting,))
    ]


@pytest.mark.parametrize("table", ROWS)
def test_commands_train_what_is_missing_and_are_independent(table, tmp_path):
    runs = runs_for_table(table, "coco", seeds=range(2), max_iters=1000)
    write(tmp_path, record(runs["run"][0]))
    lines = commands(runs, tmp_path, root="/data with a space")
    made = [name for line in lines for name in runs_of(line)]
    assert len(made) == len(set(made)) and set(made) >= {run_name(r) for r in missing(runs, tmp_path)} == set(
        runs["run"]
    ) - {runs["run"][0]}
    assert all("'/data with a space'" in line for line in lines)


def test_the_command_of_a_transductive_run_trains_its_start_too(tmp_path):
    (line,) = commands(runs_for_table("t1", "voc", ("transductive",), (3,)).tail(1), tmp_path)
    assert runs_of(line) == ["voc0-inductive-mpsa-seed3", "voc0-transductive-mpsa-seed3"]


def test_train_run_trains_the_start_if_its_checkpoint_is_missing(tmp_path, monkeypatch):
    done, records = [], tmp_path / "records"

    def fit(recipe, out, **options):
        done.append(recipe.setting)
        return record(run_name(recipe))

    monkeypatch.setattr("otseg.tables.fit", fit)
    recipe = resolve("digits", "transductive", eps=0.1)
    start = run_name(inductive_recipe(recipe))
    assert train_run(recipe, tmp_path, records) == read_record(run_name(recipe), records)
    assert done == ["inductive", "transductive"] and read_record(start, records)
    half = tmp_path / start / "half.safetensors"
    half.parent.mkdir()
    half.touch()
    train_run(recipe, tmp_path, records)
    assert done == ["inductive", "transductive", "transductive"]


def test_an_existing_record_is_not_replaced(tmp_path):
    assert read_record("a", tmp_path) is None
    first = {"name": "a", "value": 1}
    assert write_record(first, tmp_path) == write_record(first | {"value": 2}, tmp_path) == first
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_new_records_go_to_the_ignored_folder(tmp_path, monkeypatch):
    "Committed records are read first and never written, unless their folder is named."
    monkeypatch.setattr("otseg.tables.project_root", lambda: tmp_path)
    committed, own = record_folders()
    assert (committed, own) == (tmp_path / "results/runs", tmp_path / "runs/records")
    write_record({"name": "a", "value": 1}, committed)
    assert write_record({"name": "a", "value": 2})["value"] == 1 and not own.exists()
    assert write_record({"name": "b", "value": 2})["value"] == 2
    assert [p.name for p in own.iterdir()] == ["b.json"] and len([*committed.iterdir()]) == 1
    assert read_record("a", own) is None and read_record("b", committed) is None
    assert output_folder() == tmp_path / "runs" and output_folder("results").name == "results"


def test_the_note_names_the_command_for_missing_runs(tmp_path):
    runs = runs_for_table("t1", "voc", ("inductive",), range(2))
    write(tmp_path, record(runs["run"][0]))
    command = f"--seeds 2 --splits 1 --records {tmp_path} --max-iters 9`"
    note = missing_note(runs, "t1", tmp_path, root=None, max_iters=9)
    assert "`otseg tables commands t1 --dataset voc --settings inductive " in note
    assert note.startswith("1 of 4 runs have a record. Not run: 3;") and command in note
    write(tmp_path, *map(record, runs["run"]))
    assert missing_note(runs, "t1", tmp_path) == "4 of 4 runs have a record."


def test_names_are_split_and_checked():
    assert split_names("rows", "a, b", "abc") == ["a", "b"]
    with pytest.raises(ValueError, match="rows: d is not one of a, b, c"):
        split_names("rows", "a,d", "abc")


def test_mean_deviation_and_what_was_not_run(tmp_path):
    runs = runs_for_table("t1", "digits", ("inductive",), range(3))
    names = runs.query("decoder == 'mpsa'")["run"]
    write(tmp_path, record(names.iloc[0], 0.5, None), record(names.iloc[1], 0.7, None))
    long = mean_and_sd(run_scores(runs, ("ensemble",), tmp_path), ["decoder", "path"])
    row = long.query("decoder == 'mpsa' and metric == 'hIoU'").iloc[0]
    assert (
        np.isclose(row["mean"], 60)
        and np.isclose(row["sd"], 200**0.5)
        and row["runs"] == 2
        and row["records"] == ";".join(names[:2])
    )
    table = to_wide(long)
    assert table.loc[("mpsa", "ensemble")].tolist() == ["90.0 ± 0.0", "60.0 ± 0.0", "–", "60.0 ± 14.1", "50.0 ± 0.0", 2]
    assert table.loc[("softmax", "ensemble")].tolist() == [NOT_RUN] * 5 + [0]


@pytest.mark.parametrize("dataset", ["voc", "context", "coco"])
def test_published_rows_are_all_there_with_their_source(dataset):
    rows, table = pd.read_csv(ROOT / "results/published.csv"), published_table(dataset)
    rows = rows[(rows["dataset"] == dataset) & rows["metric"].isin(METRICS)]
    assert table[list(METRICS.values())].notna().sum().sum() == len(rows) and table["source"].str.len().gt(5).all()
    inductive = rows[rows["setting"] == "inductive"]
    assert {*published_table(dataset, "inductive")["method"]} == {*inductive["method"]}


def test_published_numbers_keep_sources_and_notes():
    columns = ["table", "method", "dataset", "setting", "metric", "value", "source", "note"]
    rows = [
        ("t", "A", "voc", "inductive", "hiou", 80.5, "paper", ""),
        ("t", "A", "voc", "inductive", "pacc", 90.0, "readme", "rounded"),
        ("t", "A", "coco", "inductive", "hiou", 40.0, "paper", ""),
        ("e", "A", "voc", "inductive", "fps", 9.0, "readme", ""),
    ]
    numbers = pd.DataFrame(rows, columns=columns)
    (row,) = published_table("voc", numbers=numbers).to_dict("records")
    assert row["hIoU"] == 80.5 and np.isnan(row["S"]) and len(published_table(numbers=numbers)) == 2
    assert row["source"] == "paper; readme" and row["note"] == "pAcc: rounded"
    assert published_table("digits", numbers=numbers).empty and published_table("digits").empty


def otseg(capsys, *args):
    "Exit status and output of the command line."
    try:
        status = main([str(arg) for arg in args])
    except SystemExit as e:
        status = e.code
    return status or 0, capsys.readouterr()


def test_command_line(capsys, tmp_path):
    options = ("--dataset", "voc", "--settings", "inductive,transductive", "--seeds", 2, "--records", tmp_path)
    status, printed = otseg(capsys, "tables", "commands", "t1", *options, "--root", "/data")
    lines = printed.out.splitlines()
    assert status == 0 and len(lines) == 4 and all(len(runs_of(line)) == 2 for line in lines)
    options = ("--dataset", "voc", "--settings", "inductive", "--seeds", 1, "--records", tmp_path)
    status, printed = otseg(capsys, "tables", "missing", "t1", *options)
    assert status == 0 and printed.out.split() == ["voc0-inductive-softmax-seed0", "voc0-inductive-mpsa-seed0"]
    status, printed = otseg(capsys, "tables", "missing", "t1", "--settings", "zero")
    assert status == 2 and "'zero'" in printed.err


TITLES = {title: key for key, title in METRICS.items()}
NUMBERS = sorted(
    p for p in (ROOT / "results/tables").glob("*.csv") if "records" in p.read_text().splitlines()[0].split(",")
)


def number(record, path, metric):
    "A number of a record: metrics in percent, plans as they are."
    if "ausuc" in record:
        return record["ausuc"][path]
    if "plans" in record:
        return record["plans"][path][metric]
    if metric == "mIoU":
        return 100 * np.mean([v for v in record["metrics"][path]["iou"].values() if v is not None])
    return 100 * record["metrics"][path][TITLES[metric]]


@pytest.mark.parametrize("file", NUMBERS, ids=lambda p: p.stem)
def test_every_number_is_the_mean_of_its_records(file):
    table = pd.read_csv(
        file, dtype={"path": str, "records": str}, keep_default_na=False, na_values={"mean": "", "sd": ""}
    )
    assert len(table) and (table["mean"].isna() == (table["runs"] == 0)).all()
    for row in table[table["runs"] > 0].itertuples():
        each = [number(read_record(record, RECORDS), row.path, row.metric) for record in row.records.split(";")]
        assert len(each) == row.runs and np.isclose(np.mean(each), row.mean, atol=1e-4)
        assert len(each) == 1 or np.isclose(np.std(each, ddof=1), row.sd, atol=1e-4)


@pytest.mark.parametrize("file", NUMBERS, ids=lambda p: p.stem)
def test_the_markdown_has_the_numbers_of_the_csv(file):
    "Each `mean ± sd` of the Markdown is a row of the CSV."
    several = pd.read_csv(file).query("runs > 1")
    there = {
        f"{mean:.{digits}f} ± {sd:.{digits}f}"
        for mean, sd in several[["mean", "sd"]].itertuples(index=False)
        for digits in (1, 3)
    }
    assert set(re.findall(r"-?[\d.]+ ± [\d.]+", file.with_suffix(".md").read_text())) <= there


def test_every_other_table_is_tested_elsewhere():
    "Tables without records are published numbers, logs or measurements; the tests of their notebooks check them."
    others = {p.stem for p in (ROOT / "results/tables").glob("*.csv")} - {p.stem for p in NUMBERS}
    assert all(name.endswith("_published") or name.startswith(("t5_efficiency_", "f3_training_")) for name in others)
