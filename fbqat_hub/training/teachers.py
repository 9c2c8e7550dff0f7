"""The tiny teachers that ship, by the name a recipe gives them."""

from __future__ import annotations

from fbqat_hub.files import shipped

_FOLDER = shipped("training/teachers")
SHIPPED = {
    f"fbqat-hub/{name}-openmoji": _FOLDER / name
    for name in ("sana-tiny", "pixart-sigma-tiny", "sd3-tiny", "flux-schnell-tiny")
}


def resolve_teacher(name: str) -> str:
    """The folder of a teacher that ships, else ``name`` itself: a Hub id, or a folder."""
    return str(SHIPPED[name]) if name in SHIPPED else name
