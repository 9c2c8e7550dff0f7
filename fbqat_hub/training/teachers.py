"""The tiny teachers that ship, by the name a recipe gives them."""

from __future__ import annotations

from fbqat_hub.families import FAMILIES
from fbqat_hub.files import shipped

SHIPPED = {
    f"fbqat-hub/{family.tiny}-openmoji": shipped("training/teachers") / family.tiny
    for family in FAMILIES.values()
    if family.tiny
}


def resolve_teacher(name: str) -> str:
    """The folder of a teacher that ships, else ``name`` itself: a Hub id, or a folder."""
    return str(SHIPPED[name]) if name in SHIPPED else name
