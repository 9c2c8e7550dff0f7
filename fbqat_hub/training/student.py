"""The student before training: fake-quantized layers, calibrated, at the codes that the recipe starts from."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fbqat_hub.families import get_family
from fbqat_hub.quantization import (
    FakeQuantizedLinear,
    PackedLayer,
    PackedLinear,
    calibrate,
    gptq_initialize,
    named_layers,
    prepare,
)
from fbqat_hub.quantization.blocks import BlockWalk, Call, by_block, outputs_of, walk_through
from fbqat_hub.quantization.convert import matches, prepare_layers, run_batches, targets
from fbqat_hub.quantization.gptq import move_to_codes
from fbqat_hub.training.cache import CachedSplit
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.recipe import Recipe
from fbqat_hub.training.sharding import skeleton_of
from fbqat_hub.training.widths import chosen_widths, chosen_widths_by_blocks, scored_samples


def prepare_student(recipe: Recipe, teacher: nn.Module, train_split: CachedSplit, draws: Draws) -> Any:
    """The teacher with fake-quantized layers, calibrated, with the recipe's layers trainable.

    What is not quantized are the teacher's own tensors.
    """
    student = started_student(recipe, teacher, train_split, draws)
    if recipe.quantization.average_bits is not None:
        wider = _of_8(chosen_widths(recipe, student, teacher, train_split, draws))
        if wider:
            student = started_student(recipe, teacher, train_split, draws, wider, started=student)
    set_trained_layers(recipe, student)
    return student


class Blocks(Protocol):
    """A float denoiser of which one block is loaded at a time, as `StreamedDenoiser`."""

    @property
    def model(self) -> Any:
        """The denoiser, on the CPU; its blocks need no numbers."""

    @property
    def names(self) -> Sequence[str]:
        """Of its blocks."""

    def block(self, name: str) -> Any:
        """A new copy of a block, on the CPU."""


def prepare_student_by_blocks(
    recipe: Recipe,
    teacher: Blocks,
    train_split: CachedSplit,
    draws: Draws,
    accelerator: Accelerator,
    *,
    saved: Mapping[str, float] | None = None,
    share: Callable[[nn.Module], None] | None = None,
) -> tuple[Any, nn.Module]:
    """As `prepare_student`, the same numbers, with one block on the device, and whole in memory, at a time.

    Args:
        draws: of inputs in the host's memory, where what goes into a block is kept for all samples.
        accelerator: of all processes, which make the same student.
        saved: as `resumed_student`; None to start at the recipe's codes.
        share: shares out a block of the student to the processes; None keeps it whole.

    Returns:
        The student, and its skeleton (`sharding.skeleton_of`).

    Raises:
        ValueError: a model that cannot go block by block.
    """
    batches = [] if saved is not None else samples_of(recipe, train_split, draws)
    codes: dict[str, PackedLayer] = {}
    if recipe.quantization.average_bits is not None and saved is None:
        codes = codes_by_blocks(recipe, teacher, batches, accelerator.device)
        saved = chosen_widths_by_blocks(recipe, codes, teacher, scored_samples(train_split, draws), accelerator)
    widths = {} if recipe.quantization.average_bits is None else _of_8(saved or {})
    student: Any = None
    skeleton: Any = None
    for name, module in _started_blocks(recipe, teacher, widths, batches, accelerator.device, codes):
        set_trained_layers(recipe, module, f"{name}." if name else "")
        if not name:
            student, skeleton = module, skeleton_of(module)
            continue
        skeleton.set_submodule(name, skeleton_of(module))
        if share is not None:
            share(module)
        else:
            module.to("cpu")
        student.set_submodule(name, module)
    return student, skeleton


def samples_of(recipe: Recipe, split: CachedSplit, draws: Draws) -> list[dict[str, Any]]:
    """What a student is calibrated and started on."""
    return list(draws.calibration(split, max(recipe.calibration.samples, recipe.gptq.samples)))


def codes_by_blocks(
    recipe: Recipe, teacher: Blocks, batches: Sequence[Mapping[str, Any]], device: torch.device
) -> dict[str, PackedLayer]:
    """Name -> the layer at the codes that training starts from, every one at the recipe's ``weight_bits``."""
    codes: dict[str, PackedLayer] = {}
    for block, module in _started_blocks(recipe, teacher, {}, batches, device):
        for name, layer in named_layers(module, FakeQuantizedLinear):
            codes[_full(block, name)] = PackedLinear.from_fake_quantized(layer).to("cpu")
    return codes


@torch.no_grad()
def _started_blocks(
    recipe: Recipe,
    teacher: Blocks,
    widths: Mapping[str, int],
    batches: Sequence[Mapping[str, Any]],
    device: torch.device,
    codes: Mapping[str, PackedLayer] | None = None,
) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of the denoiser without its blocks, "", and then of each block, with layers that are started.

    Args:
        widths: of layers that do not have the recipe's ``weight_bits``.
        batches: to start on; none leaves the layers at their nearest codes.
        codes: of all layers at ``weight_bits``, where they were found before.
    """
    scheme, options = recipe.config().weight_scheme(), recipe.config().layer_options()
    names, model = teacher.names, teacher.model
    layers = by_block(names, targets(model, **options | {"widths": widths}))

    def started(block: str, module: nn.Module, inputs: Sequence[Any], run: Callable[..., None]) -> nn.Module:
        prepare_layers(module, list(layers[block]), scheme)
        module.requires_grad_(False)
        if layers[block] and inputs:
            own = dict(named_layers(module, FakeQuantizedLinear))
            known = {name: codes[_full(block, name)] for name in own if not own[name].keeps_width} if codes else {}
            start(recipe, module, lambda samples: inputs[:samples], run, only=own.keys() - known.keys())
            for name, layer in known.items() if recipe.initialization == "gptq" else ():
                move_to_codes(own[name], layer.codes().to(own[name].weight.device), recipe.gptq.margin)
        return module

    def run(block: nn.Module, calls: Iterable[Call]) -> None:
        deque(outputs_of(block, calls, device), maxlen=0)

    def walk(model: nn.Module, batches: Iterable[Any]) -> None:
        walk_through(model, names, batches, device, load=teacher.block)

    inside = {id(each): each for name in names for each in tensors_of(model.get_submodule(name))}
    yield "", started("", copy.deepcopy(model, inside), batches, walk)
    if not batches:
        for name in names:
            yield name, started(name, teacher.block(name), (), run)
        return
    with BlockWalk(model, names, batches) as through:
        for name in names:
            block = teacher.block(name).to(device)
            made = list(outputs_of(block, through.calls, device))
            yield name, started(name, block, through.calls, run)
            through.advance(made)


def _full(block: str, name: str) -> str:
    return f"{block}.{name}" if block else name


def resumed_student(recipe: Recipe, teacher: nn.Module, widths: Mapping[str, float]) -> Any:
    """The student of a checkpoint, before its numbers are read: nothing is calibrated or chosen again.

    Args:
        widths: name -> bits of every quantized layer there (`checkpoint.widths_in`).
    """
    wider = None if recipe.quantization.average_bits is None else _of_8(widths)
    student = _prepared(recipe, teacher, wider)
    set_trained_layers(recipe, student)
    return student


def narrow_teacher(recipe: Recipe, teacher: nn.Module, student: nn.Module) -> None:
    """Bring the teacher's layers that are quantized in the student to the half precision that the run computes in.

    Autocast rounds these weights so at each forward: predictions are the same, to the bit, in half the memory. The
    other tensors, which the student has too, stay.
    """
    for name, _ in named_layers(student, FakeQuantizedLinear) if recipe.half else ():
        layer = teacher.get_submodule(name)
        for own, value in list(layer.named_parameters()):
            if value.dtype != recipe.half:
                setattr(layer, own, nn.Parameter(value.detach().to(recipe.half), requires_grad=False))


def _of_8(widths: Mapping[str, float]) -> dict[str, int]:
    return {name: 8 for name, bits in widths.items() if bits == 8}


def _prepared(recipe: Recipe, teacher: nn.Module, widths: Mapping[str, int] | None) -> Any:
    """The teacher with fake-quantized layers at the nearest codes, nothing trainable.

    What is not quantized are the teacher's own tensors, where they are.
    """
    config = recipe.config()
    student = with_same_tensors(teacher).requires_grad_(False)
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


def check_layers(recipe: Recipe, model: nn.Module) -> None:
    """Refuse a recipe that quantizes no layer of a float denoiser, or trains none of those.

    Raises:
        ValueError: also a pattern of layers that matches none.
    """
    names = [target.names[0] for target in targets(model, **recipe.config().layer_options())]
    patterns = get_family(recipe.family).layer_groups[recipe.train_layers]
    if recipe.steps and not any(matches(name, patterns) for name in names):
        raise ValueError(
            f"recipe: nothing is trained: of the {len(names)} layers that are quantized none is of train_layers: "
            f"{recipe.train_layers}. Take train_layers: all, or leave fewer layers out "
            "(quantization.modules_to_not_convert)."
        )


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


def with_same_tensors(model: nn.Module, *kept: Any) -> Any:
    """A copy of a model's modules, whose parameters and buffers are the model's own, and ``kept`` too."""
    return copy.deepcopy(model, {id(each): each for each in (*tensors_of(model), *kept)})


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
    only: Collection[str] | None = None,
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
    if recipe.initialization == "gptq" and (only is None or only):
        options = asdict(recipe.gptq)
        count = options.pop("samples")
        gptq_initialize(prepared, lambda: samples(count), run=run, only=only, **options)
