"""Write the tables of README.md and docs/ from benchmarks/results/, between their markers.

python -m benchmarks.tables            # rewrite
python -m benchmarks.tables --check    # exit 1 if a table is not what the results say
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.integration import ADAPTERS, OPERATIONS
from benchmarks.markdown import markdown
from benchmarks.method.findings import CHOICES, JUDGED, OLDER, Finding, findings
from benchmarks.method.judge import judge_rows
from benchmarks.method.rows import OURS, Results
from benchmarks.method.widths import half_bits
from benchmarks.rates import rates_table
from benchmarks.speed_gpu import speed_gpu_table
from benchmarks.triton_code import triton_code_table
from fbqat_hub.evaluation.results import METHODS, METRICS, Record, read_records
from fbqat_hub.export.htp.targets import TARGETS
from fbqat_hub.export.onnx.precision import OP_KINDS
from fbqat_hub.families import FAMILIES
from fbqat_hub.training.recipe import RECIPES, load_recipe

_ENCODERS = {"text encoders, float denoiser": "float", "text encoders, w4a8 denoiser": "W4A8"}
_SDNQ = "SDNQ, pictures against the packed pipeline's"
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FILES = (
    "README.md", "docs/method.md", "docs/htp.md", "docs/text-encoders.md", "docs/exits.md", "docs/integrations.md",
    "docs/lora.md", "docs/real-models.md", "docs/speed.md", "docs/speed-gpu.md", "training/README.md",
)  # fmt: skip


def measured_at_true_size(name: str) -> list[tuple[Record, float]]:
    """The HTP suite's SQNR records whose ``extra`` has ``name``, each with its run's peak memory in GB."""
    found = [record for record in read_records(RESULTS / "htp.json") if name in record.extra]
    peaks = {record.extra[name]: record.value * 2**20 / 1e9 for record in found if record.metric == "peak_rss_mib"}
    return [(record, peaks[record.extra[name]]) for record in found if record.metric == "sqnr_db"]


def demo_table() -> str:
    """Methods x metrics of one `make demo`."""
    columns = ("bits_per_weight", "kd_loss", "psnr", "ssim")
    rows: dict[str, dict[str, Record]] = defaultdict(dict)
    for record in read_records(RESULTS / "method.json"):
        if record.method != "teacher":  # only its memory
            rows[record.method][record.metric] = record
    head = ["method"] + [f"{METRICS[name].title} {'↓' if METRICS[name].better == 'lower' else '↑'}" for name in columns]
    cells = [
        [METHODS[method], *(f"{found[name].value:.4g}" for name in columns)]
        for method in METHODS
        if (found := rows.get(method))
    ]
    one, average = next(iter(rows.values())), load_recipe("sana-tiny").quantization.average_bits
    budget = rows["fbqat"]["kd_loss"].extra
    trained = (
        f" ({budget['steps']} steps of {budget['batch_size']} at a relative learning rate of "
        f"{budget['learning_rate']:.1e})"
    )
    return (
        f"{markdown(head, cells)}\n\n"
        f"Tiny Sana, weights of 4 bits and of 8 where they matter most, {average:g} on average without scales, dynamic "
        f"INT8 activations, seed {one['kd_loss'].seed}, one run each"
        f"{trained}; "
        f"{one['kd_loss'].n} held-out draws for the loss, {one['psnr'].n} pictures from equal seeds for the rest. "
        "Remade by `make results`."
    )


def judge_table() -> str:
    """Methods over draws of the teacher's sampler."""
    return judge_rows(Results.load()).rstrip()


def findings_table(chosen: Sequence[Finding]) -> str:
    """What parts of the method change."""
    return findings(Results.load(), chosen).rstrip()


def half_bits_table() -> str:
    """What each half bit buys."""
    return half_bits(Results.load()).rstrip()


_BLOCKWISE = {
    "GPTQ, not trained": ("uniform-4", "ptq-gptq", 0),
    "block by block": ("uniform-4", "fbqat staircase blockwise", 0),
    "end to end, 200 steps (equal time)": ("uniform-4", OURS, 200),
    "block by block, about 3 times the time": ("uniform-4", "fbqat staircase blockwise x4", 0),
    "end to end, 400 steps": ("uniform-4", OURS, 400),
    "GPTQ, not trained, 4.5 bits on average": ("mixed-4.5", "ptq-gptq", 0),
    "block by block, 4.5 bits on average": ("mixed-4.5", "fbqat staircase blockwise", 0),
    "end to end, 400 steps, 4.5 bits on average": ("mixed-4.5", OURS, 400),
}


def blockwise_table() -> str:
    """Block-wise training beside GPTQ and the default, end to end."""
    results, rows = Results.load(), []
    families = [name for name in FAMILIES if results.of(track="uniform-4", family=name)]
    for title, (track, method, steps) in _BLOCKWISE.items():
        cells = []
        for family in families:
            of_all = results.of(track=track, method=method, steps=steps, family=family)
            losses = [1e3 * row["test"] for row in of_all]
            spread = f" ± {statistics.stdev(losses):.2f}" if len(losses) > 1 else ""
            cells.append(f"{statistics.fmean(losses):.2f}{spread}")
        rows.append((title, *cells))
    timed = [
        [row["train_seconds"] for row in results.of(track="uniform-4", method=method, steps=steps)]
        for _, method, steps in (_BLOCKWISE["block by block"], _BLOCKWISE["end to end, 200 steps (equal time)"])
    ]
    blocks, whole = map(statistics.fmean, timed)
    return (
        f"{markdown(('loss ×1e-3', *(FAMILIES[name].title for name in families)), rows)}\n\n"
        "Held-out distillation loss, test split, mean and standard deviation of three seeds (one, where no deviation "
        f"is given). Mean time on one core, GPTQ included: {blocks:.0f} s block by block, {whole:.0f} s end to end, "
        "200 steps. Measured with the soft staircase, by fbqat_hub 0.1; today by `python -m benchmarks.method --tracks "
        "uniform-4 mixed-4.5 --methods 'fbqat blockwise' --no-pictures`."
    )


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
    head = ("", "float32, ms", "W4A8, ms", "times as fast", "bytes a weight in memory", "load average", "date")
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


def speed_peers_table() -> str:
    """Other quantizers, by `benchmarks.speed_peers`."""
    found = json.loads((RESULTS / "speed-peers.json").read_text(encoding="utf-8"))
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
        f"Median and least of {found['rounds']} rounds, {found['threads']} thread, {found['machine']['cpu']}, AVX2 "
        f"without VNNI, torch {found['versions']['torch']}, {found['date'][:10]}. Weights: what the process takes for "
        "the model after two forwards, biases and layers left in float included. Error: norm of the difference to "
        f"float32's output over its norm. {packages}. By "
        f"`{found['command']}`."
    )


def _speed_details(part: str) -> dict[str, Any]:
    details: dict[str, dict[str, Any]] = json.loads((RESULTS / "speed-details.json").read_text(encoding="utf-8"))
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


def text_encoders_table() -> str:
    """What quantized text encoders do to the pictures, by `benchmarks.text_encoders`."""
    records = [each for each in read_records(RESULTS / "integration.json") if each.extra.get("part") in _ENCODERS]
    families = list(dict.fromkeys(record.family for record in records))
    value = {(each.extra["part"], each.extra["precision"], each.family): each for each in records}
    rows = [
        [denoiser, precision, *(f"{value[part, precision, family].value:.1f}" for family in families)]
        for part, denoiser in _ENCODERS.items()
        for precision in dict.fromkeys(each.extra["precision"] for each in records if each.extra["part"] == part)
    ]
    return (
        f"{markdown(('denoiser', 'text encoders', *families), rows)}\n\n"
        f"PSNR in dB to the pictures of the float pipeline from the same seeds, mean of up to "
        f"{max(record.n for record in records)} pictures of 64 pixels; tiny pipelines, whose text encoders were "
        f"trained with the denoiser. The W4A8 denoiser is PTQ with MSE clip. By `{records[0].command}`."
    )


def sdnq_table() -> str:
    """Pictures drawn by SDNQ against ours, by `benchmarks.sdnq`."""
    records = [each for each in read_records(RESULTS / "integration.json") if each.extra.get("part") == _SDNQ]
    rows = [
        [
            record.family,
            f"{record.value:.1f}",
            str(record.extra["int8_layers"]),
            str(record.extra["float_activation_layers"]),
        ]
        for record in records
    ]
    head = ("family", "PSNR to the packed pipeline, dB", "layers with int8 products", "with float activations")
    one = records[0]
    return (
        f"{markdown(head, rows)}\n\n"
        f"Tiny pipelines at W4A8, mean of {one.n} pictures of 64 pixels from equal seeds, float32 on a CPU, sdnq "
        f"{one.versions['sdnq']}. By `{one.command}`."
    )


def _as_code(operation: str) -> str:
    return f"`{operation}`" if "(" in operation or "_" in operation else operation


def operations_table(part: str) -> str:
    """What works, operation by family, by `benchmarks.integration`."""
    found = [
        each
        for each in read_records(RESULTS / "integration.json")
        if (each.metric, each.extra.get("part")) == ("operations", part)
    ]
    by_family = {name: each for name in FAMILIES for each in found if each.family == name}
    operations = dict.fromkeys(operation for each in by_family.values() for operation in each.extra["cells"])
    shown: dict[str, str] = {}  # operation -> the error, of the first family that has one
    rows = []
    for operation in operations:
        row = [_as_code(operation)]
        for name, record in by_family.items():
            cell = record.extra["cells"].get(operation, {"state": "not yet measured"})
            row.append(cell["state"] + (f" ({cell['cosine']:.2f})" if "cosine" in cell else ""))
            if "error" in cell:
                shown.setdefault(operation, f"`{name}`: {textwrap.shorten(cell['error'], 200, placeholder=' ...')}")
        rows.append(row)
    head = ("operation", *(f"`{name}`" for name in by_family))
    errors = "".join(f"- {_as_code(operation)}, {error}\n" for operation, error in shown.items())
    errors = f"What is refused says:\n\n{errors}\n" if errors else ""
    record = next(iter(by_family.values()))
    return (
        f"{markdown(head, rows)}\n\n"
        f"{errors}"
        f"Tiny models of random weights on a CPU, diffusers {record.versions['diffusers']}, peft "
        f"{record.versions['peft']}, torch {record.versions['torch']}; {sum(each.n for each in found)} tests. By "
        f"`{record.command}`."
    )


_WAYS = {
    "float": "float base, no adapter",
    "float-adapter": "float base, adapter",
    "float-other-seed": "float base, adapter of another seed",
    "packed": "4-bit base, no adapter",
    "adapter": "**1** adapter trained on the 4-bit base",
    "adapter-of-float": "**1b** adapter of the float base, on the 4-bit base",
    "merged-gptq": "**2** merged, quantized again (GPTQ)",
    "merged-trained": "**3** merged, trained",
}


def _fine_tune(kind: str) -> list[dict[str, Any]]:
    rows = json.loads((RESULTS / "fine_tune.json").read_text(encoding="utf-8"))
    return [row for row in rows if row["kind"] == kind]


def fine_tune_table() -> str:
    """Ways to ship a fine-tune, by `benchmarks.fine_tune`."""

    def cell(rows: list[dict[str, Any]], key: str, form: str, unit: float = 1) -> str:
        values = [row[key] / unit for row in rows if row.get(key)]
        if not values:
            return "–"
        spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 and key in ("loss", "psnr", "ssim") else ""
        return f"{statistics.fmean(values):{form}}{spread}"

    rows = _fine_tune("way")
    families = list(dict.fromkeys(row["family"] for row in rows))
    cells = []
    for family in families:
        for way, title in _WAYS.items():
            found = [row for row in rows if (row["family"], row["way"]) == (family, way)]
            if not found:
                continue
            numbers = [cell(found, *each) for each in (("loss", ".4f"), ("psnr", ".1f"), ("ssim", ".3f"))]
            numbers += [cell(found, "new_bytes", ".2f", 1e6), cell(found, "seconds", ".1f", 60)]
            cells.append((family, title, *numbers))
    head = ("family", "what is shipped", "held-out loss ↓", "PSNR, dB ↑", "SSIM ↑", "new on disk, MB", "minutes")
    one, seeds = rows[0], sorted({row["seed"] for row in rows})
    adapter, plural = one["adapter"], "s" if len(seeds) > 1 else ", so no spread"
    return (
        f"{markdown(head, cells)}\n\n"
        f"Tiny pipelines of 64 pixels, weights of {one['average_bits']:g} bits on average; {one['pictures']} pictures "
        f"of the style, {one['n']} held out; LoRA of rank {adapter['rank']}, {adapter['steps']} steps of "
        f"{adapter['batch_size']}; {len(seeds)} seed{plural}. PSNR and SSIM are to pictures of the float base with its "
        f"adapter, from equal seeds. Minutes of one thread's processor time, adapter included. By `{one['command']}`."
    )


def adapter_memory_table() -> str:
    """Peak memory while an adapter is trained, by `benchmarks.fine_tune --memory`."""
    rows = {row["base"]: row for row in _fine_tune("memory")}
    numbers = {
        base: (row["peak_rss_mib"], row["peak_rss_mib"] - row["program_mib"], row["step_seconds"])
        for base, row in rows.items()
    }
    cells = [
        (base, f"{peak:.0f} MiB", f"{own:.0f} MiB", f"{seconds:.1f} s")
        for base, (peak, own, seconds) in numbers.items()
    ]
    ratios = [f"{a / b:.2f}" for a, b in zip(numbers["packed"], numbers["float"], strict=True)]
    one, head = rows["packed"], ("base", "peak", "without the program itself", "a step")
    return (
        f"{markdown(head, [*cells, ('packed over float', *ratios)])}\n\n"
        f"`{one['recipe']}`: {one['what']}, random weights, float32, LoRA of rank {one['rank']}, {one['steps']} "
        f"steps of one picture, a fresh process each. By `{one['command']}`."
    )


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


def htp_sana_table() -> str:
    """A whole Sana-600M in one bundle, by `benchmarks.htp_sana`."""
    head = (
        "part", "graphs", "binaries", "the largest", "spill/fill", "trace, calibrate, quantize", "compile", "emulate",
        "emulator to CPU, first graph", "CPU to torch, all graphs",
    )  # fmt: skip
    ((record, peak),) = measured_at_true_size("bundle")
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
        f"{markdown(head, rows)}\n\nOne command, `fbqat export ... {extra['options']}`: {took:.1f} minutes, peak RAM "
        f"{peak:.2f} GB with all its processes, {sizes[0]:.2f} GB on disk, of which {sizes[1]:.2f} GB are the token "
        f"embeddings. The machine was: {extra['machine_was']}. By `python -m benchmarks.htp_sana`."
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
    """`auto` against `w4a8`, a family a row."""
    head = (
        "family", "SQNR to torch (dB)", "pictures (dB)", "activation bytes", "MACs at 16 bits",
        "of the cost at 16 bits",
    )  # fmt: skip
    rows = []
    found = {(record.family, record.extra["precision"]): record.extra for record in _bundles()}
    for family in [family for family, precision in found if precision == "auto"]:
        before, after = found[family, "w4a8"], found[family, "auto"]
        sqnr = [each["parity"]["emulator_vs_torch_packed"]["sqnr_db"] for each in (before, after)]
        wide = [each["cost"]["macs_a16"] / each["cost"]["macs"] for each in (before, after)]
        cells = (
            FAMILIES[family].title,
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


def families_table() -> str:
    """What the package supports: a family a row, with the recipes that ship for it."""
    recipes: dict[str, list[str]] = defaultdict(list)
    for path in sorted(RECIPES.glob("*.yaml")):
        if not path.stem.endswith("-tiny"):
            recipes[load_recipe(path).family].append(f"[{path.stem}](training/recipes/{path.name})")
    rows = []
    for name, family in FAMILIES.items():
        export = "no" if family.without_graph else "denoiser" if family.without_bundle else "bundle"
        tested = "trained tiny teacher" if family.tiny else "random weights"
        rows.append((f"`{name}`", f"`{family.pipeline_class}`", ", ".join(recipes[name]), export, tested))
    head = ("family", "pipeline", "recipes (real checkpoints: not yet run)", "HTP export", "tested with")
    return markdown(head, rows)


def training_step_table() -> str:
    """Time of a training step over a float model's, by `benchmarks.training_step`."""
    found = json.loads((RESULTS / "training-step.json").read_text(encoding="utf-8"))

    def over(row: dict[str, Any], name: str) -> str:
        ratio = row["over_float"][name]
        return f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"

    rows = [
        (
            str(row["batch"]),
            f"{row['median_ms']['float32']:,.0f} ms",
            over(row, "fbqat"),
            over(row, "torchao"),
            f"{row['median_ms']['teacher']:,.0f} ms",
        )
        for row in found["rows"]
    ]
    head = ("batch", "float32", "fbqat over it", "torchao's QAT over it", "the teacher's forward, which comes on top")
    return (
        f"{markdown(head, rows)}\n\nForward, backward and Adam, 1 thread, {found['machine']['cpu']}, {found['rounds']} "
        f"rounds, {found['date'][:10]}. By `python -m benchmarks.training_step`."
    )


def training_memory_table() -> str:
    """Peak memory of training steps, computed and measured, by `benchmarks.training_memory`."""
    rows = json.loads((RESULTS / "training.json").read_text(encoding="utf-8"))
    head = (
        "batch of one, float32",
        "checkpointing",
        "computed",
        "measured",
        "ratio",
        "with glibc's defaults",
        "a step",
    )
    cells = [
        (
            f"`{row['recipe']}`: {row['what']}",
            "yes" if row["gradient_checkpointing"] else "no",
            f"{row['estimated_mib'] / 1024:.2f} GiB",
            f"{row['measured_mib'] / 1024:.2f} GiB",
            f"{row['estimated_over_measured']:.3f}",
            f"{defaults / 1024:.2f} GiB"
            if (defaults := row.get("measured_with_glibc_defaults_mib"))
            else "not measured",
            f"{row['seconds_per_step']:.0f} s",
        )
        for row in rows
    ]
    machines = {f"{row['machine']['cpu']}, {row['threads']} thread, {row['date'][:10]}" for row in rows}
    return f"{markdown(head, cells)}\n\nProcessor time of a step on {'; '.join(sorted(machines))}."


def adam_table() -> str:
    """Adam's moments in 32 and 8 bits, by `benchmarks.adam`."""
    found = json.loads((RESULTS / "adam.json").read_text(encoding="utf-8"))
    head = (
        "loss ×1e-3",
        "before training",
        "32 bits",
        "8 bits",
        "change, seed by seed",
        "bytes a weight, 32 bits",
        "8 bits",
    )
    rows = []
    for family in dict.fromkeys(row["family"] for row in found):
        exact, coded = (
            [row for row in found if (row["family"], row["moment_bits"]) == (family, bits)] for bits in (32, 8)
        )
        change = (
            f"{100 * (ours['loss'] / theirs['loss'] - 1):+.2f}%" for ours, theirs in zip(coded, exact, strict=True)
        )
        rows.append(
            (
                FAMILIES[family].title,
                *(_spread(each, key) for each, key in ((exact, "loss_before"), (exact, "loss"), (coded, "loss"))),
                ", ".join(change),
                *(f"{each[0]['optimizer_bytes'] / each[0]['trained']:.2f}" for each in (exact, coded)),
            )
        )
    some, seeds = found[0], len({row["seed"] for row in found})
    draws = ", ".join(map(str, sorted({row["draws"] for row in found})))
    return (
        f"{markdown(head, rows)}\n\nTiny teachers, {some['steps']} steps of {some['batch_size']}, {seeds} seeds, ± "
        f"standard deviation; the loss is that of the test split, {draws} draws. Of tensors with fewer than 4096 "
        "numbers the moments stay in 32 bits. By `python -m benchmarks.adam`."
    )


def _spread(rows: list[dict[str, Any]], key: str) -> str:
    values = [1e3 * row[key] for row in rows]
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def convert_table() -> str:
    """Memory of conversions, by `benchmarks.convert_true_size` and `benchmarks.convert_gptq`."""
    found = json.loads((RESULTS / "convert.json").read_text(encoding="utf-8"))
    nearest, gptq, alone = found["nearest"], found["gptq"], found["load"]
    rows = [
        (
            f"nearest codes: {nearest['denoiser_parameters'] / 1e6:.0f} M parameters at FLUX.1's width, "
            f"text encoders of {nearest['text_encoder_bytes'] / 2**30:.1f} GiB copied",
            f"{nearest['convert']['peak_mib']} MiB",
            "–",
            _seconds_of(nearest["convert"]),
        ),
        (
            f"loading a packed denoiser of {alone['packed_denoiser_bytes'] / 2**20:.0f} MiB",
            f"{alone['load']['peak_mib']} MiB ({alone['load']['peak_over_packed_bytes']:.2f} of them)",
            "–",
            _seconds_of(alone["load"]),
        ),
        (
            f"GPTQ: {gptq['denoiser_parameters'] / 1e6:.0f} M parameters at Sana-600M's width, "
            f"{gptq['blocks']} blocks, {gptq['samples']} samples",
            f"{gptq['block_by_block']['peak_mib']} MiB",
            f"{gptq['whole_model']['peak_mib']} MiB",
            _seconds_of(gptq["block_by_block"]),
        ),
    ]
    return (
        f"{markdown(('`fbqat convert`', 'peak memory', 'whole model at once', 'processor time'), rows)}\n\n"
        f"Random weights, a process each, Python and its libraries included. Loaded codes are mapped from the file, "
        f"and read when a layer runs. GPTQ's peak is "
        f"{gptq['peak_over_whole_model']:.2f} of the whole model's, whose weights in float32 are "
        f"{gptq['denoiser_float32_mib']} MiB; bytes of codes that differ: {gptq['differing_bytes_of_codes']}. By "
        f"`{nearest['command']}`, `{alone['command']}` (random codes) and `{gptq['command']}`."
    )


def _seconds_of(found: dict[str, Any]) -> str:
    return f"{found['processor_seconds']:.0f} s" if "processor_seconds" in found else "not measured"


def convert_widths_table() -> str:
    """Both ways to choose widths, by `benchmarks.convert_widths`."""
    found = json.loads((RESULTS / "convert.json").read_text(encoding="utf-8"))["widths"]
    rows = []
    for name, family in FAMILIES.items():
        if row := found.get(name):
            losses, of_8 = row["losses"], row["layers_of_8_bits"]
            change = 100 * (losses["prompts"] / losses["weights"] - 1)
            cells = [f"{1e3 * losses['4 bits']:.2f}"]
            cells += [f"{1e3 * losses[way]:.2f} ({of_8[way]} of {row['layers']})" for way in ("weights", "prompts")]
            rows.append((family.title, *cells, f"{change:+.0f}%"))
    average = f"{found['average_bits']:g} bits on average"
    head = ("loss ×1e-3 (layers of 8 bits)", "4 bits", f"{average}, by weights", f"{average}, by prompts", "change")
    some = next(found[name] for name in FAMILIES if name in found)
    return (
        f"{markdown(head, rows)}\n\nTiny teachers, GPTQ on {some['samples']} sampled inputs, not trained; the judge's "
        f"loss on a third of its captions ({some['draws']} draws for {rows[0][0]}), one set of prompts. By "
        f"`{found['command']}`."
    )


TABLES: dict[str, Callable[[], str]] = {
    "families": families_table,
    "demo": demo_table,
    "judge": judge_table,
    "findings": lambda: findings_table(JUDGED),
    "choices": lambda: findings_table(CHOICES),
    "older-findings": lambda: findings_table(OLDER),
    "half-bits": half_bits_table,
    "blockwise": blockwise_table,
    "rates": rates_table,
    "speed": speed_table,
    "speed-cpu": speed_cpu_table,
    "speed-peers": speed_peers_table,
    "speed-profile": speed_profile_table,
    "speed-layer": speed_layer_table,
    "speed-shared": speed_shared_table,
    "speed-loading": speed_loading_table,
    "speed-gpu": speed_gpu_table,
    "triton-code": triton_code_table,
    "training-memory": training_memory_table,
    "training-step": training_step_table,
    "adam": adam_table,
    "convert": convert_table,
    "convert-widths": convert_widths_table,
    "text-encoders": text_encoders_table,
    "sdnq": sdnq_table,
    "operations": lambda: operations_table(OPERATIONS),
    "adapter-operations": lambda: operations_table(ADAPTERS),
    "fine-tune": fine_tune_table,
    "adapter-memory": adapter_memory_table,
    "true-size": true_size_table,
    "htp-parts": htp_parts_table,
    "htp-sana": htp_sana_table,
    "htp-targets": htp_targets_table,
    "htp-tiles": htp_tiles_table,
    "htp-decoder": htp_decoder_table,
    "htp": htp_table,
    "htp-ops": htp_ops_table,
    "htp-text": htp_text_table,
    "htp-gain": htp_gain_table,
    "htp-tuning": htp_tuning_table,
}


def filled(text: str) -> str:
    """``text`` with every ``<!-- results:NAME -->`` block rewritten."""
    for name, written in TABLES.items():
        start, end = f"<!-- results:{name} -->", f"<!-- /results:{name} -->"
        if start in text:
            block = f"{start}\n{written()}\n{end}"
            text = re.sub(
                re.escape(start) + ".*?" + re.escape(end), lambda _, block=block: block, text, flags=re.DOTALL
            )
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for name in FILES:
        path = ROOT / name
        text = path.read_text()
        if filled(text) != text:
            stale.append(name)
            if not check:
                path.write_text(filled(text))
    print(f"{'stale' if check else 'rewritten'}: {', '.join(stale) or 'nothing'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
