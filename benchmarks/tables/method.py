"""Tables of the method: the demo, the judge, what each part changes."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

from benchmarks.markdown import markdown
from benchmarks.method.findings import Finding, findings
from benchmarks.method.judge import judge_rows
from benchmarks.method.rows import OURS, Results
from benchmarks.method.widths import half_bits
from benchmarks.tables.results import RESULTS
from fbqat_hub.evaluation.results import METHODS, METRICS, Record, read_records
from fbqat_hub.families import FAMILIES
from fbqat_hub.training.recipe import load_recipe


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
