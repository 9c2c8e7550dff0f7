"""Tables of speed and memory on a CPU."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.markdown import markdown
from benchmarks.tables.results import RESULTS, measured
from fbqat_hub.evaluation.results import Record, read_records


def _speed_records() -> list[Record]:
    return [each for each in read_records(RESULTS / "speed-cpu.json") if each.metric == "ms_forward"]


def speed_table() -> str:
    """The CPU benchmark's figures, the main ones."""
    records = [each for each in read_records(RESULTS / "speed-cpu.json") if each.extra["setting"].count(",") < 2]
    rows = [(record.extra["label"], f"{record.value:.4g} {record.unit}") for record in records]
    return markdown(("Sana-600M shape, 2 blocks, 512 px", "value"), rows)


def speed_cpu_table() -> str:
    """All settings of the CPU benchmark."""
    rows = [
        (
            record.extra["setting"],
            f"{record.extra['float32_ms']:.0f}",
            f"{record.value:.0f}",
            _speedup(record.extra),
            f"{kept:.2f}" if (kept := record.extra.get("resident_bytes_a_weight")) else "not measured",
            f"{busy:.0f}" if (busy := record.extra.get("busy")) is not None else "not recorded",
            record.date[:10],
        )
        for record in _speed_records()
    ]
    head = ("", "float32, ms", "W4A8, ms", "times as fast", "bytes per weight in memory", "load average", "date")
    machine = _speed_records()[-1].machine
    return (
        f"{markdown(head, rows)}\n\nMedians of forwards in turn, on {machine['cpu']}, {machine['cores']} cores; of "
        "several processes the one with the median ratio, in brackets the least, the largest and their number. The "
        "load average is that of the machine, our own process included."
    )


def _speedup(extra: dict[str, Any]) -> str:
    ratios = extra.get("speedups", ())
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f}; {len(ratios)})" if len(ratios) > 1 else ""
    return f"{extra['speedup']:.2f}{spread}"


def speed_peers_table(name: str) -> str:
    """Other quantizers, by `benchmarks.speed_peers`; `name`: of its results."""
    found = measured(name)
    has_vnni = "avx512_vnni" in found["machine"]["instruction_sets"]
    timed = sorted((row for row in found["rows"] if "ms" in row), key=lambda row: row["ms"])
    own = next(row["ms"] for row in timed if row["name"] == "fbqat")
    rows = [
        (
            row["name"],
            row["setting"],
            row["dtype"],
            f"{row['ms']:.0f}",
            f"{row['ms_min']:.0f}",
            f"{row['ms'] / own:.2f}",
            f"{row['weights_mib']:.0f}",
            f"{row['error']:.3f}" if "error" in row else "–",
        )
        for row in timed
    ]
    rows += [
        (row["name"], row["setting"], row["dtype"], f"does not run: {row['reason']}", "–", "–", "–", "–")
        for row in found["rows"]
        if "ms" not in row
    ]
    head = (
        "",
        "setting",
        "dtype",
        "a forward, ms",
        "least",
        "of fbqat's",
        "weights in memory, MiB",
        "error of the output",
    )
    packages = ", ".join(sorted({package for row in found["rows"] for package in row["packages"]}))
    return (
        f"{markdown(head, rows)}\n\n"
        f"Median and least of {found['rounds']} rounds, {found['threads']} thread, {found['machine']['cpu']}, "
        f"{'AVX-512 VNNI' if has_vnni else 'AVX2 without VNNI'}, torch {found['versions']['torch']}, "
        f"{found['date'][:10]}. Weights: what the process takes for the model after two forwards, biases and layers "
        "left in float included. Error: norm of the difference to float32's output over its norm. "
        f"{packages}. By `{found['command']}`."
    )


def _speed_details(part: str) -> dict[str, Any]:
    details: dict[str, dict[str, Any]] = measured("speed-details.json")
    return details[part]


def speed_profile_table() -> str:
    """Where the time of a forward goes."""
    found = _speed_details("profile")
    of = {row["model"]: row["ms"] for row in found["rows"]}
    rows = [
        (kind, *(f"{ms[kind]:.1f} ({ms[kind] / sum(ms.values()):.0%})" for ms in of.values())) for kind in of["packed"]
    ]
    rows.append(("all", *(f"{sum(ms.values()):.0f}" for ms in of.values())))
    head = ("ms of a forward", *of)
    return f"{markdown(head, rows)}\n\nBy `{found['command']}`, {found['machine']['cpu']}, {found['date'][:10]}."


def speed_layer_table() -> str:
    """Ways to compute a layer, in parts."""
    found = _speed_details("layer")
    rows = [(row["part"], row["way"], f"{row['ms']:.2f}") for row in found["rows"]]
    return f"{markdown(('part', 'way', 'ms'), rows)}\n\nBy `{found['command']}`, {found['date'][:10]}."


def speed_shared_table() -> str:
    """A trial: the input of q, k and v quantized once."""
    found = _speed_details("shared")
    rows = [(row["way"], f"{row['ms']:.0f}") for row in found["rows"]]
    return f"{markdown(('quantization of an input', 'a forward, ms'), rows)}\n\nBy `{found['command']}`."


def speed_loading_table() -> str:
    """What loading a packed pipeline costs."""
    found = _speed_details("loading")

    def median(name: str) -> float:
        return statistics.median(row[name] for row in found["rows"])

    first = statistics.median(row["first_forward_seconds"] - row["later_forward_seconds"] for row in found["rows"])
    ratio = statistics.median(row["peak_mib"] / row["resident_mib"] for row in found["rows"])
    rows = [
        ("stored weights, text encoder and decoder included", f"{median('stored_mib'):.0f} MiB"),
        ("reading their bytes", f"{median('read_seconds'):.2f} s"),
        ("`from_pretrained`", f"{median('load_seconds'):.2f} s"),
        ("what the first forward takes more than a later one", f"{first:.2f} s"),
        ("memory of the program before", f"{median('program_mib'):.0f} MiB"),
        ("peak memory, loading and first forwards", f"{median('peak_mib'):.0f} MiB"),
        ("memory after the forwards", f"{median('resident_mib'):.0f} MiB"),
        ("peak over resident", f"{ratio:.2f}"),
    ]
    return (
        f"{markdown(('packed Sana-600M shape, 28 blocks, random weights', ''), rows)}\n\n"
        f"Medians of {len(found['rows'])} fresh processes; files not in memory before. By `{found['command']}`, "
        f"{found['date'][:10]}."
    )
