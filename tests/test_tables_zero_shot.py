"""The notebooks of the zero-shot and the cross-dataset table: what they refuse, what they read, what they run."""

import json

import numpy as np
import pandas as pd
import pytest
from test_notebooks import ROOT, TINY, papermill

from otseg.metrics import METRICS

NAMES = ("t1_zero_shot", "t2_cross_dataset")
WRONG = [
    ("t1_zero_shot", {"seed_count": 3}, "unknown parameter seed_count"),
    ("t1_zero_shot", {"dataset": "ade"}, "dataset = 'ade' is not one of digits, voc"),
    ("t1_zero_shot", {"settings": "inductive,zero"}, "setting = 'zero'"),
    ("t1_zero_shot", {"seeds": 0}, "seeds = 0"),
    ("t1_zero_shot", {"splits": 4}, "splits = 4"),
    ("t1_zero_shot", {"attention": "softmax"}, "attention cannot be changed"),
    ("t1_zero_shot", {"batch": "two"}, "batch = 'two'"),
    ("t2_cross_dataset", {"target": "voc"}, "unknown parameter target"),
    ("t2_cross_dataset", {"dataset": "voc"}, "dataset = 'voc' is not one of digits, coco, context"),
    ("t2_cross_dataset", {"settings": "zero"}, "setting = 'zero'"),
    ("t2_cross_dataset", {"seeds": "all"}, "seeds = 'all'"),
    ("t2_cross_dataset", {"targets": "voc,mars"}, "mars"),
    ("t2_cross_dataset", {"dataset": "context", "targets": "context"}, "voc, coco, ade, folder for context"),
    ("t2_cross_dataset", {"seed": 3}, "seed cannot be changed"),
    ("t2_cross_dataset", {"checkpoint": "x.pth"}, "official checkpoint"),
]


def table(name, folder, /, **parameters):
    """Run the notebook with everything that it writes in a folder; its tables by name."""
    (folder / "tables").mkdir(exist_ok=True)
    done, executed = papermill(f"tables/{name}", folder, out=folder, **parameters)
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.stem: pd.read_csv(path) for path in (folder / "tables").glob("*.csv")}, executed.read_text()


@pytest.mark.parametrize("name, wrong, says", WRONG, ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_wrong_parameters_stop_the_notebook(name, wrong, says, tmp_path):
    """Before anything is trained, evaluated or written: only the cells up to the next picture or loop are needed."""
    cells = json.loads((ROOT / f"nbs/tables/{name}.ipynb").read_text())["cells"]
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    space = {}
    exec(sources[0], space)
    exec(sources[1], space)
    space.update(wrong, out=tmp_path, records=tmp_path)
    with pytest.raises(ValueError, match=says):
        for source in sources[2:4]:
            exec(source, space)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_defaults_read_records_and_give_the_committed_tables(name, tmp_path):
    tables, _ = table(name, tmp_path, dataset="digits", runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists() and f"{name}_digits" in tables
    for stem, numbers in tables.items():
        pd.testing.assert_frame_equal(
            numbers, pd.read_csv(ROOT / f"results/tables/{stem}.csv"), check_exact=False, atol=1e-3
        )
    assert (tmp_path / f"figures/{name}_digits.png").is_file()


@pytest.mark.slow
def test_zero_shot_trains_what_is_missing(tmp_path):
    """Both decoders, tiny: a record and a checkpoint each, and a table whose numbers are those of the records."""
    where = dict(records=tmp_path / "records", runs=tmp_path / "runs")
    tables, shown = table(
        "t1_zero_shot",
        tmp_path,
        dataset="digits",
        settings="inductive",
        seeds=1,
        splits=1,
        stride=48,
        run_missing=True,
        **TINY,
        **where,
    )
    records = {path.stem: json.loads(path.read_text()) for path in where["records"].iterdir()}
    assert sorted(r["method"] for r in records.values()) == ["mpsa", "softmax"]
    assert {path.parent.name for path in where["runs"].rglob("last.safetensors")} == {*records}
    numbers = tables["t1_zero_shot_digits"]
    assert len(numbers) == (2 * 3 + 1) * len(METRICS) and {*numbers["runs"]} == {1}
    keys = {title: key for key, title in METRICS.items()}
    ours = [100 * records[row.records]["metrics"][row.path][keys[row.metric]] for row in numbers.itertuples()]
    assert np.allclose(numbers["mean"], ours, atol=1e-3)
    assert "not run" in shown  # pairs of one seed


@pytest.mark.slow
def test_cross_dataset_trains_evaluates_and_keeps(tmp_path):
    where = dict(records=tmp_path / "records", runs=tmp_path / "runs")
    tables, _ = table(
        "t2_cross_dataset",
        tmp_path,
        dataset="digits",
        settings="inductive",
        seeds=1,
        targets="plain,digits",
        images=2,
        stride=48,
        run_missing=True,
        **TINY,
        **where,
    )
    records = {path.stem: json.loads(path.read_text()) for path in where["records"].glob("*@*")}
    assert sorted(name.split("@")[1] for name in records) == ["folder-digits-2-images", "folder-plain-2-images"]
    numbers = tables["t2_cross_dataset_digits"]
    for row in numbers.query("metric == 'mIoU'").itertuples():
        iou = pd.Series(records[row.records]["metrics"][row.path]["iou"], dtype=float)
        assert (
            row.mean == pytest.approx(100 * iou.mean(), abs=1e-3)
            and len(iou) == {"plain": 16, "digits": 10}[row.target]
        )
    assert all(r["images"] == 2 and r["name"] == name and r["run"] == name.split("@")[0] for name, r in records.items())


@pytest.mark.parametrize("dataset", ["voc", "context", "coco"])
def test_published_rows_stand_apart_complete_and_with_their_source(dataset):
    theirs = pd.read_csv(ROOT / f"results/tables/t1_zero_shot_{dataset}_published.csv")
    printed = pd.read_csv(ROOT / "results/published.csv").query("dataset == @dataset and table in ('table1', 'later')")
    pd.testing.assert_frame_equal(
        theirs, printed.assign(metric=printed["metric"].map(METRICS))[[*theirs]].reset_index(drop=True)
    )
    assert not {"value", "source"} & {*pd.read_csv(ROOT / f"results/tables/t1_zero_shot_{dataset}.csv")}
