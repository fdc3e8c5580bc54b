"""The site: it is built from the notebooks, no link is dead, and a browser finds nothing to complain about."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
import torch
from helpers import ROOT

from otseg import load
from otseg.digits import CLASSES, Digits
from otseg.ot import sinkhorn

pytest.importorskip("myst_nb")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("npm"), reason="no npm")]


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "Folder of the site: OTSEG_SITE if it is given, else a new one."
    if built := os.environ.get("OTSEG_SITE"):
        return Path(built)
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, ROOT / "docs/build.py", "--out", out], cwd=ROOT, capture_output=True, text=True
    )
    if "npm pack" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr, done.stderr[-3000:]
    return out


class Page(HTMLParser):
    "Links, files and anchors of a page."

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes.get("id"), attributes.get("name")}
        self.links += [attributes[name] for name in ("href", "src") if attributes.get(name)]


def pages_of(site):
    "Every page but the code listings, the page to try, and the templates that the theme leaves behind."
    others = {"_static", "_modules", "try"}
    return [path for path in sorted(site.rglob("*.html")) if not others & set(path.relative_to(site).parts)]


def test_no_internal_link_is_dead(site):
    pages = {path: Page(path) for path in site.rglob("*.html") if "_static" not in path.parts}
    dead = []
    for path, page in pages.items():
        for link in page.links:
            url = urlparse(link)
            if url.scheme or url.netloc or link in ("#", "javascript:void(0)"):
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not target.is_file() or (url.fragment and target in pages and url.fragment not in pages[target].anchors):
                dead.append(f"{path.relative_to(site)}: {link}")
    assert len(pages) > 100 and not dead, dead[:20]


def test_every_notebook_has_a_page_in_the_navigation(site):
    names = [p.relative_to(ROOT / "nbs").with_suffix(".html") for p in (ROOT / "nbs").rglob("*.ipynb")]
    names = [name for name in names if ".ipynb_checkpoints" not in name.parts]
    listed = "".join(path.read_text() for path in site.glob("*.html"))
    assert not [name for name in names if f"nbs/{name.as_posix()}" not in listed]


def test_tables_of_outputs_are_tables(site):
    "Also those that a cell displays as Markdown."
    texts = {path: re.sub(r"<pre.*?</pre>", "", path.read_text(), flags=re.DOTALL) for path in pages_of(site)}
    assert not [path for path, text in texts.items() if re.search(r"\| -{3,}:? \|", text)]
    assert texts[site / "nbs/tables/t3_components.html"].count("<table") >= 12


def test_nothing_is_loaded_from_elsewhere(site):
    foreign = []
    for path in pages_of(site):
        for link in Page(path).links:
            if urlparse(link).netloc and (link.endswith(".js") or link.endswith(".css")):
                foreign.append(f"{path.relative_to(site)}: {link}")
    assert not foreign, foreign[:5]


def test_the_reference_has_the_comments_of_the_parameters(site):
    text = (site / "api/ot.html").read_text()
    assert "cost (..., m, n)" in text and "[source]" in text


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no Chromium")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as p:
        found = p.chromium.launch(executable_path=CHROMIUM, args=options)
        yield found
        found.close()


def watched(browser, **options):
    "A page, and the complaints of its console and requests."
    page, complaints = browser.new_page(**options), []
    page.on("console", lambda m: complaints.append(f"{page.url}: {m.text}") if m.type == "error" else None)
    page.on("pageerror", lambda e: complaints.append(f"{page.url}: {e}"))
    page.on("requestfailed", lambda r: "favicon" in r.url or complaints.append(f"{page.url}: no {r.url}"))
    page.on("response", lambda r: complaints.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    return page, complaints


def test_every_page_loads_without_errors(browser, address, site):
    page, complaints = watched(browser)
    for path in pages_of(site):
        page.goto(f"{address}/{path.relative_to(site).as_posix()}", wait_until="load")
    assert not complaints, complaints[:10]


def test_formulas_are_rendered(browser, address):
    page, _ = watched(browser)
    page.goto(f"{address}/nbs/00_ot.html")
    page.wait_for_selector("mjx-container svg", timeout=20_000)
    assert "$" not in page.inner_text("article section > p >> nth=0")


def test_search_finds_sinkhorn(browser, address):
    page, _ = watched(browser)
    page.goto(f"{address}/search.html?q=sinkhorn")
    for found in ("api/ot.html", "nbs/00_ot.html"):  # the page adds one result after the other
        page.wait_for_selector(f"ul.search li a[href*='{found}']", timeout=20_000)


@pytest.mark.parametrize("width", [390, 1280])
def test_pages_fit_the_screen(browser, address, width):
    page, _ = watched(browser, viewport={"width": width, "height": 844})
    for path in ("index", "nbs/index", "nbs/00_ot", "nbs/tables/t4_prompts_and_transport", "api/ot", "howto/own_photo"):
        page.goto(f"{address}/{path}.html")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path


# the page to try


def run_node(code, given):
    "JSON that a JavaScript program prints. It reads `given` from JSON."
    program = f"import fs from 'fs'; const given = JSON.parse(fs.readFileSync(0)); {code}"
    command = ["node", "--input-type=module", "-e", program]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("m, n, spread, eps", [(36, 6, 0.3, 0.05), (36, 6, 1, 0.005), (5, 6, 2, 0.002), (10, 1, 1, 1)])
def test_the_transport_of_the_page_is_ours(m, n, spread, eps):
    C = 1 - torch.tanh(spread * torch.randn(m, n, dtype=torch.float64))
    code = f"""
        const {{ transportPlan }} = await import({json.dumps((ROOT / "docs/try/transport.js").as_uri())});
        console.log(JSON.stringify(Array.from(transportPlan(given, {m}, {n}, {eps}, 1e-10))));
    """
    T = torch.tensor(run_node(code, C.flatten().tolist()), dtype=torch.float64).view(m, n)
    torch.testing.assert_close(T, sinkhorn(C, eps=eps, tol=1e-12), atol=1e-8 / (m * n), rtol=1e-6)


@pytest.fixture
def trial(browser, address):
    page, complaints = watched(browser, viewport={"width": 1250, "height": 1100})
    page.goto(f"{address}/try/index.html")
    page.wait_for_function("window.tried", timeout=60_000)
    yield page
    assert not complaints


def settle(page):
    page.wait_for_timeout(500)
    page.wait_for_function("!document.getElementById('status').textContent.includes('Loading')")
    return np.array(page.evaluate("Array.from(window.tried.label)")).reshape(96, 96)


def move(page, name, value):
    page.evaluate(
        f"const s = document.getElementById('{name}'); s.value = {value}; s.dispatchEvent(new Event('input'))"
    )


def test_its_mask_is_that_of_the_package(trial):
    scene = Digits("val", 6)[5]["image"]
    ours = load()(scene, CLASSES).labels
    assert (settle(trial) == ours).mean() > 0.99


def test_a_drawn_digit_is_segmented(trial):
    trial.click("#textures button >> nth=1")
    box = trial.locator("#drawing").bounding_box()
    at = lambda x, y: (box["x"] + x * box["width"] / 96, box["y"] + y * box["width"] / 96)
    trial.mouse.move(*at(33, 32))
    trial.mouse.down()
    for point in ((57, 32), (43, 66)):
        trial.mouse.move(*at(*point), steps=5)
    trial.mouse.up()
    trial.wait_for_function("window.tried.label.includes(7)", timeout=20_000)
    label = settle(trial)
    ys, xs = np.nonzero(label == CLASSES.index("seven"))  # a class without masks in training
    assert len(ys) > 150 and 25 < ys.mean() < 60 and 33 < xs.mean() < 57
    assert (label == CLASSES.index("grass")).mean() > 0.8


def test_sliders_and_words_change_the_mask(trial):
    first = settle(trial)
    move(trial, "lambda", 0)
    transport_alone = settle(trial)
    assert (first != transport_alone).any()
    move(trial, "eps", 0.7)
    assert (settle(trial) != transport_alone).any()
    trial.click("#none")
    trial.check("#word11")
    assert (settle(trial) == CLASSES.index("grass")).all()


def test_the_page_is_small(site):
    size = sum(path.stat().st_size for path in (site / "try").rglob("*") if path.is_file())
    assert size < 15e6
