"""Bundles of one pipeline for several chips, as a table made from their certificates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_HEAD = """\
# Bundles for several chips

One pipeline, a folder for each chip. A context binary runs on the chip that it was compiled for. "Compiled for" is what
the binary itself says: versions of QNN, HTP architecture, SoC, MiB of VTCM. An emulator runs the binaries of any chip;
none ever ran on a phone.

"""


def write_targets(folder: Path, certificates: Mapping[str, Mapping[str, Any]]) -> None:
    """`README.md` in `folder`, of the bundles in it.

    Args:
        certificates: by the name of the bundle's folder.
    """
    (folder / "README.md").write_text(_HEAD + targets_table(certificates) + "\n", encoding="utf-8")


def targets_table(certificates: Mapping[str, Mapping[str, Any]]) -> str:
    """A row per target, Markdown: what was compiled, what was emulated and how near it is to torch."""
    rows = [
        "| folder | chip | compiled for | nodes elsewhere | binaries (MB) | ran on | to the CPU (dB) | to torch (dB) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, certificate in certificates.items():
        parity = certificate["parity"]
        graphs = [certificate, *certificate.get("graphs", {}).values()]
        size = sum(each["cost"]["binary_bytes"] for each in graphs) / 1e6
        elsewhere = sum(each["coverage"]["nodes_elsewhere"] for each in graphs)
        built_for = certificate["read_back"]["compatibility_info"] or "not told"
        rows.append(
            f"| `{name}` | {certificate['asked']['title']} | {built_for} | {elsewhere} | {size:.2f} | "
            f"{certificate['ran_on']} | {parity['emulator_vs_cpu_qdq']['sqnr_db']:.1f} | "
            f"{parity['emulator_vs_torch_packed']['sqnr_db']:.1f} |"
        )
    return "\n".join(rows)
