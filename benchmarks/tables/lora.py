"""Tables of adapters: ways to ship a fine-tune, memory of training one."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.markdown import markdown
from benchmarks.tables.results import measured

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
    rows = measured("fine_tune.json")
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
