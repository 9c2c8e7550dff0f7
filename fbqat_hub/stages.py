"""What a run keeps of the bit widths that its schedule left: ``RUN/stages/w6/transformer``, a packed denoiser each.

The other components are the run's own. A stage's folder also holds what was measured of it: ``results.json``,
``images/`` and its card.
"""

from __future__ import annotations

from pathlib import Path


def branch_name(bits: int) -> str:
    """What a width is called, as a folder and as a branch on the Hub.

    >>> branch_name(6)
    'w6'
    """
    return f"w{bits}"


def stage_folder(run: Path, bits: int) -> Path:
    """Where a run keeps its stage of a width."""
    return run / "stages" / branch_name(bits)


def stages_of(run: Path) -> dict[int, Path]:
    """Width -> folder of every stage that a run kept, the widest first."""
    folders = {bits: stage_folder(run, bits) for bits in range(8, 2, -1)}
    return {bits: folder for bits, folder in folders.items() if (folder / "transformer").is_dir()}


def find_stage(run: Path, bits: int) -> Path:
    """The folder of a stage that a run kept.

    Raises:
        FileNotFoundError: it kept none of this width; says which it kept.
    """
    kept = stages_of(run)
    if bits not in kept:
        has = f"it kept {', '.join(map(str, kept))}" if kept else "it kept none"
        raise FileNotFoundError(
            f"{run} has no stage of {bits} bits; {has}. A recipe keeps stages with keep_stages: [8, 6], where its "
            "schedule has these widths (method fbqat-paper)."
        )
    return kept[bits]
