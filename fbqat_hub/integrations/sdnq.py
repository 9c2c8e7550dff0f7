"""SDNQ: a packed pipeline in that library's format, which diffusers loads with ``pip install sdnq`` and none of ours.

SDNQ is not imported; its format is that of sdnq 0.2.8. Codes and scales are kept, so its weights are ours to the bit.
Of a layer [out, in] it stores

    weight   4 bits: uint8 [out * in / 2], code + 8 in each nibble, the low one first, over the whole tensor
             8 bits: int8 of the float weight's shape, [out, in] or [out, in, 1, 1]; transposed where an int8 product
             takes it, [in, out]
    scale    fp32 [out, 1] or [out, 1, 1, 1]; transposed with the weight. With groups [out, groups, 1] or
             [out, groups, 1, 1, 1], and 8-bit weights [out, groups, in / groups] or the same with [1, 1]

Codes of 3 bits are written as 4, those of 5 to 7 as 8. SDNQ rounds the input of an int8 product to 8 bits, a scale a
token, as our dynamic range does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fbqat_hub.integrations.packed_source import (
    Exported,
    PackedSource,
    exported_pipeline,
    packed_source,
    refuse_static,
    write_json,
)
from fbqat_hub.quantization.packed import PackedLayer
from fbqat_hub.quantization.packing import NIBBLE, pack_int4, unpack

# The classes, by their bare names, that SDNQ quantizes, of those that we do.
_KINDS = ("Linear", "Conv2d")
# Those that it would quantize if it were not told to leave them; embeddings it leaves by itself.
_OTHERS = ("Conv1d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")


def export_sdnq(source: str | Path, output: Path) -> Exported:
    """Write a packed pipeline as one that diffusers loads with SDNQ; the other parts are copied.

    Args:
        source: folder or Hub id of a packed pipeline.
        output: new or empty folder.

    Raises:
        FileExistsError: ``output`` has content.
        ValueError: a denoiser that is not packed, what SDNQ's format cannot hold, or a tensor that is damaged.
    """
    packed = packed_source(source, output)
    for name, layer in packed.layers.items():
        _check_layer(name, layer, packed.kinds[name], packed.group_size)
    int8 = [name for name, layer in packed.layers.items() if _takes_int8(layer, packed.kinds[name])]

    def convert(name: str, layer: PackedLayer, tensor: str, value: Tensor) -> Mapping[str, Tensor]:
        is_weight = tensor == "weight_packed"
        made = _weight(layer, value) if is_weight else _scale(layer, value)
        transposed = name in int8 and layer.weight_bits > NIBBLE
        return {f"{name}.{'weight' if is_weight else 'scale'}": made.t() if transposed else made}

    with exported_pipeline(packed, output) as target:
        packed.write(target, convert)
        write_json(target / "config.json", {**packed.config, "quantization_config": _config(packed, int8)})
    return Exported(output, int8, [name for name in packed.layers if name not in int8])


def _check_layer(name: str, layer: PackedLayer, kind: str, group_size: int | None) -> None:
    """Raise ValueError for what SDNQ's format cannot hold, with what to do."""
    size = layer.in_features
    refuse_static(name, layer, "SDNQ")
    if kind not in _KINDS:
        raise ValueError(f"{name} is a {kind}, and SDNQ quantizes only {' and '.join(_KINDS)}; leave it in float.")
    if layer.weight_bits <= NIBBLE and layer.out_features * size % 2:
        raise ValueError(f"{name} has {layer.out_features * size} 4-bit codes, and SDNQ stores an even number.")
    if group_size is not None and size > group_size and size % group_size:
        raise ValueError(
            f"{name} has {size} inputs, which groups of {group_size} do not divide, and SDNQ would divide them "
            "otherwise than this checkpoint. Choose a group size that divides them, or one scale per output channel."
        )


def _takes_int8(layer: PackedLayer, kind: str) -> bool:
    """Whether SDNQ computes this layer with int8 activations; SDNQ's own conditions on the shape are part of it."""
    shape = (layer.out_features, layer.in_features)
    suits = all(size >= 32 and size % 16 == 0 for size in shape)
    # with groups it would round the weights again; of packed convolutions it has no int8 product
    return kind == "Linear" and suits and layer.activation_bits == 8 and layer.weight_scale.dim() == 1


def _config(packed: PackedSource, int8: list[str]) -> dict[str, Any]:
    """SDNQ's configuration. A name ends with ``.weight``: SDNQ takes a bare one for a part of any other name."""
    layers = packed.layers
    left = [name for name, kind in packed.kinds.items() if kind in (*_KINDS, *_OTHERS) and name not in layers]
    wide = [name for name, layer in layers.items() if layer.weight_bits > NIBBLE]
    return {
        "quant_method": "sdnq",
        "weights_dtype": "int4",
        "modules_dtype_dict": {"int8": [f"{name}.weight" for name in wide]} if wide else {},
        "group_size": -1 if packed.group_size is None else packed.group_size,
        "quant_conv": True,
        "use_quantized_matmul": bool(int8),
        "use_quantized_matmul_conv": False,
        "quantized_matmul_dtype": "int8",
        "dequantize_fp32": True,
        "add_skip_keys": False,
        "modules_to_not_convert": sorted(f"{name}.weight" for name in left),
        "modules_to_not_use_matmul": sorted(f"{name}.weight" for name in layers if name not in int8),
    }


def _weight(layer: PackedLayer, packed: Tensor) -> Tensor:
    if layer.weight_bits > NIBBLE:
        return packed.reshape(*_grouped(layer), *layer.kernel)
    codes = unpack(packed, layer.in_features)
    return pack_int4(codes.reshape(-1)) ^ 0x88  # two's complement to code + 8: the high bit of each nibble


def _scale(layer: PackedLayer, scale: Tensor) -> Tensor:
    *groups, _ = _grouped(layer)
    return scale.reshape(*groups, 1, *(1 for _ in layer.kernel))


def _grouped(layer: PackedLayer) -> tuple[int, ...]:
    """[out, in], or [out, groups, in / groups] with several groups."""
    groups = layer.weight_scale.shape[1] if layer.weight_scale.dim() == 2 else 1
    if groups == 1:
        return layer.out_features, layer.in_features
    return layer.out_features, groups, layer.in_features // groups
