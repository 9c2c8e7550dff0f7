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

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fbqat_hub.components import Component, read_index
from fbqat_hub.integrations.checkpoint import BUFFERS, check_stored
from fbqat_hub.pipelines import copy_parts, downloaded, replacing
from fbqat_hub.quantization.convert import named_layers
from fbqat_hub.quantization.packed import PackedLayer
from fbqat_hub.quantization.packing import NIBBLE, pack_int4, unpack
from fbqat_hub.text import names as listed
from fbqat_hub.untrusted import read_json
from fbqat_hub.weights import check_values, read_header, read_tensor

# The classes, by their bare names, that SDNQ quantizes, of those that we do.
_KINDS = ("Linear", "Conv2d")
# Those that it would quantize if it were not told to leave them; embeddings it leaves by itself.
_OTHERS = ("Conv1d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: of the pipeline.
        int8: names of layers that SDNQ computes with int8 activations.
        float_activations: names of the others.
    """

    folder: Path
    int8: list[str]
    float_activations: list[str]


def export_sdnq(source: str | Path, output: Path) -> Exported:
    """Write a packed pipeline as one that diffusers loads with SDNQ; the other parts are copied.

    Args:
        source: folder or Hub id of a packed pipeline.
        output: new or empty folder.

    Raises:
        FileExistsError: ``output`` has content.
        ValueError: a denoiser that is not packed, what SDNQ's format cannot hold, or a tensor that is damaged.
    """
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} exists and is not empty; give another --output.")
    folder = downloaded(source)
    parts = read_index(folder)[1]
    quantized = [name for name, part in parts.items() if _is_packed(part)]
    if "transformer" not in quantized:
        raise ValueError(
            f"{source} has no denoiser that is quantized by fbqat; make one: fbqat convert or fbqat train."
        )
    if others := [name for name in quantized if name != "transformer"]:
        raise ValueError(
            f"{listed(others)} of {source} is packed too, and is not converted; export a pipeline whose text encoders "
            "are in float (fbqat convert without --text-encoders)."
        )
    denoiser = parts["transformer"]
    layers = dict(named_layers(denoiser.load(meta=True), PackedLayer))
    group_size = read_json(denoiser.folder / "config.json")["quantization_config"]["group_size"]
    kinds = _float_kinds(denoiser)
    for name, layer in layers.items():
        _check_layer(name, layer, kinds[name], group_size)
    int8 = [name for name, layer in layers.items() if _takes_int8(layer, kinds[name])]
    with replacing(output) as partial:
        copy_parts(folder, partial)
        target = partial / "transformer"
        target.mkdir()
        _write_weights(denoiser, layers, set(int8), target)
        config = read_json(denoiser.folder / "config.json")
        config["quantization_config"] = _config(layers, kinds, int8, group_size)
        (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return Exported(output, int8, [name for name in layers if name not in int8])


def _is_packed(part: Component) -> bool:
    if not part.is_model:
        return False
    config = read_json(part.folder / "config.json").get("quantization_config")
    return isinstance(config, dict) and config.get("quant_method") == "fbqat"


def _float_kinds(part: Component) -> dict[str, str]:
    """Name -> bare class name of every module of the float model."""
    config = {key: value for key, value in part.kind.load_config(part.folder).items() if key != "quantization_config"}
    with torch.device("meta"):
        model: nn.Module = part.kind.from_config(config)
    return {name: type(module).__name__ for name, module in model.named_modules()}


def _check_layer(name: str, layer: PackedLayer, kind: str, group_size: int | None) -> None:
    """Raise ValueError for what SDNQ's format cannot hold, with what to do."""
    scheme, size = layer.activation_scheme, layer.in_features
    if scheme.range == "static" and scheme.bits < 32:
        raise ValueError(
            f"{name} has a static activation range, which SDNQ's format does not hold: it finds ranges as it computes. "
            "Export a model with dynamic ranges (activation_range: per_token)."
        )
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


def _config(
    layers: dict[str, PackedLayer], kinds: dict[str, str], int8: list[str], group_size: int | None
) -> dict[str, Any]:
    """SDNQ's configuration. A name ends with ``.weight``: SDNQ takes a bare one for a part of any other name."""
    left = [name for name, kind in kinds.items() if kind in (*_KINDS, *_OTHERS) and name not in layers]
    wide = [name for name, layer in layers.items() if layer.weight_bits > NIBBLE]
    return {
        "quant_method": "sdnq",
        "weights_dtype": "int4",
        "modules_dtype_dict": {"int8": [f"{name}.weight" for name in wide]} if wide else {},
        "group_size": -1 if group_size is None else group_size,
        "quant_conv": True,
        "use_quantized_matmul": bool(int8),
        "use_quantized_matmul_conv": False,
        "quantized_matmul_dtype": "int8",
        "dequantize_fp32": True,
        "add_skip_keys": False,
        "modules_to_not_convert": sorted(f"{name}.weight" for name in left),
        "modules_to_not_use_matmul": sorted(f"{name}.weight" for name in layers if name not in int8),
    }


def _write_weights(part: Component, layers: dict[str, PackedLayer], int8: set[str], target: Path) -> None:
    """File by file; a shard keeps its name."""
    weights = part.weights()
    places: dict[str, str] = {}
    for file in weights.files:
        tensors = {}
        for key, stored in read_header(file).items():
            name, _, tensor = key.rpartition(".")
            value = read_tensor(file, stored)
            if (layer := layers.get(name)) is None or tensor not in ("weight_packed", *BUFFERS):
                check_values(value, f"{file}: {key}")
                tensors[key] = value
                continue
            check_stored(layer, tensor, value, f"{file}: {key}")
            made = _weight(layer, value) if tensor == "weight_packed" else _scale(layer, value)
            if name in int8 and layer.weight_bits > NIBBLE:
                made = made.t()
            tensors[f"{name}.{'weight' if tensor == 'weight_packed' else 'scale'}"] = made.contiguous()
        save_file(tensors, target / file.name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file.name)
    if weights.index:
        index = {**read_json(weights.index), "weight_map": dict(sorted(places.items()))}
        (target / weights.index.name).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


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
