"""The tables of a model card, as rows of text: results, what was run where, files, certificate."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fbqat_hub.evaluation.results import METHODS, METRICS, Record
from fbqat_hub.hub.names import is_local, public_name
from fbqat_hub.stages import branch_name
from fbqat_hub.untrusted import read_json

_SUMMARY = ("asked", "read_back", "parity", "pictures")
_ARROWS = {"lower": "↓", "higher": "↑"}
SUITE_TITLES = {
    "method": "Quality against the teacher",
    "speed-cpu": "Speed on a CPU",
    "speed-gpu": "Speed on a GPU",
    "training": "Training",
    "loading": "Loading",
    "htp": "HTP context binary",
    "integration": "Use from other tools",
}


def results_table(records: Sequence[Record], own: str) -> dict[str, Any]:
    """Rows = methods, columns = metrics, both in the order of DESIGN; the own method in bold."""
    columns = by_metric(records)
    header = ["method"]
    for name, group in columns.items():
        counts = {record.n for record in group}
        n = f", n = {max(counts)}" if len(counts) == 1 and max(counts) > 1 else ""
        header.append(f"{METRICS[name].title}{unit_suffix(name)} {_ARROWS[METRICS[name].better]}{n}")
    rows = []
    for method in METHODS:
        cells = [
            _cell([r for r in group if r.method == method], len({r.n for r in group}) > 1) for group in columns.values()
        ]
        if any(cells):
            row = [METHODS[method], *cells]
            rows.append([f"**{cell}**" if cell else "" for cell in row] if method == own else row)
    return {"header": header, "rows": rows}


def _cell(records: Sequence[Record], with_n: bool) -> str:
    """The mean; of one record with its interval or else spread, of several seeds with the spread over them."""
    if not records:
        return ""
    values = [record.value for record in records]
    if len(values) == 1 and records[0].interval:
        low, high = (number(bound, 3) for bound in records[0].interval)
        return f"{number(values[0])} [{low}, {high}]" + f" (n = {records[0].n})" * with_n
    spread = statistics.stdev(values) if len(values) > 1 else records[0].spread
    notes = [f"n = {records[0].n}"] * with_n + [f"{len(values)} seeds"] * (len(values) > 1)
    shown = number(statistics.fmean(values)) + (f" ± {number(spread, 2)}" if spread is not None else "")
    return f"{shown} ({', '.join(notes)})" if notes else shown


class Width(NamedTuple):
    """A bit width of a run: what was measured at it, and the bytes of its denoiser's weights."""

    bits: int
    records: Sequence[Record]
    size: int


def widths_table(widths: Sequence[Width], own: str) -> dict[str, Any]:
    """Rows = bit widths, the last of them the run's own; columns = metrics of the method ``own``, and the size."""
    measured = [[r for r in width.records if r.method == own and r.suite == "method"] for width in widths]
    metrics = list(by_metric(record for records in measured for record in records))
    header = [
        "weights",
        "branch",
        *(f"{METRICS[m].title}{unit_suffix(m)} {_ARROWS[METRICS[m].better]}" for m in metrics),
    ]
    rows = []
    for width, records in zip(widths, measured, strict=True):
        branch = f"`{branch_name(width.bits)}`" + ("" if width is not widths[-1] else " and `main`")
        cells = [_cell(by_metric(records).get(metric, ()), False) for metric in metrics]
        rows.append([f"{width.bits} bits", branch, *cells, _mebibytes(width.size)])
    return {"header": [*header, "denoiser"], "rows": rows}


def checks_table(records: Sequence[Record], certificate: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    """What was run where, and what never was: (what, where, "verified" or "never run")."""
    checks = []
    for suite, title in SUITE_TITLES.items():
        group = [record for record in records if record.suite == suite]
        if group:
            last = group[-1]
            stack = ", ".join(
                f"{name} {last.versions[name]}" for name in ("python", "torch", "diffusers") if name in last.versions
            )
            device = last.machine.get("gpu") or last.machine.get("cpu", "")
            where = f"{device}, {last.machine.get('cores', '?')} cores; {stack}; {last.date[:10]}"
            checks.append((title, where, "verified"))
    if not records:
        checks.append(("Training and evaluation", "anywhere", "never run"))
    if not any(record.machine.get("gpu") for record in records):
        checks.append(("Any of it on a GPU", "CUDA", "never run"))
    emulated = "verified" if certificate else "never run"
    checks.append(("HTP context binary on the emulator", "x86-64 emulator of the Hexagon tensor processor", emulated))
    checks.append(("HTP context binary on a phone", "any Snapdragon", "never run"))
    return checks


def files_of(run: Path) -> list[tuple[str, int, str]]:
    """The files of a run worth downloading: (path, bytes, what it is for), a component's shards summed.

    A component is a folder with both ``config.json`` and safetensors.
    """
    root = run if (run / "model_index.json").is_file() or not (run / "pipeline").is_dir() else run / "pipeline"
    rows = []
    for folder in sorted(path.parent for path in root.glob("*/config.json")):
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        if weights:
            rows.append((f"{folder.relative_to(run).as_posix()}/", weights, "diffusers, CPU or GPU"))
    return rows + [
        (file.relative_to(run).as_posix(), file.stat().st_size, "HTP context binary, phone")
        for file in sorted((run / "htp").rglob("*.bin"))
    ]


def files_table(files: Iterable[tuple[str, int, str]]) -> list[tuple[str, str, str]]:
    """(path, size, what it is for), and what each use takes altogether where it is of several files."""
    rows: list[tuple[str, str, str]] = []
    uses: dict[str, list[int]] = {}
    for path, size, use in files:
        rows.append((f"`{path}`", _mebibytes(size), use))
        uses.setdefault(use, []).append(size)
    return rows + [("together", _mebibytes(sum(sizes)), use) for use, sizes in uses.items() if len(sizes) > 1]


def htp_certificates(run: Path) -> list[dict[str, Any]]:
    """The certificates of a run's HTP bundle, or bundles of several SoCs, by their folders' names.

    Raises:
        ValueError: one that is no JSON object.
    """
    paths = [run / "htp" / "certificate.json"]
    found = []
    for path in filter(Path.is_file, paths if paths[0].is_file() else sorted(run.glob("htp/*/certificate.json"))):
        certificate = read_json(path)
        if not isinstance(certificate, dict):
            raise ValueError(f"{path} holds a JSON {type(certificate).__name__}; an object is needed: export again.")
        found.append(certificate)
    return found


def certificate_tables(certificate: Mapping[str, Any]) -> dict[str, Any]:
    """What a card shows of a certificate, whatever its keys.

    Returns:
        ``summary``: rows (dotted name, value) of what was asked, read back and compared; all rows
        where the certificate has none of these. ``rest``: the other rows. ``tensors``: header and rows of the
        graph's inputs and outputs, where they are described.
    """
    described = certificate.get("tensors")
    tensors = [
        {"tensor": kind, **tensor}
        for kind, group in (described.items() if isinstance(described, Mapping) else ())
        for tensor in (group if isinstance(group, list) else ())
        if isinstance(tensor, Mapping)
    ]
    columns = list(dict.fromkeys(name for tensor in tensors for name in tensor))
    rows = _flat({name: value for name, value in certificate.items() if name != "tensors" or not tensors})
    summary = [row for row in rows if row[0].split(".")[0] in _SUMMARY] or rows
    return {
        "summary": summary,
        "rest": [row for row in rows if row not in summary],
        "tensors": {"header": columns, "rows": [[_text(t[c], 9) if c in t else "" for c in columns] for t in tensors]},
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted name, value) of every leaf; of a list of objects only their number."""
    rows: list[tuple[str, str]] = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
            rows.append((prefix + name, f"{len(value)} entries"))
        else:
            rows.append((prefix + name, _text(value)))
    return rows


def _text(value: Any, digits: int = 4) -> str:
    """A value of the certificate as a cell of a table, without local paths."""
    if isinstance(value, float):
        return number(value, digits)
    if isinstance(value, list):
        return ", ".join(_text(item, digits) for item in value)
    shown = public_name(value) if isinstance(value, str) and is_local(value) else str(value)
    return shown.replace("|", "\\|").replace("\n", " ")


def by_metric(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records grouped by metric, in the order of `METRICS`."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.metric, []).append(record)
    return {name: groups[name] for name in METRICS if name in groups}


def unit_suffix(metric: str) -> str:
    """The unit for a heading: " (dB)", or nothing for a plain number and where the title has it."""
    unit = METRICS[metric].unit
    return "" if unit == "1" or unit in METRICS[metric].title else f" ({unit})"


def number(value: float, digits: int = 4) -> str:
    """A number as cards show it, to 4 significant digits."""
    return f"{value:.{digits}g}"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"
