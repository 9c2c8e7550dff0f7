"""Tables of the HTP export."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from benchmarks.markdown import markdown
from benchmarks.tables.results import RESULTS
from fbqat_hub.evaluation.results import Record, read_records
from fbqat_hub.export.htp.targets import TARGETS
from fbqat_hub.export.onnx.precision import OP_KINDS
from fbqat_hub.families import FAMILIES


def measured_at_true_size(name: str) -> list[tuple[Record, float]]:
    """The HTP suite's SQNR records whose ``extra`` has ``name``, each with its run's peak memory in GB."""
    found = [record for record in read_records(RESULTS / "htp.json") if name in record.extra]
    peaks = {record.extra[name]: record.value * 2**20 / 1e9 for record in found if record.metric == "peak_rss_mib"}
    return [(record, peaks[record.extra[name]]) for record in found if record.metric == "sqnr_db"]


def true_size_table() -> str:
    """Denoisers of true size exported for the HTP, by `benchmarks.htp_true_size`."""
    head = (
        "model", "packed weights", "binary", "spill/fill", "export", "compile", "emulate", "probe", "processor time",
        "peak RAM", "emulator to CPU", "to torch",
    )  # fmt: skip
    rows, notes = [], []
    for record, peak in measured_at_true_size("model"):
        extra = record.extra
        cost, steps = extra["cost"], extra["steps_seconds"]
        graphs = f"{extra['graphs']} graphs" if extra["graphs"] > 1 else "1 graph"
        rows.append(
            [
                f"`{extra['model']}`: {extra['shape']}; {graphs}",
                f"{extra['packed_weights'] / 1e6:.0f} M",
                f"{cost['binary_bytes'] / 1e6:.0f} MB",
                f"{cost['spill_fill_bytes'] / 1e6:.1f} MB",
                f"{extra['export_seconds']:.0f} s",
                *(f"{steps[step]:.0f} s" for step in ("compile", "emulate", "probe")),
                f"{extra['cpu_seconds']:.0f} s" if "cpu_seconds" in extra else "not measured",
                f"{peak:.2f} GB",
                f"{extra['emulator_vs_cpu_qdq_db']:.1f} dB",
                f"{record.value:.1f} dB",
            ]
        )
        notes.append(f"{extra['machine_was']}, torch on {extra['threads']} of its threads")
    return f"{markdown(head, rows)}\n\nThe machine was: {'; '.join(dict.fromkeys(notes))}."


def htp_whole_table() -> str:
    """Whole models in one bundle each, by `benchmarks.htp_whole`."""
    return "\n\n".join(_whole(record, peak) for record, peak in measured_at_true_size("bundle"))


def _whole(record: Record, peak: float) -> str:
    head = (
        "part", "graphs", "binaries", "the largest", "spill/fill", "trace, calibrate, quantize", "compile", "emulate",
        "emulator to CPU, first graph", "CPU to torch, all graphs",
    )  # fmt: skip
    extra = record.extra
    rows = [
        (
            f"`{each['part']}`",
            str(each["graphs"]),
            f"{each['binary_bytes'] / 1e6:,.0f} MB",
            f"{each['largest_binary_bytes'] / 1e6:.0f} MB",
            f"{each['spill_fill_bytes'] / 1e6:.1f} MB",
            f"{sum(each['seconds'][step] for step in ('trace', 'calibrate', 'quantize')):.0f} s",
            *(f"{each['seconds'][step]:.0f} s" for step in ("compile", "emulate")),
            f"{each['emulator_vs_cpu_qdq_db']:.1f} dB",
            f"{each['cpu_qdq_vs_torch_packed_db']:.1f} dB",
        )
        for each in extra["parts"]
    ]
    took, sizes = extra["export_seconds"] / 60, (extra["bundle_bytes"] / 1e9, extra["table_bytes"] / 1e9)
    return (
        f"{extra['shape']}:\n\n{markdown(head, rows)}\n\n"
        f"One command, `fbqat export ... {extra['options']}`: {took:.1f} minutes, peak RAM "
        f"{peak:.2f} GB with all its processes, {sizes[0]:.2f} GB on disk, of which {sizes[1]:.2f} GB are the token "
        f"embeddings. The machine was: {extra['machine_was']}. By "
        f"`python -m benchmarks.htp_whole --model {extra['bundle']}`."
    )


def htp_parts_table() -> str:
    """Text encoders and decoders at true width, by `benchmarks.htp_parts`."""
    head = ("part", "weights of the whole", "binary", "compile", "peak RAM", "emulator to CPU", "to torch")
    rows = [
        (
            f"`{record.extra['part']}`: {record.extra['shape']}",
            f"{record.extra['parameters_of_all_layers'] / 1e9:.2f} G",
            f"{record.extra['cost']['binary_bytes'] / 1e6:.0f} MB",
            f"{record.extra['compile_seconds']:.0f} s",
            f"{peak:.2f} GB",
            f"{record.extra['emulator_vs_cpu_qdq_db']:.1f} dB",
            f"{record.value:.1f} dB",
        )
        for record, peak in measured_at_true_size("part")
    ] + [
        (
            f"`{record.extra['part']}`: {record.extra['shape']}",
            f"{record.extra['parameters_of_all_layers'] / 1e9:.2f} G",
            f"{record.extra['cost']['binary_bytes'] / 1e6:.0f} MB",
            f"{record.extra['compile_seconds']:.0f} s",
            f"{record.value * 2**20 / 1e9:.2f} GB",
            "not run",
            "not run",
        )
        for record in read_records(RESULTS / "htp.json")
        if record.metric == "peak_rss_mib" and "part" in record.extra and "emulator_vs_cpu_qdq_db" not in record.extra
    ]
    encoders = [
        (record.extra["cost"]["constant_bytes"] / 1e9, peak)
        for record, peak in measured_at_true_size("part")
        if "tokens" in record.extra["shape"]
    ]
    slope, base = np.polyfit(*zip(*encoders, strict=True), 1)
    error = max(abs(base + slope * size - peak) for size, peak in encoders)
    return (
        f"{markdown(head, rows)}\n\nPeak RAM of the text encoders' graphs is {base:.2f} GB and {slope:.0f} bytes a "
        f"weight, to within {error:.2f} GB."
    )


def htp_tiles_table() -> str:
    """Pictures decoded in tiles against whole ones, by `benchmarks.decoder_tiles`."""
    found = [record for record in read_records(RESULTS / "htp.json") if "tiles_to_original_db" in record.extra]
    rows = [
        (
            record.extra["autoencoder"],
            record.extra["part"],
            str(record.extra["calls"]),
            f"{record.value:.1f}, lowest {record.extra['lowest_db']:.1f}",
            f"{record.extra['tiles_to_original_db']:.1f}",
            f"{record.extra['whole_to_original_db']:.1f}",
        )
        for record in found
    ]
    head = (
        "decoder",
        "picture",
        "calls of a graph",
        "tiles to whole (dB)",
        "tiles to original (dB)",
        "whole to original (dB)",
    )
    return f"{markdown(head, rows)}\n\nMean PSNR of {found[0].n} pictures. By `{found[0].command}`."


def htp_decoder_table() -> str:
    """The 16-channel decoder between its group norms at true width, by `benchmarks.htp_decoder`."""
    (found,) = (record for record in read_records(RESULTS / "htp.json") if "picture_sqnr_db" in record.extra)
    stages = found.extra["stages"]
    by_map: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for each in stages:
        rows, columns = (each["stage"]["factor"] * side for side in each["stage"]["map"])
        by_map[f"{rows} x {columns}"].append(each)
    head = (
        "makes", "graphs", "calls of them", "binaries", "compile", "largest spill/fill", "emulated", "a call in",
        "emulator to CPU, lowest", "to torch, lowest",
    )  # fmt: skip
    lines = []
    for size, each in by_map.items():
        ran = [stage for stage in each if "emulate_seconds" in stage]
        took = [stage["emulate_seconds"] for stage in ran]
        lines.append(
            (
                size,
                str(len(each)),
                str(sum(stage["calls"] for stage in each)),
                f"{sum(stage['binary_bytes'] for stage in each) / 1e6:.1f} MB",
                f"{sum(stage['compile_seconds'] for stage in each):.0f} s",
                f"{max(stage['spill_fill_bytes'] for stage in each) / 1e6:.1f} MB",
                f"{len(ran)} of {len(each)}",
                *(
                    (
                        f"{min(took):.0f} to {max(took):.0f} s",
                        f"{min(stage['emulator_vs_cpu_qdq_db'] for stage in ran):.1f} dB",
                        f"{min(stage['emulator_vs_torch_db'] for stage in ran):.1f} dB",
                    )
                    if ran
                    else ("not run",) * 3
                ),
            )
        )
    return (
        f"{markdown(head, lines)}\n\nThe picture of {found.extra['picture']} px by the exact CPU reference of all "
        f"{len(stages)} graphs is {found.extra['picture_sqnr_db']:.1f} dB (PSNR {found.value:.1f}) from torch's. Peak "
        f"RAM {found.extra['peak_rss_mib'] * 2**20 / 1e9:.2f} GB. By `{found.command}`."
    )


def htp_targets_table() -> str:
    """Chips that a bundle can be made for, and what was compiled and emulated, by `benchmarks.htp_targets`."""
    measured = {record.extra["soc"]: record for record in read_records(RESULTS / "htp.json") if "soc" in record.extra}
    head = (
        "`--soc`", "chip", "HTP", "compiled for", "nodes elsewhere", "binaries (MB)", "ran on", "to the CPU (dB)",
        "to torch (dB)", "picture (dB)",
    )  # fmt: skip
    rows = []
    for name, target in TARGETS.items():
        cells = ("not compiled here", *["–"] * 6)
        if record := measured.get(name):
            found = record.extra
            cells = (
                found["compatibility_info"] or "not told",
                str(found["nodes_elsewhere"]),
                f"{found['binary_bytes'] / 1e6:.2f}",
                found["ran_on"],
                f"{found['emulator_vs_cpu_qdq_db']:.1f}",
                f"{record.value:.1f}",
                f"{found['pictures_psnr_db']:.1f}",
            )
        rows.append((f"`{name}`", target.title, f"v{target.htp_arch}", *cells))
    return markdown(head, rows)


def _bundles() -> list[Record]:
    """One record a family and precision, of `benchmarks.htp_bundles`."""
    return [record for record in read_records(RESULTS / "htp.json") if "precision" in record.extra]


def htp_table() -> str:
    """Parity, pictures and cost of the tiny bundles."""
    head = (
        "family", "precision", "emulator to torch (dB)", "to the CPU (dB)", "CPU to torch (dB)", "pictures (dB)",
        "runner's, from text (dB)", "activations (KB)", "at A16, of M MACs", "binary (MB)", "seconds",
    )  # fmt: skip
    rows = []
    for record in _bundles():
        found, parity = record.extra, record.extra["parity"]
        cost = found["cost"]
        cells = [
            FAMILIES[record.family].title,
            f"`{found['precision']}`",
            *(
                f"{parity[pair]['sqnr_db']:.1f} ({parity[pair]['cosine']:.4f})"
                for pair in ("emulator_vs_torch_packed", "emulator_vs_cpu_qdq", "cpu_qdq_vs_torch_packed")
            ),
            f"{found['pictures_psnr_db']:.1f}",
            ", ".join(f"{value:.1f}" for value in found["runner_psnr_db"].values()),
            f"{cost['activation_bytes'] / 1e3:,.0f}",
            f"{cost['macs_a16'] / cost['macs']:.0%} of {cost['macs'] / 1e6:.0f}",
            f"{cost['binary_bytes'] / 1e6:.2f}",
            f"{found['export_seconds']:.0f}",
        ]
        rows.append(cells)
    return markdown(head, rows)


def htp_text_table() -> str:
    """Parity of the text encoders and the decoder, of the bundles at W4A8 (they are the same in both)."""
    shown = ("emulator_vs_torch_packed", "emulator_vs_cpu_qdq")
    rows = [
        (FAMILIES[record.family].title, f"`{name}`", *(f"{pairs[pair]['sqnr_db']:.1f}" for pair in shown))
        for record in _bundles()
        if record.extra["precision"] == "w4a8"
        for name, pairs in record.extra["graphs"].items()
    ]
    return markdown(("family", "graph", "emulator to torch (dB)", "to the CPU (dB)"), rows)


def htp_ops_table() -> str:
    """What 8 bits cost each kind of op and, of the layers, the group that suffers most."""
    reports = {
        record.family: record.extra["allocation"] for record in _bundles() if record.extra["precision"] == "auto"
    }
    named_of = {family: {each["name"]: each for each in report["candidates"]} for family, report in reports.items()}

    def cell(each: dict[str, Any] | None) -> str:
        return "–" if each is None else f"{each['alone_db']:.1f}, {each['cost'] / 2:.1%}, A{each['bits']}"

    rows = [
        (kind, *(cell(named.get(kind)) for named in named_of.values()))
        for kind in OP_KINDS
        if any(kind in named for named in named_of.values())
    ]
    worst = [
        min((each for name, each in named.items() if name not in OP_KINDS), key=lambda each: each["alone_db"])
        for named in named_of.values()
    ]
    rows.append(("worst layers", *(f"`{each['name']}` {cell(each)}" for each in worst)))
    rows.append(("nothing", *(f"{report['all_at_16_db']:.1f}" for report in reports.values())))
    return markdown(("at 8 bits", *(FAMILIES[family].title for family in reports)), rows)


def htp_gain_table() -> str:
    """`auto` against `w4a8`, a family and target a row."""
    head = (
        "family, precision", "SQNR to torch (dB)", "pictures (dB)", "activation bytes", "MACs at 16 bits",
        "of the cost at 16 bits",
    )  # fmt: skip
    rows = []
    found = {(record.family, record.extra["precision"]): record.extra for record in _bundles()}
    for family, precision in sorted(found, key=lambda each: each[1]):
        if precision == "w4a8":
            continue
        before, after = found[family, "w4a8"], found[family, precision]
        sqnr = [each["parity"]["emulator_vs_torch_packed"]["sqnr_db"] for each in (before, after)]
        wide = [each["cost"]["macs_a16"] / each["cost"]["macs"] for each in (before, after)]
        cells = (
            f"{FAMILIES[family].title}, `{precision}`",
            f"{sqnr[1] - sqnr[0]:+.1f}",
            f"{after['pictures_psnr_db'] - before['pictures_psnr_db']:+.1f}",
            f"{after['cost']['activation_bytes'] / before['cost']['activation_bytes'] - 1:+.0%}",
            f"{wide[0]:.0%} → {wide[1]:.0%}",
            f"{after['allocation']['share_at_16']:.0%}",
        )
        rows.append(cells)
    return markdown(head, rows)


def htp_tuning_table() -> str:
    """Denoisers before and after `--tune`, a family and seed a row, of `benchmarks.htp_tuning`."""
    head = (
        "family, seed", "torch to the CPU, same graph (dB)", "emulator to torch, same graph (dB)",
        "emulator to the packed model (dB)", "emulator to the teacher (dB)", "packed model to the teacher (dB)",
        "picture to the teacher's (dB)", "the packed model's (dB)",
    )  # fmt: skip
    rows = []
    records = [record for record in read_records(RESULTS / "htp.json") if "tuned_steps" in record.extra]
    for record in sorted(records, key=lambda record: list(FAMILIES).index(record.family)):
        found = record.extra
        pictures = found["pictures_psnr_db"]

        def both(name: str, found: dict[str, Any] = found) -> str:
            return " → ".join(f"{found[when][name]['sqnr_db']:.1f}" for when in ("before", "after"))

        cells = (
            f"{FAMILIES[record.family].title}, {record.seed}",
            both("torch_vs_cpu_reference"),
            both("emulator_vs_torch"),
            both("emulator_vs_torch_packed"),
            both("emulator_vs_teacher"),
            f"{found['tuning']['torch_packed_vs_teacher']['sqnr_db']:.1f}",
            f"{pictures['before_vs_teacher']:.1f} → {pictures['after_vs_teacher']:.1f}",
            f"{pictures['packed_vs_teacher']:.1f}",
        )
        rows.append(cells)
    return markdown(head, rows)
