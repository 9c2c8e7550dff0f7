"""torchao's own W4A8 QAT as a baseline; the only module here that needs torchao."""

from __future__ import annotations

import math

import torch
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
    quantize_,
)
from torchao.quantization.qat import FakeQuantizedLinear as TorchaoLinear
from torchao.quantization.qat import QATConfig

from benchmarks.method.baselines import student_of
from fbqat_hub.quantization import ActivationScheme
from fbqat_hub.training.cache import CachedSplit
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.recipe import Recipe

TORCHAO_GROUP_SIZE: int | None = 32


def prepare_torchao(
    recipe: Recipe,
    teacher: nn.Module,
    train_split: CachedSplit,
    draws: Draws,
    *,
    group_size: int | None = TORCHAO_GROUP_SIZE,
) -> nn.Module:
    """A student under torchao's QAT: INT8 activations per token, affine; symmetric INT4 weights, steps of max|W| / 7.5.

    torchao quantizes nn.Linear only: a 1x1 convolution becomes one between two transpositions. It has no 16-bit
    activations: a layer that the recipe gives these keeps float ones. Weight scales are torchao's, not the recipe's.

    Args:
        group_size: inputs that share a scale, or None for one scale an output channel. Where it does not divide a
            layer's inputs, their greatest common divisor is used.

    Raises:
        ValueError: an activation scheme that torchao's QAT does not have.
    """
    bits = recipe.config().weight_bits
    return student_of(
        recipe, teacher, train_split, draws, lambda _, linear, scheme: torchao_linear(linear, bits, scheme, group_size)
    )


def torchao_linear(
    linear: nn.Linear, bits: int, activations: ActivationScheme, group_size: int | None
) -> TorchaoLinear:
    """torchao's fake-quantized twin of a layer, with the layer's own parameters; arguments as ``prepare_torchao``."""
    dtype = getattr(torch, f"int{bits}")  # int1 to int7 are not in torch's stubs
    scales = PerAxis(0) if group_size is None else PerGroup(math.gcd(group_size, linear.in_features))
    if activations.bits > 8:
        scheme = IntxWeightOnlyConfig(weight_dtype=dtype, granularity=scales)
    elif activations.range == "per_token":
        scheme = Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=scales)
    else:
        raise ValueError(
            f"activation range is {activations.range!r}; torchao's QAT has 8-bit activations 'per_token' only."
        )
    holder = nn.Sequential(linear)
    quantize_(holder, QATConfig(scheme, step="prepare"))
    return holder[0]
