"""The entry notebooks, in settings so small that only the plumbing is tested.

They run in this process. One test starts papermill, as users do.
"""

import json

import pytest
from helpers import ROOT, TINY, papermill, run_cells

from otseg.digits import digits_clip


@pytest.fixture(scope="module")
def trained(few_scenes, tmp_path_factory):
    "Folder of an inductive and a transductive training, and what the notebook displayed."
    out = tmp_path_factory.mktemp("train")
    return out, run_cells("train", out=out / "run", records=out / "records", workers=0, **TINY)


def test_train_writes_records_table_and_pictures(trained):
    out, notebook = trained
    records = [json.loads(path.read_text()) for path in sorted((out / "records").glob("*.json"))]
    assert [record["setting"] for record in records] == ["inductive", "transductive"]
    for record in records:
        assert set(record["metrics"]) == {"mps", "mpsa", "ensemble", "dense_clip"}
        assert record["recipe"]["max_iters"] == TINY["max_iters"]
        written = {path.name for path in (out / "run" / record["name"]).iterdir()}
        assert {"half.safetensors", "last.safetensors", "log.jsonl", "record.json"} <= written
    table = (out / "run/table.md").read_text()
    assert "| dense_clip |" in table and table in notebook.text
    pictures = {f"{kind}_{record['setting']}.png" for kind in ("curves", "scenes") for record in records}
    assert {path.name for path in (out / "run").glob("*.png")} == pictures


def test_evaluate_measures_what_training_recorded(trained):
    checkpoint = next((trained[0] / "run").glob("*-transductive-*/last.safetensors"))
    written = trained[0] / "evaluation.json"
    notebook = run_cells("evaluate", checkpoint=checkpoint, scenes=2, record=written)
    record = json.loads((checkpoint.parent / "record.json").read_text())
    assert json.loads(written.read_text())["metrics"] == record["metrics"]
    assert f"| ensemble | {100 * record['metrics']['ensemble']['pacc']:.1f} |" in notebook.text


def test_evaluate_takes_a_part_of_the_images(trained):
    checkpoint = next((trained[0] / "run").glob("*-inductive-*/last.safetensors"))
    notebook = run_cells("evaluate", checkpoint=checkpoint, images=2, scenes=1)
    assert "evaluated on 2 images of digits" in notebook.text


def test_runs_write_below_runs_by_default(few_scenes, tmp_path, monkeypatch):
    "A run of a user must not change a committed file."
    monkeypatch.setattr("otseg.checkpoints.project_root", lambda: tmp_path)
    monkeypatch.setattr("otseg.tables.project_root", lambda: tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results/published.csv").write_bytes((ROOT / "results/published.csv").read_bytes())
    run_cells("train", setting="inductive", workers=0, **TINY)
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["published.csv"]
    assert list((tmp_path / "runs/records").glob("digits0-inductive-*.json")) and (tmp_path / "runs/digits").is_dir()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"max_iter": 4}, "unknown parameter max_iter"),
        ({"batch": 4}, "'batch' is now called 'batch_size'"),
        ({"setting": "inductiv"}, "inductive, transductive, fully_supervised, all"),
        ({"dataset": "digit"}, "digits / inductive"),
        ({"split": 7}, "0 to 2"),
        ({"seed": "x"}, "seed = 'x'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_train_rejects_a_wrong_parameter(tmp_path, wrong, message):
    "Papermill only warns. The notebook must stop before any training, and name what is allowed."
    with pytest.raises(ValueError, match=message):
        run_cells("train", out=tmp_path / "run", records=tmp_path / "records", **wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_papermill_passes_parameters_and_errors(tmp_path):
    done, executed = papermill("train", tmp_path, out=tmp_path / "run", records=tmp_path / "records", max_iter=4)
    assert done.returncode != 0 and "unknown parameter max_iter" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [executed.name]


def test_pretraining_writes_a_clip_that_loads(tmp_path):
    path = tmp_path / "clip.safetensors"
    run_cells("pretrain_digits", steps=3, batch=8, scenes=20, validation=8, out=path)
    assert digits_clip(path).context_length == 16
