"""What this machine's processor is and can do, as Linux tells it."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def cpuinfo() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def instruction_sets() -> frozenset[str]:
    """Those that the processor has and the system lets programs use, by Linux' names: "avx2", "avx512_vnni"."""
    return frozenset((cpuinfo().get("flags") or cpuinfo().get("Features") or "").split())
