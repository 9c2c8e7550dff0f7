"""Tables of training and of conversion: time, memory, losses."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.markdown import markdown
from benchmarks.tables.results import measured
from fbqat_hub.families import FAMILIES


def training_step_table() -> str:
    """Time of a training step over a float model's, by `benchmarks.training_step`."""
    found = measured("training-step.json")

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
    rows = measured("training.json")
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
    found = measured("adam.json")
    head = (
        "loss ×1e-3",
        "before training",
        "32 bits",
        "8 bits",
        "change, seed by seed",
        "bytes per weight, 32 bits",
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
    found = measured("convert.json")
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
    found = measured("convert.json")["widths"]
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
