"""A LoRA merged into a float denoiser as its tensors are read: W + scale * B A, in float32, before anything is rounded.

Names, layouts and scaling are what diffusers and peft make of the adapter: they load it into a denoiser of the right
shapes that holds no numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fbqat_hub.components import quiet, read_index
from fbqat_hub.families import get_family
from fbqat_hub.integrations.convert_files import checked_tensors
from fbqat_hub.integrations.streamed import StreamedDenoiser
from fbqat_hub.pipelines import downloaded, load_pipeline, pinned
from fbqat_hub.text import names
from fbqat_hub.training.lora_check import adapter_file, load_adapter
from fbqat_hub.training.recipe import Recipe
from fbqat_hub.training.teachers import resolve_teacher
from fbqat_hub.weights import check_values, read_header

_ADAPTER = "merged"
# Parts of the names of tensors that are more than a low-rank pair of the denoiser -> what they are.
_REFUSED = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "text_encoder": "a text encoder's part",
    "lora_te": "a text encoder's part",
}


@dataclass(frozen=True)
class Lora:
    """An adapter that is merged.

    Attributes:
        adapter: a safetensors file, a folder with one, or a Hub id; in the layout of diffusers or of peft.
        scale: of its change, beside the adapter's own scaling (alpha / rank); any number but 0.
    """

    adapter: str
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not (abs(self.scale) < float("inf") and self.scale):
            raise ValueError(f"the scale of the adapter is {self.scale!r}; it must be a number other than 0, mostly 1.")


class Merge:
    """What the tensors of a denoiser become with an adapter.

    Args:
        pipeline: float, its denoiser on the meta device; it is of no use afterwards.
        lora: the adapter.

    Raises:
        FileNotFoundError, HubError: no such adapter.
        ValueError: a tensor of it belongs to no layer of the denoiser, or has another shape or rank; DoRA, a part for a
            text encoder, a bias; values that are not finite; or it changes nothing.
    """

    def __init__(self, pipeline: Any, lora: Lora) -> None:
        from peft.tuners.lora.layer import LoraLayer  # an extra: that it is missing is said before anything is loaded

        file = adapter_file(lora.adapter)
        _refuse_more_than_pairs(file)
        denoiser = pipeline.transformer
        _give_shapes(denoiser)
        with quiet():
            _, unmatched = load_adapter(pipeline, file, _ADAPTER)
        if unmatched:
            raise ValueError(
                f"{names(sorted(unmatched))} of {file} belong to no layer of this {type(denoiser).__name__}, and a "
                "merge in part is another adapter. It was made for another architecture, or is damaged."
            )
        found = {name: layer for name, layer in denoiser.named_modules() if isinstance(layer, LoraLayer)}
        self._changes = {f"{name}.weight": _change(name, layer, lora.scale, file) for name, layer in found.items()}
        if not any(bool(change.up.any()) for change in self._changes.values()):
            raise ValueError(f"{file} changes nothing: all its lora_B are zero, as before training.")

    def __call__(self, name: str, value: Tensor) -> Tensor:
        """A tensor of the denoiser with the adapter's change, in float32; what it does not change as it is."""
        change = self._changes.get(name)
        if change is None:
            return value
        return value.float() + ((change.up @ change.down) * change.scaling).view(value.shape)


class _Change(NamedTuple):
    """up [out, rank] times down [rank, in], fp32, times scaling."""

    down: Tensor
    up: Tensor
    scaling: float


def _change(name: str, layer: Any, scale: float, file: Path) -> _Change:
    """Of one layer that peft made."""
    if _ADAPTER in layer.lora_variant or layer.lora_bias[_ADAPTER] or _ADAPTER not in layer.lora_A:
        raise ValueError(f"{file} changes {name} by more than a low-rank pair, which cannot be merged here.")
    down, up = (part[_ADAPTER].weight.detach().float().flatten(1) for part in (layer.lora_A, layer.lora_B))
    for value in (down, up):
        check_values(value, f"{file}: {name}")
    own = layer.get_base_layer().weight.shape[:2]
    if (up.shape[0], down.shape[1]) != tuple(own):
        raise ValueError(f"{file} has {name} of shape {(up.shape[0], down.shape[1])}; this model has {tuple(own)}.")
    return _Change(down.clone(), up.clone(), layer.scaling[_ADAPTER] * scale)


def _refuse_more_than_pairs(file: Path) -> None:
    for key in read_header(file):
        for part, what in _REFUSED.items():
            if part in key:
                raise ValueError(
                    f"{file} has {key}, {what}, which is not merged; only low-rank pairs of the denoiser are. Give an "
                    "adapter without, or fuse it with diffusers and save the pipeline."
                )


def _give_shapes(model: nn.Module) -> None:
    """Parameters of the right shapes that take no memory, on the CPU and in float32, as peft will have the adapter."""
    for name, parameter in list(model.named_parameters()):
        owner, _, own = name.rpartition(".")
        empty = torch.zeros(()).expand(parameter.shape)
        setattr(model.get_submodule(owner), own, nn.Parameter(empty, requires_grad=False))


def pinned_recipe(recipe: Recipe) -> tuple[Recipe, Path]:
    """The recipe with the commits of what it takes from the Hub, its teacher and its adapter, and the teacher's folder.

    Both are downloaded if need be.

    Raises:
        FileNotFoundError, ValueError, HubError: as `downloaded` and `adapter_file`.
    """
    folder = downloaded(resolve_teacher(recipe.teacher))
    lora = None if recipe.lora is None else pinned_adapter(recipe.lora)
    return replace(recipe, teacher=pinned(recipe.teacher, folder), lora=lora), folder


def pinned_adapter(adapter: str) -> str:
    """An adapter with the commit that is in the Hub's cache, if it is a Hub id; downloaded if need be."""
    return adapter if Path(adapter).exists() else pinned(adapter, adapter_file(adapter).parent)


def float_pipeline(recipe: Recipe, dtype: torch.dtype = torch.float32, *, meta: bool = False) -> Any:
    """A recipe's teacher, with its adapter merged where it has one.

    Args:
        meta: without numbers.

    Raises:
        FileNotFoundError, ValueError, HubError: as `load_pipeline`, and as `Merge`.
    """
    folder = downloaded(resolve_teacher(recipe.teacher))
    pipeline = load_pipeline(folder, dtype, meta=meta)
    merge = _merge(recipe, folder)
    if merge is not None and not meta:
        for name, parameter in pipeline.transformer.named_parameters():
            parameter.data = merge(name, parameter.data).to(dtype)
    return pipeline


def streamed_denoiser(recipe: Recipe) -> StreamedDenoiser:
    """The denoiser of `float_pipeline`, in float32, whose blocks are read when they are asked for."""
    folder = downloaded(resolve_teacher(recipe.teacher))
    denoiser = read_index(folder)[1]["transformer"]
    read = checked_tensors(denoiser, change=_merge(recipe, folder))
    return StreamedDenoiser(denoiser, get_family(recipe.family).blocks, read)


def _merge(recipe: Recipe, folder: Path) -> Merge | None:
    if recipe.lora is None:
        return None
    return Merge(load_pipeline(folder, meta=True), Lora(recipe.lora, recipe.lora_scale))
