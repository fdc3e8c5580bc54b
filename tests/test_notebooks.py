"""The entry notebooks through papermill, in settings so small that only the plumbing is tested."""

import json

import pytest
from helpers import TINY, papermill


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Inductive and transductive training from a folder that is not the repository's."""
    out = tmp_path_factory.mktemp("train")
    done, executed = papermill("train", out, cwd=out, out=out / "run", records=out / "records", **TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.slow
def test_train_leaves_records_tables_and_pictures(trained):
    records = [json.loads(p.read_text()) for p in sorted((trained / "records").glob("*.json"))]
    assert [r["setting"] for r in records] == ["inductive", "transductive"]
    for r in records:
        assert set(r["metrics"]) == {"mps", "mpsa", "ensemble", "dense_clip"} and r["recipe"]["max_iters"] == 4
        assert {"half.safetensors", "last.safetensors", "log.jsonl", "record.json"} <= {
            p.name for p in (trained / "run" / r["name"]).iterdir()
        }
    assert "dense_clip" in (trained / "run/table.md").read_text()
    assert {p.name for p in (trained / "run").glob("*.png")} == {
        f"{kind}_{r['setting']}.png" for kind in ("curves", "scenes") for r in records
    }


@pytest.mark.slow
def test_evaluate_reads_what_training_wrote(trained):
    checkpoint = next((trained / "run").glob("*-transductive-*/last.safetensors"))
    done, executed = papermill("evaluate", trained, checkpoint=checkpoint, scenes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((checkpoint.parent / "record.json").read_text())
    assert f"| ensemble | {100 * record['metrics']['ensemble']['pacc']:.1f} |" in executed.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"max_iter": 4}, "unknown parameter max_iter"),
        ({"setting": "inductiv"}, "inductive, transductive, fully_supervised, all"),
        ({"dataset": "digit"}, "digits / inductive"),
        ({"split": 7}, "0 to 2"),
        ({"seed": "x"}, "seed = 'x' is a str"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_train_refuses_a_wrong_parameter(tmp_path, wrong, says):
    """Papermill itself only warns: the notebook must stop, before any training, and name what is allowed."""
    done, _ = papermill("train", tmp_path, out=tmp_path / "run", records=tmp_path / "records", **wrong)
    assert done.returncode != 0 and says in done.stderr
    assert not list((tmp_path).rglob("*.safetensors"))


@pytest.mark.slow
def test_pretraining_writes_a_clip_that_loads(tmp_path):
    from otseg.digits import digits_clip

    done, _ = papermill(
        "pretrain_digits", tmp_path, steps=3, batch=8, scenes=20, validation=8, out=tmp_path / "clip.safetensors"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert digits_clip(tmp_path / "clip.safetensors").context_length == 16
