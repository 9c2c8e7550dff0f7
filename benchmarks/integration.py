"""What users do with a packed model, operation by family, as the tests have it that carry the mark ``cell``.

    python -m benchmarks.integration       # -> benchmarks/results/integration.json; then python -m benchmarks.tables

Runs them all, the slow ones too; of given files, or with ``--families``, some of them, whose cells alone are replaced.
The mark names an operation; a parameter of the test is its family. A test that passes says that the operation works
there, or, by ``record_property("state", "refused")``, that it is an error which says what to do; one that is skipped
says that diffusers does not have it. Of several tests of a cell the worst outcome counts. If one fails, nothing is
written.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fbqat_hub.evaluation.results import Record, read_records, versions, write_records
from fbqat_hub.families import FAMILIES

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "integration.json"
COMMAND = "python -m benchmarks.integration"
TESTS = "tests/integrations"
#: The page of a test -> which table it is of; of other pages, ``OPERATIONS``.
ADAPTERS, OPERATIONS = "adapter operations", "operations"
PARTS = {"test_peft": ADAPTERS}
#: The best first.
STATES = ("works", "refused", ABSENT := "not in diffusers")


class Place(NamedTuple):
    """Where the outcome of a test goes."""

    part: str
    operation: str
    family: str


class Outcome(NamedTuple):
    """What a test said."""

    state: str
    error: str
    cosine: float | None


class Cells:
    """A plugin of pytest that runs the tests with the mark only, and keeps what each said."""

    def __init__(self, families: Collection[str] = tuple(FAMILIES)) -> None:
        self.families = families
        self.places: dict[str, list[Place]] = {}
        self.outcomes: dict[Place, list[Outcome]] = defaultdict(list)

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        for item in items:
            operations = [mark.args[0] for mark in item.iter_markers("cell")]
            given = item.callspec.params.values() if hasattr(item, "callspec") else ()
            of = [value for value in given if isinstance(value, str) and value in FAMILIES]
            if operations and len(of) != 1:
                raise pytest.UsageError(f"{item.nodeid} has the mark cell, and not one family among its parameters.")
            if operations and of[0] in self.families:
                part = PARTS.get(item.path.stem, OPERATIONS)
                self.places[item.nodeid] = [Place(part, operation, of[0]) for operation in operations]
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in self.places])
        items[:] = [item for item in items if item.nodeid in self.places]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any) -> Any:
        report = yield
        if report.skipped and not str(report.longrepr[-1]).endswith(ABSENT):
            report.outcome = "failed"  # it says nothing of the operation
        elif report.skipped or (report.when == "call" and report.passed):
            said = dict(report.user_properties)
            state = ABSENT if report.skipped else said.get("state", "works")
            for place in self.places[item.nodeid]:
                self.outcomes[place].append(Outcome(state, said.get("error", ""), said.get("cosine")))
        return report


def records(outcomes: Mapping[Place, Sequence[Outcome]], known: Iterable[Record] = ()) -> list[Record]:
    """One a family and table: how many operations work, and what each came to.

    Args:
        known: earlier ones, whose other cells are kept.
    """
    cells: dict[tuple[str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for record in known:
        if record.metric == "operations":
            cells[record.extra["part"], record.family] = dict(record.extra["cells"])
    for place, said in outcomes.items():
        cell: dict[str, Any] = {"state": max((each.state for each in said), key=STATES.index), "tests": len(said)}
        if cell["state"] == "refused":
            cell["error"] = next(each.error for each in said if each.state == "refused")
        if cosines := [each.cosine for each in said if each.cosine is not None]:
            cell["cosine"] = min(cosines)
        cells[place.part, place.family][place.operation] = cell
    return [
        Record(
            suite="integration",
            family=family,
            method="ptq-mse",
            metric="operations",
            value=sum(cell["state"] == "works" for cell in found.values()),
            n=sum(cell["tests"] for cell in found.values()),
            seed=0,
            command=COMMAND,
            versions=versions("peft"),
            extra={"part": part, "cells": found},
        )
        for (part, family), found in cells.items()
        if any((place.part, place.family) == (part, family) for place in outcomes)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", default=[TESTS], help=f"files or folders of tests (default: {TESTS})")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--output", type=Path, default=RESULTS, help="results file")
    options = parser.parse_args()
    cells = Cells(options.families)
    status = pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *options.tests], plugins=[cells])
    if status:
        print("Nothing is written: not every test passed.", file=sys.stderr)
        return int(status)
    partly = options.tests != [TESTS] or set(options.families) != set(FAMILIES)
    made = records(cells.outcomes, read_records(options.output) if partly and options.output.exists() else ())
    errors = [cell.get("error", "") for each in made for cell in each.extra["cells"].values()]
    if leaks := [error for error in errors if re.search(r"\s/\w+/", error)]:
        raise ValueError(f"an error names a path of this machine: {leaks[0]}")
    write_records(options.output, made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
