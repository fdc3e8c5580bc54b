"""The notebooks of `nbs/tables`: wrong parameters, committed tables, tiny runs, and what is not run.

One tiny training, of both decoders, serves all notebooks. The benchmark has 4 scenes of each kind.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ROOT, TINY, papermill, run_cells
from PIL import Image

import otseg.digits
from otseg.checkpoints import read_tensors, write_tensors
from otseg.comparisons import ONE_PAIR
from otseg.evaluation import TABLE_METRICS
from otseg.explain import window_maps
from otseg.metrics import METRICS
from otseg.models import DEFAULT_CHECKPOINT
from otseg.predict import load
from otseg.recipes import resolve, run_name
from otseg.tables import NOT_RUN, ROWS, path_scores, read_record
from otseg.viz import PromptRow, prompt_rows

RESULTS = ROOT / "results"
TINY_RUNS = TINY | dict(settings="inductive", seeds=1, stride=48, workers=0)


@pytest.fixture(autouse=True, scope="module")
def few_scenes():
    draw = otseg.digits.draw_scenes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(otseg.digits, "draw_scenes", lambda split, size, start=0: draw(split, min(size, 4), start))
        yield


@dataclass
class Table:
    "What a table notebook has written and displayed."

    out: Path
    text: str

    def csv(self, name):
        return pd.read_csv(self.out / f"tables/{name}.csv")


def run_table(name, out, /, **parameters):
    run = run_cells(f"tables/{name}", out=out, **parameters)
    return Table(out, run.text)


# parameters


WRONG = [
    ("t1_zero_shot", {"seed_count": 3}, "unknown parameter seed_count"),
    ("t1_zero_shot", {"dataset": "mars"}, "dataset: mars is not one of digits, voc"),
    ("t1_zero_shot", {"settings": "inductive,zero"}, "settings: zero is not one of inductive"),
    ("t1_zero_shot", {"seeds": 0}, "seeds = 0"),
    ("t1_zero_shot", {"splits": 4}, "splits = 4"),
    ("t1_zero_shot", {"attention": "softmax"}, "attention cannot be changed"),
    ("t1_zero_shot", {"batch_size": "two"}, "batch_size = 'two'"),
    ("t1_zero_shot", {"batch": 2}, "'batch' is now called 'batch_size'"),
    ("t2_cross_dataset", {"target": "voc"}, "unknown parameter target"),
    ("t2_cross_dataset", {"dataset": "voc"}, "dataset: voc is not one of digits, coco, context"),
    ("t2_cross_dataset", {"settings": "zero"}, "settings: zero"),
    ("t2_cross_dataset", {"seeds": "all"}, "seeds = 'all'"),
    ("t2_cross_dataset", {"targets": "voc,mars"}, "targets: mars is not one of plain"),
    ("t2_cross_dataset", {"dataset": "context", "targets": "context"}, "one of voc, coco, ade, folder"),
    ("t2_cross_dataset", {"seed": 3}, "seed cannot be changed"),
    ("t2_cross_dataset", {"checkpoint": "x.pth"}, "official checkpoint"),
    ("t3_components", {"seed": 3}, "seed cannot be changed"),
    ("t3_components", {"rows": "mpsa-two"}, "rows: mpsa-two is not one of softmax-repeated"),
    ("t4_prompts_and_transport", {"factors": "eps,epsilon"}, "factors: epsilon is not one of num_templates"),
    ("t4_prompts_and_transport", {"calibration": 0.2}, "calibration cannot be changed"),
    ("t6_training_free", {"dense": "value"}, "dense cannot be changed"),
    ("t6_training_free", {"reading": "value"}, "unknown parameter reading"),
    ("f1_prompts", {"images": "0,a.png"}, "either numbers of validation images or files"),
    ("f1_prompts", {"attention": "mpsa"}, "attention cannot be changed"),
    ("f2_qualitative", {"setting": "inductive"}, "unknown parameter setting"),
    ("f2_qualitative", {"num_templates": 2}, "num_templates cannot be changed"),
    ("f3_training", {"path": "both"}, "path: both is not one of mps, mpsa, ensemble"),
]


@pytest.mark.parametrize("name, wrong, says", WRONG, ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_a_wrong_parameter_stops_the_notebook(name, wrong, says, tmp_path):
    "Before it trains, evaluates or writes anything."
    with pytest.raises(ValueError, match=says):
        run_cells(f"tables/{name}", out=tmp_path, records=tmp_path, runs=tmp_path, **wrong)
    assert not list(tmp_path.iterdir())


# committed tables


TABLE_NOTEBOOKS = (
    "t1_zero_shot",
    "t2_cross_dataset",
    "t3_components",
    "t4_prompts_and_transport",
    "t6_training_free",
    "f3_training",
)


@pytest.mark.parametrize("name", TABLE_NOTEBOOKS)
def test_committed_records_give_the_committed_tables(name, tmp_path):
    run_table(name, tmp_path, dataset="digits", records=RESULTS / "runs", runs=tmp_path / "runs")
    assert (tmp_path / f"figures/{name}_digits.png").is_file() and not (tmp_path / "runs").exists()
    files = sorted((tmp_path / "tables").iterdir())
    assert f"{name}_digits.csv" in {file.name for file in files}
    for file in files:
        assert file.read_text() == (RESULTS / "tables" / file.name).read_text(), file.name


@pytest.mark.parametrize("name", ["t3_components", "t4_prompts_and_transport", "t6_training_free"])
def test_what_was_not_run_says_so(name, tmp_path):
    records = tmp_path / "records"
    table = run_table(name, tmp_path, dataset="voc", records=records, runs=tmp_path / "runs")
    text, rows = (tmp_path / f"tables/{name}_voc.md").read_text(), len(table.csv(f"{name}_voc")) // len(TABLE_METRICS)
    assert text.count(f"| {' | '.join([NOT_RUN] * len(TABLE_METRICS))} | 0 |") == rows and not records.exists()
    assert f"`otseg tables commands {name[:2]} --dataset voc --settings" in table.text


@pytest.mark.slow
def test_papermill_runs_a_table_from_another_folder(tmp_path):
    "One run in a kernel. A relative `out` belongs to the folder of the user."
    parameters = dict(dataset="voc", factors="lambda", out="mine")
    done, executed = papermill("tables/t4_prompts_and_transport", tmp_path, cwd=tmp_path, **parameters)
    assert done.returncode == 0, done.stderr[-3000:]
    table = pd.read_csv(tmp_path / "mine/tables/t4_prompts_and_transport_voc.csv")
    assert set(table["factor"]) == {"lambda"} and set(table["runs"]) == {0}
    assert "otseg tables commands t4 --dataset voc" in executed.read_text()


@pytest.mark.parametrize("notebook", sorted((ROOT / "nbs/tables").glob("[tf][1-46]*.ipynb")), ids=lambda p: p.stem)
def test_the_default_folder_is_ignored_by_git(notebook):
    "Committed tables, figures and records change only if a user names their folder."
    source = notebook.read_text()
    assert "output_folder(out)" in source
    assert '\\"results\\" / \\"runs\\"' not in source


@pytest.mark.parametrize("dataset", ["voc", "context", "coco"])
def test_published_rows_stand_apart_complete_and_with_their_source(dataset):
    theirs = pd.read_csv(RESULTS / f"tables/t1_zero_shot_{dataset}_published.csv")
    printed = pd.read_csv(RESULTS / "published.csv").query("dataset == @dataset and table in ('table1', 'later')")
    printed = printed.assign(metric=printed["metric"].map(METRICS))
    pd.testing.assert_frame_equal(theirs, printed[[*theirs]].reset_index(drop=True))
    assert not {"value", "source"} & {*pd.read_csv(RESULTS / f"tables/t1_zero_shot_{dataset}.csv")}


def test_committed_plans_of_one_prompt_are_uniform():
    "Independent of the training: with one prompt, or copies of one, the marginals leave a single plan."
    plans = pd.read_csv(RESULTS / "tables/t3_plans_digits.csv").query("metric == 'distance'")
    one = plans[plans["decoder"].str.startswith("Sinkhorn, 1 prompt")]["mean"]
    assert one.max() < 1e-4 < plans[plans["decoder"].str.startswith("MPSA")]["mean"].min()


def test_the_committed_mixture_at_its_ends_is_a_path():
    for seed in range(3):
        run = read_record(f"digits0-inductive-mpsa-seed{seed}", RESULTS / "runs")["metrics"]
        mixed = read_record(f"digits0-inductive-mpsa-seed{seed}@lambda", RESULTS / "runs")["metrics"]
        ends = [run[path]["hiou"] for path in ("mps", "ensemble", "mpsa")]
        # the mixture was evaluated on another machine than the run, with the same weights
        assert np.allclose([mixed[weight]["hiou"] for weight in ("0.0", "0.5", "1.0")], ends, rtol=0, atol=1e-4)


# tiny runs


@dataclass
class Tiny:
    "Tiny runs of both decoders, trained by t1_zero_shot."

    folders: dict  # records and runs, as parameters of a notebook
    table: Table

    def records(self, pattern="*"):
        return {p.stem: json.loads(p.read_text()) for p in sorted(self.folders["records"].glob(f"{pattern}.json"))}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, few_scenes):
    out = tmp_path_factory.mktemp("tiny")
    folders = dict(records=out / "records", runs=out / "runs")
    table = run_table("t1_zero_shot", out, dataset="digits", splits=1, run_missing=True, **folders, **TINY_RUNS)
    return Tiny(folders, table)


def test_zero_shot_trains_what_is_missing(tiny):
    records = {name: record for name, record in tiny.records().items() if "@" not in name}
    assert sorted(record["method"] for record in records.values()) == ["mpsa", "softmax"]
    assert all(record["recipe"]["max_iters"] == TINY["max_iters"] for record in records.values())
    assert {path.parent.name for path in tiny.folders["runs"].rglob("last.safetensors")} == {*records}
    numbers = tiny.table.csv("t1_zero_shot_digits")
    assert len(numbers) == (2 * 3 + 1) * len(TABLE_METRICS) and {*numbers["runs"]} == {1}
    ours = [path_scores(records[row.records], row.path)[row.metric] for row in numbers.itertuples()]
    assert np.allclose(numbers["mean"], ours, atol=1e-3)
    assert ONE_PAIR in tiny.table.text and tiny.table.text.count(NOT_RUN) == 1  # transductive minus inductive


def test_cross_dataset_evaluates_the_checkpoints(tiny, tmp_path):
    options = dict(dataset="digits", targets="plain,digits", images=2, run_missing=True)
    numbers = run_table("t2_cross_dataset", tmp_path, **options, **tiny.folders, **TINY_RUNS)
    numbers = numbers.csv("t2_cross_dataset_digits")
    records = tiny.records("*@folder-*")
    assert sorted(name.split("@")[1] for name in records) == ["folder-digits-2-images", "folder-plain-2-images"]
    for row in numbers.query("metric == 'mIoU'").itertuples():
        iou = pd.Series(records[row.records]["metrics"][row.path]["iou"], dtype=float)
        assert row.mean == pytest.approx(100 * iou.mean(), abs=1e-3)
        assert len(iou) == {"plain": 16, "digits": 10}[row.target]
    assert all(r["images"] == 2 and r["name"] == name and r["run"] == name.split("@")[0] for name, r in records.items())


def test_untrained_scores_continue_after_an_interruption(tmp_path, monkeypatch):
    "Every reading and score is evaluated once, with the same result as without an interruption."
    from otseg import evaluation

    validate, calls, limit = evaluation.validate, [], 5

    def counted(*args, **options):
        if len(calls) == limit:
            raise KeyboardInterrupt
        calls.append(args)
        return validate(*args, **options)

    monkeypatch.setattr(evaluation, "validate", counted)
    monkeypatch.setattr("otseg.tables.missing", lambda *_: [])  # nothing is trained
    options = dict(dataset="digits", splits=2, run_missing=True, runs=tmp_path / "runs") | TINY_RUNS
    with pytest.raises(KeyboardInterrupt):
        run_table("t6_training_free", tmp_path, records=tmp_path / "records", **options)
    assert len(calls) == 5 and not (tmp_path / "records").exists()
    limit = 36
    run_table("t6_training_free", tmp_path, records=tmp_path / "records", **options)
    limit, records = 72, sorted((tmp_path / "records").glob("*@features.json"))
    assert len(calls) == 36 and len(records) == 2 and not list((tmp_path / "runs").iterdir())
    run_table("t6_training_free", tmp_path, records=tmp_path / "again", **options)
    for file in records:
        first, again = (json.loads((folder / file.name).read_text()) for folder in (file.parent, tmp_path / "again"))
        assert first["metrics"] == again["metrics"] and first["identity"] == again["identity"]
        assert len(first["metrics"]) == 36
    unseen = [json.loads(file.read_text())["metrics"]["value, uniform plan"]["miou_unseen"] for file in records]
    assert unseen[0] != unseen[1]  # the splits differ


def test_components_measure_the_plans(tiny, tmp_path):
    table = run_table("t3_components", tmp_path, rows="mpsa-n", images=1, run_missing=True, **tiny.folders, **TINY_RUNS)
    ((name, plans),) = tiny.records("*@plans").items()
    assert plans["name"] == name == f"{plans['run']}@plans" and plans["images"] == 1
    numbers = table.csv("t3_components_digits")
    assert set(numbers["records"]) == {plans["run"]} and set(numbers["path"]) == {"mps", "mpsa", "ensemble"}
    assert set(table.csv("t3_plans_digits")["metric"]) == {"distance", "diversity"}
    assert len([*(tmp_path / "figures").glob("t3_*.png")]) == 3


def test_factors_of_inference_are_evaluated_from_the_checkpoint(tiny, tmp_path):
    options = dict(factors="lambda", run_missing=True)
    table = run_table("t4_prompts_and_transport", tmp_path, **options, **tiny.folders, **TINY_RUNS)
    ((name, mixed),) = tiny.records("*@lambda").items()
    run = tiny.records()[mixed["run"]]
    assert mixed["name"] == name == f"{run['name']}@lambda"
    for path, weight in {"mps": "0.0", "ensemble": "0.5", "mpsa": "1.0"}.items():
        assert mixed["metrics"][weight] == run["metrics"][path]
    numbers = table.csv("t4_prompts_and_transport_digits")
    assert (
        len(numbers) == 5 * len(TABLE_METRICS) and (numbers["value"].astype(str) == numbers["path"].astype(str)).all()
    )
    assert (tmp_path / "figures/t4_prompts_and_transport_digits.png").is_file()


def test_from_softmax_to_transport(tiny, tmp_path):
    "One record has the untrained models of every pair of penalties, of which one is infinite."
    options = dict(factors="rho_pixels", run_missing=True)
    table = run_table("t4_prompts_and_transport", tmp_path, **options, **tiny.folders, **TINY_RUNS)
    ((name, record),) = tiny.records("*@untrained").items()
    grid = pd.DataFrame(record["grid"])
    assert record["name"] == name == f"{record['run']}@untrained"
    assert len(grid) == grid[["eps", "rho_pixels", "rho_prompts"]].drop_duplicates().shape[0] == 5 * 9
    assert {*grid["rho_pixels"]} == {0.0, 0.02, 0.1, 0.5, "inf"} == {*grid["rho_prompts"]}
    assert ((grid["rho_pixels"] == "inf") | (grid["rho_prompts"] == "inf")).all()
    assert (
        "Untrained, MPS, pixel marginal: " in table.text and "Trained, decoder, prompt marginal: not run" in table.text
    )
    assert (tmp_path / "figures/t4_softmax_to_transport_digits.png").is_file()
    recipe = {
        tiny.records()[name]["recipe"]["rho_pixels"] for name in table.csv("t4_prompts_and_transport_digits")["records"]
    }
    assert recipe == {0.0, 0.02, 0.1, 0.5, "inf"}


def check_curves(table, records):
    "Every run has a record, and the last row of its curve agrees with the record."
    assert len(table)
    for run, log in table.groupby("run"):
        record = json.loads((records / f"{run}.json").read_text())
        for column, key in {"setting": "setting", "seed": "seed", "decoder": "method"}.items():
            assert (log[column] == record[key]).all()
        (final,) = log[log["final"]].to_dict("records")
        assert final["iteration"] == record["recipe"]["max_iters"]
        for column in (c for c in table if "." in c):
            path, metric = column.split(".")
            value = record["metrics"][path][metric]
            same = math.isnan(final[column]) if value is None else math.isclose(final[column], value, rel_tol=1e-4)
            assert same, (run, column)


@pytest.mark.parametrize("file", sorted((RESULTS / "tables").glob("f3_training_*.csv")), ids=lambda p: p.stem)
def test_committed_curves_end_where_the_records_do(file):
    check_curves(pd.read_csv(file), RESULTS / "runs")


def test_curves_are_kept_when_the_logs_are_gone(tiny, tmp_path):
    first = run_table("f3_training", tmp_path, **tiny.folders, **TINY_RUNS)
    file = tmp_path / "tables/f3_training_digits.csv"
    check_curves(first.csv("f3_training_digits"), tiny.folders["records"])
    assert first.csv("f3_training_digits")["run"].nunique() == 2
    assert (tmp_path / "figures/f3_training_digits.png").is_file()
    text = file.read_text()
    again = run_table("f3_training", tmp_path, **tiny.folders | {"runs": tmp_path / "gone"}, **TINY_RUNS)
    assert file.read_text() == text and "2 of 2 runs have a log" in again.text


# figures


def test_maps_of_the_last_layer_have_mean_one():
    segmenter = load(device="cpu")
    maps = window_maps(segmenter.model, torch.randn(1, 3, 48, 48), [3, 11], 24)
    assert maps["shares"].shape == maps["plan"].shape and (maps["shares"].mean((-2, -1)) - 1).abs().max() < 0.1


def test_rows_of_prompts_share_scales_and_may_be_short():
    image, maps = torch.rand(3, 8, 8), torch.rand(3, 8, 8)
    rows = [PromptRow(name, "mass", "", image, own, "", maps[0]) for name, own in (("a", 4 * maps), ("b", maps[:1]))]
    axes = prompt_rows(rows, list("xyz")).axes[:10]
    shown = [ax.images[0] for ax in axes if ax.images]
    assert len({image.get_clim() for image in shown if image.get_cmap().name == "cividis"}) == 1
    assert [ax.axison for ax in axes[5:10]] == [True, True, False, False, True]


def pretend(folder, recipe):
    "A checkpoint of another run with the shipped weights: softmax attention has the same projections."
    state, about = read_tensors(DEFAULT_CHECKPOINT)
    file = folder / run_name(recipe) / "last.safetensors"
    file.parent.mkdir(parents=True)
    write_tensors(file, state, about | {"recipe": asdict(recipe), "templates": recipe.text_prompts, "identity": {}})


def test_prompts_with_and_without_mpsa(tiny, tmp_path):
    parameters = {name: value for name, value in TINY_RUNS.items() if name not in ("settings", "seeds")}
    run = run_table("f1_prompts", tmp_path, setting="inductive", images="0", **tiny.folders, **parameters)
    assert NOT_RUN not in run.text and "last layer, MPSA" in run.text and "last layer, softmax" in run.text
    assert Image.open(tmp_path / "figures/f1_prompts_digits.png").width > 300


def test_prompts_train_a_missing_run(tmp_path, monkeypatch):
    recipes = []

    def train_run(recipe, runs, records, **options):
        recipes.append(recipe)
        pretend(Path(runs), recipe)

    monkeypatch.setattr("otseg.tables.train_run", train_run)
    options = dict(setting="inductive", images="0", shown="page", stride=48, run_missing=True)
    run_cells("tables/f1_prompts", out=tmp_path, runs=tmp_path / "runs", records=tmp_path, **options)
    assert [recipe.attention for recipe in recipes] == ["mpsa", "softmax"]


def test_prompts_of_own_photos(tmp_path):
    """The shipped model, two photos of different shapes, and words that are not all of its classes.

    A figure of one model does not replace a figure of two.
    """
    figure = tmp_path / "figures/f1_prompts_digits.png"
    figure.parent.mkdir()
    figure.write_text("a complete figure")
    for name, shape in {"a.png": (60, 64, 3), "b.png": (64, 60, 3)}.items():
        Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / name)
    options = dict(images=f"{tmp_path}/a.png,{tmp_path}/b.png", classes="three,eight|zero,grass", shown="grass,eight")
    run = run_table("f1_prompts", tmp_path, runs=tmp_path, records=tmp_path, **options)
    assert "digits0-transductive-softmax-seed0" in run.text and "not run: `papermill nbs/train.ipynb" in run.text
    titles = [f"{name}, image {photo}" for name in ("grass", "eight (unseen)") for photo in ("a.png", "b.png")]
    assert all(title in run.text for title in titles) and figure.read_text() == "a complete figure"


def test_masks_of_the_variants(tmp_path):
    for changes in (ROWS["t3"][0][1], ROWS["t3"][1][1], {}):
        pretend(tmp_path, resolve("digits", stride=48, **changes))
    figure = tmp_path / "figures/f2_qualitative_digits.png"
    figure.parent.mkdir()
    figure.write_text("an older figure")
    options = dict(settings="inductive", images=1, worst=1, among=2, stride=48, runs=tmp_path, records=tmp_path)
    run = run_table("f2_qualitative", tmp_path, **options)
    columns = ("CLIP", "softmax, one prompt", "softmax, n prompts", "MPSA", "MPSA, ensemble")
    assert NOT_RUN not in run.text and all(f"| inductive | {column} |" in run.text for column in columns)
    assert "the largest error" in run.text and Image.open(figure).width > 300


def test_masks_without_any_run(tmp_path):
    run = run_table("f2_qualitative", tmp_path, dataset="voc", runs=tmp_path, records=tmp_path)
    assert run.text.count("not run: `papermill nbs/train.ipynb") == 6 and not list(tmp_path.rglob("*.png"))
