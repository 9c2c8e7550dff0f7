"""prepare -> calibrate -> set_bit_width -> convert, over a module tree."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fbqat_hub.quantization.layer import QuantizedLayer, is_pointwise
from fbqat_hub.quantization.linear import FakeQuantizedLinear, FakeQuantizedPointwiseConv2d
from fbqat_hub.quantization.observer import RangeObserver, RangeRule, affine_parameters
from fbqat_hub.quantization.packed import PackedLayer, PackedLinear, PackedPointwiseConv2d
from fbqat_hub.quantization.quantize import group_count
from fbqat_hub.quantization.rounding import NEAREST, Rounding
from fbqat_hub.quantization.scheme import ActivationScheme, WeightScheme

Layer = TypeVar("Layer", bound=nn.Module)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """True if a module's full name matches one of the fnmatch patterns.

    >>> matches("transformer_blocks.0.attn1.to_q", ["*.attn1.*"]), matches("proj_out", ["*.proj_out"])
    (True, False)
    """
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def quantizable(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every linear layer and 1x1 convolution of ``model`` by its full name, in order; a shared one by each name."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and is_pointwise(module)))
        and not isinstance(module, QuantizedLayer)
    }


def named_layers(model: nn.Module, kind: type[Layer]) -> Iterator[tuple[str, Layer]]:
    """The layers of one kind by full name, in order; a shared one once, by its first name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, kind))


class Target(NamedTuple):
    """A layer to quantize.

    Attributes:
        layer: as it is in the model.
        names: its full names, in order; more than one if it is shared.
        activations: the scheme of its input.
        weight_bits: its own width, where it was given one.
    """

    layer: nn.Linear | nn.Conv2d
    names: list[str]
    activations: ActivationScheme
    weight_bits: int | None


def targets(
    model: nn.Module,
    activations: ActivationScheme,
    *,
    not_convert: Sequence[str] = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    widths: Mapping[str, int] | None = None,
) -> list[Target]:
    """The layers of a float model to quantize, in order. A shared layer is what patterns say of any of its names.

    Args:
        activations: the scheme of a layer of which ``overrides`` says nothing.
        not_convert, overrides, widths: as ``prepare``.

    Raises:
        ValueError: a model that is quantized already, nothing to quantize, or a pattern that matches no layer.
    """
    overrides, widths = overrides or {}, widths or {}
    if (quantized := next(named_layers(model, QuantizedLayer), None)) is not None:
        raise ValueError(
            f"the model is quantized already ({quantized[0]} is a {type(quantized[1]).__name__}); start from the float "
            "model, or call dequantize() first."
        )
    layers = quantizable(model)
    if "" in layers:
        raise ValueError(f"the model is itself a {type(model).__name__}; put it into a module, e.g. nn.Sequential.")
    for pattern in [*not_convert, *overrides, *widths]:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise ValueError(
                f"pattern {pattern!r} matches no linear layer or 1x1 convolution of {type(model).__name__}; there are "
                f"e.g. {', '.join(list(layers)[:3])}."
            )
    names_of: dict[nn.Linear | nn.Conv2d, list[str]] = {}
    for name, layer in layers.items():
        names_of.setdefault(layer, []).append(name)
    found = []
    for layer, names in names_of.items():
        if any(matches(name, not_convert) for name in names):
            continue
        scheme = activations
        for pattern, changes in overrides.items():
            if any(fnmatchcase(name, pattern) for name in names):
                scheme = replace(scheme, **changes)
        own = [bits for pattern, bits in widths.items() if any(fnmatchcase(name, pattern) for name in names)]
        found.append(Target(layer, names, scheme, own[-1] if own else None))
    if not found:
        raise ValueError(f"nothing to quantize: the model has {len(layers)} linear layers and all are left alone.")
    return found


def replace_layers(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> list[str]:
    """Put each of ``replacements`` in the place of its key, under every name of this; returns the names in order."""
    found = [(name, each) for name, each in model.named_modules(remove_duplicate=False) if each in replacements]
    for name, layer in found:
        model.set_submodule(name, replacements[layer])
    return [name for name, _ in found]


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


def prepare(
    model: nn.Module,
    weights: WeightScheme,
    activations: ActivationScheme,
    *,
    not_convert: Sequence[str] = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    widths: Mapping[str, int] | None = None,
) -> list[str]:
    """Replace, in place, every quantizable layer by its fake-quantized one.

    A layer that is registered under several names stays one. Layers that share a weight, or a bias, still do, each with
    a clip of its own. What a layer shares with a module that is not quantized is copied: from then on they are apart.

    Args:
        model: the float model.
        not_convert: fnmatch patterns of full module names to leave alone.
        overrides: pattern -> fields of ``ActivationScheme`` that differ there, e.g. {"proj_out": {"bits": 16}}; where
            several match, later ones win.
        widths: pattern -> bit width of layers that keep it whatever ``set_bit_width`` says of the model, e.g.
            {"proj_out": 8}; where several match, the last one.

    Returns:
        The names of the layers replaced, in order.

    Raises:
        ValueError: nothing to quantize, a pattern that matches no layer, or a layer that the scheme does not fit.
    """
    chosen = targets(model, activations, not_convert=not_convert, overrides=overrides, widths=widths)
    return prepare_layers(model, chosen, weights)


def prepare_layers(model: nn.Module, chosen: list[Target], weights: WeightScheme) -> list[str]:
    """``prepare`` for some of a model's layers.

    Args:
        chosen: of `targets`; the list is emptied.

    Raises:
        ValueError: a layer that the scheme does not fit; the model is left as it was.
    """
    for layer, names, _, _ in chosen:
        try:
            group_count(weights.group_size or layer.weight.shape[1], layer.weight.shape[1])
        except ValueError as error:
            raise ValueError(f"{names[0]} cannot be quantized: {error}") from error
    names_of_all = {name for target in chosen for name in target.names}
    replaced = [name for name in quantizable(model) if name in names_of_all]
    shared: dict[int, nn.Parameter] = {}
    chosen.reverse()
    while chosen:  # a float layer goes as soon as it is replaced, or two copies of the model were in memory
        _, names, scheme, own_bits = chosen.pop()
        own: Any = model.get_submodule(names[0])  # a copy of a block has its own, on its device
        kind = FakeQuantizedPointwiseConv2d if isinstance(own, nn.Conv2d) else FakeQuantizedLinear
        fake = kind(own, weights if own_bits is None else replace(weights, bits=own_bits), scheme)
        fake.keeps_width = own_bits is not None
        fake.weight = shared.setdefault(id(own.weight), fake.weight)
        if fake.bias is not None:
            fake.bias = shared.setdefault(id(own.bias), fake.bias)
        for name in names:
            model.set_submodule(name, fake)
    return replaced


def set_bit_width(model: nn.Module, bit_width: float, rounding: Rounding = NEAREST) -> list[nn.Parameter]:
    """Move every fake-quantized layer to a rounding, and to a bit width all that do not keep one of their own.

    Returns:
        The parameters of clips that were set anew, because the width changed (``clip.Learned``). What an optimizer
        remembers of them, Adam's moments, is of another clip: drop it.
    """
    anew = []
    for _, layer in named_layers(model, FakeQuantizedLinear):
        anew += layer.set_bit_width(layer.weight_scheme.bits if layer.keeps_width else bit_width, rounding)
    return anew


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


def run_batches(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
    """The forward of each batch, keyword arguments of it."""
    for batch in batches:
        model(**batch)


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    rule: RangeRule = "min_max",
    percentile: float = 99.9,
    run: Callable[[nn.Module, Iterable[Any]], None] = run_batches,
) -> dict[str, tuple[float, float]]:
    """Set the static activation ranges of a prepared model from the float model's activations.

    Args:
        model: a prepared model; layers whose range is not "static" are left alone.
        batches: what ``run`` takes; by default keyword arguments of ``model.forward``.
        rule, percentile: as ``RangeObserver.range``.
        run: runs the model on all batches.

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
        run(model, batches)
    ranges = {name: observer.range(rule, percentile) for name, observer in observers.items()}
    for name, layer in layers.items():
        layer.set_input_range(*affine_parameters(*ranges[name], layer.activation_scheme.bits))
    return ranges


def convert(model: nn.Module) -> list[str]:
    """Replace, in place, every fake-quantized layer by its packed one; returns their names in order.

    A layer that is registered under several names stays one. Layers that share a weight have packed ones of their own.

    Raises:
        ValueError: no layer to convert, or one that is not at a width that is stored (``set_bit_width(model, 4)``), not
            calibrated, or not finite; the model is left as it was.
    """
    return replace_layers(model, _packed_layers(model))


def converted(model: nn.Module) -> nn.Module:
    """A packed copy of a prepared model, which itself stays as it is and can be trained on.

    Raises:
        ValueError: as ``convert``.
    """
    # deepcopy takes what is in the memo as copied already: the float weights of the layers are never copied
    return copy.deepcopy(model, {id(layer): packed for layer, packed in _packed_layers(model).items()})


def _packed_layers(model: nn.Module) -> dict[nn.Module, PackedLayer]:
    packed: dict[nn.Module, PackedLayer] = {}
    for name, layer in named_layers(model, FakeQuantizedLinear):
        kind = PackedPointwiseConv2d if isinstance(layer, FakeQuantizedPointwiseConv2d) else PackedLinear
        try:
            packed[layer] = kind.from_fake_quantized(layer)
        except ValueError as error:
            raise ValueError(f"{name} cannot be packed: {error}") from error
    if not packed:
        raise ValueError("the model has no fake-quantized layer; prepare it first.")
    return packed


def stored_bits_per_weight(model: nn.Module) -> float:
    """Bytes of the packed weights and their scales x 8, over the number of weights."""
    layers = [layer for _, layer in named_layers(model, PackedLayer)]
    if not layers:
        raise ValueError("the model has no packed layer; convert it first.")
    stored = sum(layer.weight_packed.nbytes + layer.weight_scale.nbytes for layer in layers)
    return 8 * stored / sum(layer.in_features * layer.out_features for layer in layers)
