"""Render nbs/index.ipynb to README.md: `python scripts/readme.py`.

Relative links are rewritten to work from the repository's root and pictures that the notebook drew go to
results/figures. Cells marked `#| hide` stay out, and so does the code of those marked `#| echo: false`.
"""

import posixpath
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"""(\]\(|(?:src|href)=["'])(?![a-z]+:|[#/])([^)\s"'#]+)""")
BADGES = " ".join(  # GitHub resolves these links from the page of README.md
    f"[![{name}](../../actions/workflows/{file}.yml/badge.svg)](../../actions/workflows/{file}.yml)"
    for name, file in {"CI": "ci", "Site": "site"}.items()
)
PICTURES = {"enabled": True, "output_filename_template": "results/figures/readme_{cell_index}_{index}{extension}"}


def from_root(markdown):
    """Rewrite the links of a notebook in nbs/ for a file in the repository's root."""
    return LINK.sub(lambda m: m[1] + posixpath.normpath(posixpath.join("nbs", m[2])), markdown)


def render(notebook=ROOT / "nbs/index.ipynb"):
    """Return the text of README.md and its pictures as {path: bytes}; writes nothing."""
    nb = nbformat.read(notebook, as_version=4)
    nb.cells = [cell for cell in nb.cells if not cell.source.startswith("#| hide")]
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = from_root(cell.source)
        for output in cell.get("outputs", []):
            if "text/markdown" in output.get("data", {}):
                output.data["text/markdown"] = from_root(output.data["text/markdown"])
        if cell.source.startswith("#| echo: false"):
            cell.metadata["transient"] = {"remove_source": True}
    text, resources = MarkdownExporter(config={"ExtractOutputPreprocessor": PICTURES}).from_notebook_node(nb)
    text = re.sub(r"<style scoped>.*?</style>\s*", "", text, flags=re.DOTALL)  # GitHub shows it as text
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)).strip()
    title, rest = text.split("\n", 1)
    return f"{title}\n\n{BADGES}\n{rest}\n", resources["outputs"]


if __name__ == "__main__":
    text, pictures = render()
    for path, data in pictures.items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_bytes(data)
    (ROOT / "README.md").write_text(text, encoding="utf-8")
    print(f"README.md and {len(pictures)} pictures")
