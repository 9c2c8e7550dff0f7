"""torchao: a packed pipeline with torchao's own quantized tensors, which diffusers loads by ``pip install torchao``.

torchao is not imported; the format is that of torchao 0.18 (``torchao.prototype.safetensors``) as diffusers 0.42 reads
it. Of a linear layer [out, in] that has one scale per output channel the file has an ``Int8Tensor``,

    _weight_qdata   int8 [out, in], the codes, of 3 to 8 bits, one to a byte
    _weight_scale   fp32 [out, 1]

and in its header a description of each tensor, under the tensor's name, as JSON. Codes and scales are kept, so
torchao's weights are ours to the bit. An 8-bit activation is quantized per token and multiplied as integers; torchao's
scale of a token is max|x| / 127.5, ours is max|x| / 127. Layers with groups, and 1x1 convolutions, which diffusers'
torchao leaves alone, are written in float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
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

# torchao's own description of int8 activations with a scale for each token, as its encoder writes it
_PER_TOKEN = {
    "_type": "QuantizeTensorToInt8Kwargs",
    "_data": {
        "granularity": {"_type": "PerRow", "_data": {"dim": -1}},
        "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
        "reduce_range": False,
    },
}
# What ``TorchAoConfig`` saves of int8 weights and activations; the tensors themselves say how each layer is quantized.
_CONFIG = {
    "quant_method": "torchao",
    "modules_to_not_convert": None,
    "quant_type": {
        "default": {
            "_type": "Int8DynamicActivationInt8WeightConfig",
            "_version": 2,
            "_data": {
                "act_mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
                "weight_only_decode": False,
                "granularity": {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}},
                "set_inductor_config": True,
                "reduce_range": False,
            },
        }
    },
}


def export_torchao(source: str | Path, output: Path) -> Exported:
    """Write a packed pipeline as one that diffusers loads with torchao; the other parts are copied.

    Args:
        source: folder or Hub id of a packed pipeline.
        output: new or empty folder.

    Raises:
        FileExistsError: ``output`` has content.
        ValueError: a denoiser that is not packed, a static activation range, or a tensor that is damaged.
    """
    packed = packed_source(source, output)
    for name, layer in packed.layers.items():
        refuse_static(name, layer, "torchao")
    quantized = [name for name, layer in packed.layers.items() if _fits(layer, packed.kinds[name])]
    int8 = [name for name in quantized if packed.layers[name].activation_bits == 8]

    def convert(name: str, layer: PackedLayer, tensor: str, value: Tensor) -> Mapping[str, Tensor]:
        if name not in quantized:
            return {f"{name}.weight": packed.real_weight(name)} if tensor == "weight_packed" else {}
        if tensor == "weight_packed":
            return {f"{name}._weight_qdata": packed.codes(name)}
        return {f"{name}._weight_scale": value.reshape(-1, 1)}

    with exported_pipeline(packed, output) as target:
        packed.write(target, convert, _described(packed, quantized, int8))
        write_json(target / "config.json", {**packed.config, "quantization_config": _CONFIG})
    rest = [name for name in quantized if name not in int8]
    return Exported(output, int8, rest, [name for name in packed.layers if name not in quantized])


def _fits(layer: PackedLayer, kind: str) -> bool:
    """Whether diffusers' torchao has a quantized tensor for this layer with these scales."""
    return kind == "Linear" and layer.weight_scale.numel() == layer.out_features


def _described(packed: PackedSource, quantized: list[str], int8: list[str]) -> dict[str, str]:
    """Name of each tensor of the model -> what it is; all in every file, since diffusers takes the last one's list."""
    described: dict[str, Any] = {}
    for key in packed.stored:
        layer, tensor = packed.of_layer(key)
        name = key.rpartition(".")[0]
        if layer is None:
            described[key] = {"_type": "Tensor"}
        elif tensor == "weight_packed":
            described[f"{name}.weight"] = _tensor(layer, name in int8) if name in quantized else {"_type": "Tensor"}
    texts = {name: json.dumps(value) for name, value in described.items()}
    return {**texts, "tensor_names": json.dumps(list(texts))}


def _tensor(layer: PackedLayer, int8: bool) -> dict[str, Any]:
    """Of an ``Int8Tensor``."""
    return {
        "_type": "Int8Tensor",
        "_data": {
            "block_size": [1, layer.in_features],
            "dtype": {"_type": "torch.dtype", "_data": str(torch.float32).removeprefix("torch.")},
            "act_quant_kwargs": _PER_TOKEN if int8 else None,
            "reduce_range": False,
        },
        "_tensor_data_names": ["qdata", "scale"],
    }
