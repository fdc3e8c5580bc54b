"""Build the site: `python docs/build.py` writes static pages into `_docs/html` from the notebooks and their outputs.

No notebook is executed. The JavaScript libraries of the pages come from npm, once, and are part of the site: it loads
nothing from elsewhere. It needs `npm` and the packages of `pip install 'otseg[dev]'`.
"""

import argparse
import gzip
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from try_page import write_try_page

ROOT = Path(__file__).parents[1]
SITE = ROOT / "_docs"
LIBRARIES = {  # npm package -> files in it, and their places in the site
    "mathjax@3.2.2": {"package/es5/tex-mml-svg.js": "_static/mathjax/tex-mml-svg.js"},
    "mermaid@11.17.2": {"package/dist/mermaid.min.js": "_static/mermaid.min.js"},
    "onnxruntime-web@1.30.0": {
        "package/dist/ort.wasm.min.mjs": "extra/try/ort/ort.wasm.min.mjs",
        "package/dist/ort-wasm-simd-threaded.mjs": "extra/try/ort/ort-wasm-simd-threaded.mjs",
        "package/dist/ort-wasm-simd-threaded.wasm": "extra/try/ort/ort-wasm-simd-threaded.wasm.gz",
    },
}
PARTS = {  # title of a part -> its notebooks in reading order, as patterns
    "Method": ("0[0-8]_*",),
    "Data": ("09_*", "1*_*"),
    "Experiments": ("2*_*", "train", "evaluate"),
    "Use": ("3*_*", "predict"),
    "Measure": ("4*_*", "benchmark", "torture", "reliability", "pretrain_digits"),
    "Tables and figures": ("tables/*",),
}
HOW_TO = ("own_photo", "own_dataset", "new_attention", "table_1", "several_gpus")
DIRECTIVE = re.compile(r"#\|\s*(\w+).*\n?")


def fetch_libraries(folder: Path):
    "Copy the files of LIBRARIES from npm packages. The packages are kept for the next build."
    cache = SITE / "npm"
    cache.mkdir(parents=True, exist_ok=True)
    for package, files in LIBRARIES.items():
        archive = cache / f"{package.replace('@', '-').strip('-')}.tgz"
        if not archive.exists():
            done = subprocess.run(["npm", "pack", "--silent", package], cwd=cache, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"npm pack {package} failed: {done.stderr.strip()}")
            (cache / done.stdout.split()[-1]).rename(archive)
        with tarfile.open(archive) as tar:
            for inside, outside in files.items():
                target = folder / outside
                target.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(inside).read()
                target.write_bytes(gzip.compress(content) if target.suffix == ".gz" else content)


def notebooks(pattern: str) -> list[str]:
    "Names of the notebooks that a pattern of PARTS selects, without suffix."
    found = sorted((ROOT / "nbs").glob(f"{pattern}.ipynb"))
    return [path.relative_to(ROOT / "nbs").with_suffix("").as_posix() for path in found]


def linked(text: str, names: dict[str, str], here: str, displayed: bool = False) -> str:
    """Markdown whose `NN_name` are links, and whose links to folders and code of the repository are plain text.

    Sphinx does not resolve the links in displayed outputs, so these point to pages of the site already."""
    up, ending = "../" * here.count("/"), ".html" if displayed else ".ipynb"
    for name, place in names.items():
        text = re.sub(rf"(?<!\[)`{re.escape(name)}`(?!\])", f"[`{name}`]({up}{place}{ending})", text)

    def reachable(match):
        label, target = match.groups()
        path = (ROOT / "nbs" / here).parent / target.split("#")[0]
        inside = path.suffix in (".ipynb", ".png", *((".csv", ".json") if not displayed else ())) and path.is_file()
        if inside and displayed:
            return match[0].replace(".ipynb", ".html")
        return match[0] if inside else label if label.startswith("`") else f"{label} (`{path.name}` in the repository)"

    text = re.sub(r"(?<!!)\[([^\]]+)\]\((?![a-z]+:|#)([^)\s]+)\)", reachable, text)
    return re.sub(r"```mermaid\n", "```{mermaid}\n", text)


def prepare_notebook(name: str, names: dict[str, str], target: Path):
    "Copy a notebook without directives of nbdev, hidden cells, and code that is not echoed."
    nb = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))
    cells = []
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            cell["source"] = linked(source, names, name)
        else:
            directives = set(DIRECTIVE.findall(source))
            if "hide" in directives or "default_exp" in directives:
                continue
            if "echo" in directives:
                cell["metadata"]["tags"] = ["remove-input"]
            cell["source"] = DIRECTIVE.sub("", source) if source.startswith("#|") else source
            for output in cell["outputs"]:
                text = output.get("data", {}).get("text/markdown")
                if text:
                    output["data"]["text/markdown"] = linked("".join(text), names, name, displayed=True)
        cells.append(cell)
    nb["cells"] = cells
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(nb), encoding="utf-8")


def contents(title: str, entries: list[str], text: str = "") -> str:
    "A page with a table of contents."
    listed = "\n".join(entries)
    return f"# {title}\n\n{text}\n\n```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n"


def write_api(folder: Path) -> list[str]:
    "Write a page for each module, with its docstring and all that it exports. Returns their names."
    folder.mkdir(parents=True, exist_ok=True)
    modules = []
    for path in sorted((ROOT / "otseg").glob("*.py")):
        if path.stem in ("__init__", "_modidx", "cli", "kernel", "loss_kernel"):
            continue
        modules.append(f"api/{path.stem}")
        head = f"# otseg.{path.stem}\n\n```{{eval-rst}}\n.. automodule:: otseg.{path.stem}\n   :members:\n```\n"
        (folder / f"{path.stem}.md").write_text(head, encoding="utf-8")
    return modules


def prepare(source: Path):
    "Write the sources of all pages for Sphinx."
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    for name in ("conf.py", "_static", "howto"):
        copy = shutil.copytree if (ROOT / "docs" / name).is_dir() else shutil.copy
        copy(ROOT / "docs" / name, source / name)
    fetch_libraries(source)
    parts = {title: [n for pattern in patterns for n in notebooks(pattern)] for title, patterns in PARTS.items()}
    places = {name.split("/")[-1]: f"nbs/{name}" for names in parts.values() for name in names}
    local = {name: place.removeprefix("nbs/") for name, place in places.items()}
    for name in (*[n for names in parts.values() for n in names], "index"):
        prepare_notebook(name, local, source / "nbs" / f"{name}.ipynb")
    shutil.copytree(ROOT / "results", source / "results")
    slugs = {title: re.sub(r"\W+", "_", title.lower()) for title in parts}
    for title, names in parts.items():
        (source / f"{slugs[title]}.md").write_text(contents(title, [f"nbs/{name}" for name in names]), encoding="utf-8")
    modules = write_api(source / "api")
    reference = "Generated from the docstrings and the comments beside the parameters. `[source]` shows the code."
    (source / "reference.md").write_text(contents("Reference", modules, reference), encoding="utf-8")
    (source / "how_to.md").write_text(contents("How do I ...?", [f"howto/{name}" for name in HOW_TO]), encoding="utf-8")
    toc = "\n".join(["Overview <nbs/index>", "how_to", *slugs.values(), "reference"])
    index = f"# otseg\n\n```{{include}} front.md\n```\n\n```{{toctree}}\n:hidden:\n\n{toc}\n```\n"
    shutil.copy(ROOT / "docs" / "front.md", source / "front.md")
    (source / "index.md").write_text(index, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=SITE / "html", help="folder of the site")
    out = parser.parse_args().out
    prepare(SITE / "source")
    write_try_page(SITE / "source" / "extra" / "try", ROOT / "docs" / "try")
    command = [sys.executable, "-m", "sphinx", "-q", "-j", "auto", "-b", "html", str(SITE / "source"), str(out)]
    status = subprocess.run([*command, "-d", str(SITE / "doctrees")]).returncode
    print(f"{out / 'index.html'}: {sum(1 for _ in out.rglob('*.html'))} pages")
    sys.exit(status)


if __name__ == "__main__":
    main()
