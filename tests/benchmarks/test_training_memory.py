"""The memory that was computed is near the one that was measured."""

from __future__ import annotations

import json

import pytest

from benchmarks.training_memory import RESULTS


def test_the_estimate_is_within_a_tenth_of_what_was_measured() -> None:
    rows = json.loads(RESULTS.read_text())
    assert {row["recipe"] for row in rows} >= {"sana-600m", "flux-schnell", "sd3.5-medium"}
    for row in rows:
        assert row["estimated_mib"] / row["measured_mib"] == pytest.approx(row["estimated_over_measured"], abs=1e-3)
        assert 0.9 <= row["estimated_over_measured"] <= 1.1, row["name"]
