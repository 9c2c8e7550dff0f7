"""AIMET's and QNN's encodings: a packed pipeline as a float one, and a JSON file of its scales.

The file is version 1.0.0 of AIMET's encoding format, which AIMET loads and Qualcomm's converters take as overrides.
real = scale * (code + offset), codes from 0; offset is QNN's word for -zero_point. A weight is named as in the model's
state dict, an activation as its layer with ``.input``: there is no graph here whose tensors it could be named after.
Targets know 4 and 8 bits: codes of 3 bits are written as 4, those of 5 to 7 as 8, with the same scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fbqat_hub.integrations.packed_source import PackedSource, exported_pipeline, packed_source, write_json
from fbqat_hub.quantization.packed import PackedLayer
from fbqat_hub.quantization.packing import NIBBLE

FILE = "encodings.json"


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: of the float pipeline; the denoiser's folder has the file ``encodings.json``.
        weights, activations: how many encodings it has of each.
    """

    folder: Path
    weights: int
    activations: int


def export_encodings(source: str | Path, output: Path) -> Exported:
    """Write a packed pipeline with its dequantized weights in float32, and their encodings beside them.

    Args:
        source: folder or Hub id of a packed pipeline.
        output: new or empty folder.

    Raises:
        FileExistsError: ``output`` has content.
        ValueError: a denoiser that is not packed, or a tensor that is damaged.
    """
    packed = packed_source(source, output)

    def convert(name: str, layer: PackedLayer, tensor: str, value: Tensor) -> Mapping[str, Tensor]:
        return {f"{name}.weight": packed.real_weight(name)} if tensor == "weight_packed" else {}

    static = {name: layer for name, layer in packed.layers.items() if layer.input_scale is not None}
    with exported_pipeline(packed, output) as target:
        packed.write(target, convert)
        write_json(target / "config.json", packed.config)
        found = {
            "version": "1.0.0",
            "param_encodings": [_weight(packed, name) for name in sorted(packed.layers)],
            "activation_encodings": [_input(packed, name) for name in sorted(static)],
            "excluded_layers": [],
        }
        write_json(target / FILE, found)
    return Exported(output, len(packed.layers), len(static))


def _weight(packed: PackedSource, name: str) -> dict[str, Any]:
    layer, scale = packed.layers[name], packed.scale(name)
    bits = NIBBLE if layer.weight_bits <= NIBBLE else 8
    found = {
        "name": f"{name}.weight",
        "dtype": "INT",
        "bw": bits,
        "is_sym": True,
        "enc_type": "PER_CHANNEL",
        "scale": scale.flatten().tolist(),
        "offset": [-(2 ** (bits - 1))] * scale.numel(),
    }
    if scale.numel() > layer.out_features:
        found |= {"enc_type": "PER_BLOCK", "block_size": layer.in_features // scale.shape[1]}
    return found


def _input(packed: PackedSource, name: str) -> dict[str, Any]:
    return {
        "name": f"{name}.input",
        "dtype": "INT",
        "bw": packed.layers[name].activation_bits,
        "is_sym": False,
        "enc_type": "PER_TENSOR",
        "scale": [packed.read(f"{name}.input_scale").item()],
        "offset": [-int(packed.read(f"{name}.input_zero_point"))],
    }
