"""The repository's own rules: what is generated is in sync, what is committed is clean, what is declared is true."""

import ast
import configparser
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path

import pandas as pd
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
PAPERMILL = [p for p in NOTEBOOKS if not re.match(r"\d\d_|index", p.name)]
ENTRIES = [p for p in PAPERMILL if p.stem in ("train", "evaluate", "predict")]


def each(notebooks):
    return pytest.mark.parametrize("path", notebooks, ids=lambda p: p.relative_to(ROOT / "nbs").as_posix())


def code_cells(path):
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


def config():
    cfg = configparser.ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    return cfg["DEFAULT"]


# generated files


def test_modules_are_what_the_notebooks_export(tmp_path):
    """A hand edit of a module, a notebook that was not exported and a module without its notebook all show up here."""
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "assets")
    for name in ("nbs", "otseg"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    shutil.copy(ROOT / "settings.ini", tmp_path)
    for module in (tmp_path / "otseg").rglob("*.py"):
        if module.name != "__init__.py":
            module.unlink()
    subprocess.run([Path(sys.executable).with_name("nbdev_export")], cwd=tmp_path, check=True)
    ours, exported = (
        {
            p.relative_to(root).as_posix(): p.read_text(encoding="utf-8")
            for p in (root / "otseg").rglob("*.py")
            if p.name != "_modidx.py"
        }
        for root in (ROOT, tmp_path)
    )
    assert sorted(ours) == sorted(exported), "run `make export`"
    assert not [p for p in ours if ours[p] != exported[p]], "run `make export`"


def test_readme_is_the_rendered_index():
    if not (ROOT / "nbs/index.ipynb").exists():
        pytest.skip("no nbs/index.ipynb")
    text, pictures = runpy.run_path(str(ROOT / "scripts/readme.py"))["render"]()
    assert (ROOT / "README.md").read_text(encoding="utf-8") == text, "run `make readme`"
    for path, data in pictures.items():
        assert (ROOT / path).read_bytes() == data, f"{path}: run `make readme`"
    for link in re.findall(r"""(?:\]\(|(?:src|href)=["'])(?![a-z]+:|#)([^)\s"'#]+)""", text):
        workflow = re.fullmatch(r"../../actions/workflows/(\w+\.yml)(/badge.svg)?", link)
        place = ROOT / (f".github/workflows/{workflow[1]}" if workflow else link)
        assert place.exists(), f"README.md points to {link}, which does not exist"


def test_links_of_the_index_work_from_the_root():
    from_root = runpy.run_path(str(ROOT / "scripts/readme.py"))["from_root"]
    assert (
        from_root("[a](00_ot.ipynb) ![b](../results/b.png) [c](https://x.org/y) [d](#e)")
        == "[a](nbs/00_ot.ipynb) ![b](results/b.png) [c](https://x.org/y) [d](#e)"
    )
    assert from_root('<img src="../results/b.png" width="9">') == '<img src="results/b.png" width="9">'


# structure


def imports_of(module):
    """Modules of the package that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            found.add(node.module)
        elif isinstance(node, ast.ImportFrom) and node.module == "otseg":
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("otseg."):
            found.add(node.module.removeprefix("otseg."))
        elif isinstance(node, ast.Import):
            found |= {name.name.removeprefix("otseg.") for name in node.names if name.name.startswith("otseg.")}
    return found


NUMBERED = {p.stem[3:]: p.stem[:2] for p in (ROOT / "nbs").glob("[0-9][0-9]_*.ipynb")}


def test_no_number_is_used_twice():
    "Except by the transport and its solver."
    numbers = list(NUMBERED.values())
    assert {number for number in numbers if numbers.count(number) > 1} == {"00"} and numbers.count("00") == 2


@pytest.mark.parametrize("module", sorted(NUMBERED))
def test_module_imports_only_earlier_notebooks(module):
    "No import circle is possible then. Exceptions: `ot` and `losses` call GPU kernels; `otseg tables` is a command."
    later = {name for name in imports_of(ROOT / f"otseg/{module}.py") if NUMBERED.get(name, "") > NUMBERED[module]}
    assert later == {"ot": {"kernel"}, "losses": {"loss_kernel"}, "cli": {"tables"}}.get(module, set())
    assert not imports_of(ROOT / "otseg/kernel.py") and imports_of(ROOT / "otseg/loss_kernel.py") == {"upsampling"}


@pytest.mark.parametrize("module", sorted(NUMBERED))
def test_module_is_short_and_says_its_job(module):
    text = (ROOT / f"otseg/{module}.py").read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= 420


def test_the_index_lists_every_notebook():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [p.stem for p in NOTEBOOKS if p.stem != "index" and f"{p.relative_to(ROOT)})" not in text]


# notebooks


@each(NOTEBOOKS)
def test_notebook_is_clean(path):
    for cell in code_cells(path):
        assert cell["execution_count"] is None, "run `nbdev_clean`"
        assert set(cell["metadata"]) <= {"tags"}, "run `nbdev_clean`"
        for output in cell["outputs"]:
            assert output["output_type"] != "error", f"a committed traceback: {output.get('ename')}"
            assert output.get("execution_count") is None, "run `nbdev_clean`"
            assert not re.search(r"\d+%\||it/s\]", json.dumps(output)), "a committed progress bar"
    assert path.stat().st_size < 200_000, "over 200 kB: fewer or smaller pictures"


@each(PAPERMILL)
def test_papermill_finds_the_parameters(path):
    """Without the tag, papermill runs the defaults in silence."""
    tagged = [c for c in code_cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    for line in "".join(tagged[0]["source"]).splitlines():
        if "=" in line.partition("#")[0]:
            assert "#" in line, f"no comment says what this parameter is: {line}"


@each(ENTRIES)
def test_entry_notebook_is_thin(path):
    """It calls the package and defines nothing that somebody would have to copy."""
    assert not [c for c in code_cells(path) if re.search(r"^\s*(def|class) ", "".join(c["source"]), re.MULTILINE)]


# packaging

CONDA_NAMES = {"torch": "pytorch", "build": "python-build"}


def pins(requirements):
    return {
        (CONDA_NAMES.get(r.name, canonicalize_name(r.name)), str(r.specifier)) for r in map(Requirement, requirements)
    }


def test_environment_matches_settings():
    cfg = config()
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["name"] == cfg["lib_name"] and environment["channels"] == ["conda-forge"]
    conda = [d for d in environment["dependencies"] if isinstance(d, str) and d != "pip"]
    conda += [d for part in environment["dependencies"] if isinstance(part, dict) for d in part["pip"] if d != "-e ."]
    ours = [*cfg["requirements"].split(), *cfg["dev_requirements"].split(), f"python>={cfg['min_python']}"]
    assert pins(conda) == pins(ours)


def test_one_version():
    import otseg

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert otseg.__version__ == config()["version"] == citation["version"]


def make_targets():
    return set(re.findall(r"(?m)^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "schema, file",
    [
        ("github-workflows", ".github/workflows/ci.yml"),
        ("github-workflows", ".github/workflows/site.yml"),
        ("citation-file-format", "CITATION.cff"),
    ],
)
def test_files_for_others_fit_their_schema(schema, file):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", ROOT / file]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_workflows_call_targets_of_the_makefile_on_supported_versions():
    workflows = [yaml.safe_load(p.read_text(encoding="utf-8")) for p in (ROOT / ".github/workflows").glob("*.yml")]
    jobs = [job for workflow in workflows for job in workflow["jobs"].values()]
    called = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    assert {command.removeprefix("make ") for command in called} == {"lint", "demo", "test", "site"} <= make_targets()
    (matrix,) = [job["strategy"]["matrix"]["python"] for job in jobs if "strategy" in job]
    assert matrix[0] == config()["min_python"] and matrix[-1] == "3.13"


def test_the_changelog_begins_with_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"(?m)^## (\S+)", text)[1] == config()["version"]


def test_a_wheel_has_the_package_and_its_files(tmp_path):
    "`build` makes the wheel from the source distribution, so that one is complete too."
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listing.stdout.split("\0")):
        if not name.startswith(("nbs/", "results/", "tests/", ".")) and (ROOT / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    done = subprocess.run([sys.executable, "-m", "build", tmp_path], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = (tmp_path / "dist").glob(f"otseg-{config()['version']}-*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    ours = {p.relative_to(tmp_path).as_posix() for p in (tmp_path / "otseg").rglob("*") if p.is_file()}
    assert ours <= inside and not [name for name in inside if name.startswith(("tests/", "docs/", "nbs/"))]


def runtime_distributions():
    """Names of everything that the requirements of the package bring along, without its dev extra."""
    todo, known = config()["requirements"].split(), set()
    while todo:
        requirement = Requirement(todo.pop())
        name = canonicalize_name(requirement.name)
        if name in known or requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        known.add(name)
        try:
            todo += distribution(name).requires or []
        except PackageNotFoundError:  # optional on this platform
            pass
    return known


def test_package_imports_with_its_requirements_alone(tmp_path):
    """In an environment of links to the declared packages, where no dev dependency and nothing undeclared exists."""
    runtime = runtime_distributions()
    for dist in distributions():
        if canonicalize_name(dist.metadata["Name"]) in runtime:
            for name in {file.parts[0] for file in dist.files or []}:
                if not (tmp_path / name).exists() and dist.locate_file(name).exists():
                    (tmp_path / name).symlink_to(dist.locate_file(name))
    code = """
        import importlib, importlib.util, pkgutil, otseg
        for name in ("nbdev", "fastcore", "papermill", "IPython", "mlxtend", "skimage", "ot", "pytest"):
            assert not importlib.util.find_spec(name), f"{name} should be out of reach here"
        for module in pkgutil.walk_packages(otseg.__path__, "otseg."):
            importlib.import_module(module.name)
    """
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    result = subprocess.run(
        [sys.executable, "-S", "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_no_path_of_somebodys_machine():
    """A path that exists on one computer only, in a notebook's output as in the code."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    private = re.compile(r"(?<![\w.])(/(work|root|home|Users|opt|tmp|mnt|private)/[\w.]+|[A-Z]:\\\\?Users)")
    found = []
    for path in map(ROOT.joinpath, filter(None, listing.stdout.split("\0"))):
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
        except UnicodeDecodeError:  # weights and pictures
            continue
        found += [f"{path.relative_to(ROOT)}: {m[0]}" for m in private.finditer(text)]
    assert not found


# numbers of others


def test_published_numbers_have_a_source_and_agree():
    df = pd.read_csv(ROOT / "results/published.csv", keep_default_na=False)
    assert list(df) == ["table", "method", "dataset", "setting", "metric", "value", "source", "note"]
    assert (df.source != "").all() and not df.duplicated(["table", "method", "dataset", "setting", "metric"]).any()
    scores = df[df.table != "efficiency"]
    metrics = scores.table.map({"training_free": "miou"}).fillna("pacc miou_seen miou_unseen hiou")
    assert all(metric in allowed.split() for metric, allowed in zip(scores.metric, metrics))
    assert scores.value.between(0, 100).all()
    for key, rows in scores.groupby(["table", "method", "dataset", "setting"]):
        value, note = rows.set_index("metric").value, rows.set_index("metric").note
        if "hiou" in value and not note["hiou"]:
            s, u = value["miou_seen"], value["miou_unseen"]
            assert abs(2 * s * u / (s + u) - value["hiou"]) < 0.11, (
                f"{key}: hIoU is not that of S and U, and no note says so"
            )
