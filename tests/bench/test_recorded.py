"""Recorded numbers stay as they were measured, however their file is laid out."""

from __future__ import annotations

import hashlib
import json

import pytest

from bench import record

# The start of the sha256 over all that a result says, its keys sorted. A result that is recorded takes its place here.
SUMS = {
    "2026-11-23-0937b5a9-accuracy.json": "b31b708c04aa4ee494c3084e79033be9",
    "2026-11-24-4676212d-2.json": "df90339d50da0bcf385309db1f3579f7",
    "2026-11-24-4676212d-3.json": "9d53111edac588b0a99cf2be0e19df3b",
    "2026-11-24-4676212d-4.json": "d3c9f379bfa8eb8662c1c85227930ba9",
    "2026-11-24-4676212d.json": "20c2302e79216abdacbf52b9d1bde3d7",
    "2026-11-28-5ed7ae6a-accuracy.json": "cf40c5f8ac0750619428b17cc6b8a207",
    "2026-11-28-65284476-accuracy.json": "6ba729d492ed4f41507382b58d28bd32",
    "2026-11-29-b84a4400-2.json": "29bc8209975959ab6d9749ff4c049c82",
    "2026-11-29-b84a4400.json": "28db53fd51a6ce7e4efa7ac5c10ee44c",
}


def test_every_recorded_result_is_listed() -> None:
    assert {path.name for path in record.RESULTS.glob("*/*.json")} == SUMS.keys()


@pytest.mark.parametrize("name", SUMS)
def test_no_number_has_changed(name: str) -> None:
    (path,) = record.RESULTS.glob(f"*/{name}")
    found = json.loads(path.read_text())
    assert hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest().startswith(SUMS[name])
    assert path.read_text() == record.text(found)


def test_a_row_is_a_line() -> None:
    result = {"schema": 2, "env": {"cpu": "C", "load": [1.0, 2.0]}, "rows": [{"n": 1, "ms": {"min": 0.1}}, {"n": 2}], "errors": []}
    written = record.text(result)
    assert json.loads(written) == result
    assert [json.loads(line.strip().rstrip(",")) for line in written.splitlines() if '"n"' in line] == result["rows"]
