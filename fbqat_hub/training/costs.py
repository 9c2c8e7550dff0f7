"""What a run costs, from its recipe and its teacher's configs alone: parameters, memory, disk, steps and hours."""

from __future__ import annotations

import datetime
import functools
import inspect
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fbqat_hub.families import get_family
from fbqat_hub.files import shipped
from fbqat_hub.hub.names import repo_and_revision
from fbqat_hub.text import columns
from fbqat_hub.training.bases import Configs, build_on_meta, configs_of, parameters
from fbqat_hub.training.block_footprint import BlockMemory, block_memory
from fbqat_hub.training.captioned import pictures_in
from fbqat_hub.training.dataset import SEEDS, folder_of, source_of
from fbqat_hub.training.fit import other_bytes, packed_size
from fbqat_hub.training.footprint import StepMemory, step_memory
from fbqat_hub.training.prompts import PROMPT_SETS, training_prompts
from fbqat_hub.training.recipe import Recipe, load_recipe
from fbqat_hub.training.sharding import needs_whole_layers
from fbqat_hub.training.states import STEPS

# Two checkpoints are kept while the third is written.
_CHECKPOINTS = 3
# Of a GPU's memory, for the driver's context and what the allocator loses.
RESERVE = 2**30
_HALF = 2
# What makes a step smaller, the least harmful first; None is the largest that fits.
_CHANGES: tuple[dict[str, Any], ...] = (
    {"gradient_checkpointing": True},
    {"mixed_precision": "bf16"},
    {"micro_batch_size": None},
    {"optimizer.moment_bits": 8},
    {"micro_batch_size": None},
    {"train_layers": "attention", "micro_batch_size": 1},
)
# The same of block-wise training; of batch sizes above 8 its rates were not tried.
_BLOCK_CHANGES: tuple[dict[str, Any], ...] = (
    {"mixed_precision": "bf16"},
    {"batch_size": 8},
    {"gradient_checkpointing": True},
    {"blockwise.tuning_steps": 0},
    {"optimizer.moment_bits": 8},
    {"batch_size": 1},
)

# With layers shared out to several GPUs (FSDP2).
_SHARED_OUT = {"gradient_checkpointing": True, "mixed_precision": "bf16", "micro_batch_size": 1}
# Of the largest block there are at once: its weights, the buffer they came in and the next one's; its gradients, and
# the buffer they leave in. What is in no block stays whole, of teacher and student.
_WHOLE_BLOCKS, _WHOLE_OUTSIDE = 5, 2


@dataclass(frozen=True)
class Gpus:
    """``count`` GPUs of ``bytes`` memory each."""

    count: int
    bytes: int

    @classmethod
    def parse(cls, text: str) -> Gpus:
        """
        >>> Gpus.parse("8x80GB")
        Gpus(count=8, bytes=85899345920)
        """
        found = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})GB", text, re.IGNORECASE)
        if not found:
            raise ValueError(f"{text!r} is not a number of GPUs and the memory of each; write e.g. 1x24GB or 8x80GB.")
        return cls(int(found[1]), int(found[2]) * 2**30)

    def __str__(self) -> str:
        return f"{self.count}x{self.bytes >> 30}GB"


@dataclass(frozen=True)
class Costs:
    """Of a run of ``recipe``.

    Attributes:
        parameters: component -> number.
        captions, pictures: of the data, or prompts and what the sampler makes of them; None where they cannot be
            counted without loading them.
        embeddings, latents: bytes on disk of a caption, at most, and of a picture.
        packed: bytes of the quantized denoiser.
        others: bytes of the other parts of the finished pipeline.
        devices: that share each batch, end to end.
    """

    recipe: Recipe
    parameters: Mapping[str, int]
    captions: int | None
    pictures: int | None
    embeddings: int
    latents: int
    packed: int
    others: int
    devices: int = 1

    @property
    def share(self) -> int:
        """Samples of a step on each device."""
        return -(-self.recipe.batch_size // self.devices)

    @property
    def at_once(self) -> int:
        """Samples that a device takes at a time."""
        return min(self.share, self.recipe.micro_batch_size or self.share)

    @functools.cached_property
    def memory(self) -> StepMemory:
        """Of an end-to-end step, on each device."""
        recipe = replace(self.recipe, batch_size=self.share, micro_batch_size=self.at_once)
        return step_memory(recipe, configs_of(recipe.teacher))

    @functools.cached_property
    def memory_of_one(self) -> StepMemory:
        """The same with a batch of one."""
        return step_memory(self.recipe, configs_of(self.recipe.teacher), 1)

    @functools.cached_property
    def _largest_and_outside(self) -> tuple[int, int]:
        """Parameters of the denoiser's largest block, and of what is in none."""
        denoiser = build_on_meta(configs_of(self.recipe.teacher)["transformer"])
        names = get_family(self.recipe.family).blocks(denoiser)
        blocks = [sum(each.numel() for each in denoiser.get_submodule(name).parameters()) for name in names]
        return max(blocks), sum(each.numel() for each in denoiser.parameters()) - sum(blocks)

    @functools.cached_property
    def shared_out(self) -> int:
        """Bytes of an end-to-end step on each of the devices that share out every layer (FSDP2), about."""
        memory, (largest, outside) = self.memory, self._largest_and_outside
        # gradients are as the masters, and what is not trained each of the two has for itself
        kept = memory.teacher + 2 * memory.student + 2 * memory.frozen + memory.optimizer
        whole = 4 * (_WHOLE_BLOCKS * largest + _WHOLE_OUTSIDE * outside)
        return -(-kept // self.devices) + whole + memory.activations

    @property
    def on_each(self) -> int:
        """The same, or those of the largest component: while data is encoded one is there at a time."""
        return max(self.shared_out, 4 * self._most_parameters)

    @functools.cached_property
    def starting(self) -> int:
        """Bytes of the host's memory that a process takes with FSDP2 until its first step, at most, about."""
        recipe, (largest, outside) = self.recipe, self._largest_and_outside
        samples = max(recipe.calibration.samples, recipe.gptq.samples)
        alone = replace(
            recipe,
            batch_size=1,
            micro_batch_size=None,
            mixed_precision="no",
            blockwise=replace(recipe.blockwise, samples=samples, tuning_steps=0),
        )
        inputs = block_memory(alone, configs_of(recipe.teacher)).kept
        return 4 * 2 * (largest + outside) + inputs + (self.codes if recipe.quantization.average_bits else 0)

    @property
    def output(self) -> int:
        """Bytes of the finished pipeline."""
        return self.packed + self.others

    @property
    def encoding(self) -> int:
        """Bytes of the whole pipeline in float32, which is on the device while the data is encoded."""
        return 4 * sum(self.parameters.values())

    @property
    def largest_part(self) -> int:
        """Bytes of the largest component, which alone is on the device while block-wise data is made, in the precision
        of training. The denoiser is there only to make pictures of prompts."""
        return _width(self.recipe) * self._most_parameters

    @property
    def _most_parameters(self) -> int:
        """Of the components that encode."""
        sampled = "prompts" in self.recipe.dataset
        return max((count for name, count in self.parameters.items() if sampled or name != "transformer"), default=0)

    @functools.cached_property
    def blocks(self) -> BlockMemory:
        """Of block-wise training."""
        return block_memory(self.recipe, configs_of(self.recipe.teacher))

    @property
    def codes(self) -> int:
        """Bytes of the denoiser at 4 bits, in the host's memory while widths are chosen."""
        return self.parameters["transformer"] // 2

    @property
    def tuning(self) -> int:
        """Bytes of the last stage of block-wise training, on the device; 0 if there is none."""
        return self.blocks.tuning + self.packed if self.blocks.tuning else 0

    @property
    def download(self) -> int:
        """Bytes of the teacher, stored in half precision."""
        return _HALF * sum(self.parameters.values())

    @property
    def checkpoints(self) -> int:
        """Bytes of all that are there at once."""
        recipe = self.recipe
        if recipe.training == "blockwise":  # the finished blocks, and then those of the tuning
            saved = 0 < recipe.save_every < recipe.blockwise.tuning_steps
            return self.packed * (1 + (_CHECKPOINTS if saved else 0))
        one = self.memory.student + self.memory.frozen + self.memory.optimizer
        return _CHECKPOINTS * one if 0 < recipe.save_every < recipe.steps else 0

    def largest_micro_batch(self, budget: int) -> int:
        """The most samples at a time, a power of two or all of a device, with which a step takes at most so many bytes.

        0 if not even one does.
        """
        if self.memory.peak <= budget or self.at_once == 1:
            return self.at_once if self.memory.peak <= budget else 0
        one, two = (replace(self, recipe=replace(self.recipe, micro_batch_size=size)).memory.peak for size in (1, 2))
        if one > budget:
            return 0
        fits = 1 + int((budget - one) / (two - one)) if two > one else self.at_once
        return int(2 ** math.floor(math.log2(min(fits, self.at_once))))


def costs(recipe: Recipe) -> Costs:
    """What a run costs; no weights are needed, and of a teacher on the Hub only its configs.

    Raises:
        ValueError: a method that does not train.
        HubError: a teacher that is not known here and cannot be looked up.
    """
    check_trains(recipe)
    configs, counts = configs_of(recipe.teacher), parameters(recipe.teacher)
    embeddings, latents = cached_bytes(recipe, configs)
    captions = _captions(recipe.dataset)
    return Costs(
        recipe=recipe,
        parameters=counts,
        captions=captions,
        pictures=None if captions is None else captions * _of_a_prompt(recipe),
        embeddings=embeddings,
        latents=latents,
        packed=packed_size(recipe).at(recipe.quantization.average_bits),
        others=other_bytes(recipe.teacher, recipe.text_encoders),
    )


def cached_bytes(recipe: Recipe, configs: Configs) -> tuple[int, int]:
    """What the cache keeps of a caption, at most, and of a picture."""
    family = get_family(recipe.family)
    whole = {name: build_on_meta(configs[name]).config for name in ("transformer", "vae")}
    shapes = family.conditioning_shapes(whole["transformer"], recipe.generation).values()
    width, kept = _width(recipe), min(STEPS, _sampler_steps(recipe)) if "prompts" in recipe.dataset else 1
    return width * sum(map(math.prod, shapes)), kept * width * math.prod(family.latent_shape(whole, recipe.size))


def check_trains(recipe: Recipe) -> None:
    """Refuse a recipe whose method only quantizes."""
    if not recipe.steps:
        raise ValueError(f"method {recipe.method} does not train, so there is nothing to plan; take e.g. fbqat.")


def advice(found: Costs, gpus: Gpus) -> list[tuple[str, Costs]]:
    """Changes of the recipe, each with those before it, until it fits or none is left.

    Returns:
        Of each, KEY=VALUE as ``--set`` takes it, and what the run costs with it.
    """
    budget, found = _budget(gpus), replace(found, devices=gpus.count)
    if found.encoding > budget:
        return []

    def fitting(now: Costs, change: dict[str, Any]) -> dict[str, Any] | None:
        if change == {"micro_batch_size": None}:
            change = {"micro_batch_size": now.largest_micro_batch(budget - _buckets(now, gpus))}
        return None if change.get("micro_batch_size") == 0 else change

    return _advised(found, _CHANGES, lambda now: on_device(now, gpus) <= budget, fitting)


def block_advice(found: Costs, gpus: Gpus) -> list[tuple[str, Costs]]:
    """As ``advice``, of block-wise training, which uses one of the devices."""

    def fitting(now: Costs, change: dict[str, Any]) -> dict[str, Any] | None:
        larger = change.get("batch_size", 0) >= now.recipe.batch_size
        without_effect = "gradient_checkpointing" in change and not now.tuning
        return None if larger or without_effect else change

    return _advised(found, _BLOCK_CHANGES, lambda now: on_one_device(now) <= _budget(gpus), fitting)


def _advised(
    found: Costs,
    changes: Iterable[dict[str, Any]],
    fits: Callable[[Costs], bool],
    fitting: Callable[[Costs, dict[str, Any]], dict[str, Any] | None],
) -> list[tuple[str, Costs]]:
    """``advice`` among these changes.

    Args:
        fitting: a change, as it is made to what there is by then; None where it would be none.
    """
    tried: list[tuple[str, Costs]] = []
    for each in changes:
        if fits(found):
            break
        change = fitting(found, each)
        if change is None or ("mixed_precision" in change and found.recipe.half):
            continue
        changed = _changed(found.recipe, change)
        if changed == found.recipe:
            continue
        found = replace(costs(changed), devices=found.devices)
        tried.append((_settings(change), found))
    return tried


def _changed(recipe: Recipe, change: Mapping[str, Any]) -> Recipe:
    """With the fields of ``change``, those of a section as SECTION.NAME."""
    given: dict[str, Any] = {}
    for key, value in change.items():
        section, _, name = key.rpartition(".")
        given[section or key] = replace(getattr(recipe, section), **{name: value}) if section else value
    return replace(recipe, **given)


def _settings(change: Mapping[str, Any]) -> str:
    """KEY=VALUE of each, as ``--set`` takes it."""
    return " ".join(f"{name}={_yaml(value)}" for name, value in change.items())


def on_device(found: Costs, gpus: Gpus) -> int:
    """Bytes on each GPU, at the worst moment."""
    return max(found.memory.peak + _buckets(found, gpus), found.encoding)


def on_one_device(found: Costs) -> int:
    """Bytes on the device of block-wise training, at the worst moment."""
    return max(found.blocks.block, found.largest_part, found.tuning)


def fits_at_all(found: Costs, gpus: Gpus) -> bool:
    """With a batch of one."""
    return max(found.memory_of_one.peak + _buckets(found, gpus), found.encoding) <= _budget(gpus)


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
        of_memory.append(("buckets of gradients, several GPUs", _buckets(found, gpus)))
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
    if gpus and blockwise and on_one_device(found) > _budget(gpus):
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
    budget, needs = _budget(gpus), on_one_device(found)
    if needs <= budget:
        return [f"{gpus}: block by block it fits one of them."]
    lines = [f"{gpus}: block by block it does not fit; it needs {gib(needs)} of {gib(budget)}."]
    tried = block_advice(found, gpus)
    lines += [f"  --set {change}: {gib(on_one_device(after))}" for change, after in tried]
    last = tried[-1][1] if tried else found
    if on_one_device(last) <= budget:
        return [*lines, f"With {'all of these' if len(tried) > 1 else 'this'} it fits."]
    return [*lines, "Block by block no setting makes it fit."]


def _without_training(found: Costs) -> list[str]:
    return ["Without training:", f"  fbqat convert {found.recipe.teacher} --output {found.recipe.name}"]


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
    steps, each = _sampler_steps(found.recipe), _of_a_prompt(found.recipe)
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
        lines.append(
            f"Measured: {row['seconds_per_step']:g} s for a step of one sample on {_where(row)}, "
            f"gradient_checkpointing={_yaml(row['gradient_checkpointing'])}; all samples of the run at that pace are "
            f"{hours:,.0f} hours."
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
    budget = _budget(gpus)
    needs = on_device(found, gpus)
    said = f"it needs {gib(needs)}; {gib(budget)} are there ({gib(gpus.bytes)} less 1 GiB)."
    if found.recipe.batch_size % gpus.count:
        said += f" But batch_size, {found.recipe.batch_size}, must go into {gpus.count} equal shares."
    if needs <= budget:
        return [f"{gpus}: it fits. On each, {said}"]
    lines = [f"{gpus}: it does not fit. On each, {said}"]
    tried = advice(found, gpus)
    lines += [f"  --set {change}: {gib(on_device(after, gpus))}" for change, after in tried]
    last = tried[-1][1] if tried else found
    if on_device(last, gpus) <= budget:
        return [*lines, f"With {'all of these' if len(tried) > 1 else 'this'} it fits."]
    if last.encoding > budget:
        lines.append(f"The whole pipeline takes {gib(last.encoding)} in float32 while the data is encoded.")
    if (changed := in_parts(found, gpus)) is not None:
        lines += _shared_out(changed, gpus)
        if changed.on_each <= budget:
            return lines
    lines.append("End to end no setting makes it fit.")
    change: dict[str, Any] = {
        "training": "blockwise",
        "mixed_precision": "bf16",
        "batch_size": min(8, found.recipe.batch_size),
    }
    blocks = costs(replace(found.recipe, **change))
    lines.append(f"With --set {_settings(change)}:")
    lines += [f"  {line}" for line in [*"\n".join(_blocks(blocks)).splitlines(), *_blocks_fit(blocks, gpus)]]
    return [*lines, *_without_training(found)]


def in_parts(found: Costs, gpus: Gpus) -> Costs | None:
    """The costs with every layer shared out to the GPUs (FSDP2), and with what makes them small there.

    None of one GPU, and of what needs layers whole.
    """
    changed = _changed(found.recipe, _SHARED_OUT)
    if gpus.count == 1 or needs_whole_layers(changed):
        return None
    return replace(costs(changed), devices=gpus.count)


def launched(gpus: Gpus, name: str) -> list[str]:
    """The command that trains a recipe with FSDP2, on two lines."""
    settings = _settings(_SHARED_OUT)
    start = f"accelerate launch --use_fsdp --fsdp_version 2 --num_processes {gpus.count} -m fbqat_hub.cli train"
    return [f"{start} {name} \\", f"  --output runs/{name} --set {settings}"]


def _shared_out(found: Costs, gpus: Gpus) -> list[str]:
    needs = found.on_each
    fits = "fits" if needs <= _budget(gpus) else "does not fit"
    return [
        f"With every layer shared out to the {gpus.count}, by FSDP2, it {fits}. On each, it needs about {gib(needs)}; "
        "this was computed, and never measured on GPUs:",
        *(f"  {line}" for line in launched(gpus, "RECIPE")),
        f"  Of the host's memory the first process takes {gib(found.encoding)} while it encodes. Then each takes up to "
        f"{gib(found.starting)} for calibration and GPTQ, block by block.",
    ]


def _budget(gpus: Gpus) -> int:
    return gpus.bytes - RESERVE


def _buckets(found: Costs, gpus: Gpus) -> int:
    """DistributedDataParallel copies gradients into buckets."""
    return found.memory.student if gpus.count > 1 else 0


def _captions(dataset: Mapping[str, Any]) -> int | None:
    source = PROMPT_SETS.get(source_of(dataset))
    if source:
        return min(source.rows, int(dataset.get("count") or source.rows))
    if "prompts" in dataset:
        return None if source_of(dataset) in PROMPT_SETS else sum(map(len, training_prompts(dataset).values()))
    folder: Path | None = folder_of(dataset)
    return len(pictures_in(folder)) if folder else None


def _of_a_prompt(recipe: Recipe) -> int:
    """Pictures."""
    return int(recipe.dataset.get("seeds", SEEDS)) if "prompts" in recipe.dataset else 1


def _sampler_steps(recipe: Recipe) -> int:
    import diffusers

    name = "num_inference_steps"
    call = getattr(diffusers, get_family(recipe.family).pipeline_class).__call__
    return int(recipe.generation.get(name, inspect.signature(call).parameters[name].default))


def _width(recipe: Recipe) -> int:
    """Bytes of a number in the precision of training."""
    return _HALF if recipe.half else 4


def _precision(recipe: Recipe) -> str:
    """In which the teacher computes."""
    return {None: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}[recipe.half]


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def gib(size: float) -> str:
    """Memory, in powers of two."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**29 else f"{size / 2**20:,.1f} MiB"


def gb(size: float) -> str:
    """Disk, in powers of ten."""
    return f"{size / 1e9:,.1f} GB" if size >= 5e8 else f"{size / 1e6:,.1f} MB"
