"""The tables of what works are made of what the tests say, and of every test that says something."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.integration import ADAPTERS, OPERATIONS, RESULTS
from fbqat_hub.evaluation.results import read_records
from fbqat_hub.families import FAMILIES
from tests.conftest import ROOT

TESTS = """
import pytest

@pytest.mark.cell("mixed")
@pytest.mark.parametrize("kind", [1, 2, 3])
@pytest.mark.parametrize("family", ["sana", "flux"])
def test_mixed(family, kind, record_property):
    if kind == 2 and family == "flux":
        record_property("state", "refused")
        record_property("error", "no, because")
    record_property("cosine", 1 / kind)

@pytest.mark.cell("absent")
@pytest.mark.parametrize("family", ["sana", pytest.param("flux", marks=pytest.mark.slow)])
def test_absent(family):
    if family == "flux":
        pytest.skip("not in diffusers")

def test_of_nothing():
    raise AssertionError("not to be run")
"""


def collect(tests: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "test_some.py").write_text(tests)
    command = [sys.executable, "-m", "benchmarks.integration", str(folder), "--output", str(folder / "out.json")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_outcomes_are_folded(tmp_path: Path) -> None:
    done = collect(TESTS, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    sana, flux = sorted(read_records(tmp_path / "out.json"), key=lambda record: -record.value)
    assert (sana.family, sana.value, sana.n) == ("sana", 2, 4)
    assert {cell["state"] for cell in sana.extra["cells"].values()} == {"works"}
    assert flux.extra == {
        "part": OPERATIONS,
        "cells": {
            "mixed": {"state": "refused", "tests": 3, "error": "no, because", "cosine": pytest.approx(1 / 3)},
            "absent": {"state": "not in diffusers", "tests": 1},
        },
    }
    again = collect(TESTS.replace("absent", "other").replace("mixed", "new"), tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {tuple(record.extra["cells"]) for record in read_records(tmp_path / "out.json")} == {
        ("mixed", "absent", "new", "other")
    }


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ("    assert family == 'sana'", "not every test passed"),
        ("    pytest.skip('no such machine')", "not every test passed"),
        ("    raise KeyError\n\n@pytest.mark.cell('x')\ndef test_of_no_family(): pass", "not one family"),
    ],
)
def test_nothing_is_written_of_tests_that_fail(last: str, message: str, tmp_path: Path) -> None:
    head = '@pytest.mark.cell("last")\n@pytest.mark.parametrize("family", ["sana", "flux"])\ndef test_last(family):\n'
    done = collect(f"{TESTS}\n{head}{last}\n", tmp_path)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert not (tmp_path / "out.json").exists()


def test_the_results_are_of_these_tests() -> None:
    """Of every family, and no cell of a test that is gone; one that was not run yet is said to be so in the table."""
    marks: dict[str, set[str]] = {ADAPTERS: set(), OPERATIONS: set()}
    for path in (ROOT / "tests" / "integrations").glob("test_*.py"):
        part = ADAPTERS if path.stem == "test_peft" else OPERATIONS
        marks[part] |= set(re.findall(r'mark\.cell\("([^"]+)"\)', path.read_text()))
    records = [record for record in read_records(RESULTS) if record.metric == "operations"]
    assert {(record.family, record.extra["part"]) for record in records} == {(f, p) for f in FAMILIES for p in marks}
    for record in records:
        assert set(record.extra["cells"]) <= marks[record.extra["part"]]
