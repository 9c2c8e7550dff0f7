"""The phones' chips an export can aim at, as data."""

from __future__ import annotations

from dataclasses import dataclass

from fbqat_hub.export.errors import ExportError


@dataclass(frozen=True, kw_only=True)
class Target:
    """One system-on-chip as QNN names it.

    Attributes:
        name: the key a user types.
        title: the name on the box.
        soc_model: QNN's SoC number. It alone decides what the context binary is for: without it the compiler
            targets an old default (architecture 68), and with it `htp_arch` is ignored.
        htp_arch: the Hexagon tensor processor's version (79 = v79).
        vtcm_mb: on-chip memory the graph may plan with, in MiB (the compiler's own default is 4).
    """

    name: str
    title: str
    soc_model: int
    htp_arch: int
    vtcm_mb: int


TARGETS: dict[str, Target] = {
    "sm8750": Target(name="sm8750", title="Snapdragon 8 Elite", soc_model=69, htp_arch=79, vtcm_mb=8),
}


def target_for(soc: str) -> Target:
    """The target named `soc` (case does not matter).

    Raises:
        ExportError: the name is not in `TARGETS`.

    >>> target_for("SM8750").soc_model
    69
    """
    try:
        return TARGETS[soc.lower()]
    except KeyError:
        raise ExportError(f"unknown soc {soc!r}; known: {', '.join(sorted(TARGETS))}") from None
