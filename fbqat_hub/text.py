"""Tables and lists in what is told to a user."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def columns(rows: Sequence[Sequence[str]], *, numbers_from: int | None = None) -> str:
    """Rows of cells as lines of aligned columns, two spaces apart.

    Args:
        rows: the heading is one of them; all of the same length.
        numbers_from: from this column on cells stand at the right; at the left everywhere if None.

    >>> print(columns([("width", "loss"), ("4", "12.5")], numbers_from=1))
    width  loss
    4      12.5
    """
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = len(sizes) if numbers_from is None else numbers_from
    return "\n".join(
        "  ".join(
            cell.ljust(size) if column < left else cell.rjust(size)
            for column, (cell, size) in enumerate(zip(row, sizes, strict=True))
        ).rstrip()
        for row in rows
    )


def names(items: Iterable[str], most: int = 5) -> str:
    """A list for a message: the first few, and how many more.

    >>> names(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    shown = list(items)
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")
