"""The memory that was computed is near the one that was measured."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.training_memory import RESULTS, Row, estimate, measure


def test_the_estimate_is_within_a_tenth_of_what_was_measured() -> None:
    rows = json.loads(RESULTS.read_text())
    assert {row["recipe"] for row in rows} >= {"sana-600m", "flux-schnell", "sd3.5-medium"}
    for row in rows:
        assert row["estimated_mib"] / row["measured_mib"] == pytest.approx(row["estimated_over_measured"], abs=1e-3)
        assert 0.9 <= row["estimated_over_measured"] <= 1.1, row["name"]


@pytest.mark.parametrize("changes", [{}, {"training": "blockwise", "blockwise": {"samples": 2, "steps": 12}}])
def test_a_row_is_measured(changes: dict[str, Any]) -> None:
    changes = {**changes, "blockwise": {**changes.get("blockwise", {}), "tuning_steps": 0}}
    row = Row("sana-tiny", "tiny", changes=changes)
    found = measure(row)
    assert found["measured_mib"] >= found["program_mib"] > 0
    assert found["seconds_per_step"] > 0
    assert estimate(row.resolved(), row.configs())[0] > 0
