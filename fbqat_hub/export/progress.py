"""What an export is doing, as a bar, and how long each step took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self


class Progress:
    """A bar over named steps, and the seconds each took; closed at the end of its `with` block.

    Args:
        steps: how many there will be.
        shown: whether there is a bar.
    """

    def __init__(self, steps: int, shown: bool) -> None:
        from tqdm.auto import tqdm

        self.bar = tqdm(total=steps, disable=not shown, desc="export", unit="step")
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """One step of that name."""
        self.bar.set_postfix_str(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
        self.bar.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()
