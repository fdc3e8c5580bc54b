"""The committed records: old numbers are unchanged since the fields were renamed, and names fit recipes."""

import hashlib
import json

from helpers import ROOT

from otseg.recipes import resolve, run_name

# name -> former name, digest and count; null: trained again since, with the strict crop rule
FORMER = json.loads((ROOT / "tests/golden/records.json").read_text())
RECORDS = {file.stem: json.loads(file.read_text()) for file in sorted((ROOT / "results/runs").glob("*.json"))}


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
    assert set(RECORDS) == set(FORMER)
    former = [entry["was"] for entry in FORMER.values() if entry]
    assert len(set(former)) == len(former) > 0


def test_a_digest_depends_on_every_number_and_their_order():
    record = {"a": [1, 2.5], "b": {"c": 0.1}, "d": True, "e": None, "f": "3"}
    assert numbers(record) == [1, 2.5, 0.1] and digest(record) == digest(record | {"d": False, "f": "4"})
    changed = [{**record, "b": {"c": 0.1 + 2**-56}}, {**record, "a": [2.5, 1]}, {**record, "e": 0}]
    assert len({digest(record), *map(digest, changed)}) == 4


def test_numbers_are_those_of_before():
    for name, former in FORMER.items():
        if former is None:
            continue
        record = RECORDS[name]
        assert len(numbers(record)) == former["count"] and digest(record) == former["numbers"], name


def test_records_that_were_made_again_follow_the_strict_crop_rule():
    again = [RECORDS[name] for name, former in FORMER.items() if former is None]
    assert {record["recipe"]["crop_labels"] for record in again if "recipe" in record} == {"training"}


def test_the_name_is_that_of_the_recipe():
    for name, record in RECORDS.items():
        run, _, evaluation = name.partition("@")
        assert record["name"] == name
        if evaluation:
            assert record["run"] == run and run in RECORDS, name
        else:
            assert run_name(resolve(**record["recipe"])) == name
