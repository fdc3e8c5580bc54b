"""`otseg.viz` on small synthetic inputs: contents of the figures, errors, and unchanged arguments."""

from io import BytesIO

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from otseg import viz
from otseg.curves import plot_curves
from otseg.evaluation import markdown, metrics_table

NAMES = ["road", "sky", "cat", "dog"]
g = torch.Generator().manual_seed(0)
IMAGE = torch.stack(
    torch.meshgrid(torch.linspace(0, 1, 24), torch.linspace(1, 0, 32), indexing="ij") + (torch.full((24, 32), 0.5),)
)
MASK = torch.randint(4, (24, 32), generator=g)
MASK[:4] = 255


def pixels(fig):
    png = BytesIO()
    fig.savefig(png)
    return np.asarray(Image.open(png).convert("RGB"), float)


def legend_texts(fig):
    return [t.get_text() for legend in fig.legends for t in legend.get_texts()]


def log():
    t = np.arange(1, 41)
    df = pd.DataFrame({"iteration": t, "loss": 1 / t, "mps_focal": 2 / t})
    for metric in ("miou_seen", "miou_unseen", "hiou"):
        df[f"mps.{metric}"] = np.where(t % 10 == 0, t / 80, np.nan)
    return df


def every_figure():
    T = torch.full((2, 12, 3), 1 / 36)
    return [
        viz.overlay(IMAGE, MASK, NAMES, [2, 3]),
        viz.show_predictions([IMAGE] * 2, [MASK] * 2, {"mps": [MASK] * 2}, NAMES, [2, 3]),
        viz.plan_maps(T, 3, 4, names=["cat", "dog"], image=IMAGE),
        plot_curves(log()),
    ]


def test_functions_return_figures_and_open_none():
    plt.close("all")
    for fig in every_figure():
        assert isinstance(fig, Figure) and fig.dpi == 80 and len(np.unique(pixels(fig))) > 2
    assert not plt.get_fignums()


def test_arguments_and_settings_stay_as_they_are():
    image, mask, table, rc = IMAGE.clone(), MASK.clone(), log(), dict(plt.rcParams)
    every_figure()
    plot_curves(table)
    assert torch.equal(image, IMAGE) and torch.equal(mask, MASK) and table.equals(log()) and rc == dict(plt.rcParams)


def test_types_of_images_and_masks_draw_the_same():
    byte = (IMAGE * 255).to(torch.uint8)
    reference = pixels(viz.overlay(byte, MASK, NAMES))
    for image, mask in (
        (byte / 255, MASK.to(torch.uint8)),
        (byte.numpy(), MASK.numpy()),
        ((byte / 255).requires_grad_(), MASK),
    ):
        assert np.abs(pixels(viz.overlay(image, mask, NAMES)) - reference).max() <= 1  # of 255: rounding


def test_legend_has_the_present_classes_and_marks_the_unseen():
    mask = torch.where(MASK == 1, 255, MASK)  # no sky
    assert legend_texts(viz.overlay(IMAGE, mask, NAMES, [0, 3])) == ["cat", "road (unseen)", "dog (unseen)"]
    assert legend_texts(viz.overlay(IMAGE, torch.full_like(MASK, 255), NAMES)) == []


def test_paint_is_exact():
    """Colours where a class is, white or the image where the label is ignored, stripes on unseen classes only."""
    mask, colors = np.array([[0, 255], [1, 1]]), np.eye(3)[:2]
    out = viz.paint(mask, colors, unseen=[])
    half = len(out) // 2
    assert (out[:half, :half] == colors[0]).all() and (out[:half, half:] == 1).all() and (out[half:] == colors[1]).all()
    under = np.full((2, 2, 3), 0.5)
    assert (viz.paint(mask, colors, [], under)[:half, half:] == 0.5).all()
    striped = viz.paint(mask, colors, unseen=[1])
    assert (striped[:half] == out[:half]).all() and 0.2 < (striped[half:] != out[half:]).any(-1).mean() < 0.5


def test_predictions_grid():
    wrong = torch.where(MASK == 255, MASK, (MASK + 1) % 4)
    fig = viz.show_predictions([IMAGE], [MASK], {"mps": [MASK], "mpsa": [wrong]}, NAMES)
    assert [a.get_title() for a in fig.axes] == ["image", "truth", "mps", "mpsa"]
    assert [a.get_xlabel() for a in fig.axes] == ["", "", "pAcc 100 %", "pAcc 0 %"]
    all_ignored = viz.show_predictions([IMAGE], [torch.full_like(MASK, 255)], {"mps": [MASK]}, NAMES)
    assert [a.get_xlabel() for a in all_ignored.axes] == ["", "", ""]


def test_images_of_different_sizes():
    small, mask = torch.rand(3, 10, 8), torch.zeros(10, 8).long()
    fig = viz.show_predictions([IMAGE, small], [MASK, mask], {"mps": [MASK, mask]}, NAMES)
    assert len(fig.axes) == 6 and pixels(fig).shape[-1] == 3


def test_plan_maps_are_relative_to_the_uniform_plan():
    fig = viz.plan_maps(torch.full((12, 2), 1 / 24, requires_grad=True), 3, 4, prompts=["a photo", "a part"])
    first, second, _ = fig.axes
    assert np.allclose(first.images[0].get_array(), 1) and first.images[0].get_array().shape == (3, 4)
    assert (first.get_title(), second.get_title()) == ("a photo", "a part")


def test_curves_panels():
    fig = plot_curves(log())
    assert [a.get_ylabel() for a in fig.axes] == ["loss", "S (%)", "U (%)", "hIoU (%)"]
    y = fig.axes[1].lines[0].get_ydata()
    assert np.allclose(y, [12.5, 25, 37.5, 50])
    only_losses = plot_curves(log()[["iteration", "loss"]])
    assert [a.get_ylabel() for a in only_losses.axes] == ["loss"]
    supervised = plot_curves(log().assign(**{"mps.miou_unseen": np.nan, "mps.hiou": np.nan}))
    assert [a.get_ylabel() for a in supervised.axes] == ["loss", "S (%)"]
    staged = pd.concat([log().assign(setting="inductive"), log().assign(setting="transductive")])
    assert "transductive" in [t.get_text() for t in plot_curves(staged).axes[1].get_legend().get_texts()]


def test_palette():
    assert viz.palette(16).shape == (16, 3) and len(np.unique(viz.palette(20), axis=0)) == 20
    given = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]])
    assert (
        pixels(viz.overlay(IMAGE, MASK, NAMES, palette=given))
        == pixels(viz.overlay(IMAGE, MASK, NAMES, palette=given / 255))
    ).all()


def test_picture_is_small_and_faithful(tmp_path):
    fig = viz.overlay(IMAGE, torch.arange(4).repeat_interleave(8).expand(24, 32), NAMES)
    image = viz.picture(fig, 256)
    image.save(tmp_path / "a.png")
    fig.savefig(tmp_path / "b.png", dpi=80)
    assert (tmp_path / "a.png").stat().st_size < (tmp_path / "b.png").stat().st_size
    assert np.abs(np.asarray(image.convert("RGB"), float) - pixels(fig)).mean() < 3  # of 255


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: viz.palette(21), ["21", "20"]),
        (lambda: viz.overlay(IMAGE[0], MASK, NAMES), ["(24, 32)", "(3, H, W)"]),
        (lambda: viz.overlay(IMAGE * 4 - 2, MASK, NAMES), ["-2.00", "normalisation"]),
        (lambda: viz.overlay(IMAGE, MASK[1:], NAMES), ["(24, 32)", "(23, 32)"]),
        (lambda: viz.overlay(IMAGE, MASK, NAMES[:3]), ["3", "3 names"]),
        (lambda: viz.overlay(IMAGE, MASK, NAMES, palette=[[0, 0, 0]]), ["(1, 3)", "4 names"]),
        (lambda: viz.show_predictions([IMAGE], [MASK], {"mps": [MASK, MASK]}, NAMES), ["1 images", "2 masks of mps"]),
        (lambda: viz.show_predictions([IMAGE], [MASK], {"mps": [MASK[1:]]}, NAMES), ["mps", "(23, 32)", "(24, 32)"]),
        (lambda: viz.plan_maps(torch.ones(12, 2), 3, 5), ["(1, 12, 2)", "3 x 5"]),
        (lambda: viz.plan_maps(torch.ones(12, 2), 3, 4, prompts=["a"]), ["2 prompts", "1 prompt"]),
        (lambda: plot_curves(pd.DataFrame({"step": [1]})), ["step", "iteration"]),
    ],
)
def test_refusals_name_both_values(call, words):
    with pytest.raises(ValueError) as e:
        call()
    assert all(w in str(e.value) for w in words), e.value


def record(seed=0, unseen=0.25):
    scores = dict(pacc=0.9, miou_seen=0.5, miou_unseen=unseen, hiou=None if unseen is None else 1 / 3, iou={"cat": 0.1})
    return dict(
        dataset="digits",
        split=0,
        setting="inductive",
        method="otseg",
        seed=seed,
        commit="abc",
        metrics={"mps": scores, "ensemble": scores},
    )


def test_metrics_table_is_in_percent():
    table = metrics_table(record(0), record(1), record(2, None))
    assert list(table) == ["pAcc", "S", "U", "hIoU", "mIoU"] and len(table) == 6
    row = table.loc[("digits", 0, "inductive", "otseg", 1, "mps")]
    assert row.tolist() == pytest.approx([90, 50, 25, 100 / 3, 10])
    assert table.xs(2, level="seed")[["U", "hIoU"]].isna().all(axis=None)
    assert metrics_table().empty


def test_markdown():
    table = pd.DataFrame({"S": [50.0, np.nan]}, index=pd.Index(["a|b", "c"], name="path"))
    assert markdown(table).splitlines() == ["| path | S |", "| --- | ---: |", "| a\\|b | 50.0 |", "| c | – |"]


def test_numbers_stand_in_their_regions_and_in_the_legend():
    mask = torch.zeros(40, 60).long()
    mask[5:35, 10:30], mask[:, 45:] = 2, 3
    fig = viz.overlay(torch.rand(3, 40, 60), mask, NAMES, numbers=True)
    assert legend_texts(fig) == ["1 road", "3 cat", "4 dog"]
    f = fig.axes[1].images[0].get_array().shape[0] / 40
    for text in fig.axes[1].texts:
        x, y = text.get_position()
        assert mask[int(y / f), int(x / f)] == int(text.get_text()) - 1
    assert len(fig.axes[1].texts) == 3


def test_an_explanation_has_two_rows_for_each_class_and_three_scales():
    n, r = 3, 2
    maps = [torch.rand(r, n, 6, 8), torch.rand(r, n, 6, 8), torch.rand(r, 6, 8), torch.rand(r, 6, 8)]
    mask = torch.tensor([255, 255, 0, 1])[MASK.clamp(max=3)]
    fig = viz.plot_explanation(IMAGE, mask, viz.ClassMaps(NAMES[2:], ["a", "b", "c"], *maps))
    assert len(fig.axes) == 2 * r * (n + 2) + 3
    assert [a.get_xlabel() for a in fig.axes[-3:]] == ["score", "mass (uniform = 1)", "logit"]
    assert np.allclose(fig.axes[n + 3].images[0].get_array(), maps[1][0, 0])
    with pytest.raises(ValueError, match="2 classes and 1 prompt titles but plans of 2 classes and 3 prompts"):
        viz.ClassMaps(NAMES[2:], ["a"], *maps)
