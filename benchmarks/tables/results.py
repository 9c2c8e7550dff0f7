"""Where the repository keeps what its benchmarks measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def measured(name: str) -> Any:
    """What a file of the results holds."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))
