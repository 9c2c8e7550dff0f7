"""The phones' chips an export can aim at, as data."""

from __future__ import annotations

from collections.abc import Sequence
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


#: Numbers as in ExecuTorch's public table (backends/qualcomm/serialization/qc_schema.py) and QNN's list of supported
#: devices.
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(name="sm8850", title="Snapdragon 8 Elite Gen 5", soc_model=87, htp_arch=81, vtcm_mb=8),
        Target(name="sm8750", title="Snapdragon 8 Elite", soc_model=69, htp_arch=79, vtcm_mb=8),
        Target(name="sm8650", title="Snapdragon 8 Gen 3", soc_model=57, htp_arch=75, vtcm_mb=8),
        Target(name="sm8550", title="Snapdragon 8 Gen 2", soc_model=43, htp_arch=73, vtcm_mb=8),
        Target(name="sc8380xp", title="Snapdragon X Elite", soc_model=60, htp_arch=73, vtcm_mb=8),
    )
}

DEFAULT_SOC = "sm8750"


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


def targets_of(socs: str | Sequence[str]) -> list[Target]:
    """The target of one name, or those of several.

    Raises:
        ExportError: a name that is not in `TARGETS`, one twice, or none.
    """
    names = [socs] if isinstance(socs, str) else socs
    targets = [target_for(name) for name in names]
    if not targets or len(set(targets)) < len(targets):
        raise ExportError(f"soc is {', '.join(names) or 'nothing'}; give one or more of: {', '.join(sorted(TARGETS))}")
    return targets
