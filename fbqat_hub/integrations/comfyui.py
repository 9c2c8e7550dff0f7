"""ComfyUI: a packed denoiser as one file for ComfyUI's own loader of diffusion models.

Neither ComfyUI nor its kernels (comfy-kitchen) are imported; the layout is ``int8_tensorwise`` of comfy-kitchen 0.2.40,
as ComfyUI's mixed-precision layers read it. Under the names of the original checkpoint a layer [out, in] has

    weight         int8 [out, in], the codes, of 3 to 8 bits, one to a byte
    weight_scale   fp32 [out, 1]
    comfy_quant    uint8, the bytes of a JSON object that names the layout

Layers that are one in the original (query, key and value) are joined: their codes and their scales follow each other,
so ComfyUI's weights are ours to the bit. It multiplies int8 by int8, with a scale for each token of the input,
max|x| / 127 as here; a layer of 16-bit or float activations is dequantized (``full_precision_matrix_mult``).

What ComfyUI has at 4 bits does not hold our codes: ``asym_w4a8_int8`` and ``convrot_w4a4`` rotate the weight by a
Hadamard matrix of at least 4 x 4, ``awq_w4a16`` has 16-bit scales.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fbqat_hub.components import read_index
from fbqat_hub.families import FAMILIES, Family, family_of
from fbqat_hub.families.base import Original
from fbqat_hub.files import whole
from fbqat_hub.integrations.packed_source import PackedSource, packed_source, refuse_static
from fbqat_hub.text import names as listed
from fbqat_hub.weights import TensorFile


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        file: to be put into ComfyUI's ``models/diffusion_models``.
        int8: names of the file's layers that ComfyUI computes with int8 activations.
        float_activations: names of its layers with int8 weights and float activations.
    """

    file: Path
    int8: list[str]
    float_activations: list[str]


class _Tensor(NamedTuple):
    """A tensor of the file, made when it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def export_comfyui(source: str | Path, output: Path) -> Exported:
    """Write a packed denoiser as a file for ComfyUI, which takes text encoders and autoencoder from other files.

    Args:
        source: folder or Hub id of a packed pipeline.
        output: new or empty folder.

    Raises:
        FileExistsError: ``output`` has content.
        ValueError: a family whose original names are not known here, a denoiser that is not packed, what the layout
            cannot hold, or a tensor that is damaged.
    """
    packed = packed_source(source, output)
    family = family_of(read_index(packed.folder)[0])
    known = [each.name for each in FAMILIES.values() if type(each).original_modules is not Family.original_modules]
    if family.name not in known:
        raise ValueError(
            f"{source} is of the family {family.name}, which is not written for ComfyUI, in the original's names; "
            f"{', '.join(known)} are."
        )
    originals = family.original_modules(packed.config)
    modules: dict[str, list[str]] = {}
    for name, original in originals.items():
        modules.setdefault(original.name, []).append(name)
    named = [key for name in originals for key in _own(packed, name)]
    if unknown := sorted(set(packed.stored) - set(named)):
        raise ValueError(
            f"{source}: {listed(unknown)} has no name in the original checkpoint; ComfyUI has no such model."
        )
    quantized = {name: parts for name, parts in modules.items() if set(parts) & set(packed.layers)}
    for parts in quantized.values():
        _check(packed, parts)
    tensors: dict[str, _Tensor] = {}
    for parts in modules.values():
        tensors |= _tensors(packed, originals[parts[0]], parts)
    file = (
        f"{packed.folder.resolve().name if Path(source).is_dir() else str(source).rpartition('/')[2]}-int8.safetensors"
    )
    with whole(output) as partial:
        partial.mkdir()
        with TensorFile(partial / file, {key: (each.dtype, each.shape) for key, each in tensors.items()}) as target:
            for key, each in tensors.items():
                target.write(key, each.make())
    int8 = [name for name, parts in quantized.items() if packed.layers[parts[0]].activation_bits == 8]
    return Exported(output / file, int8, [name for name in quantized if name not in int8])


def _own(packed: PackedSource, name: str) -> Iterator[str]:
    """Full names of a module's tensors, or of the tensor that has the name."""
    yield from (key for key in packed.stored if key == name or key.rpartition(".")[0] == name)


def _check(packed: PackedSource, parts: list[str]) -> None:
    """Raise ValueError for layers that are one in ComfyUI, and that its layout cannot hold."""
    left = [name for name in parts if name not in packed.layers]
    if left:
        raise ValueError(
            f"{listed(parts)} are one layer in ComfyUI, and {listed(left)} is in float; quantize all of them, or none."
        )
    layers = [packed.layers[name] for name in parts]
    for name, layer in zip(parts, layers, strict=True):
        refuse_static(name, layer, "ComfyUI")
        if layer.weight_scale.numel() != layer.out_features:
            raise ValueError(f"{name} has groups, and ComfyUI's int8 layout has one scale per output channel.")
        if layer.kernel:
            raise ValueError(
                f"{name} is a packed convolution, which ComfyUI's int8 layout does not hold; leave it in float."
            )
    if len({layer.activation_bits for layer in layers}) > 1:
        raise ValueError(f"{listed(parts)} are one layer in ComfyUI, and have activations of different bits.")


def _tensors(packed: PackedSource, original: Original, parts: list[str]) -> dict[str, _Tensor]:
    """Of one module of the file: ``parts``, one after the other."""
    made: dict[str, _Tensor] = {}

    def joined(read: Callable[[str], Tensor]) -> Callable[[], Tensor]:
        def make() -> Tensor:
            value = torch.cat([read(name) for name in parts])
            return torch.cat(value.chunk(2)[::-1]) if original.halves_swapped else value

        return make

    layer = packed.layers.get(parts[0])
    if layer is not None:
        rows = sum(packed.layers[name].out_features for name in parts)
        described: dict[str, Any] = {"format": "int8_tensorwise"}
        if layer.activation_bits != 8:
            described["full_precision_matrix_mult"] = True
        text = torch.frombuffer(bytearray(json.dumps(described).encode()), dtype=torch.uint8)
        made[f"{original.name}.weight"] = _Tensor(torch.int8, (rows, layer.in_features), joined(packed.codes))
        made[f"{original.name}.weight_scale"] = _Tensor(
            torch.float32, (rows, 1), joined(lambda name: packed.scale(name).reshape(-1, 1))
        )
        made[f"{original.name}.comfy_quant"] = _Tensor(torch.uint8, tuple(text.shape), lambda: text)
    for key in _own(packed, parts[0]):
        if packed.of_layer(key)[0] is None:
            tensor = key.removeprefix(parts[0])  # ".weight", ".bias", or nothing
            places = [packed.stored[name + tensor][1] for name in parts]
            shape = (sum(place.shape[0] for place in places), *places[0].shape[1:])
            name = original.name + (f".{original.weight}" if tensor == ".weight" else tensor)
            made[name] = _Tensor(places[0].dtype, shape, joined(_reader(packed, tensor)))
    return made


def _reader(packed: PackedSource, tensor: str) -> Callable[[str], Tensor]:
    return lambda part: packed.read(part + tensor)
