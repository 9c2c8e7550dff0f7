"""What an export is doing, and how long each step took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from fbqat_hub import progress
from fbqat_hub.export.memory import trim_heap


class Progress(progress.Progress):
    """Progress over named steps, and the seconds that each took; closed at the end of its `with` block.

    Args:
        steps: how many there will be.
        shown: whether to show it.
    """

    def __init__(self, steps: int, shown: bool) -> None:
        super().__init__("export", steps, "step", shown=shown)
        self.shown = shown
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """One step of that name; memory that it freed goes back to the system."""
        self.stage(f"export, {name}")
        start = time.perf_counter()
        yield
        trim_heap()
        self.seconds[name] = round(time.perf_counter() - start, 3)
        self.update()
