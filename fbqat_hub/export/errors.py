"""What an export fails with."""

from __future__ import annotations


class ExportError(ValueError):
    """The export stopped, in one line: what failed, the value, the limit, what to do. Nothing is left at the output
    path."""
