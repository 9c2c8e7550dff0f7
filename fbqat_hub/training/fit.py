"""``--fit SIZE``: the bits per weight on average with which a pipeline, or its denoiser, is stored in so many bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fbqat_hub.components import INDEX, TEXTS, read_index
from fbqat_hub.config import FBQATConfig
from fbqat_hub.integrations.checkpoint import packed_layers
from fbqat_hub.integrations.transformers import TEXT_ENCODERS
from fbqat_hub.quantization.packed import BUFFERS
from fbqat_hub.training.bases import build_on_meta, configs_of
from fbqat_hub.training.recipe import Recipe
from fbqat_hub.training.teachers import resolve_teacher
from fbqat_hub.weights import stored_dtype

_UNITS = {"MB": 10**6, "MIB": 2**20, "GB": 10**9, "GIB": 2**30}
# Of a tensor in a safetensors header, beside its name: dtype, shape and place, as text.
_OF_HEADER = 120
# Tokenizers, schedulers and configs of a pipeline that is not here yet: the largest, two of T5's, take 6 MB.
_SMALL_FILES = 10**7
# The denoiser's config, but for the names of its layers of 8 bits, and the recipe.
_TEXTS = 8000


@dataclass(frozen=True)
class Fit:
    """What is to fit: so many bytes, of the whole pipeline's files or of its denoiser's alone."""

    bytes: int
    denoiser_only: bool = False

    @classmethod
    def parse(cls, text: str) -> Fit:
        """
        >>> Fit.parse("6GB"), Fit.parse("transformer=900MiB")
        (Fit(bytes=6000000000, denoiser_only=False), Fit(bytes=943718400, denoiser_only=True))
        """
        found = re.fullmatch(r"(transformer=)?(\d{1,9}(?:\.\d{1,9})?) ?([MG]i?B)", text.strip(), re.IGNORECASE)
        if not found or not float(found[2]):
            raise ValueError(
                f"{text!r:.50} is no size; write e.g. 6GB or 900MB (or GiB, MiB) for the whole pipeline, or "
                "transformer=3GB for its denoiser alone."
            )
        return cls(int(float(found[2]) * _UNITS[found[3].upper()]), found[1] is not None)


@dataclass(frozen=True)
class PackedSize:
    """Of a packed model.

    Attributes:
        bytes: of its files, at the config's own widths.
        weights: how many are quantized.
    """

    bytes: int
    weights: int

    @classmethod
    def of(cls, model: nn.Module, config: FBQATConfig, dtype: torch.dtype) -> PackedSize:
        """Of a float model, which may be on the meta device.

        Args:
            config: how it is quantized.
            dtype: of the tensors that are not quantized.
        """
        layers = packed_layers(model, config)
        once = {id(layer): (name, layer) for name, layer in layers.items()}
        packed = {f"{name}.{tensor}" for name in layers for tensor in ("weight", "bias")}
        rest = [(name, value) for name, value in _stored(model) if name not in packed]
        own = [item for name, layer in once.values() for item in layer.state_dict(prefix=f"{name}.").items()]
        listed = sum(len(name) + 16 for name in layers)  # in the config, if they have 8 bits
        weights = sum(layer.in_features * layer.out_features for _, layer in once.values())
        return cls(_bytes(rest, dtype) + _bytes(own, dtype) + listed, weights)

    def at(self, average_bits: float | None) -> int:
        """Bytes with so many bits per weight on average, from 4 to 8; as it is, if None."""
        return self.bytes + math.ceil(self.weights * ((average_bits or 4) - 4) / 8)

    def average(self, room: int) -> float:
        """Bits a weight on average that so many bytes hold, at most 8; below 4 they do not hold the model."""
        return min(8.0, math.floor(1000 * (4 + 8 * (room - self.bytes) / self.weights)) / 1000)


def _stored(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The tensors of its files: of those that share their numbers, as T5's embeddings do, one."""
    found = {id(value): (name, value) for name, value in model.state_dict(keep_vars=True).items()}
    return list(found.values())


def _bytes(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> int:
    """In files: what has no dtype of its own in docs/format.md is ``dtype``."""
    size = 0
    for name, value in tensors:
        fixed = name.rpartition(".")[2] in BUFFERS or not value.is_floating_point()
        size += value.numel() * (value.element_size() if fixed else dtype.itemsize) + _OF_HEADER + len(name)
    return size


def average_that_fits(fit: Fit, denoiser: PackedSize, others: int, text_encoders: str | None) -> float:
    """Bits a weight on average, from 4 to 8.

    Args:
        others: bytes of the pipeline's other files.
        text_encoders: their precision, which an error advises if there is none.

    Raises:
        ValueError: it does not fit at 4 bits; says what takes how much.
    """
    others = 0 if fit.denoiser_only else others
    average = denoiser.average(fit.bytes - others - _TEXTS)
    if average < 4:
        least, takes = _shown(denoiser.bytes + others + _TEXTS), _shown(denoiser.bytes)
        if fit.denoiser_only:
            why, smaller = f"the denoiser, which takes {takes} at 4 bits", ""
        else:
            why = f"the pipeline: its denoiser takes {takes} at 4 bits, its other parts {_shown(others)}"
            smaller = "" if text_encoders else ", or quantize the text encoders too (w8a8, say)"
        raise ValueError(f"{_shown(fit.bytes)} do not hold {why}. Give at least {least}{smaller}.")
    return average


def fitted(recipe: Recipe, fit: Fit) -> Recipe:
    """The recipe with the average width, in place of its own, with which what a run of it leaves fits.

    Of a teacher on the Hub its configs are enough, and its other parts count as stored in half precision.

    Raises:
        ValueError: it does not fit at 4 bits, or the recipe has other widths.
        HubError: a teacher that is not known here and cannot be looked up.
    """
    quantization = recipe.quantization
    if quantization.weight_bits != 4 or len(recipe.bit_schedule().stages) > 1:
        raise ValueError(
            f"--fit chooses from widths of 4 and 8 bits; weight_bits must be 4 and schedule.stages constant (here "
            f"weight_bits is {quantization.weight_bits}, method {recipe.method})."
        )
    others = other_bytes(recipe.teacher, recipe.text_encoders)
    average = average_that_fits(fit, packed_size(recipe), others, recipe.text_encoders)
    return replace(recipe, quantization=replace(quantization, average_bits=average))


def packed_size(recipe: Recipe) -> PackedSize:
    """Of the denoiser that a run of the recipe leaves; an average of its own does not count."""
    model = build_on_meta(configs_of(recipe.teacher)["transformer"])
    return PackedSize.of(model, recipe.config(), torch.float32)  # training leaves the rest in float32


def other_bytes(teacher: str, text_encoders: str | None, variant: str | None = None) -> int:
    """Bytes of all files but the denoiser's of a pipeline made from ``teacher``.

    Args:
        text_encoders: precision of its text encoders; None for as they are stored.
        variant: of the weights of a folder, see ``Component.weights``. What has no weights there counts as stored in
            bfloat16.
    """
    folder, configs = Path(resolve_teacher(teacher)), configs_of(teacher)
    parts = read_index(folder)[1] if folder.is_dir() else {}
    total = (folder / INDEX).stat().st_size if parts else _SMALL_FILES
    total += sum(
        path.stat().st_size for part in parts.values() for path in part.folder.iterdir() if path.suffix in TEXTS
    )
    for name in configs.keys() - {"transformer"}:
        here = name in parts and any(parts[name].folder.glob("*.safetensors"))
        files = parts[name].weights(variant).files if here else ()
        if files and not (text_encoders and name.startswith("text_encoder")):
            total += sum(path.stat().st_size for path in files)
        else:
            dtype = stored_dtype(files) if files else torch.bfloat16
            total += _part(build_on_meta(configs[name]), name, text_encoders, dtype)
    return total


def _part(model: nn.Module, name: str, text_encoders: str | None, dtype: torch.dtype) -> int:
    """Bytes of a part's weights, quantized if it is a text encoder and they are."""
    if text_encoders is None or not name.startswith("text_encoder"):
        return _bytes(_stored(model), dtype)
    bits, activations = TEXT_ENCODERS[text_encoders]
    return PackedSize.of(model, FBQATConfig(weight_bits=bits, activation_bits=activations), dtype).bytes


def _shown(size: int) -> str:
    """Rounded up, as ``Fit.parse`` reads it."""
    return f"{math.ceil(size / 1e4) / 100:,.2f}MB" if size < 10**9 else f"{math.ceil(size / 1e7) / 100:,.2f}GB"
