"""The student before training: fake-quantized layers, calibrated, at the codes that the recipe starts from."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from fbqat_hub.families import get_family
from fbqat_hub.integrations.checkpoint import targets_of
from fbqat_hub.quantization import FakeQuantizedLinear, calibrate, gptq_initialize, named_layers, prepare
from fbqat_hub.quantization.blocks import BlockWalk, Call, by_block, outputs_of, walk_through
from fbqat_hub.quantization.convert import matches, prepare_layers, run_batches
from fbqat_hub.training.cache import CachedSplit
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.recipe import Recipe
from fbqat_hub.training.widths import chosen_widths


def prepare_student(recipe: Recipe, teacher: nn.Module, train_split: CachedSplit, draws: Draws) -> Any:
    """A copy of the teacher with fake-quantized layers, calibrated, with the recipe's layers trainable."""
    student = started_student(recipe, teacher, train_split, draws)
    if recipe.quantization.average_bits is not None:
        widths = chosen_widths(recipe, student, teacher, train_split, draws)
        wider = {name: 8 for name in widths if widths[name] == 8}
        if wider:
            student = started_student(recipe, teacher, train_split, draws, wider, started=student)
    set_trained_layers(recipe, student)
    return student


@torch.no_grad()
def prepare_student_by_blocks(
    recipe: Recipe, teacher: nn.Module, train_split: CachedSplit, draws: Draws, device: torch.device
) -> Any:
    """As `prepare_student`, the same numbers, with one block on ``device`` at a time.

    Args:
        teacher: in the host's memory, where the student is made.
        draws: of inputs in the host's memory, where what goes into a block is kept for all samples.

    Raises:
        ValueError: the recipe chooses widths, or a model that cannot go block by block.
    """
    if recipe.quantization.average_bits is not None:
        raise ValueError("quantization.average_bits is chosen with the whole model on one device; set it to null.")
    config, names = recipe.config(), draws.family.blocks(teacher)
    chosen = by_block(names, targets_of(teacher, config))
    of_blocks = [each for name in names for each in tensors_of(teacher.get_submodule(name))]
    student: Any = copy.deepcopy(teacher, {id(each): each for each in of_blocks})  # blocks are copied one by one

    def started(module: nn.Module, name: str, batches: Sequence[Any], run: Callable[..., None]) -> nn.Module:
        if chosen[name]:
            prepare_layers(module, list(chosen[name]), config.weight_scheme())
            start(recipe, module, lambda samples: batches[:samples], run)
        return module.requires_grad_(False)

    def run(block: nn.Module, calls: Iterable[Call]) -> None:
        deque(outputs_of(block, calls, device), maxlen=0)

    def walk(model: nn.Module, batches: Iterable[Any]) -> None:
        walk_through(model, names, batches, device)

    count = max(recipe.calibration.samples, recipe.gptq.samples)
    batches = list(draws.calibration(train_split, count))
    started(student, "", batches, walk)
    with BlockWalk(teacher, names, batches) as through:
        for name, own in zip(names, through.blocks, strict=True):
            block = copy.deepcopy(own).to(device)
            made = list(outputs_of(block, through.calls, device))
            student.set_submodule(name, started(block, name, through.calls, run).to("cpu"))
            through.advance(made)
    set_trained_layers(recipe, student)
    return student


def empty_student(recipe: Recipe, teacher: nn.Module, device: torch.device | str, widths: Mapping[str, float]) -> Any:
    """A student whose numbers are those of a checkpoint, to be loaded: not calibrated, at no codes in particular.

    Args:
        widths: name -> bits of the layers in the checkpoint.
    """
    chosen = recipe.quantization.average_bits is not None
    student = _prepared(recipe, teacher, device, {name: 8 for name in widths if chosen and widths[name] == 8})
    set_trained_layers(recipe, student)
    return student


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
    student = _prepared(recipe, teacher, draws.device, widths)
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


def _prepared(recipe: Recipe, teacher: nn.Module, device: torch.device | str, widths: Mapping[str, int] | None) -> Any:
    config = recipe.config()
    student = copy.deepcopy(teacher).to(device).requires_grad_(False)
    prepare(student, config.weight_scheme(), **config.layer_options() | {"widths": widths})
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
