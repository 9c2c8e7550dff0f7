"""Every fault at every step of publish and pull comes to what docs/publishing.md says, and nothing half-done stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hub.faults import FAULTS, STEPS, advice_table, block, on_page, outcome
from tests.hub.server import LoopbackHub

PLACES = [(verb, step) for verb, steps in STEPS.items() for step in steps]


@pytest.mark.parametrize(("verb", "step"), PLACES)
def test_the_hub_is_down(verb: str, step: str, hub: LoopbackHub, tmp_path: Path) -> None:
    assert outcome(hub, verb, step, 503, tmp_path) == on_page()[verb, step, 503]


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "step"), PLACES)
def test_every_fault(verb: str, step: str, hub: LoopbackHub, tmp_path: Path) -> None:
    stated = {fault: on_page()[verb, step, fault] for fault in FAULTS}
    assert {fault: outcome(hub, verb, step, fault, tmp_path / str(fault)) for fault in FAULTS} == stated


def test_the_page_says_what_errors_say() -> None:
    assert block("advice") == advice_table()
