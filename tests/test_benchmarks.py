"""Training and evaluation on miniatures of every layout with a random small CLIP, through papermill and from Python."""

import json

import pytest
import torch
import trees
from helpers import close, papermill, run_cells

from otseg.benchmarks import BenchmarkSource, load_benchmark
from otseg.cli import main
from otseg.evaluation import evaluate_checkpoint
from otseg.models import load_model, read_checkpoint
from otseg.official import convert, official_name
from otseg.recipes import recipe_dict, resolve
from otseg.training import fit

SMALL = dict(
    clip="digits_clip",
    image_size=48,
    stride=32,
    train_short_side=48,
    train_long_side=96,
    test_short_side=48,
    max_iters=2,
    batch_size=2,
    warmup_iters=1,
    val_interval=1,
    val_images=2,
    visual_prompts=2,
    num_templates=2,
    depth=2,
)
OWN = {
    "ade": {"unseen": "wall, sky"},
    "cityscapes": {"unseen": "bicycle"},
    "camvid": {"unseen": "bicyclist"},
}  # none of their own
NAMES = {"folder": "mine"}  # name of the dataset in records, where it is not its recipe's


def place(forest, dataset):
    return forest / "mine" if dataset == "folder" else forest


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "A random small CLIP in a file."
    from otseg.digits import new_clip, save_clip

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    save_clip(new_clip(), torch.arange(49408), path)
    return path


@pytest.fixture(scope="module")
def runs(forest, weights, tmp_path_factory):
    "One folder for each dataset with an inductive and a transductive run, made when first asked for."
    done = {}

    def run(dataset):
        if dataset not in done:
            out = tmp_path_factory.mktemp(dataset)
            process, executed = papermill(
                "train",
                out,
                dataset=dataset,
                root=place(forest, dataset),
                clip_weights=weights,
                workers=0,
                out=out / "run",
                records=out / "records",
                **SMALL | OWN.get(dataset, {}),
            )
            assert process.returncode == 0, process.stderr[-3000:]
            done[dataset] = out, executed
        return done[dataset]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("dataset", trees.WRITERS)
def test_train(runs, dataset):
    "Two runs with a record each, the table, per-class IoU, curves and masks; no path of the data in the record."
    out, executed = runs(dataset)
    records = [json.loads(path.read_text()) for path in sorted((out / "records").glob("*.json"))]
    assert [(r["dataset"], r["setting"]) for r in records] == [
        (NAMES.get(dataset, dataset), "inductive"),
        (NAMES.get(dataset, dataset), "transductive"),
    ]
    for r in records:
        assert set(r["metrics"]) == {"mps", "mpsa", "ensemble", "dense_clip"} and r["skipped_images"] == 0
        assert {"best.safetensors", "half.safetensors", "last.safetensors", "log.jsonl", "record.json"} <= {
            p.name for p in (out / "run" / r["name"]).iterdir()
        }
        assert "/" not in json.dumps(r)
    assert {p.name for p in (out / "run").glob("*.png")} == {
        f"{kind}_{s}.png" for kind in ("curves", "scenes") for s in ("inductive", "transductive")
    }
    text = executed.read_text()
    assert (f"Nothing is published for {dataset}." in text) == (dataset not in ("voc", "context", "coco"))
    assert "dense_clip" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "source, target", [("voc", None), ("coco", "voc"), ("coco", "context"), ("coco", "ade"), ("context", "folder")]
)
def test_evaluate(runs, forest, weights, source, target):
    "On its own dataset or another, with the target's names and as many classes."
    out, _ = runs(source)
    (checkpoint,) = (out / "run").glob("*-inductive-*/last.safetensors")
    record = out / f"on-{target}.json"
    more = {} if target is None else {"target": target, "test_short_side": 48}
    process, executed = papermill(
        "evaluate",
        out,
        checkpoint=checkpoint,
        clip_weights=weights,
        root=place(forest, target or source),
        record=record,
        workers=0,
        scenes=2,
        **more,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    scores, there = json.loads(record.read_text()), json.loads((checkpoint.parent / "record.json").read_text())
    assert (
        scores["target"] == NAMES.get(target, target or source)
        and scores["images"] == 4
        and "mIoU" in executed.read_text()
    )
    if target is None:
        assert scores["metrics"] == there["metrics"]
    else:
        assert scores["recipe"]["calibration"] == 0 and set(scores["metrics"]["ensemble"]["iou"]) == set(
            classes_of(target, forest)
        )
        assert scores["recipe"]["normalization"] == ("clip" if target == "ade" else "imagenet")


def classes_of(dataset, forest):
    return load_benchmark(BenchmarkSource(dataset, root=place(forest, dataset))).classes


# what is refused


@pytest.mark.slow
def test_a_missing_dataset_stops_the_notebook(tmp_path, weights):
    process, _ = papermill(
        "train",
        tmp_path,
        dataset="coco",
        root=tmp_path / "nowhere",
        clip_weights=weights,
        out=tmp_path / "run",
        records=tmp_path / "records",
        **SMALL,
    )
    assert (
        process.returncode != 0
        and "looked for" in process.stderr
        and "How to get it: COCO-Stuff 164k" in process.stderr
    )
    assert not list(tmp_path.rglob("*.safetensors"))


def test_settings_that_need_unseen_classes(forest, weights, tmp_path):
    with pytest.raises(
        ValueError,
        match="needs unseen and seen classes, but 0 of the 150 classes of ade are unseen: name some",
    ):
        fit(resolve("ade", **SMALL), tmp_path, root=forest, clip_weights=weights, progress=False)
    assert not list(tmp_path.iterdir())


def test_fully_supervised_without_unseen_classes(forest, weights, tmp_path):
    record = fit(
        resolve("ade", "fully_supervised", **SMALL),
        tmp_path,
        root=forest,
        clip_weights=weights,
        workers=0,
        progress=False,
    )
    assert record["metrics"]["ensemble"]["miou_unseen"] is None and record["metrics"]["ensemble"]["pacc"] is not None


def test_transductive_asks_for_its_checkpoint(forest, weights, tmp_path):
    with pytest.raises(FileNotFoundError, match="run the setting 'inductive' first, or give init"):
        fit(
            resolve("voc", "transductive", **SMALL), tmp_path / "run", root=forest, clip_weights=weights, progress=False
        )


def test_wrong_labels_stop_the_run_before_anything_is_lost(weights, tmp_path):
    "Raw ids of COCO-Stuff: an error with the remedy, and no checkpoint that looks trained."
    trees.write_coco(tmp_path, ids=(180, 181))
    with pytest.raises(ValueError, match="ids of the raw release"):
        fit(resolve("coco", **SMALL), tmp_path / "run", root=tmp_path, clip_weights=weights, workers=0, progress=False)
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_missing_weights(forest, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.pt"):
        fit(
            resolve("voc", **SMALL | dict(clip="ViT-B-16-quickgelu")),
            tmp_path,
            root=forest,
            clip_weights=tmp_path / "absent.pt",
            progress=False,
        )


# from the shell, and one by one


@pytest.fixture(scope="module")
def voc(forest, weights, tmp_path_factory):
    "A fully supervised run on the miniature of VOC, from the shell's entry."
    out = tmp_path_factory.mktemp("voc")
    args = [f"--{name}={value}" for name, value in SMALL.items()]
    status = main(
        [
            "train",
            "--dataset=voc",
            "--setting=fully_supervised",
            f"--root={forest}",
            f"--out={out}",
            f"--clip-weights={weights}",
            "--workers=0",
            *args,
        ]
    )
    assert status == 0
    return out, json.loads((out / "record.json").read_text())


def test_from_the_shell(voc, forest, weights, tmp_path):
    out, record = voc
    assert record["recipe"] == recipe_dict(resolve("voc", "fully_supervised", **SMALL))
    status = main(
        [
            "evaluate",
            str(out / "last.safetensors"),
            f"--root={forest}",
            f"--clip-weights={weights}",
            f"--record={tmp_path / 'r.json'}",
        ]
    )
    assert status == 0 and json.loads((tmp_path / "r.json").read_text())["metrics"] == record["metrics"]


@pytest.mark.parametrize(
    "args, says",
    [
        (["--dataset=cocoa"], "no recipe for dataset = 'cocoa'"),
        (["--dataset=voc", "--lr=-1"], "lr = -1.0: input should be greater"),
        (["--dataset=voc", "--root=nowhere"], "looked for nowhere/SegmentationClass"),
    ],
)
def test_errors_of_the_shell(args, says, capsys):
    assert main(["train", *args]) == 2 and says in capsys.readouterr().err


def test_a_checkpoint_needs_no_dataset(voc, weights, monkeypatch):
    monkeypatch.delenv("OTSEG_DATA", raising=False)
    model, recipe, bench = load_model(voc[0] / "last.safetensors", clip_weights=weights)
    assert len(bench.classes) == len(model.text) == 20 and recipe.dataset == "voc"
    assert read_checkpoint(voc[0] / "last.safetensors")[1]["templates"] == ["a photo of a {}.", "a portrait of a {}."]
    with pytest.raises(FileNotFoundError):
        bench.images("val")


def test_some_images(voc, forest, weights):
    record = evaluate_checkpoint(
        voc[0] / "last.safetensors",
        root=forest,
        clip_weights=weights,
        images=2,
        workers=0,
        baseline=False,
        progress=False,
    ).record
    assert record["images"] == 2 and set(record["metrics"]) == {"mps", "mpsa", "ensemble"}
    with pytest.raises(ValueError, match="lr was fixed in training"):
        evaluate_checkpoint(voc[0] / "last.safetensors", root=forest, clip_weights=weights, lr=1.0)


def test_readers_in_processes_change_nothing(forest, weights, voc, tmp_path):
    record = fit(
        resolve("voc", "fully_supervised", **SMALL),
        tmp_path,
        root=forest,
        clip_weights=weights,
        workers=2,
        progress=False,
    )
    ours, theirs = (read_checkpoint(folder / "last.safetensors")[0] for folder in (voc[0], tmp_path))
    assert record["metrics"] == voc[1]["metrics"] and all(torch.equal(ours[name], theirs[name]) for name in ours)


# official checkpoints


@pytest.fixture(scope="module")
def official(voc, weights, tmp_path_factory):
    "The same run's weights as the official code would have written them."
    model, *_ = load_model(voc[0] / "last.safetensors", clip_weights=weights)
    state = {official_name(name, 2): value for name, value in model.state_dict().items() if name != "text"}
    path = tmp_path_factory.mktemp("official") / "latest.pth"
    torch.save(
        {
            "meta": {"CLASSES": model.text.new_zeros(0).tolist(), "iter": 2},
            "state_dict": state | {"decode_head.loss_decode.criterion.empty_weight": torch.ones(21)},
        },
        path,
    )
    return path


@pytest.mark.parametrize("converted", [False, True])
def test_an_official_checkpoint_scores_the_same(voc, official, forest, weights, tmp_path, converted):
    path = official
    if converted:
        path = tmp_path / "otseg.safetensors"
        convert(official, path)
    changes = {name: SMALL[name] for name in ("stride", "test_short_side")}
    found = evaluate_checkpoint(
        path,
        root=forest,
        clip_weights=weights,
        trained="voc",
        setting="fully_supervised",
        clip="digits_clip",
        workers=0,
        progress=False,
        **changes,
    )
    assert found.recipe.num_templates == 6 and found.recipe.image_size == 512  # the recipe's, not the miniature's
    assert found.record["source"] == "official" and len(found.record["metrics"]["ensemble"]["iou"]) == 20
    ours, image = (
        load_model(voc[0] / "last.safetensors", clip_weights=weights)[0],
        torch.randn(1, 3, 48, 64, generator=torch.Generator().manual_seed(0)),
    )
    with torch.no_grad():
        for theirs, mine in zip(found.model(image), ours(image, found.model.text)):
            close(theirs, mine, 1e-6)


@pytest.mark.slow
def test_evaluate_an_official_checkpoint(official, forest, weights, tmp_path):
    process, _ = papermill(
        "evaluate",
        tmp_path,
        checkpoint=official,
        trained="voc",
        setting="fully_supervised",
        clip="digits_clip",
        target="folder",
        root=forest / "mine",
        clip_weights=weights,
        record=tmp_path / "r.json",
        test_short_side=48,
        workers=0,
        scenes=1,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert json.loads((tmp_path / "r.json").read_text())["target"] == "mine"


def test_an_official_checkpoint_of_another_dataset(official, forest, weights):
    with pytest.raises(ValueError, match="trained with 20 classes, but context has 59, 49 of them seen"):
        evaluate_checkpoint(
            official, root=forest, clip_weights=weights, trained="context", clip="digits_clip", progress=False
        )
    with pytest.raises(ValueError, match="not a checkpoint of otseg.*official checkpoints"):
        evaluate_checkpoint(official, root=forest, clip_weights=weights, progress=False)


# the real size


@pytest.mark.slow
def test_vit_b16_in_openai_format(tmp_path, openai_vit_b_16):
    "Load, one training step at 512 x 512, and sliding windows over a larger photo."
    trees.write_folder(tmp_path / "mine", size=(300, 420), n=1)
    recipe = resolve("folder", max_iters=1, batch_size=1, num_templates=1, warmup_iters=1, val_images=1)
    record = fit(
        recipe,
        tmp_path / "run",
        root=tmp_path / "mine",
        clip_weights=openai_vit_b_16,
        workers=0,
        progress=False,
    )
    assert record["metrics"]["ensemble"]["pacc"] is not None
    state, about = read_checkpoint(tmp_path / "run/last.safetensors")
    assert state["encoder.deep_prompt_embeddings"].shape == (11, 10, 768) and all(
        v.isfinite().all() for v in state.values()
    )


@pytest.mark.slow
def test_figures_of_a_described_folder(runs, forest, weights, tmp_path):
    "They find its runs, whose names contain that of the dataset, and train or name those that are missing."
    out, _ = runs("folder")
    data = dict(dataset="folder", root=place(forest, "folder"), clip_weights=weights)
    options = data | dict(runs=out / "run", records=out / "records", out=tmp_path, workers=0) | SMALL
    prompts = run_cells("tables/f1_prompts", setting="inductive", images="0", **options).text
    assert "MPSA: mine0-inductive-mpsa-seed0-" in prompts and f"-p root {data['root']}" in prompts
    assert "not run: `papermill nbs/train.ipynb runs/mine0-inductive-softmax-seed0-" in prompts
    curves = run_cells("tables/f3_training", settings="inductive,transductive", seeds=1, **options).text
    assert "2 of 4 runs have a log." in curves
    del options["num_templates"]  # which differs between the columns
    masks = run_cells("tables/f2_qualitative", settings="inductive", images=1, run_missing=True, **options).text
    assert "| inductive | MPSA, ensemble |" in masks and "not run" not in masks
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {
        "f1_prompts_folder",
        "f2_qualitative_folder",
        "f3_training_folder",
    }


@pytest.mark.slow
def test_transfer_to_a_described_folder(runs, forest, weights, tmp_path):
    out, _ = runs("context")
    parameters = dict(dataset="context", settings="inductive", seeds=1, targets="folder", run_missing=True, workers=0)
    parameters |= dict(folder=forest / "CamVid", description="camvid", root=forest, clip_weights=weights, out=tmp_path)
    run_cells("tables/t2_cross_dataset", runs=out / "run", records=out / "records", **parameters, **SMALL)
    (record,) = (json.loads(path.read_text()) for path in (out / "records").glob("*@folder-CamVid.json"))
    assert record["target"] == "camvid" and len(record["metrics"]["ensemble"]["iou"]) == 11
