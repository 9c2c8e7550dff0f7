"""What the exits to other formats share: a packed pipeline's files, read layer by layer and checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fbqat_hub.components import Component, read_index
from fbqat_hub.config import is_packed
from fbqat_hub.inputs import check_new
from fbqat_hub.pipelines import copy_parts, downloaded, replacing
from fbqat_hub.quantization.convert import named_layers
from fbqat_hub.quantization.kernels.reference import dequantize_weight
from fbqat_hub.quantization.packed import BUFFERS, PackedLayer
from fbqat_hub.quantization.packing import unpack
from fbqat_hub.text import names as listed
from fbqat_hub.untrusted import read_json
from fbqat_hub.weights import StoredTensor, check_values, read_header, read_tensor

# Name of a packed layer, the layer, the name of one of its tensors, its value -> what is written in the tensor's place.
Convert = Callable[[str, PackedLayer, str, Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Exported:
    """A pipeline that was written for a library that computes with int8.

    Attributes:
        folder: of the pipeline.
        int8: names of layers with int8 activations there.
        float_activations: names of layers with quantized weights and float activations.
        float_weights: names of layers that are in float32.
    """

    folder: Path
    int8: list[str]
    float_activations: list[str]
    float_weights: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PackedSource:
    """The packed denoiser of a pipeline, whose numbers stay on disk until they are asked for.

    Attributes:
        folder: of the pipeline.
        denoiser: its part ``transformer``.
        layers: name -> packed layer, without numbers.
    """

    folder: Path
    denoiser: Component
    layers: dict[str, PackedLayer]

    @cached_property
    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = read_json(self.denoiser.folder / "config.json")
        return config

    @property
    def config(self) -> dict[str, Any]:
        """The denoiser's ``config.json``, without its quantization."""
        return {key: value for key, value in self._config.items() if key != "quantization_config"}

    @property
    def group_size(self) -> int | None:
        """Of per-group scales."""
        size: int | None = self._config["quantization_config"]["group_size"]
        return size

    @cached_property
    def kinds(self) -> dict[str, str]:
        """Name -> bare class name of every module of the float model."""
        with torch.device("meta"):
            model: nn.Module = self.denoiser.kind.from_config(self.config)
        return {name: type(module).__name__ for name, module in model.named_modules()}

    @cached_property
    def stored(self) -> dict[str, tuple[Path, StoredTensor]]:
        """Full name of every tensor -> where it is."""
        files = self.denoiser.weights().files
        return {name: (file, place) for file in files for name, place in read_header(file).items()}

    def of_layer(self, key: str) -> tuple[PackedLayer | None, str]:
        """The packed layer that a tensor's codes, scale or range are of, else None; and the tensor's own name."""
        name, _, tensor = key.rpartition(".")
        is_own = tensor in ("weight_packed", *BUFFERS)
        return (self.layers.get(name) if is_own else None), tensor

    def read(self, key: str) -> Tensor:
        """A tensor by its full name.

        Raises:
            ValueError: it is not finite, or not what docs/format.md has there.
        """
        file, place = self.stored[key]
        value = read_tensor(file, place)
        layer, tensor = self.of_layer(key)
        if layer is None:
            check_values(value, f"{file}: {key}")
        else:
            layer.check_stored(tensor, value, f"{file}: {key}")
        return value

    def codes(self, name: str) -> Tensor:
        """Of a layer, int8 [out, in]."""
        return unpack(self.read(f"{name}.weight_packed"), self.layers[name].in_features)

    def scale(self, name: str) -> Tensor:
        """Of a layer, fp32 [out] or [out, groups]."""
        return self.read(f"{name}.weight_scale")

    def real_weight(self, name: str) -> Tensor:
        """Of a layer, dequantized: fp32, of the float layer's shape."""
        layer = self.layers[name]
        real = dequantize_weight(self.read(f"{name}.weight_packed"), self.scale(name), layer.in_features)
        return real.reshape(*real.shape, *layer.kernel)

    def write(self, target: Path, convert: Convert, metadata: Mapping[str, str] | None = None) -> None:
        """Write the denoiser's weights into a folder, those of packed layers converted, the others as they are.

        A shard keeps its name, an index its place.
        """
        weights = self.denoiser.weights()
        places: dict[str, str] = {}
        for file in weights.files:
            tensors: dict[str, Tensor] = {}
            for key in read_header(file):
                layer, tensor = self.of_layer(key)
                value = self.read(key)
                name = key.rpartition(".")[0]
                tensors |= {key: value} if layer is None else convert(name, layer, tensor, value)
            tensors = {name: value.contiguous() for name, value in tensors.items()}
            save_file(tensors, target / file.name, metadata={"format": "pt", **(metadata or {})})
            places |= dict.fromkeys(tensors, file.name)
        if weights.index:
            index = {**read_json(weights.index), "weight_map": dict(sorted(places.items()))}
            write_json(target / weights.index.name, index)


@contextmanager
def exported_pipeline(packed: PackedSource, output: Path) -> Iterator[Path]:
    """Write a pipeline whose denoiser the block writes; the other parts are copied.

    Args:
        output: new or empty folder; there is nothing new in it if the block fails.

    Yields:
        The new folder of the denoiser, empty.
    """
    with replacing(output) as partial:
        copy_parts(packed.folder, partial)
        target = partial / "transformer"
        target.mkdir()
        yield target


def packed_source(source: str | Path, output: Path) -> PackedSource:
    """A packed pipeline that can be exported.

    Args:
        source: folder or Hub id.
        output: where it is to be exported to.

    Raises:
        FileExistsError: ``output`` has content.
        ValueError: the denoiser is not packed, or another part is.
    """
    check_new(output)
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
    return PackedSource(folder, denoiser, dict(named_layers(denoiser.load(meta=True), PackedLayer)))


def refuse_static(name: str, layer: PackedLayer, library: str) -> None:
    """Raise ValueError for a layer with a static activation range, in a format that has none."""
    if layer.activation_scheme.range == "static" and layer.activation_scheme.bits < 32:
        raise ValueError(
            f"{name} has a static activation range, which {library}'s format does not hold: it finds ranges as it "
            "computes. Export a model with dynamic ranges (activation_range: per_token)."
        )


def write_json(path: Path, value: Any) -> None:
    """Sorted and indented, as diffusers writes its configurations."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _is_packed(part: Component) -> bool:
    if not part.is_model:
        return False
    return is_packed(read_json(part.folder / "config.json"))
