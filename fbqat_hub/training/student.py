"""The student before training: fake-quantized layers, calibrated, at the codes that the recipe starts from."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fbqat_hub.families import get_family
from fbqat_hub.integrations.checkpoint import targets_of
from fbqat_hub.quantization import FakeQuantizedLinear, calibrate, gptq_initialize, named_layers, prepare
from fbqat_hub.quantization.blocks import BlockWalk, Call, by_block, outputs_of, walk_through
from fbqat_hub.quantization.convert import Target, matches, prepare_layers, run_batches
from fbqat_hub.training.cache import CachedSplit
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.recipe import Recipe
from fbqat_hub.training.widths import chosen_widths


def prepare_student(recipe: Recipe, teacher: nn.Module, train_split: CachedSplit, draws: Draws) -> Any:
    """A copy of the teacher with fake-quantized layers, calibrated, with the recipe's layers trainable."""
    student = started_student(recipe, teacher, train_split, draws)
    if recipe.quantization.average_bits is not None:
        wider = _of_8(chosen_widths(recipe, student, teacher, train_split, draws))
        if wider:
            student = started_student(recipe, teacher, train_split, draws, wider, started=student)
    set_trained_layers(recipe, student)
    return student


def prepare_student_by_blocks(
    recipe: Recipe, teacher: nn.Module, train_split: CachedSplit, draws: Draws, accelerator: Accelerator
) -> Any:
    """As `prepare_student`, the same numbers, with one block on the device at a time.

    Args:
        teacher: in the host's memory, where the student is made.
        draws: of inputs in the host's memory, where what goes into a block is kept for all samples.
        accelerator: of all processes, which make the same student.

    Raises:
        ValueError: a model that cannot go block by block.
    """
    student, batches = started_by_blocks(recipe, teacher, train_split, draws, accelerator.device)
    if recipe.quantization.average_bits is not None:
        wider = _of_8(chosen_widths(recipe, student, teacher, train_split, draws, accelerator))
        chosen = targets_of(teacher, recipe.config().with_widths(wider))
        anew = [target for target in chosen if target.weight_bits is not None]
        if anew:
            _start_by_blocks(recipe, teacher, student, anew, batches, accelerator.device)
    set_trained_layers(recipe, student)
    return student


def started_by_blocks(
    recipe: Recipe, teacher: nn.Module, split: CachedSplit, draws: Draws, device: torch.device
) -> tuple[Any, list[Any]]:
    """As `started_student`, with one block on ``device`` at a time, and the samples that it took."""
    chosen = targets_of(teacher, recipe.config())
    replaced = {id(each): each for target in chosen for each in tensors_of(target.layer)}
    student: Any = copy.deepcopy(teacher, replaced).requires_grad_(False)
    batches = list(draws.calibration(split, max(recipe.calibration.samples, recipe.gptq.samples)))
    _start_by_blocks(recipe, teacher, student, chosen, batches, device)
    return student, batches


@torch.no_grad()
def _start_by_blocks(
    recipe: Recipe,
    teacher: nn.Module,
    student: nn.Module,
    chosen: Iterable[Target],
    batches: Sequence[Mapping[str, Any]],
    device: torch.device,
) -> None:
    """Put layers at the codes that training starts from into a student, with one block on ``device`` at a time.

    Args:
        teacher: in the host's memory, as the student and ``batches``.
        chosen: of the teacher's layers, those to fake-quantize.
    """
    names = get_family(recipe.family).blocks(teacher)
    layers = by_block(names, chosen)

    def started(module: nn.Module, block: str, inputs: Sequence[Any], run: Callable[..., None]) -> None:
        if not layers[block]:
            return
        prepare_layers(module, list(layers[block]), recipe.config().weight_scheme())
        start(recipe, module, lambda samples: inputs[:samples], run)
        into = student.get_submodule(block)
        for name in (name for target in layers[block] for name in target.names):
            into.set_submodule(name, module.get_submodule(name).requires_grad_(False).to("cpu"))

    def run(block: nn.Module, calls: Iterable[Call]) -> None:
        deque(outputs_of(block, calls, device), maxlen=0)

    def walk(model: nn.Module, batches: Iterable[Any]) -> None:
        walk_through(model, names, batches, device)

    outside = copy.deepcopy(teacher, {id(each): each for each in tensors_of(teacher)})
    started(outside, "", batches, walk)
    with BlockWalk(teacher, names, batches) as through:
        for name, own in zip(names, through.blocks, strict=True):
            block = copy.deepcopy(own).to(device)
            made = list(outputs_of(block, through.calls, device))
            started(block, name, through.calls, run)
            through.advance(made)


def resumed_student(recipe: Recipe, teacher: nn.Module, widths: Mapping[str, float]) -> Any:
    """The student of a checkpoint, before its numbers are read: nothing is calibrated or chosen again.

    Args:
        widths: name -> bits of every quantized layer there (`checkpoint.widths_in`).
    """
    wider = None if recipe.quantization.average_bits is None else _of_8(widths)
    student = _prepared(recipe, teacher, wider)
    set_trained_layers(recipe, student)
    return student


def _of_8(widths: Mapping[str, float]) -> dict[str, int]:
    return {name: 8 for name, bits in widths.items() if bits == 8}


def _prepared(recipe: Recipe, teacher: nn.Module, widths: Mapping[str, int] | None) -> Any:
    """A copy of the teacher, where this is, with fake-quantized layers at the nearest codes, nothing trainable."""
    config = recipe.config()
    student = copy.deepcopy(teacher).requires_grad_(False)
    prepare(student, config.weight_scheme(), **config.layer_options() | {"widths": widths})
    return student.requires_grad_(False)


def set_trained_layers(recipe: Recipe, model: nn.Module, within: str = "") -> None:
    """Of a model's fake-quantized layers, let those be trained that the recipe's ``train_layers`` names, no others.

    Args:
        within: what stands before their names in the denoiser, of a part of it.
    """
    patterns = get_family(recipe.family).layer_groups[recipe.train_layers]
    for name, layer in named_layers(model, FakeQuantizedLinear):
        layer.requires_grad_(matches(f"{within}{name}", patterns))


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


def started_student(
    recipe: Recipe,
    teacher: nn.Module,
    train_split: CachedSplit,
    draws: Draws,
    widths: Mapping[str, int] | None = None,
    started: nn.Module | None = None,
) -> Any:
    """The student at the codes that training starts from, nothing trainable.

    Args:
        widths: name -> bits of layers that do not have the recipe's ``weight_bits``.
        started: the same without ``widths``. Its weights are those of the other layers, which are not started again.
    """
    student = _prepared(recipe, teacher, widths).to(draws.device)
    start(
        recipe,
        student,
        lambda samples: draws.calibration(train_split, samples),
        only=None if started is None else widths,
    )
    if started is not None:
        own = dict(named_layers(student, FakeQuantizedLinear))
        with torch.no_grad():
            for name, layer in named_layers(started, FakeQuantizedLinear):
                if name not in (widths or {}):
                    own[name].weight.copy_(layer.weight)
    return student


def start(
    recipe: Recipe,
    prepared: nn.Module,
    samples: Callable[[int], Iterable[Any]],
    run: Callable[[nn.Module, Iterable[Any]], None] = run_batches,
    only: Container[str] | None = None,
) -> None:
    """Bring a prepared model, or a part of one, to the codes that training starts from, calibrated where it must be.

    Args:
        samples: gives the first so many training samples, as ``run`` takes them; the same ones at every call.
        run: runs the model on all of them.
        only: names of the layers that get GPTQ's codes; None for all.
    """
    if recipe.config().needs_calibration:
        options = asdict(recipe.calibration)
        calibrate(prepared, samples(options.pop("samples")), run=run, **options)
    if recipe.initialization == "gptq":
        options = asdict(recipe.gptq)
        count = options.pop("samples")
        gptq_initialize(prepared, lambda: samples(count), run=run, only=only, **options)
