"""The tiny teachers that ship, by the name a recipe gives them."""

from __future__ import annotations

from pathlib import Path

SHIPPED = {"fbqat-hub/sana-tiny-openmoji": Path(__file__).parent / "teachers" / "sana-tiny"}


def resolve_teacher(name: str) -> str:
    """The folder of a teacher that ships, else ``name`` itself: a Hub id, or a folder."""
    return str(SHIPPED[name]) if name in SHIPPED else name
