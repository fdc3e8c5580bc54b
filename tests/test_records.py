"""The committed records: their numbers are unchanged since the fields were renamed, and names fit recipes."""

import hashlib
import json
from pathlib import Path

import pytest

from otseg.recipes import resolve, run_name

ROOT = Path(__file__).parents[1]
FORMER = json.loads((ROOT / "tests/golden/records.json").read_text())  # name -> former name, digest and count
FILES = sorted((ROOT / "results/runs").glob("*.json"))


def numbers(value):
    "All numbers of a record in their order. Booleans and None are not numbers."
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def digest(record):
    return hashlib.sha256(" ".join(map(repr, numbers(record))).encode()).hexdigest()[:16]


def test_no_record_is_missing_or_new():
    assert {file.stem for file in FILES} == set(FORMER)
    assert len({former["was"] for former in FORMER.values()}) == len(FORMER)


def test_a_digest_depends_on_every_number_and_their_order():
    record = {"a": [1, 2.5], "b": {"c": 0.1}, "d": True, "e": None, "f": "3"}
    assert numbers(record) == [1, 2.5, 0.1] and digest(record) == digest(record | {"d": False, "f": "4"})
    changed = [{**record, "b": {"c": 0.1 + 2**-56}}, {**record, "a": [2.5, 1]}, {**record, "e": 0}]
    assert len({digest(record), *map(digest, changed)}) == 4


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_numbers_are_those_of_before(file):
    record, former = json.loads(file.read_text()), FORMER[file.stem]
    assert record["name"] == file.stem
    assert len(numbers(record)) == former["count"] and digest(record) == former["numbers"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_name_is_that_of_the_recipe(file):
    record = json.loads(file.read_text())
    run, _, evaluation = file.stem.partition("@")
    if evaluation:
        assert record["run"] == run and (ROOT / f"results/runs/{run}.json").is_file()
    else:
        assert run_name(resolve(**record["recipe"])) == run
