"""Which layers of a student have 8 bits, for a given average: by their effect on what the denoiser predicts.

One pass of Gauss-Newton over the teacher scores every layer at 4 and at 8 bits (`quantization.sensitivity`); the widths
with the least sum of scores are those within the average (`quantization.widths`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fbqat_hub.integrations.checkpoint import targets_of
from fbqat_hub.quantization import FakeQuantizedLinear, named_layers
from fbqat_hub.quantization.sensitivity import ErrorsOf, Scores, nearest_errors, output_sensitivity
from fbqat_hub.quantization.sensitivity_blocks import block_sensitivity
from fbqat_hub.quantization.widths import WIDTHS, widths_of_average
from fbqat_hub.training.cache import CachedSplit
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.recipe import Recipe

# Standard error of a score: about sqrt(2 / (samples x signs)) of it, 7%.
_SAMPLES, _SIGNS = 100, 4


def chosen_widths(
    recipe: Recipe,
    student: nn.Module,
    teacher: nn.Module,
    split: CachedSplit,
    draws: Draws,
    accelerator: Accelerator | None = None,
) -> dict[str, int]:
    """Name -> bits of every quantized layer, ``quantization.average_bits`` a weight on average.

    Args:
        student: prepared at 4 bits, with the codes that training starts from: its errors there are what is scored.
        teacher: the full-precision denoiser; layers have the same names.
        split: of training samples, of which 100 are used.
        accelerator: as `layer_scores_by_blocks`, where the models are in the host's memory; None where they are on the
            device.

    Raises:
        ValueError: the recipe has no average.
    """
    average = recipe.quantization.average_bits
    if average is None:
        raise ValueError("quantization.average_bits is not given; every layer has weight_bits.")
    sizes = {name: layer.weight.numel() for name, layer in named_layers(student, FakeQuantizedLinear)}
    if accelerator is None:
        scores = layer_scores(recipe, student, teacher, split, draws)
    else:
        scores = layer_scores_by_blocks(recipe, student, teacher, split, draws, accelerator)
    return widths_of_average({name: scores[name] for name in sizes}, sizes, average)


def layer_scores(recipe: Recipe, student: nn.Module, teacher: nn.Module, split: CachedSplit, draws: Draws) -> Scores:
    """Name -> bits, 4 and 8 -> what the layer's error at these bits does to the prediction. As `chosen_widths`."""
    errors_of = _errors_of(recipe, student)

    def errors(name: str) -> Callable[[], Mapping[int, Tensor]]:
        def of_layer() -> Mapping[int, Tensor]:
            weight: Any = teacher.get_submodule(name).weight
            return errors_of(name, weight)

        return of_layer

    return output_sensitivity(
        teacher,
        {name: errors(name) for name, _ in named_layers(student, FakeQuantizedLinear)},
        lambda: draws.calibration(split, _SAMPLES),
        lambda model, inputs: draws.predict(model, dict(inputs)),
        signs=_SIGNS,
        seed=recipe.seed,
    )


def layer_scores_by_blocks(
    recipe: Recipe,
    student: nn.Module,
    teacher: nn.Module,
    split: CachedSplit,
    draws: Draws,
    accelerator: Accelerator,
) -> Scores:
    """As `layer_scores`, the same numbers, of models in the host's memory, a block of each on the device at a time.

    Args:
        draws: of inputs in the host's memory.
        accelerator: of the processes, each of which takes its share of the samples; all of them get the same scores.
    """
    family, blocks = draws.family, {name: teacher.get_submodule(name) for name in draws.family.blocks(teacher)}
    sharing = min(accelerator.num_processes, _SAMPLES)
    process = accelerator.process_index
    scores = block_sensitivity(
        teacher,
        list(blocks),
        draws.calibration(split, _SAMPLES),
        targets_of(teacher, recipe.config()),
        _errors_of(recipe, student),
        lambda model, inputs: family.predict(model, dict(inputs)),
        load=lambda name: copy.deepcopy(blocks[name]),
        signs=_SIGNS,
        seed=recipe.seed,
        device=accelerator.device,
        share=(process % sharing, sharing),
    )
    own = torch.tensor([[by_width[bits] for bits in WIDTHS] for by_width in scores.values()], dtype=torch.float64)
    total = accelerator.reduce((own * (process < sharing)).to(accelerator.device), reduction="sum")
    return {name: dict(zip(WIDTHS, row, strict=True)) for name, row in zip(scores, total.tolist(), strict=True)}


def _errors_of(recipe: Recipe, student: nn.Module) -> ErrorsOf:
    """At 4 bits of the student, at 8 of nearest rounding."""
    at_8 = nearest_errors(replace(recipe.config().weight_scheme(), clip="mse"), [8])

    @torch.no_grad()
    def errors(name: str, weight: Tensor) -> Mapping[int, Tensor]:
        rows, layer = weight.detach().float().flatten(1), student.get_submodule(name)
        if layer.weight.device != weight.device:
            layer = copy.deepcopy(layer).to(weight.device)
        own: Any = layer
        return {4: own.fake_quantized_weight().flatten(1) - rows, **at_8(name, rows)}

    return errors
