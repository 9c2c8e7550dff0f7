"""What the quantizers of diffusers and of transformers share: empty packed layers, checks of what goes into them."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fbqat_hub.config import FBQATConfig
from fbqat_hub.quantization.convert import Target, named_layers, quantizable, targets
from fbqat_hub.quantization.packed import PackedLayer, PackedLinear, PackedPointwiseConv2d
from fbqat_hub.quantization.packing import pack
from fbqat_hub.quantization.quantize import quantize_weight
from fbqat_hub.text import names


def targets_of(model: nn.Module, config: FBQATConfig) -> list[Target]:
    """The layers of a float model that a config quantizes, as `targets`."""
    return targets(model, **config.layer_options())


def packed_layers(model: nn.Module, config: FBQATConfig) -> dict[str, PackedLayer]:
    """Name -> an empty packed layer, on the meta device, for every layer of a float model that is to be quantized.

    Raises:
        ValueError: a pattern of the config that matches no layer, a layer that its groups do not suit, or none at all.
    """
    packed: dict[str, PackedLayer] = {}
    for layer, shared, scheme, own_bits in targets_of(model, config):
        kind = PackedPointwiseConv2d if isinstance(layer, nn.Conv2d) else PackedLinear
        out_features, in_features = layer.weight.shape[:2]
        try:
            empty = kind(
                in_features,
                out_features,
                weight_bits=own_bits or config.weight_bits,
                bias=layer.bias is not None,
                activation_scheme=scheme,
                group_size=config.group_size,
                dtype=layer.weight.dtype,
                device="meta",
            )
        except ValueError as error:
            raise ValueError(
                f"{shared[0]} cannot be quantized: {error} Give another, or put the layer into modules_to_not_convert."
            ) from error
        packed |= dict.fromkeys(shared, empty)
    return packed


def attach_quantizer(model: Any, quantizer: Any) -> None:
    """Make a model that was just converted one that ``save_pretrained`` writes as a packed checkpoint.

    What it writes as ``modules_to_not_convert`` are the sorted names of the quantizable layers that are not packed, and
    as ``weight_bits_by_module`` the widths of those that have not ``weight_bits``.

    Args:
        quantizer: of the model's library, with the config.

    Raises:
        ValueError: a layer was packed at another width than the config's.
    """
    config: FBQATConfig = quantizer.quantization_config
    for name, layer in named_layers(model, PackedLayer):
        shared = [other for other, module in model.named_modules(remove_duplicate=False) if module is layer]
        own = [bits for pattern, bits in config.weight_bits_by_module.items() if fnmatch.filter(shared, pattern)]
        if layer.weight_bits != (bits := [config.weight_bits, *own][-1]):
            raise ValueError(
                f"{name} is packed at {layer.weight_bits} bits, and the config has {bits}; move the model there with "
                "set_bit_width before convert, or give the config its width in weight_bits_by_module."
            )
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method
    quantizer.write_config(model)


def described(model: nn.Module, config: FBQATConfig) -> FBQATConfig:
    """The config with the widths of a model's packed layers, and with the layers left in float, all by name."""
    widths = {name: layer.weight_bits for name, layer in named_layers(model, PackedLayer)}
    whole = config.with_widths(widths)
    whole.modules_to_not_convert = sorted(quantizable(model))
    return whole


def refuse_static(config: FBQATConfig) -> None:
    """Raise ValueError if quantize-on-load would have to calibrate."""
    if config.needs_calibration:
        raise ValueError(
            "the activation range is 'static', which quantize-on-load cannot calibrate; use 'per_token', or train "
            "with `fbqat train`, which does."
        )


def refuse_incomplete(model: nn.Module, missing: Sequence[str], extra: Sequence[str], *, packed: bool) -> None:
    """Raise ValueError that names the tensors of a checkpoint which the model lacks, or which it has not."""
    problems = [f"missing tensors: {names(missing)}"] if missing else []
    problems += [f"extra tensors: {names(extra)}"] if extra else []
    if problems:
        raise ValueError(
            f"this is not a whole {'packed ' if packed else ''}checkpoint of a {type(model).__name__}: "
            f"{'; '.join(problems)}. Download or convert it again."
        )


def check_shape(layer: PackedLayer, name: str, shape: tuple[int, ...]) -> None:
    """Raise ValueError for the shape of a float weight that is not this layer's."""
    own = (layer.out_features, layer.in_features)
    if shape[:2] != own or math.prod(shape) != math.prod(own):
        raise ValueError(f"{name}.weight has shape {tuple(shape)}; this model needs {own}.")


def quantized(layer: PackedLayer, name: str, weight: Tensor, config: FBQATConfig) -> tuple[Tensor, Tensor]:
    """What ``weight_packed`` and ``weight_scale`` of a layer are to hold, from its float weight.

    Raises:
        ValueError: names the layer, whose weight is empty or not finite.
    """
    scheme = replace(config.weight_scheme(), bits=layer.weight_bits)
    try:
        codes, scale = quantize_weight(weight, scheme)
    except ValueError as error:
        raise ValueError(f"{name}.weight cannot be quantized: {error}") from error
    return pack(codes, layer.weight_bits), scale
