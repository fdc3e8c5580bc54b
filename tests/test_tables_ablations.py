"""The ablation notebooks: through papermill in tiny settings, and what they wrote against the records."""

import json
from pathlib import Path

import pandas as pd
import pytest
from test_notebooks import papermill

from otseg.tables import NOT_RUN, load_or_make_record

ROOT = Path(__file__).parents[1]
TINY = {"max_iters": 2, "batch": 2, "warmup": 1, "val_interval": 1, "val_images": 1, "seeds": 1}


def run_table(name, folder, /, **parameters):
    """Run nbs/tables/NAME.ipynb from that folder; the finished process."""
    given = {"out": folder / "out", "records": folder / "records", "runs": folder / "runs"} | parameters
    return papermill(f"tables/{name}", folder, cwd=folder, **given)[0]


@pytest.fixture(scope="module")
def components(tmp_path_factory):
    """A run of the full method, trained and measured by t3_components."""
    folder = tmp_path_factory.mktemp("components")
    done = run_table("t3_components", folder, settings="inductive", rows="mpsa-n", images=1, run_missing=True, **TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_components_train_and_measure_what_is_missing(components):
    run, plans = sorted(
        (json.loads(p.read_text()) for p in (components / "records").glob("*")), key=lambda r: len(r["name"])
    )[:2]
    assert run["recipe"]["max_iters"] == 2 and plans["name"] == f"{run['name']}@plans" and plans["images"] == 1
    table = pd.read_csv(components / "out/tables/t3_components_digits.csv")
    assert set(table["records"]) == {run["name"]} and set(table["path"]) == {"mps", "mpsa", "ensemble"}
    assert set(pd.read_csv(components / "out/tables/t3_plans_digits.csv")["metric"]) == {"distance", "diversity"}
    assert len([*(components / "out/figures").glob("t3_*.png")]) == 2


@pytest.mark.slow
def test_factors_of_inference_are_evaluated_from_the_checkpoint(components):
    done = run_table("t4_prompts_and_transport", components, factors="lambda", run_missing=True, **TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    records = {path.stem: json.loads(path.read_text()) for path in (components / "records").glob("*.json")}
    (run,) = (record for name, record in records.items() if "@" not in name)
    mixed = records[f"{run['name']}@lambda"]
    assert mixed["name"] == f"{run['name']}@lambda" and mixed["run"] == run["name"]
    for path, weight in {"mps": "0.0", "ensemble": "0.5", "mpsa": "1.0"}.items():
        assert mixed["metrics"][weight] == run["metrics"][path]
    table = pd.read_csv(components / "out/tables/t4_prompts_and_transport_digits.csv")
    assert (
        len(table) == 5 * 4
        and (table["value"] == table["path"]).all()
        and (components / "out/figures/t4_prompts_and_transport_digits.png").is_file()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name, rows", [("t3_components", 2 * 6 * 3), ("t4_prompts_and_transport", 31)])
def test_what_was_not_run_says_so(tmp_path, name, rows):
    done = run_table(name, tmp_path, dataset="voc")
    assert done.returncode == 0, done.stderr[-3000:]
    text = (tmp_path / f"out/tables/{name}_voc.md").read_text()
    assert text.count(f"| {' | '.join([NOT_RUN] * 4)} | 0 |") == rows and not (tmp_path / "records").exists()
    assert "python -m otseg.tables commands" in (tmp_path / f"tables/{name}.out.ipynb").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, wrong, says",
    [
        ("t3_components", {"seed": 3}, "seed is what this notebook varies"),
        ("t4_prompts_and_transport", {"factors": "templates,epsilon"}, "factors = epsilon: there is templates"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_a_wrong_parameter_stops_the_notebook(tmp_path, name, wrong, says):
    done = run_table(name, tmp_path, **wrong)
    assert done.returncode != 0 and says in done.stderr and not (tmp_path / "out").exists()


def test_one_prompt_has_one_plan():
    """Whatever was learnt: the distance from uniform of plans with one prompt, or with copies of one, is nought."""
    plans = pd.read_csv(ROOT / "results/tables/t3_plans_digits.csv").query("metric == 'distance'")
    assert (
        plans[plans["decoder"].str.startswith("Sinkhorn, 1 prompt")]["mean"].max()
        < 1e-4
        < plans[plans["decoder"].str.startswith("MPSA")]["mean"].min()
    )


def test_the_mixture_at_the_ends_is_a_path():
    for seed in range(3):
        run = load_or_make_record(f"digits0-inductive-mpsa-seed{seed}")["metrics"]
        mixed = load_or_make_record(f"digits0-inductive-mpsa-seed{seed}@lambda")["metrics"]
        assert [mixed[w]["hiou"] for w in ("0.0", "0.5", "1.0")] == [
            run[path]["hiou"] for path in ("mps", "ensemble", "mpsa")
        ]
