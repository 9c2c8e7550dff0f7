"""The loop: bit width from the schedule, student against the frozen teacher (arXiv 2510.14823, algorithm 1).

There is no ground truth. Student and teacher see the same noisy latents, timestep and conditioning, and the loss is
the squared distance of their predictions. Everything random in a step is drawn from (seed, step), so a resumed run
continues to the bit-identical result.

A step's batch is shared out to the processes, and within each to parts that its device holds; gradients are averaged.
How it is shared out changes no number but by the order of sums. The first process writes.
"""

from __future__ import annotations

import datetime
import functools
import io
import itertools
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, fsdp2_prepare_model
from torch import Tensor, nn

from fbqat_hub.config import FBQATConfig
from fbqat_hub.integrations.diffusers import attach
from fbqat_hub.pipelines import save_stage
from fbqat_hub.progress import Progress
from fbqat_hub.quantization import (
    BitSchedule,
    FakeQuantizedLinear,
    PackedLayer,
    Rounding,
    converted,
    named_layers,
    set_bit_width,
)
from fbqat_hub.quantization.layer import QuantizedLayer
from fbqat_hub.stages import stage_folder
from fbqat_hub.training.adam import Rates, optimizer_of, set_rate
from fbqat_hub.training.cache import CachedSplit
from fbqat_hub.training.checkpoint import load_checkpoint, save_checkpoint
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.loss import held_out_loss, mean_squared
from fbqat_hub.training.recipe import Recipe
from fbqat_hub.training.sharding import (
    check_sharding,
    fsdp_plugin,
    is_sharded,
    share_out_blocks,
    whole_student,
)

# A line per step, in the folder of a run.
LOG = "training_log.jsonl"


def accelerator_of(recipe: Recipe) -> Accelerator:
    """The accelerator of a run: of this process alone, or of those that ``accelerate launch`` started.

    Raises:
        ValueError: as `check_sharding`.
    """
    # While the first process encodes the data, which takes hours, the others wait.
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(days=2))
    # A trained layer may have no effect: the last block of SD3 has no text output.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    # without it several processes on CPUs would not know of each other
    cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(
        mixed_precision=recipe.mixed_precision, cpu=cpu, kwargs_handlers=[patience, unused], fsdp_plugin=fsdp_plugin()
    )
    check_sharding(recipe, accelerator)
    return accelerator


def own_parts(recipe: Recipe, process: int, processes: int) -> list[slice]:
    """What a process takes of a step's batch, a part at a time.

    Raises:
        ValueError: the batch does not go into as many equal shares as there are processes.

    >>> own_parts(Recipe(family="sana", name="tiny", teacher="tiny", batch_size=10, micro_batch_size=3), 1, 2)
    [slice(5, 8, None), slice(8, 10, None)]
    """
    share, left = divmod(recipe.batch_size, processes)
    if left:
        more = recipe.batch_size - left + processes
        raise ValueError(
            f"recipe: batch_size is {recipe.batch_size}, of all {processes} processes together, and each takes as many "
            f"samples as the others; make it {more if not share else f'{more - processes} or {more}'}, or start fewer "
            "processes."
        )
    first, size = process * share, recipe.micro_batch_size or share
    ends = [*range(first, first + share, size), first + share]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


@dataclass
class LogLine:
    """One line of ``training_log.jsonl``. ``step`` counts from 1; ``loss`` is the mean over the batch.

    ``block`` is the one that is trained, of block-wise training.
    """

    step: int
    loss: float
    bit_width: float
    learning_rate: float
    validation_loss: float | None = None
    block: str | None = None

    def json(self) -> str:
        """The line, without what is None."""
        return json.dumps({key: value for key, value in asdict(self).items() if value is not None}) + "\n"


class Loop:
    """A student in training, with its optimizer.

    Args:
        student: from ``prepare_student``; changed in place.
        teacher: the full-precision denoiser.
        splits, draws: what is learned from.
        output: folder of the log, the stages and the checkpoints.
        skeleton: of a student that is trained in parts; its blocks, and the teacher's, are shared out already.

    Raises:
        ValueError: as `own_parts`.
    """

    def __init__(
        self,
        recipe: Recipe,
        student: Any,
        teacher: nn.Module,
        splits: dict[str, CachedSplit],
        draws: Draws,
        output: Path,
        accelerator: Accelerator,
        skeleton: nn.Module | None = None,
    ) -> None:
        self.recipe, self.student, self.splits, self.draws = recipe, student, splits, draws
        self.output, self.accelerator = output, accelerator
        self.teacher: Any = teacher.eval().requires_grad_(False)
        self._skeleton = skeleton
        if is_sharded(accelerator):
            share_out_blocks(accelerator, draws.family, teacher)
            self.teacher = fsdp2_prepare_model(accelerator, self.teacher)
        else:
            self.teacher.to(accelerator.device)
        if recipe.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        self.optimizer = optimizer_of(recipe, student, self.teacher)
        self._parts = own_parts(recipe, accelerator.process_index, accelerator.num_processes)
        self._schedule = recipe.bit_schedule()
        self._text = recipe.as_yaml()
        ends = recipe.stage_ends()
        self._stages = {ends[bits]: bits for bits in recipe.keep_stages}
        self._wrapped, self._stepping = student, self.optimizer

    def start(self, resume: bool) -> int:
        """Wrap what is trained for the accelerator; returns the steps that are done already.

        Raises:
            FileNotFoundError: a stage that the checkpoint is past was taken away.
            ValueError: as ``load_checkpoint``.
        """
        # prepared first: accelerate moves all of an optimizer's state to the device, also what stays on the CPU there
        self._wrapped, self._stepping = self.accelerator.prepare(self.student, self.optimizer)
        checkpoints, first = self.output / "checkpoints", 0
        if resume:
            first = load_checkpoint(checkpoints, self.student, self.optimizer, self._text, self.accelerator.scaler)
        for end, bits in self._stages.items():
            if end <= first and not stage_folder(self.output, bits).exists():
                raise FileNotFoundError(
                    f"{stage_folder(self.output, bits)} is missing, and the newest checkpoint is past it; put it back, "
                    f"or delete {checkpoints} to start again."
                )
        self._wrapped.train()
        return first

    def step(self, step: int) -> LogLine:
        """One update, of the step with this number from 0.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        recipe, accelerator = self.recipe, self.accelerator
        line = set_step(recipe, self._schedule, self.student, self.optimizer, step)
        loss = torch.zeros((), device=accelerator.device)
        for part in self._parts:
            last = part is self._parts[-1]  # with which the processes' gradients are averaged
            together = last or self._skeleton is not None  # which keeps only its parts of gradients
            with nullcontext() if together else accelerator.no_sync(self._wrapped):
                own = self._loss(step, part)
                accelerator.backward(own)
            loss += own.detach()
        line.loss = accelerator.reduce(loss, reduction="mean").item()
        if not math.isfinite(line.loss):  # before the step, which would leave no layer finite
            again = functools.partial(self._losses, step)
            raise not_finite(line, recipe, self.output, self.student, again)
        if recipe.optimizer.max_grad_norm:
            accelerator.clip_grad_norm_(self._wrapped.parameters(), recipe.optimizer.max_grad_norm)
        self._stepping.step()
        self._stepping.zero_grad()
        return line

    def _losses(self, step: int) -> list[Tensor]:
        return [self._loss(step, part) for part in self._parts]

    def _loss(self, step: int, part: slice) -> Tensor:
        """Of a part of this process's share of the batch, as its part of the share's mean."""
        recipe, share = self.recipe, self.recipe.batch_size // self.accelerator.num_processes
        inputs = self.draws.training(self.splits["train"], step, recipe.batch_size, part)
        with torch.no_grad(), self.accelerator.autocast():
            target = self.draws.predict(self.teacher, inputs)
        weight = self.draws.error_weight(inputs) if recipe.loss_weighting == "sampler" else None
        with self.accelerator.autocast():
            made = self.draws.predict(self._wrapped, inputs)
        loss = mean_squared(made.float(), target.float(), weight)
        return loss * ((part.stop - part.start) / share)

    def validation_loss(self) -> float:
        """Mean held-out loss of the validation split, student and teacher in the precision of training."""
        with self.accelerator.autocast():
            losses = held_out_loss(self.student.eval(), self.teacher, self.splits["validation"], self.draws)
        self.student.train()
        return sum(losses) / len(losses)

    def keep(self, done: int) -> None:
        """Write the stage and the checkpoint that are due after ``done`` steps."""
        if done in self._stages:  # before the checkpoint of this step: a run that is resumed from it has the stage
            self._keep_stage(self._stages[done])
        if self.recipe.save_every and done % self.recipe.save_every == 0 and done < self.recipe.steps:
            folder, scaler = self.output / "checkpoints", self.accelerator.scaler
            writes = self.accelerator.is_main_process
            save_checkpoint(folder, done, self.student, self.optimizer, self._text, scaler, writes=writes)

    def finish(self) -> Any:
        """The student as it was before the accelerator wrapped it, to compute in its own precision again.

        One that was trained in parts is whole on the CPU of the first process, and None in the others.
        """
        if self._skeleton is not None:
            self.student = whole_student(self.student, self._skeleton, self.accelerator)
        else:
            self.accelerator.unwrap_model(self._wrapped, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
        return self.student

    def _keep_stage(self, bits: int) -> None:
        """Save a packed copy of the student at the width that its schedule leaves now."""
        set_bit_width(self.student, bits)
        packed = converted(self.student).cpu()
        attach(packed, FBQATConfig(**{**self.recipe.config().to_dict(), "weight_bits": bits}))
        save_stage(packed, stage_folder(self.output, bits))


def distill(
    recipe: Recipe,
    student: Any,
    teacher: nn.Module,
    splits: dict[str, CachedSplit],
    draws: Draws,
    output: Path,
    accelerator: Accelerator,
    resume: bool,
    progress: bool,
    after_step: Callable[[int], None] | None = None,
    stage: str = "",
    skeleton: nn.Module | None = None,
) -> Any:
    """Run the recipe's steps on a prepared student; writes ``output/training_log.jsonl``, stages and checkpoints.

    Args:
        recipe, student, teacher, splits, draws, output, accelerator, skeleton: as `Loop`.
        resume: continue from the newest checkpoint in ``output``.
        progress: show a progress bar.
        after_step: called with the number of each step, from 0, when its update is done.
        stage: what the progress is called; "train" and the method if empty.

    Returns:
        As `Loop.finish`.

    Raises:
        FileNotFoundError, FloatingPointError, ValueError: as `Loop.start`, `Loop.step` and `check_trained`.
    """
    loop, line = Loop(recipe, student, teacher, splits, draws, output, accelerator, skeleton), None
    first, writes = loop.start(resume), accelerator.is_main_process
    log = open_log(output / LOG, first) if writes else io.StringIO()
    bar = Progress(stage or f"train {recipe.method}", recipe.steps, "step", start=first, shown=progress and writes)
    with log, bar:
        for step in range(first, recipe.steps):
            line = loop.step(step)
            if after_step:
                after_step(step)
            if writes or is_sharded(accelerator):  # where all have a part of what is computed and kept
                if recipe.validate_every and line.step % recipe.validate_every == 0:
                    line.validation_loss = loop.validation_loss()
                log.write(line.json())
                log.flush()
                loop.keep(line.step)
            bar.update(loss=f"{line.loss:.2e}", bits=f"{line.bit_width:g}")
    student = loop.finish()
    if line is not None and student is not None:
        check_trained(line, recipe, output, student)
    return student


def set_step(
    recipe: Rates, schedule: BitSchedule, student: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> LogLine:
    """Bring a student and its optimizer (`optimizer_of`) to the width, the rounding and the rate of a step, from 0.

    Returns:
        The step's line of the log, without its loss.
    """
    width = schedule.bit_width(step / recipe.steps)
    for clip in set_bit_width(student, width, Rounding(recipe.optimizer.ewgs)):
        optimizer.state.pop(clip, None)  # moments of the clip at another width
    rate = recipe.learning_rate * learning_rate_factor(recipe, step)
    set_rate(optimizer, rate)
    return LogLine(step + 1, math.nan, width, rate)


def not_finite(
    line: LogLine, recipe: Recipe, output: Path, model: nn.Module, again: Callable[[], Any]
) -> FloatingPointError:
    """The error of a step whose loss is not finite: which layer is the first whose output is not, and what to do.

    Args:
        model: the student, or the block that is trained.
        again: computes the loss once more.
    """
    found: list[str] = []

    def look(name: str, layer: QuantizedLayer, made: Tensor) -> None:
        if not found and not bool(made.isfinite().all()):
            found.append(f"{name} ({_bits(layer):g} bits)")

    hooks = [
        layer.register_forward_hook(lambda layer, _, made, name=name: look(name, layer, made))
        for name, layer in named_layers(model, QuantizedLayer)
    ]
    with torch.no_grad():
        again()
    for hook in hooks:
        hook.remove()
    cause = f"the first output that is not finite is that of {found[0]}" if found else "all layers' outputs are finite"
    said = f"the loss is {line.loss} at {_where(line)}, {line.bit_width:g} bits; {cause}"
    return FloatingPointError(f"{said}. {_what_to_change(line, recipe, output, model)}")


def check_trained(line: LogLine, recipe: Recipe, output: Path, model: nn.Module) -> None:
    """Refuse what the last update left, of which no loss was computed, where it cannot be stored.

    Args:
        line: of that update.
        model: the student, or the block that is trained.

    Raises:
        FloatingPointError: names the layer, its width, the step and what to change.
    """
    for name, layer in named_layers(model, QuantizedLayer):
        try:
            layer.check_numbers()
        except ValueError as error:
            raise FloatingPointError(
                f"{name} ({_bits(layer):g} bits) after the last update, {_where(line)}: {error} "
                f"{_what_to_change(line, recipe, output, model)}"
            ) from None


def _where(line: LogLine) -> str:
    return f"{line.block}, step {line.step}" if line.block else f"step {line.step}"


def _bits(layer: QuantizedLayer) -> float:
    return layer.bit_width if isinstance(layer, FakeQuantizedLinear) else cast(PackedLayer, layer).weight_bits


def _what_to_change(line: LogLine, recipe: Recipe, output: Path, model: nn.Module) -> str:
    rate = "blockwise.learning_rate" if line.block else "learning_rate"
    if next(named_layers(model, PackedLayer), None):  # whose scales are tuned
        rate = "blockwise.tuning_rate"
    folder = output / "checkpoints"
    kept = f"The last checkpoint is kept in {folder}." if folder.is_dir() else "There is no checkpoint yet."
    return f"Lower {rate} ({recipe.learning_rate:g}) or set optimizer.max_grad_norm. {kept}"


def learning_rate_factor(recipe: Rates, step: int) -> float:
    """Learning rate at ``step`` as a share of the peak: linear warm-up, then constant or cosine to 0."""
    rule = recipe.optimizer
    warm = min(1.0, (step + 1) / rule.warmup_steps) if rule.warmup_steps else 1.0
    if rule.learning_rate_schedule == "constant":
        return warm
    return warm * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


def open_log(path: Path, steps_done: int) -> io.TextIOBase:
    """The log, cut back to the steps of the checkpoint that is continued."""
    lines = path.read_text().splitlines(keepends=True)[:steps_done] if path.exists() else []
    path.write_text("".join(lines))
    return path.open("a")
