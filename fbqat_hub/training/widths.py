"""Which layers of a student have 8 bits, for a given average: by their effect on what the denoiser predicts.

One pass of Gauss-Newton over the teacher scores every layer at 4 and at 8 bits (`quantization.sensitivity`); the widths
with the least sum of scores are those within the average (`quantization.widths`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fbqat_hub.families import get_family
from fbqat_hub.integrations.checkpoint import targets_of
from fbqat_hub.quantization import FakeQuantizedLinear, PackedLayer, named_layers
from fbqat_hub.quantization.sensitivity import ErrorsOf, Scores, nearest_errors, output_sensitivity
from fbqat_hub.quantization.sensitivity_blocks import block_sensitivity
from fbqat_hub.quantization.widths import WIDTHS, widths_of_average
from fbqat_hub.training.cache import CachedSplit
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.recipe import Recipe

# Standard error of a score: about sqrt(2 / (samples x signs)) of it, 7%.
_SAMPLES, _SIGNS = 100, 4


def chosen_widths(
    recipe: Recipe, student: nn.Module, teacher: nn.Module, split: CachedSplit, draws: Draws
) -> dict[str, int]:
    """Name -> bits of every quantized layer, ``quantization.average_bits`` a weight on average.

    Args:
        student: prepared at 4 bits, with the codes that training starts from: its errors there are what is scored.
        teacher: the full-precision denoiser; layers have the same names.
        split: of training samples, of which 100 are used.

    Raises:
        ValueError: the recipe has no average.
    """
    sizes = {name: layer.weight.numel() for name, layer in named_layers(student, FakeQuantizedLinear)}
    return widths_of_average(layer_scores(recipe, student, teacher, split, draws), sizes, _average(recipe))


def chosen_widths_by_blocks(
    recipe: Recipe,
    codes: Mapping[str, PackedLayer],
    teacher: Any,
    batches: Iterable[Mapping[str, Any]],
    accelerator: Accelerator,
) -> dict[str, int]:
    """As `chosen_widths`, by the same scores, with one block of the teacher on the device at a time.

    Args:
        codes: name -> the layer, packed at the 4-bit codes that training starts from, in the host's memory.
        teacher: `student.Blocks`.
        batches: `scored_samples`, in the host's memory and the teacher's precision.
        accelerator: of the processes, each of which takes its share of the samples; all of them get the same widths.
    """
    sizes = {name: layer.in_features * layer.out_features for name, layer in codes.items()}
    return widths_of_average(
        layer_scores_by_blocks(recipe, codes, teacher, batches, accelerator), sizes, _average(recipe)
    )


def scored_samples(split: CachedSplit, draws: Draws) -> Iterator[dict[str, Any]]:
    """Training samples to score layers with."""
    return draws.calibration(split, _SAMPLES)


def layer_scores(recipe: Recipe, student: nn.Module, teacher: nn.Module, split: CachedSplit, draws: Draws) -> Scores:
    """Name -> bits, 4 and 8 -> what the layer's error at these bits does to the prediction. As `chosen_widths`."""
    layers = dict(named_layers(student, FakeQuantizedLinear))
    errors_of = _errors_of(recipe, lambda name, device: layers[name].fake_quantized_weight())

    def errors(name: str) -> Callable[[], Mapping[int, Tensor]]:
        def of_layer() -> Mapping[int, Tensor]:
            weight: Any = teacher.get_submodule(name).weight
            return errors_of(name, weight)

        return of_layer

    return output_sensitivity(
        teacher,
        {name: errors(name) for name in layers},
        lambda: scored_samples(split, draws),
        lambda model, inputs: draws.predict(model, dict(inputs)),
        signs=_SIGNS,
        seed=recipe.seed,
    )


def layer_scores_by_blocks(
    recipe: Recipe,
    codes: Mapping[str, PackedLayer],
    teacher: Any,
    batches: Iterable[Mapping[str, Any]],
    accelerator: Accelerator,
) -> Scores:
    """As `layer_scores` and `chosen_widths_by_blocks`."""
    family = get_family(recipe.family)
    sharing, process = min(accelerator.num_processes, _SAMPLES), accelerator.process_index
    scores = block_sensitivity(
        teacher.model,
        teacher.names,
        batches,
        targets_of(teacher.model, recipe.config()),
        _errors_of(recipe, lambda name, device: copy.deepcopy(codes[name]).to(device).dequantize()),
        family.predict,
        load=teacher.block,
        signs=_SIGNS,
        seed=recipe.seed,
        device=accelerator.device,
        share=(process % sharing, sharing),
    )
    own = torch.tensor([[by_width[bits] for bits in WIDTHS] for by_width in scores.values()], dtype=torch.float64)
    total = accelerator.reduce((own * (process < sharing)).to(accelerator.device), reduction="sum").tolist()
    found = {name: dict(zip(WIDTHS, row, strict=True)) for name, row in zip(scores, total, strict=True)}
    return {name: found[name] for name in codes}


def _average(recipe: Recipe) -> float:
    if recipe.quantization.average_bits is None:
        raise ValueError("quantization.average_bits is not given; every layer has weight_bits.")
    return recipe.quantization.average_bits


def _errors_of(recipe: Recipe, at_4: Callable[[str, torch.device], Tensor]) -> ErrorsOf:
    """At 4 bits of a layer's weight there, at 8 of nearest rounding."""
    at_8 = nearest_errors(replace(recipe.config().weight_scheme(), clip="mse"), [8])

    @torch.no_grad()
    def errors(name: str, weight: Tensor) -> Mapping[int, Tensor]:
        rows = weight.detach().float().flatten(1)
        return {4: at_4(name, weight.device).flatten(1) - rows, **at_8(name, rows)}

    return errors
