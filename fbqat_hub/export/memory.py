"""Memory of the exporter's own process."""

from __future__ import annotations

import contextlib
import ctypes


def trim_heap() -> None:
    """Give freed memory back to the system: glibc keeps what serialized graphs took (malloc_trim(3))."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
