"""Training the scales and biases of a packed model, whose codes stay.

A scale per output channel multiplies the layer's output, so training it needs no float weight and no gradient of one:
the output without the bias is multiplied by a factor that starts at 1, and in the end the scale is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fbqat_hub.quantization.convert import named_layers
from fbqat_hub.quantization.layer import Pointwise
from fbqat_hub.quantization.packed import SCALE_FACTOR, PackedLayer


@contextmanager
def scales_tuned(model: nn.Module) -> Iterator[None]:
    """Within, the only parameters of ``model`` with a gradient are its packed layers' scales, as factors, and biases.

    When the block ends the scales have the factors in them; when it fails they are as before.

    Raises:
        ValueError: no packed layer, or one with a scale per group, which is no factor of the output.
    """
    layers = dict(named_layers(model, PackedLayer))
    if not layers:
        raise ValueError("the model has no packed layer; convert it first.")
    for name, layer in layers.items():
        if layer.weight_scale.dim() != 1:
            raise ValueError(f"{name} has a scale per group; only a scale per output channel can be trained alone.")
    model.requires_grad_(False)
    hooks = []
    for layer in layers.values():
        layer.register_parameter(SCALE_FACTOR, nn.Parameter(torch.ones_like(layer.weight_scale)))
        if layer.bias is not None:
            layer.bias.requires_grad_(True)
        hooks.append(layer.register_forward_hook(_scaled))
    try:
        yield
        with torch.no_grad():
            for layer in layers.values():
                layer.weight_scale *= getattr(layer, SCALE_FACTOR)
    finally:
        for hook, layer in zip(hooks, layers.values(), strict=True):
            hook.remove()
            delattr(layer, SCALE_FACTOR)
        model.requires_grad_(False)


def _scaled(layer: Any, _: Any, output: Tensor) -> Tensor:
    shape = (-1, 1, 1) if isinstance(layer, Pointwise) else (-1,)
    factor = getattr(layer, SCALE_FACTOR).to(output.dtype).view(shape)
    if layer.bias is None:
        return output * factor
    bias = layer.bias.to(output.dtype).view(shape)
    return (output - bias) * factor + bias
