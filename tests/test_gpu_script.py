"""scripts/gpu.py on a CPU, with tiny sizes: every part writes its rows, and a part that fails costs no other."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(ROOT / "scripts"))
    import gpu

    yield gpu
    sys.path.remove(str(ROOT / "scripts"))


@pytest.mark.slow
def test_parts_write_what_they_measure(tmp_path):
    command = [sys.executable, ROOT / "scripts/gpu.py", "--device", "cpu", "--out", tmp_path]
    done = subprocess.run([*command, "--parts", "facts,parity,transport,step"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "cpu_tiny.json").read_text())
    rows = {(row["part"], row["what"]): row for row in found["rows"]}
    failed = [row for row in found["rows"] if row.get("note", "").startswith(("failed", "stopped"))]
    assert not failed
    assert rows["parity", "float32"]["error_mps"] < 2e-5 and rows["parity", "plan a"]["error"] < 1e-5
    assert rows["transport", "ours, forward"]["error_marginal"] < 1e-6
    assert rows["step", "COCO-Stuff, batch 2, bf16"]["images_per_s"] > 0
    with open(tmp_path / "cpu_tiny.csv", newline="") as f:
        assert len(list(csv.DictReader(f))) == len(found["rows"])
    text = (tmp_path / "cpu_tiny.md").read_text()
    assert all(f"## {part}" in text for part in ("facts", "parity", "transport", "step"))


def test_a_part_that_fails_or_hangs_leaves_a_note(gpu, tmp_path, monkeypatch):
    fake = tmp_path / "fake.py"
    fake.write_text(
        "import json, sys, time\n"
        "part, path = sys.argv[2], sys.argv[-1]\n"
        "open(path, 'a').write(json.dumps({'part': part, 'what': 'first row'}) + chr(10))\n"
        "time.sleep(60) if part == 'kernels' else sys.exit('out of luck')\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(fake))
    monkeypatch.setitem(gpu.PARTS, "kernels", (gpu.kernels, 6, 6))
    for part, note in (("facts", "failed: out of luck"), ("kernels", "stopped after 6 s")):
        first, last = gpu.run_part(part, "cpu", 100, tmp_path / f"{part}.jsonl")
        assert first["what"] == "first row" and last["note"] == note
    assert gpu.run_part("facts", "cpu", 1, tmp_path / "none.jsonl")[0]["note"] == "not run: no time left"


def test_a_row_that_fails_leaves_a_note(gpu, tmp_path):
    report = gpu.Report(tmp_path / "rows.jsonl", "step")
    with gpu.noted(report, "too large", batch=16):
        raise MemoryError("out of memory")
    report.row("next", ms=1.0)
    first, second = gpu.read_rows(tmp_path / "rows.jsonl")
    assert first["note"] == "failed: MemoryError: out of memory" and first["batch"] == 16 and second["ms"] == 1.0


def test_wrong_part_is_refused():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/gpu.py", "--device", "cpu", "--parts", "kernel"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "no part kernel; there is facts, kernels" in done.stderr
