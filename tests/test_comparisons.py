"""`otseg.comparisons`: differences between pairs of runs, their verdicts, and the sentences made from them."""

import numpy as np
import pandas as pd
import pytest

from otseg.comparisons import (
    BETTER,
    NOT_DISTINGUISHABLE,
    ONE_PAIR,
    WORSE,
    base_against_others,
    compare_with_base,
    comparisons_to_wide,
    count_verdicts,
    paired_difference,
)
from otseg.tables import NOT_RUN

CLEAR = dict(a=[3.0, 3.1, 3.2], b=[1.0, 1.2, 1.1])


def frame(**values):
    rows = [{"decoder": name, "seed": s, "hIoU": v} for name, side in values.items() for s, v in enumerate(side)]
    return pd.DataFrame(rows)


def test_difference_and_interval():
    scores = frame(a=[3.0, 5.0, 4.0], b=[1.0, 2.0, 3.0])
    found = paired_difference(scores, "decoder", "a", "b")
    assert found.difference == pytest.approx(2) and found.wins == 3 and found.pairs == 3
    half = 4.302653 * 1 / 3**0.5  # Student's t for two degrees of freedom, deviation 1
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half)) and found.verdict == NOT_DISTINGUISHABLE
    assert found.text == "+2.0 [-0.5, +4.5], 3 of 3 seeds: not distinguishable"
    back = paired_difference(scores, "decoder", "b", "a")
    assert back.difference == -found.difference and back.p == pytest.approx(found.p) and back.wins == 0
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))


def test_the_text_says_what_the_pairs_are():
    "Seeds, splits, or pairs of both."
    runs = [
        dict(decoder=d, split=t, seed=s, hIoU=s + 2 * t + (d == "a") * (4 + s + t))
        for d in "ab"
        for t in (0, 1)
        for s in (0, 1)
    ]
    scores, on = pd.DataFrame(runs), ("split", "seed")
    kinds = {
        "4 of 4 pairs": scores,
        "2 of 2 seeds": scores.query("split == 0"),
        "2 of 2 splits": scores.query("seed == 0"),
    }
    for text, part in kinds.items():
        assert text in paired_difference(part, "decoder", "a", "b", on=on).text


def test_verdicts():
    found = paired_difference(frame(**CLEAR), "decoder", "a", "b")
    assert found.verdict == BETTER and found.text.endswith(": better")
    assert found.describe({"better": "higher"}).endswith(": higher")
    assert paired_difference(frame(**CLEAR), "decoder", "b", "a").verdict == WORSE
    equal = paired_difference(frame(a=[1.0, 2.0, 3.0], b=[1.0, 2.0, 3.0]), "decoder", "a", "b")
    assert equal.verdict == NOT_DISTINGUISHABLE and equal.difference == 0


def test_only_pairs_count():
    found = paired_difference(frame(a=[3.0, 5.0, np.nan, 9.0], b=[1.0, 2.0, 3.0]), "decoder", "a", "b")
    assert found.pairs == 2 and found.difference == pytest.approx(2.5)
    single = paired_difference(frame(a=[3.0], b=[1.0]), "decoder", "a", "b")
    assert single.text == "+2.0, one pair, no verdict" and single.verdict == ONE_PAIR and np.isnan(single.low)
    none = paired_difference(frame(a=[np.nan], b=[1.0]), "decoder", "a", "b")
    assert none.text == none.verdict == NOT_RUN and none.pairs == 0 and np.isnan(none.difference)
    with pytest.raises(ValueError, match="several runs with the same seed"):
        paired_difference(pd.concat([frame(a=[1.0], b=[1.0])] * 2), "decoder", "a", "b")


def test_every_row_is_compared_with_the_base():
    found = compare_with_base(frame(a=[3.0, 5.0], b=[1.0, 2.0], c=[0.0, 9.0]), "decoder", "b", ("hIoU",))
    assert [*found["variant"]] == ["a", "c"] and set(found["base"]) == {"b"}
    wide = comparisons_to_wide(found)
    assert [*wide.index] == ["a", "c"] and wide.loc["a", "hIoU"].startswith("+2.5 [")
    assert wide.index.name == "variant, minus b"


def test_groups_are_compared_separately():
    scores = pd.concat([frame(**CLEAR).assign(setting="x"), frame(a=CLEAR["b"], b=CLEAR["a"]).assign(setting="y")])
    found = compare_with_base(scores, "decoder", "b", ("hIoU",), by=("setting",))
    assert dict(zip(found["setting"], found["verdict"])) == {"x": BETTER, "y": WORSE}
    assert [*comparisons_to_wide(found).index] == [("x", "a"), ("y", "a")]
    assert count_verdicts(found) == "Compared with b in hIoU: a is better in 1, worse in 1."


def test_sentences_agree_with_the_verdicts():
    scores = frame(base=[2.0, 2.1, 2.2], above=[4.0, 4.2, 4.1], below=[1.0, 0.9, 1.2], near=[2.0, 2.3, 2.0])
    found = compare_with_base(scores, "decoder", "base", ("hIoU",))
    verdicts = dict(zip(found["variant"], found["verdict"]))
    assert verdicts == {"above": BETTER, "below": WORSE, "near": NOT_DISTINGUISHABLE}
    expected = "In hIoU, base is ahead of *below*; not distinguishable from *near*; behind *above*."
    assert base_against_others(found) == expected


def test_nothing_run_gives_no_sentence():
    found = compare_with_base(frame(a=[np.nan], b=[1.0]), "decoder", "b", ("hIoU",))
    assert [*found["verdict"]] == [NOT_RUN] and base_against_others(found) == ""
    one = compare_with_base(frame(a=[2.0], b=[1.0]), "decoder", "b", ("hIoU",))
    assert [*one["verdict"]] == [ONE_PAIR] and base_against_others(one) == "" and ONE_PAIR in count_verdicts(one)
    nothing = compare_with_base(frame(b=[1.0]), "decoder", "b", ("hIoU",))
    assert nothing.empty and count_verdicts(nothing) == "Nothing has been run yet."
    assert comparisons_to_wide(nothing).empty and base_against_others(nothing) == ""
