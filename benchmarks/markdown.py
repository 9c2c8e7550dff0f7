"""The one way the benchmarks' pages write a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, no newline at its end."""
    lines = ["|---" * len(head) + "|"] + [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([f"| {' | '.join(head)} |", *lines])
