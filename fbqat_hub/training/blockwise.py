"""Training block by block: each block of the student learns to give what the teacher's block gives.

Memory holds one block, its gradients and its optimizer, and what goes into it of all samples. A block is trained and
packed, and the samples go through it to the next one. Its inputs are the student's own, as the packed blocks before it
made them, and its targets what the teacher's block makes of the teacher's inputs: so a block undoes errors of those
before it, too. This is EfficientQAT (arXiv 2407.11062) for diffusion transformers; BRECQ (arXiv 2102.05426) trained
blocks before.

What a block learns is its own output, not the prediction of the model; docs/method.md says what that costs.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fbqat_hub.families import Family
from fbqat_hub.files import whole
from fbqat_hub.integrations.checkpoint import packed_layers, targets_of
from fbqat_hub.progress import Progress
from fbqat_hub.quantization import PackedLayer, convert, set_bit_width
from fbqat_hub.quantization.blocks import BlockWalk, Call, by_block, moved_tensors, outputs_of, walk_through
from fbqat_hub.quantization.convert import matches, prepare_layers
from fbqat_hub.quantization.tuning import scales_tuned
from fbqat_hub.training.adam import optimizer_of
from fbqat_hub.training.cache import CachedSplit
from fbqat_hub.training.checkpoint import is_of_recipe, is_whole
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.loop import LOG, LogLine, check_trained, distill, not_finite, open_log, set_step
from fbqat_hub.training.loss import mean_squared
from fbqat_hub.training.method import Schedule
from fbqat_hub.training.recipe import Recipe
from fbqat_hub.training.seeding import generator
from fbqat_hub.training.student import codes_by_blocks, samples_of, set_trained_layers, start, with_same_tensors
from fbqat_hub.training.widths import chosen_widths_by_blocks, scored_samples
from fbqat_hub.untrusted import read_json


def train_blockwise(
    recipe: Recipe,
    teacher: nn.Module,
    splits: dict[str, CachedSplit],
    draws: Draws,
    output: Path,
    accelerator: Accelerator,
    *,
    resume: bool = False,
    progress: bool = True,
) -> Any:
    """A packed student: its blocks trained one by one, then the scales and biases of all, end to end.

    Layers outside the blocks are quantized as training starts, and only tuned. Writes ``output/training_log.jsonl``, a
    line per step (`LogLine`), and while it runs the finished blocks and the tuning into ``output/checkpoints``.

    Args:
        teacher: the full-precision denoiser. Until the last stage it stays where it is, and copies of single blocks go
            to the accelerator's device.
        draws: on the teacher's device, where all inputs of a block are kept.
        resume: go on with what is not finished; the student is the same, bit for bit.

    Raises:
        FloatingPointError: a loss, or what the last update left, that is not finite; names the block and the step.
        ValueError: more than one process, a model that cannot go block by block, or blocks that were finished with
            another recipe.
    """
    if accelerator.num_processes > 1:
        raise ValueError(
            f"recipe: training is blockwise, and there are {accelerator.num_processes} processes; it runs in one, on "
            "one device. Start it without accelerate launch, or use training: end_to_end."
        )
    training = _BlockTraining(recipe, teacher, splits["train"], draws, output, accelerator)
    done = training.finished() if resume else 0
    student = training.run(done, progress)
    if recipe.blockwise.tuning_steps:
        draws.device, folder = accelerator.device, output / "checkpoints" / "tuning"
        folder.mkdir(parents=True, exist_ok=True)
        tuning = _tuning(recipe)
        with scales_tuned(student.to(accelerator.device)):
            distill(tuning, student, teacher, splits, draws, folder, accelerator, resume, progress, stage="tune scales")
        _append_log(output / LOG, folder / LOG)
    return student


def _tuning(recipe: Recipe) -> Recipe:
    """The last stage, of scales and biases alone."""
    return replace(
        recipe,
        training="end_to_end",
        steps=recipe.blockwise.tuning_steps,
        learning_rate=recipe.blockwise.tuning_rate,
        schedule=Schedule(stages="constant"),  # codes stay as they are
        optimizer=replace(recipe.optimizer, learning_rate_unit="absolute"),  # scales are trained as factors, from 1
    )


def _append_log(log: Path, tuning: Path) -> None:
    """Put the lines of the tuning behind those of the blocks, and count on."""
    before = len(log.read_text().splitlines())
    with log.open("a") as lines:
        for line in map(json.loads, tuning.read_text().splitlines()):
            lines.write(json.dumps({**line, "step": before + line["step"]}) + "\n")


class _BlockTraining:
    """A student on its way from the first block to the last.

    Attributes:
        student: the modules of the teacher, and its very tensors where a layer is not quantized yet.
        chosen: name of a block, or "" of what is outside -> its layers to quantize, named from the block.
        trained: of each block, whether a layer of it is; a block of which none is takes no steps.
        batches: keyword arguments of the denoiser, all that is trained on; ``weights`` are those of their errors.
        folder: of the finished blocks.
    """

    def __init__(
        self,
        recipe: Recipe,
        teacher: nn.Module,
        split: CachedSplit,
        draws: Draws,
        output: Path,
        accelerator: Accelerator,
    ) -> None:
        own = recipe.blockwise
        self.recipe = replace(recipe, steps=own.steps, learning_rate=own.learning_rate)
        self._saved = recipe.as_yaml()
        self.teacher, self.draws, self.output, self.device = teacher.eval(), draws, output, accelerator.device
        self.names = draws.family.blocks(teacher)
        self.folder = output / "checkpoints" / "blocks"
        self.student = with_same_tensors(teacher)
        self.config = recipe.config().with_widths(self._widths(recipe, split, accelerator))
        self.chosen = by_block(self.names, targets_of(teacher, self.config))
        patterns = draws.family.layer_groups[recipe.train_layers]
        self.trained = [
            any(matches(f"{name}.{each.names[0]}", patterns) for each in self.chosen[name]) for name in self.names
        ]
        numbers = range(math.ceil(recipe.blockwise.samples / recipe.batch_size))
        drawn = [draws.training(split, number, recipe.batch_size) for number in numbers]
        weighted = recipe.loss_weighting == "sampler"
        self.weights = [draws.error_weight(inputs) if weighted else None for inputs in drawn]
        dtype = next(teacher.parameters()).dtype
        self.batches = [forward_arguments(draws.family, inputs, dtype) for inputs in drawn]

    def _widths(self, recipe: Recipe, split: CachedSplit, accelerator: Accelerator) -> dict[str, int]:
        """For the recipe's average, chosen once in a run. It takes the codes of a student in the host's memory."""
        if recipe.quantization.average_bits is None:
            return {}
        kept = self.folder / "widths.json"
        if not kept.exists() or not is_of_recipe(self.folder, self._saved):
            blocks, dtype = _Held(self.teacher, self.names), next(self.teacher.parameters()).dtype
            started, scored = (
                [forward_arguments(self.draws.family, inputs, dtype) for inputs in drawn]
                for drawn in (samples_of(recipe, split, self.draws), scored_samples(split, self.draws))
            )
            codes = codes_by_blocks(recipe, blocks, started, accelerator.device)
            widths = chosen_widths_by_blocks(recipe, codes, blocks, scored, accelerator)
            self._write_recipe()
            with whole(kept) as partial:
                partial.write_text(json.dumps(widths))
        chosen: dict[str, int] = read_json(kept)
        return chosen

    def finished(self) -> int:
        """How many blocks an interrupted run has finished, up to the first whose file is damaged; 0 if the recipe is.

        Raises:
            ValueError: with another recipe.
        """
        if self.folder.exists() and not is_of_recipe(self.folder, self._saved):
            return 0
        files = map(self._file, range(len(self.names)))
        return sum(1 for _ in itertools.takewhile(lambda file: file.exists() and is_whole(file), files))

    def run(self, done: int, progress: bool) -> Any:
        """Train all blocks but the first ``done``, which are read."""
        steps, empty = self.recipe.steps, packed_layers(self.teacher, self.config) if done else {}
        first = steps * sum(self.trained[:done])
        bar = Progress("train blocks", sum(self.trained) * steps, "step", start=first, shown=progress)
        self.output.mkdir(parents=True, exist_ok=True)
        self._quantize_outside()
        with (
            bar,
            open_log(self.output / LOG, first) as log,
            BlockWalk(self.teacher, self.names, self.batches) as of_teacher,
            BlockWalk(self.student, self.names, self.batches) as of_student,
        ):
            for number, name in enumerate(self.names):
                block = copy.deepcopy(of_teacher.blocks[number]).to(self.device)
                with torch.no_grad():
                    wanted = list(self._outputs(block, of_teacher.calls))
                if number < done:
                    self._read(number, block, empty)
                else:
                    self._prepare(block, name, of_teacher.calls)
                    own = of_teacher.blocks[number]
                    lines = self._train(number, block, own, of_student.calls, wanted) if self.trained[number] else ()
                    for line in lines:
                        log.write(line.json())
                        bar.update(block=f"{number + 1}/{len(self.names)}", loss=f"{line.loss:.2e}")
                    log.flush()
                    if self.chosen[name]:
                        convert(block)
                    self._write(number, block)
                of_student.advance(self._outputs(block, of_student.calls))
                of_teacher.advance(wanted)
                of_student.blocks[number] = block.to(_device_of(self.teacher))
        return self.student

    def _train(
        self, number: int, block: nn.Module, of_teacher: nn.Module, calls: list[Call], wanted: list[Any]
    ) -> Iterator[LogLine]:
        """The steps of one block, on the kept batches in an order that is shuffled in each round."""
        recipe, name, count = self.recipe, self.names[number], len(calls)
        before = recipe.steps * sum(self.trained[:number])
        optimizer, schedule = optimizer_of(recipe, block, of_teacher), recipe.bit_schedule()
        order: list[int] = []
        for step in range(recipe.steps):
            if step % count == 0:
                order = torch.randperm(count, generator=generator(recipe.seed, "blocks", number, step)).tolist()
            index = order[step % count]
            line = set_step(recipe, schedule, block, optimizer, step)
            line.step, line.block = before + step + 1, name
            call, target, weight = moved_tensors((calls[index], wanted[index], self.weights[index]), self.device)
            loss = block_loss(call.run(block), target, weight)
            line.loss = loss.item()
            if not math.isfinite(line.loss):
                raise not_finite(line, recipe, self.output, block, functools.partial(call.run, block))
            loss.backward()
            if recipe.optimizer.max_grad_norm:
                nn.utils.clip_grad_norm_(block.parameters(), recipe.optimizer.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            yield line
        set_bit_width(block, recipe.quantization.weight_bits)
        check_trained(line, recipe, self.output, block)

    def _quantize_outside(self) -> None:
        """Pack the layers that are in no block; the blocks are still the teacher's."""
        if self.chosen[""]:
            self._start(self.student, "", self.batches, self._walk)
            convert(self.student)

    def _prepare(self, block: nn.Module, name: str, calls: list[Call]) -> None:
        if self.chosen[name]:
            self._start(block, name, calls, self._run)
        set_trained_layers(self.recipe, block, f"{name}.")

    def _start(self, module: nn.Module, name: str, batches: list[Any], run: Any) -> None:
        """Fake-quantize the layers of a block, or of what is outside, at the codes that training starts from."""
        prepare_layers(module, list(self.chosen[name]), self.config.weight_scheme())
        module.requires_grad_(False)
        start(self.recipe, module, lambda samples: batches[: math.ceil(samples / self.recipe.batch_size)], run)

    def _outputs(self, block: nn.Module, calls: Iterable[Call]) -> Iterator[Any]:
        return outputs_of(block, calls, self.device, _device_of(self.teacher))

    def _run(self, block: nn.Module, calls: Iterable[Call]) -> None:
        for call in calls:
            moved_tensors(call, self.device).run(block)

    def _walk(self, model: nn.Module, batches: Iterable[Any]) -> None:
        walk_through(model, self.names, batches, self.device, _device_of(self.teacher))

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:04d}.safetensors"

    def _write(self, number: int, block: nn.Module) -> None:
        if not number:
            self._write_recipe()
        with whole(self._file(number)) as partial:
            save_file({name: value.contiguous().cpu() for name, value in block.state_dict().items()}, partial)

    def _write_recipe(self) -> None:
        with whole(self.folder / "recipe.yaml") as partial:
            partial.write_text(self._saved)

    def _read(self, number: int, block: nn.Module, empty: Mapping[str, PackedLayer]) -> None:
        prefix = f"{self.names[number]}."
        for name, layer in empty.items():
            if name.startswith(prefix):
                block.set_submodule(name.removeprefix(prefix), layer)
        block.load_state_dict(load_file(self._file(number)), assign=True)
        block.requires_grad_(False).to(self.device)


def forward_arguments(family: Family, inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Of a denoiser's forward, in its precision. Not the timesteps, of which bfloat16 would leave 256."""
    own = {family.timestep_input: inputs[family.timestep_input]}
    return {**moved_tensors(dict(inputs), dtype=dtype), **own, "return_dict": False}


def block_loss(made: Any, wanted: Any, weight: Tensor | None = None) -> Tensor:
    """Mean squared error of what a block makes of the picture.

    Blocks of two streams give those of the text first, and the loss leaves them out: what becomes of the text counts
    by what it does to the picture in the same block. With it, the model's own loss was higher on FLUX's and SD3.5's
    tiny teachers (validation, seed 1).

    Args:
        made, wanted: a tensor [N, ...], or a tuple of which the last is the picture's.
        weight: [N], of each sample.
    """
    own, target = (each[-1] if isinstance(each, tuple) else each for each in (made, wanted))
    return mean_squared(own.float(), target.float(), weight)


class _Held:
    """A denoiser in the host's memory, as `student.Blocks`."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model, self.names = model, names
        self._blocks = {name: model.get_submodule(name) for name in names}

    def block(self, name: str) -> nn.Module:
        return copy.deepcopy(self._blocks[name])


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
