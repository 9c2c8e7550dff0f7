"""prepare -> calibrate -> set_bit_width -> convert, over a module tree."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fbqat_hub.quantization.fake_quantize import HARD, Rounding
from fbqat_hub.quantization.linear import (
    FakeQuantizedLinear,
    FakeQuantizedPointwiseConv2d,
    PackedLinear,
    PackedPointwiseConv2d,
    is_pointwise,
)
from fbqat_hub.quantization.observer import RangeObserver, RangeRule, affine_parameters
from fbqat_hub.quantization.scheme import ActivationScheme, WeightScheme

Layer = TypeVar("Layer", bound=nn.Module)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """True if a module's full name matches one of the fnmatch patterns.

    >>> matches("transformer_blocks.0.attn1.to_q", ["*.attn1.*"]), matches("proj_out", ["*.proj_out"])
    (True, False)
    """
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def quantizable(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every linear layer and every 1x1 convolution of ``model`` by its full name, in order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and is_pointwise(module))
    }


def named_layers(model: nn.Module, kind: type[Layer]) -> Iterator[tuple[str, Layer]]:
    """The layers of one kind by full name, in order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, kind))


@contextmanager
def observed_inputs(layers: Mapping[str, nn.Module], observe: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within, ``observe(name, x)`` gets the first argument x of each of the ``layers`` whenever it is about to run."""
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: observe(name, inputs[0]))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def scheme_for(name: str, scheme: ActivationScheme, overrides: Mapping[str, Mapping[str, Any]]) -> ActivationScheme:
    """The activation scheme of one module: ``scheme`` with every override whose pattern matches, in order."""
    for pattern, changes in overrides.items():
        if fnmatchcase(name, pattern):
            scheme = replace(scheme, **changes)
    return scheme


def prepare(
    model: nn.Module,
    weights: WeightScheme,
    activations: ActivationScheme,
    *,
    not_convert: Sequence[str] = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[str]:
    """Replace, in place, every quantizable layer by its fake-quantized one.

    Args:
        model: the float model.
        not_convert: fnmatch patterns of full module names to leave alone.
        overrides: pattern -> fields of ``ActivationScheme`` that differ there, e.g. {"proj_out": {"bits": 16}}.

    Returns:
        The names of the layers replaced, in order.

    Raises:
        ValueError: nothing to quantize, a pattern that matches no layer, or a layer that the scheme does not fit.
    """
    layers = quantizable(model)
    for pattern in [*not_convert, *(overrides or {})]:
        if not any(fnmatchcase(name, pattern) for name in layers):
            examples = ", ".join(list(layers)[:3])
            raise ValueError(
                f"pattern {pattern!r} matches no linear layer or 1x1 convolution; there are e.g. {examples}."
            )
    chosen = {name: layer for name, layer in layers.items() if not matches(name, not_convert)}
    if not chosen:
        raise ValueError(f"nothing to quantize: the model has {len(layers)} linear layers and all are left alone.")
    for name, layer in chosen.items():
        kind = FakeQuantizedPointwiseConv2d if isinstance(layer, nn.Conv2d) else FakeQuantizedLinear
        try:
            model.set_submodule(name, kind(layer, weights, scheme_for(name, activations, overrides or {})))
        except ValueError as error:
            raise ValueError(f"{name} cannot be quantized: {error}") from error
    return list(chosen)


def set_bit_width(model: nn.Module, bit_width: float, rounding: Rounding = HARD) -> list[nn.Parameter]:
    """Move every fake-quantized layer to a bit width and a rounding; returns the learned clips that were set anew."""
    layers = [layer for _, layer in named_layers(model, FakeQuantizedLinear)]
    moved = [layer.set_bit_width(bit_width, rounding) for layer in layers]
    return [layer.log_clip for layer, anew in zip(layers, moved, strict=True) if anew]


@contextmanager
def quantization_disabled(model: nn.Module) -> Iterator[None]:
    """Within the block, fake-quantized layers compute in float with their own weights."""
    before = [(layer, layer.enabled) for _, layer in named_layers(model, FakeQuantizedLinear)]
    for layer, _ in before:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in before:
            layer.enabled = enabled


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, rule: RangeRule = "mean_3sigma", percentile: float = 99.9
) -> dict[str, tuple[float, float]]:
    """Set the static activation ranges of a prepared model from the float model's activations.

    Args:
        model: a prepared model; layers whose range is not "static" are left alone.
        batches: keyword arguments of ``model.forward``.
        rule, percentile: as ``RangeObserver.range``.

    Returns:
        name -> (low, high), the ranges set.

    Raises:
        ValueError: a layer that no batch reached, or one with an input that is not finite; no range is set then.
    """
    layers = {
        name: layer
        for name, layer in named_layers(model, FakeQuantizedLinear)
        if layer.activation_scheme.range == "static" and layer.activation_scheme.bits < 32
    }
    observers = {name: RangeObserver(name) for name in layers}
    with observed_inputs(layers, lambda name, x: observers[name].observe(x)), quantization_disabled(model):
        for batch in batches:
            model(**batch)
    ranges = {name: observer.range(rule, percentile) for name, observer in observers.items()}
    for name, layer in layers.items():
        layer.set_input_range(*affine_parameters(*ranges[name], layer.activation_scheme.bits))
    return ranges


def convert(model: nn.Module) -> list[str]:
    """Replace, in place, every fake-quantized layer by its packed one; returns their names in order.

    Raises:
        ValueError: no layer to convert, layers of several bit widths, or one that is not at a width that is stored with
            a hard grid (``set_bit_width(model, 4)``), or not calibrated; the model is left as it was.
    """
    packed = _packed_layers(model)
    for name, packed_layer in packed.items():
        model.set_submodule(name, packed_layer)
    return list(packed)


def converted(model: nn.Module) -> nn.Module:
    """A packed copy of a prepared model, which itself stays as it is and can be trained on.

    Raises:
        ValueError: as ``convert``.
    """
    # deepcopy takes what is in the memo as copied already: the float weights of the layers are never copied
    layers = {id(model.get_submodule(name)): layer for name, layer in _packed_layers(model).items()}
    return copy.deepcopy(model, dict(layers))


def _packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    packed: dict[str, PackedLinear] = {}
    for name, layer in named_layers(model, FakeQuantizedLinear):
        kind = PackedPointwiseConv2d if isinstance(layer, FakeQuantizedPointwiseConv2d) else PackedLinear
        try:
            packed[name] = kind.from_fake_quantized(layer)
        except ValueError as error:
            raise ValueError(f"{name} cannot be packed: {error}") from error
    if not packed:
        raise ValueError("the model has no fake-quantized layer; prepare it first.")
    if len(widths := {layer.weight_bits for layer in packed.values()}) > 1:
        raise ValueError(f"layers are at {', '.join(map(str, sorted(widths)))} bits; set_bit_width puts all at one.")
    return packed


def stored_bits_per_weight(model: nn.Module) -> float:
    """Bytes of the packed weights and their scales x 8, over the number of weights."""
    layers = [layer for _, layer in named_layers(model, PackedLinear)]
    if not layers:
        raise ValueError("the model has no packed layer; convert it first.")
    stored = sum(layer.weight_packed.nbytes + layer.weight_scale.nbytes for layer in layers)
    return 8 * stored / sum(layer.in_features * layer.out_features for layer in layers)
