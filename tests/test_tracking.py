"""Losses, metrics and pictures of a run reach the tracker; a tracker that is not there is refused before the run."""

import pytest
import trees

from otseg.recipes import DATASET_RECIPES, resolve
from otseg.tracking import check_tracker
from otseg.training import fit

RECIPE = resolve(
    "folder",
    **DATASET_RECIPES["digits"] | dict(max_iters=4, batch_size=2, warmup_iters=1, val_interval=2, val_images=2),
)


def test_tensorboard_gets_losses_metrics_and_pictures(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trees.write_folder(tmp_path / "data")
    fit(RECIPE, tmp_path / "run", root=tmp_path / "data", workers=0, progress=False, tracker="tensorboard")
    scalars, images = {}, {}
    for file in (tmp_path / "run/tensorboard").rglob("events.out.tfevents.*"):
        found = events.EventAccumulator(str(file)).Reload()
        scalars |= {tag: [e.step for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
        images |= {tag: found.Images(tag)[0] for tag in found.Tags()["images"]}
    assert scalars["mpsa_dice"] == [4] and scalars["ensemble.pacc"] == [2, 4]
    assert {"validation/0", "validation/1"} <= images.keys()
    assert images["validation/0"].width % 3 == 0 and images["validation/0"].height > 0


@pytest.mark.parametrize(
    "name, error, says", [("paper", ValueError, "is not one of none"), ("wandb", ImportError, "pip")]
)
def test_a_missing_tracker(name, error, says, monkeypatch):
    monkeypatch.setattr("otseg.tracking.find_spec", lambda package: None)
    with pytest.raises(error, match=says):
        check_tracker(name)
