"""Which layers of a student have 8 bits, for a given average: by their effect on what the denoiser predicts.

One pass of Gauss-Newton over the teacher scores every layer at 4 and at 8 bits (`quantization.sensitivity`); the widths
with the least sum of scores are those within the average (`quantization.widths`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fbqat_hub.quantization import FakeQuantizedLinear, named_layers
from fbqat_hub.quantization.sensitivity import output_sensitivity, rounding_errors
from fbqat_hub.quantization.widths import widths_of_average
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
    average = recipe.quantization.average_bits
    if average is None:
        raise ValueError("quantization.average_bits is not given; every layer has weight_bits.")
    sizes = {name: layer.weight.numel() for name, layer in named_layers(student, FakeQuantizedLinear)}
    return widths_of_average(layer_scores(recipe, student, teacher, split, draws), sizes, average)


def layer_scores(
    recipe: Recipe, student: nn.Module, teacher: nn.Module, split: CachedSplit, draws: Draws
) -> dict[str, dict[int, float]]:
    """Name -> bits, 4 and 8 -> what the layer's error at these bits does to the prediction. As `chosen_widths`."""
    layers = dict(named_layers(student, FakeQuantizedLinear))
    at_8 = replace(recipe.config().weight_scheme(), clip="mse")

    def errors_of(name: str) -> Callable[[], Mapping[int, Tensor]]:
        def errors() -> Mapping[int, Tensor]:
            with torch.no_grad():
                weight: Any = teacher.get_submodule(name).weight
                rows = weight.detach().float().flatten(1)
                at_4 = layers[name].fake_quantized_weight().flatten(1) - rows
            return {4: at_4, **rounding_errors(rows, at_8, [8])}

        return errors

    return output_sensitivity(
        teacher,
        {name: errors_of(name) for name in layers},
        lambda: draws.calibration(split, _SAMPLES),
        lambda model, inputs: draws.predict(model, dict(inputs)),
        signs=_SIGNS,
        seed=recipe.seed,
    )
