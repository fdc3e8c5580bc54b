"""Notebooks in JupyterLab: a browser opens them, runs all cells, and moves the controls of the panel.

`make jupyter` runs these tests. They need Playwright (`pip install playwright`) and Chromium, and are skipped without
them. They work on a temporary copy of the repository. OTSEG_SCREENSHOTS=FOLDER keeps the screenshots.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, TINY

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MINUTE = 60_000  # milliseconds, Playwright's unit of time

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository, in which the training notebook runs for a few iterations."""
    root = tmp_path_factory.mktemp("jupyter") / "otseg"
    shutil.copytree(
        ROOT,
        root,
        ignore=shutil.ignore_patterns(
            ".git", ".venv", "runs", "__pycache__", "*.egg-info", ".pytest_cache", ".hypothesis"
        ),
    )
    tiny = TINY | {"setting": "inductive", "out": str(root / "out"), "records": str(root / "records")}
    shipped = {"checkpoint": str(root / "otseg/assets/digits_otseg.safetensors"), "images": 6, "scenes": 2}
    for name, parameters in {"train": tiny, "evaluate": shipped, "tables/t1_zero_shot": {"dataset": "digits"}}.items():
        path = root / f"nbs/{name}.ipynb"
        nb = json.loads(path.read_text())
        cell = next(c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", []))
        source = "".join(cell["source"])
        cell["source"] = "\n".join([source, *(f"{name} = {value!r}" for name, value in parameters.items())])
        path.write_text(json.dumps(nb))
    return root


@pytest.fixture(scope="module")
def lab(copy):
    """Address of a JupyterLab server for the copy."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    home = copy.parent / "home"  # JupyterLab neither reads nor writes the user's settings
    env = {
        **os.environ,
        "HOME": str(home),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(copy),
    }
    args = [
        "--no-browser",
        f"--port={port}",
        "--ip=127.0.0.1",
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={copy}",
        "--allow-root",
        "--LabApp.news_url=",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    log = copy.parent / "lab.log"
    server = subprocess.Popen(
        [Path(sys.executable).with_name("jupyter-lab"), *args],
        cwd=copy,
        env=env,
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        for _ in range(120):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        else:
            pytest.fail(f"JupyterLab did not start: {log.read_text()[-2000:]}")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def browser():
    """Chromium of the system, controlled by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def screenshots(copy):
    folder = Path(os.environ.get("OTSEG_SCREENSHOTS") or copy.parent / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def open_and_run(browser, lab, name, minutes):
    """Open a notebook in a new tab, run all cells, and wait until the kernel is idle."""
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.goto(f"{lab}/lab/workspaces/{Path(name).name}/tree/nbs/{name}.ipynb?reset", timeout=2 * MINUTE)
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=2 * MINUTE)
    page.locator(".jp-Toolbar-kernelName", has_text="Python 3").wait_for(timeout=2 * MINUTE)
    page.get_by_text(re.compile(r"Python 3.*\| Idle")).wait_for(
        timeout=2 * MINUTE
    )  # earlier, JupyterLab would show a dialog to choose a kernel
    page.wait_for_timeout(2000)
    assert page.locator(".jp-Dialog").count() == 0, (
        f"{name}: JupyterLab shows a dialog: {page.locator('.jp-Dialog').all_inner_texts()}"
    )
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]", state="attached", timeout=2 * MINUTE)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator("li[data-command='runmenu:run-all']").click()
    page.wait_for_timeout(1000)
    assert page.locator(".jp-Dialog").count() == 0, (
        f"{name}: JupyterLab shows a dialog: {page.locator('.jp-Dialog').all_inner_texts()}"
    )
    state = "document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status"
    quiet = 0
    deadline = time.monotonic() + 60 * minutes
    while quiet < 3:
        assert time.monotonic() < deadline, f"{name} is still running after {minutes} minutes"
        time.sleep(1)
        quiet = (
            quiet + 1
            if page.evaluate(state) == "idle" and not page.locator(".jp-InputPrompt", has_text="[*]").count()
            else 0
        )
    return page


def save_and_check(page, copy, name):
    """Save with Ctrl-S, and check that each cell ran without an error."""
    path = copy / f"nbs/{name}.ipynb"
    before = path.stat().st_mtime_ns
    page.keyboard.press("Control+s")
    for _ in range(60):
        if path.stat().st_mtime_ns != before:
            break
        time.sleep(0.5)
    else:
        pytest.fail(f"{name} was not saved")
    time.sleep(1)
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    errors = [(o["ename"], o["evalue"]) for c in cells for o in c["outputs"] if o["output_type"] == "error"]
    assert not errors, f"{name}: {errors}"
    idle = ["".join(c["source"])[:80] for c in cells if not c["execution_count"]]
    assert not idle, f"{name}: cells that did not run: {idle}"
    assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr'] .ansi-red-fg").count() == 0


@pytest.mark.parametrize("name", ["index", "00_ot", "train", "predict", "evaluate", "tables/t1_zero_shot"])
def test_notebook_runs_in_jupyterlab(browser, lab, copy, screenshots, name):
    page = open_and_run(browser, lab, name, minutes=6)
    page.screenshot(path=screenshots / f"{Path(name).name}.png")
    save_and_check(page, copy, name)
    if name == "predict":
        drive_the_panel(page, screenshots)
        restart_and_reload(page, screenshots)
    page.close()


def restart_and_reload(page, screenshots):
    """The widgets of the panel are gone then, and its picture is still there."""
    source = page.locator(".jp-RenderedImage img").last.get_attribute("src")
    page.get_by_role("menuitem", name="File", exact=True).click()
    page.locator("li[data-command='docmanager:save']").click()
    page.wait_for_timeout(2000)
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.locator("li[data-command='kernelmenu:restart']").click()
    page.locator(".jp-Dialog button.jp-mod-accept").click()
    page.wait_for_timeout(4000)
    page.reload()
    page.wait_for_selector(".jp-RenderedImage img", timeout=2 * MINUTE)
    page.locator(".jp-Notebook .jp-Cell").first.click()
    page.keyboard.press("Escape")
    page.keyboard.press("Control+End")
    page.wait_for_timeout(3000)
    page.screenshot(path=screenshots / "panel_without_kernel.png")
    sources = page.eval_on_selector_all(".jp-RenderedImage img", "all => all.map(image => image.src)")
    assert source in sources


def drive_the_panel(page, screenshots):
    """Each change of words, lambda or image changes the mask. An unknown word shows an error message."""
    mask = page.locator(".jp-RenderedImage img").last
    mask.scroll_into_view_if_needed()
    sources = [mask.get_attribute("src")]

    def changed():
        for _ in range(60):
            if (src := mask.get_attribute("src")) != sources[-1]:
                return sources.append(src)
            time.sleep(0.5)
        pytest.fail("the mask did not change")

    words = page.locator(".widget-vbox .widget-text input").first
    words.fill("three, six, grass, brick")
    words.press("Enter")
    changed()
    handle = page.locator(".widget-vbox .noUi-handle").nth(1)  # lambda
    handle.focus()
    for _ in range(8):
        handle.press("ArrowRight")
    changed()
    page.locator(".widget-vbox select").select_option(index=1)
    changed()
    page.screenshot(path=screenshots / "panel.png")
    words.fill("three, cat")
    words.press("Enter")
    page.get_by_text("does not know 'cat'").wait_for(timeout=MINUTE)
    page.screenshot(path=screenshots / "panel_message.png")
