"""The costs of a run to read, with hours where a step was measured."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from shlex import quote
from typing import Any

import torch

from fbqat_hub.families import get_family
from fbqat_hub.files import shipped
from fbqat_hub.hub.names import repo_and_revision
from fbqat_hub.text import columns
from fbqat_hub.training.advice import (
    advice,
    as_settings,
    block_advice,
    block_by_block,
    buckets,
    in_parts,
    launched,
    on_device,
    on_one_device,
)  # fmt: skip
from fbqat_hub.training.costs import Costs, pictures_of_a_prompt
from fbqat_hub.training.dataset import source_of
from fbqat_hub.training.gpus import Gpus
from fbqat_hub.training.prompts import PROMPT_SETS
from fbqat_hub.training.recipe import Recipe, load_recipe


def report(found: Costs, gpus: Gpus | None, seconds_per_step: float | None) -> str:
    """The costs to read, with what fits and which setting to change."""
    found = replace(found, devices=gpus.count if gpus else 1)
    recipe, memory = found.recipe, found.memory
    total, blockwise = sum(found.parameters.values()), recipe.training == "blockwise"
    numbers = [(name, f"{count / 1e6:,.1f} M") for name, count in found.parameters.items()]
    of_memory = [
        (f"teacher's quantized layers, {_precision(found.recipe)}", memory.teacher),
        ("student, masters in float32", memory.student),
        ("what is not trained, of both", memory.frozen),
        (f"Adam's moments, {recipe.optimizer.moment_bits} bits", memory.optimizer),
        ("gradients at the peak", memory.gradients),
        ("activations at the peak", memory.activations),
    ]
    if gpus and gpus.count > 1:
        of_memory.append(("buckets of gradients, several GPUs", buckets(found, gpus)))
    lines = [
        f"{recipe.name}: {recipe.teacher}, {total / 1e6:,.1f} million parameters, of which "
        f"{memory.trained / 1e6:,.1f} million are trained (train_layers: {recipe.train_layers})",
        columns(numbers, numbers_from=1),
        "",
        *(_blocks(found) if blockwise else _end_to_end(found, of_memory)),
        "Computed from shapes; the driver's context and what an allocator loses (about 1 GiB) are not in it.",
        "",
        "Disk:",
        columns(_disk(found), numbers_from=1),
        "",
        *(_sampling(found) if "prompts" in recipe.dataset else []),
        *(_blocks_time if blockwise else _time)(found, seconds_per_step),
    ]
    fit = (_blocks_fit if blockwise else _fit)(found, gpus) if gpus else []
    if gpus and blockwise and on_one_device(found) > gpus.budget:
        fit += _without_training(found)
    return "\n".join(lines + (["", *fit] if fit else []))


def _end_to_end(found: Costs, of_memory: list[tuple[str, int]]) -> list[str]:
    recipe, step = found.recipe, sum(size for _, size in of_memory)
    return [
        f"Memory of each device, {found.at_once} of {recipe.batch_size} samples of a step at a time, "
        f"{recipe.size[0]} x {recipe.size[1]}:",
        columns([(name, gib(size)) for name, size in of_memory], numbers_from=1),
        columns(
            [("a training step", gib(step)), ("the whole pipeline in float32, while encoding", gib(found.encoding))],
            numbers_from=1,
        ),
    ]


def _blocks(found: Costs) -> list[str]:
    recipe, memory = found.recipe, found.blocks
    rows = [
        (f"a step of the largest block, {memory.name}", gib(memory.block), "device"),
        ("the largest part, while encoding", gib(found.largest_part), "device"),
        (f"the teacher, {_precision(recipe)}", gib(memory.teacher), "host"),
        (f"inputs and outputs of a block, {recipe.blockwise.samples} samples", gib(memory.kept), "host"),
    ]
    if memory.tuning:
        tuning = f"the tuning of scales, {recipe.blockwise.tuning_steps} steps (blockwise.tuning_steps)"
        rows.insert(1, (tuning, gib(found.tuning), "device"))
    if recipe.quantization.average_bits is not None:
        rows.append(("the student's codes, to choose widths (average_bits)", gib(found.codes), "host"))
    return [
        f"Memory, block by block, a batch of {recipe.batch_size} at {recipe.size[0]} x {recipe.size[1]}:",
        columns(rows, numbers_from=1),
    ]


def _blocks_fit(found: Costs, gpus: Gpus) -> list[str]:
    """One device is used, whatever their number."""
    budget, needs = gpus.budget, on_one_device(found)
    if needs <= budget:
        return [f"{gpus}: block by block it fits one of them."]
    lines = [f"{gpus}: block by block it does not fit; it needs {gib(needs)} of {gib(budget)}."]
    last, advised = _tried(found, block_advice(found, gpus), on_one_device, budget)
    return [*lines, *advised, *([] if on_one_device(last) <= budget else ["Block by block no setting makes it fit."])]


def _tried(
    found: Costs, tried: Sequence[tuple[str, Costs]], needs: Callable[[Costs], int], budget: int
) -> tuple[Costs, list[str]]:
    """What the run costs with all the advice, and the advice to read; its last line says so where that fits."""
    last = tried[-1][1] if tried else found
    lines = [f"  --set {change}: {gib(needs(after))}" for change, after in tried]
    if needs(last) <= budget:
        lines.append(f"With {'all of these' if len(tried) > 1 else 'this'} it fits.")
    return last, lines


def _without_training(found: Costs) -> list[str]:
    teacher, output = quote(found.recipe.teacher), quote(found.recipe.name)
    return ["Without training:", f"  fbqat convert {teacher} --output {output}"]


def _disk(found: Costs) -> list[tuple[str, str]]:
    recipe, rows = found.recipe, [("the teacher, in half precision", gb(found.download))]
    sampled = "prompts" in recipe.dataset
    if source := PROMPT_SETS.get(source_of(recipe.dataset)):
        name, pictures = source.download.split(", ")
        rows.append((f"the data set {source_of(recipe.dataset)}", name if sampled else f"{name}, {pictures}"))
    what = "latents that the sampler passes through," if sampled else "latents of"
    if found.captions is None or found.pictures is None:
        rows.append(("embeddings of a caption, at most", f"{found.embeddings / 1e3:,.1f} kB"))
        rows.append((f"{what} a picture", f"{found.latents / 1e3:,.1f} kB"))
    else:
        rows.append((f"embeddings of {found.captions:,} captions, at most", gb(found.captions * found.embeddings)))
        rows.append((f"{what} {found.pictures:,} pictures", gb(found.pictures * found.latents)))
    return [*rows, ("checkpoints", gb(found.checkpoints)), ("the quantized pipeline", gb(found.output))]


def _sampling(found: Costs) -> list[str]:
    recipe = found.recipe
    steps, each = get_family(recipe.family).sampler_steps(recipe.generation), pictures_of_a_prompt(recipe)
    calls = "" if found.pictures is None else f", {found.pictures * steps:,} calls of the denoiser"
    return [
        f"Before training the teacher's sampler makes {each} pictures of each prompt in {steps} steps{calls}; with "
        "guidance each call is of two."
    ]


def _time(found: Costs, seconds: float | None) -> list[str]:
    recipe = found.recipe
    if seconds is not None:
        took = datetime.timedelta(seconds=round(seconds * recipe.steps))
        return [f"Time: {recipe.steps} steps of {seconds:g} s are {took}, without encoding and validation."]
    lines = [f"Time: {recipe.steps} steps of {recipe.batch_size}; give --seconds-per-step for the hours."]
    for row in _measured_steps(found):
        hours = row["seconds_per_step"] * recipe.batch_size * recipe.steps / 3600
        setting = as_settings({"gradient_checkpointing": row["gradient_checkpointing"]})
        lines.append(
            f"Measured: {row['seconds_per_step']:g} s for a step of one sample on {_where(row)}, "
            f"{setting}; all samples of the run at that pace are {hours:,.0f} hours."
        )
    return lines


_BESIDE_BLOCKS = "without encoding, the codes to start from and the tuning of scales"


def _blocks_time(found: Costs, seconds: float | None) -> list[str]:
    """Of all blocks; not of what is made before their steps, nor of the tuning."""
    recipe, count, steps = found.recipe, found.blocks.count, found.recipe.blockwise.steps
    if seconds is not None:
        took = datetime.timedelta(seconds=round(seconds * steps * count))
        return [f"Time: {steps} steps of {seconds:g} s for each of {count} blocks are {took}, {_BESIDE_BLOCKS}."]
    lines = [
        f"Time: {steps} steps of {recipe.batch_size} for each of {count} blocks; give --seconds-per-step, of one "
        "block, for the hours."
    ]
    for row in _measured(found):
        if "share" not in row:
            continue
        hours = row["seconds_per_step"] * row["share"] * recipe.batch_size * steps / 3600
        lines.append(
            f"Measured: {row['seconds_per_step']:g} s for a step of one sample of {1 / row['share']:.1%} of the blocks "
            f"on {_where(row)}; all samples of all blocks at that pace are {hours:,.0f} hours, {_BESIDE_BLOCKS}."
        )
    return lines


def _measured_steps(found: Costs) -> list[dict[str, Any]]:
    """Rows that train the whole teacher end to end."""
    return [row for row in _measured(found) if row["bytes"].get("trained") == found.memory.trained]


def _measured(found: Costs) -> list[dict[str, Any]]:
    """Rows of benchmarks/results/training.json that are of this teacher, or of some of its blocks, at this size."""
    rows: list[dict[str, Any]] = json.loads(shipped("benchmarks/results/training.json").read_text(encoding="utf-8"))
    teacher, _ = repo_and_revision(found.recipe.teacher)
    return [
        row for row in rows if row["size"] == [*found.recipe.size] and load_recipe(row["recipe"]).teacher == teacher
    ]


def _where(row: Mapping[str, Any]) -> str:
    return f"{row['machine']['cpu']}, {row['threads']} thread, {row['date'][:10]}"


def _fit(found: Costs, gpus: Gpus) -> list[str]:
    budget = gpus.budget
    needs = on_device(found, gpus)
    said = f"it needs {gib(needs)}; {gib(budget)} are there ({gib(gpus.bytes)} less 1 GiB)."
    if found.recipe.batch_size % gpus.count:
        said += f" But batch_size, {found.recipe.batch_size}, must go into {gpus.count} equal shares."
    if needs <= budget:
        return [f"{gpus}: it fits. On each, {said}"]
    lines = [f"{gpus}: it does not fit. On each, {said}"]
    last, advised = _tried(found, advice(found, gpus), lambda now: on_device(now, gpus), budget)
    lines += advised
    if on_device(last, gpus) <= budget:
        return lines
    if last.encoding > budget:
        lines.append(f"The whole pipeline takes {gib(last.encoding)} in float32 while the data is encoded.")
    if (changed := in_parts(found, gpus)) is not None:
        lines += _shared_out(changed, gpus)
        if changed.on_each <= budget:
            return lines
    lines.append("End to end no setting makes it fit.")
    try:
        settings, blocks = block_by_block(found.recipe)
    except ValueError as error:
        return [*lines, f"Nor block by block: {error}", *_without_training(found)]
    lines.append(f"With --set {settings}:")
    lines += [f"  {line}" for line in [*"\n".join(_blocks(blocks)).splitlines(), *_blocks_fit(blocks, gpus)]]
    return [*lines, *_without_training(found)]


def _shared_out(found: Costs, gpus: Gpus) -> list[str]:
    needs = found.on_each
    fits = "fits" if needs <= gpus.budget else "does not fit"
    return [
        f"With every layer shared out to the {gpus.count}, by FSDP2, it {fits}. On each, it needs about {gib(needs)}; "
        "this was computed, and never measured on GPUs:",
        *(f"  {line}" for line in launched(gpus, "RECIPE")),
        f"  Of the host's memory the first process takes {gib(found.encoding)} while it encodes. Then each takes up to "
        f"{gib(found.starting)} for calibration and GPTQ, block by block.",
    ]


def _precision(recipe: Recipe) -> str:
    """In which the teacher computes."""
    return {None: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}[recipe.half]


def gib(size: float) -> str:
    """Memory, in powers of two."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**29 else f"{size / 2**20:,.1f} MiB"


def gb(size: float) -> str:
    """Disk, in powers of ten."""
    return f"{size / 1e9:,.1f} GB" if size >= 5e8 else f"{size / 1e6:,.1f} MB"
