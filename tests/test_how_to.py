"""The code on the "how do I" pages of the site works as it is printed."""

import re

import pytest
from helpers import ROOT, random_image, small_model

from otseg.cli import main
from otseg.descriptions import read_description
from otseg.mpsa import ATTENTIONS
from otseg.recipes import resolve

PAGES = sorted((ROOT / "docs/howto").glob("*.md"))


def blocks(page, language):
    text = (ROOT / f"docs/howto/{page}.md").read_text(encoding="utf-8")
    return [re.sub(r"(?m)^ {3}", "", block) for block in re.findall(rf"```{language}\n(.*?)\n *```", text, re.DOTALL)]


def test_the_new_attention():
    try:
        exec(blocks("new_attention", "python")[0], {})
        masks = small_model(attention="relaxed")(random_image(1, 32))
        assert (masks.mpsa != small_model()(random_image(1, 32)).mpsa).any()
        assert resolve("digits", attention="relaxed").attention == "relaxed"
    finally:
        ATTENTIONS.pop("relaxed", None)


def test_the_description_of_a_dataset(tmp_path):
    (tmp_path / "dataset.json").write_text(blocks("own_dataset", "json")[0])
    about = read_description(tmp_path / "dataset.json")
    assert about.names == ("table", "cup", "plate") and about.unseen_indices == (2,)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_commands_and_parameters_exist(page, capsys):
    "Every option of an `otseg` command is in its help, and every papermill parameter in its notebook or recipe."
    text = page.read_text(encoding="utf-8")
    for command, options in re.findall(r"otseg (\w+) ([^`\n]*)", text):
        main([command, "--help"])
        known = capsys.readouterr().out
        assert not [option for option in re.findall(r"--[\w-]+", options) if option not in known], command
    for notebook, options in re.findall(r"papermill (nbs/\S+\.ipynb) ([^`\n]*)", text):
        source, fields = (ROOT / notebook).read_text(encoding="utf-8"), vars(resolve("digits"))
        assert not [
            name for name in re.findall(r"-p (\w+)", options) if name not in fields and f'"{name} = ' not in source
        ]
