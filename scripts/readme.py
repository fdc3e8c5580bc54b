"""Render nbs/index.ipynb to README.md: `python scripts/readme.py`.

Relative links are rewritten to work from the repository's root, pictures that the notebook drew go to
results/figures, and cells marked `#| hide` stay out.
"""
import posixpath
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
FIGURES = "results/figures"
LINK = re.compile(r"""(\]\(|(?:src|href)=["'])(?![a-z]+:|[#/])([^)\s"'#]+)""")


def from_root(markdown):
    """Rewrite the links of a notebook in nbs/ for a file in the repository's root."""
    return LINK.sub(lambda m: m[1] + posixpath.normpath(posixpath.join("nbs", m[2])), markdown)


def render(notebook=ROOT / "nbs/index.ipynb"):
    """Return the text of README.md and its pictures as {path: bytes}; writes nothing."""
    nb = nbformat.read(notebook, as_version=4)
    nb.cells = [cell for cell in nb.cells if "#| hide" not in cell.source]
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = from_root(cell.source)
    name = f"{FIGURES}/readme_{{cell_index}}_{{index}}{{extension}}"
    exporter = MarkdownExporter(config={"ExtractOutputPreprocessor": {"output_filename_template": name}})
    text, resources = exporter.from_notebook_node(nb)
    text = re.sub(r"<style scoped>.*?</style>\s*", "", text, flags=re.DOTALL)  # GitHub shows it as text
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)).strip()
    return text + "\n", resources["outputs"]


if __name__ == "__main__":
    text, pictures = render()
    for path, data in pictures.items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_bytes(data)
    (ROOT / "README.md").write_text(text, encoding="utf-8")
    print(f"README.md and {len(pictures)} pictures")
