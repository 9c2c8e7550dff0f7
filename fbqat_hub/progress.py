"""How far a stage is: a bar on a terminal or in a notebook; elsewhere, in a log say, a plain line now and then.

tqdm draws the bars: huggingface_hub brings it along, so it costs no dependency.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Self, TypeVar

Item = TypeVar("Item")
# A plain line at most every so many seconds, and at most every so many percent.
_SECONDS, _PERCENT = 5.0, 10
_bars = True


def plain_lines() -> None:
    """From now on plain lines, on a terminal too: for one of several processes that share it."""
    global _bars
    _bars = False


class Progress:
    """One stage of work of a known length; a context manager.

    Args:
        stage: what is done, e.g. "train fbqat".
        total: its length in units.
        unit: e.g. "step"; "B" for bytes, which are shown as kB, MB and so on.
        start: how much is done already.
        shown: print nothing if False.
    """

    def __init__(self, stage: str, total: int, unit: str, *, start: int = 0, shown: bool = True) -> None:
        self._stage, self._total, self._unit, self._start, self._done = stage, total, unit, start, start
        self._began = self._said = time.monotonic()
        self._percent = _percent(start, total)
        self._shown = shown and total > start
        self._bar: Any = None
        if self._shown and _bars and (sys.stderr.isatty() or "ipykernel" in sys.modules):
            from tqdm.auto import tqdm  # a third of a second, which `fbqat --help` need not take

            self._bar = tqdm(total=total, initial=start, desc=stage, unit=unit, unit_scale=unit == "B")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def stage(self, name: str) -> None:
        """What is done now, where a stage has parts."""
        self._stage = name
        if self._bar is not None:
            self._bar.set_description(name)

    def update(self, units: int = 1, **facts: str) -> None:
        """More of it is done; ``facts`` are numbers to show, e.g. ``loss="1.2e-02"``."""
        self._done += units
        if self._bar is not None:
            self._bar.set_postfix(facts, refresh=False)
            self._bar.update(units)
            return
        now, percent = time.monotonic(), _percent(self._done, self._total)
        due = now - self._said >= _SECONDS and percent >= self._percent + _PERCENT
        if self._shown and (due or self._done == self._total):
            self._said, self._percent = now, percent
            print(self._line(now, percent, facts), file=sys.stderr, flush=True)

    def _line(self, now: float, percent: int, facts: dict[str, str]) -> str:
        """
        >>> Progress("train", 400, "step", start=40)._line(time.monotonic(), 10, {"loss": "1e-2"})
        'train: 40 of 400 steps, 10%, 0 s, loss 1e-2'
        >>> half_done = Progress("train", 400, "step")
        >>> half_done.update(100)
        >>> half_done._line(half_done._began + 60, 25, {})
        'train: 100 of 400 steps, 25%, 60 s, about 180 s left'
        >>> Progress("generate", 9, "batch")._line(time.monotonic(), 0, {})
        'generate: 0 of 9 batches, 0%, 0 s'
        """
        if self._unit == "B":
            sizes = (f"{self._done / 1e6:.1f}", f"{self._total / 1e6:.1f} MB")
        else:
            plural = "" if self._total == 1 else "es" if self._unit.endswith("ch") else "s"
            sizes = (str(self._done), f"{self._total} {self._unit}{plural}")
        parts = [" of ".join(sizes), f"{percent}%", f"{now - self._began:.0f} s"]
        if self._start < self._done < self._total:
            left = (now - self._began) * (self._total - self._done) / (self._done - self._start)
            parts.append(f"about {left:.0f} s left")
        return f"{self._stage}: {', '.join([*parts, *(f'{name} {value}' for name, value in facts.items())])}"


def each(items: Sequence[Item], stage: str, unit: str, *, shown: bool = True) -> Iterator[Item]:
    """The items, one after the other, as a stage."""
    with Progress(stage, len(items), unit, shown=shown) as progress:
        for item in items:
            yield item
            progress.update()


@contextlib.contextmanager
def only_ours() -> Iterator[None]:
    """No bars of `datasets` for a while, and none of the Hub's where nobody watches; loading has none of its own."""
    quiet = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}  # read when it is imported
    if not sys.stderr.isatty():
        quiet["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    before = {name: os.environ.get(name) for name in quiet}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    imported = sys.modules.get("datasets")
    shown = imported is not None and imported.is_progress_bar_enabled()
    if imported is not None and shown:
        imported.disable_progress_bars()
    try:
        yield
    finally:
        for name, was in before.items():
            if was is None:
                os.environ.pop(name, None)
        if imported is not None and shown:
            imported.enable_progress_bars()


def _percent(done: int, total: int) -> int:
    return 100 * done // total if total else 100
