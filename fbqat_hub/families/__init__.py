"""What one architecture needs, one short file each."""

from __future__ import annotations

from fbqat_hub.families.base import Family, component_configs, moved
from fbqat_hub.families.flux import Flux, FluxKontext
from fbqat_hub.families.flux2 import Flux2Klein
from fbqat_hub.families.pixart_sigma import PixArtSigma
from fbqat_hub.families.qwen_image import QwenImage
from fbqat_hub.families.sana import Sana, SanaSprint
from fbqat_hub.families.sd3 import StableDiffusion3
from fbqat_hub.families.z_image import ZImage

_ALL = (
    Sana(),
    SanaSprint(),
    PixArtSigma(),
    StableDiffusion3(),
    Flux(),
    FluxKontext(),
    Flux2Klein(),
    ZImage(),
    QwenImage(),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}


def get_family(name: str) -> Family:
    """The family of that name; ValueError with the names there are."""
    if name not in FAMILIES:
        raise ValueError(f"family is {name!r}; supported: {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def family_of(pipeline_class: str) -> Family:
    """The family whose pipeline has that class name (model_index.json); ValueError with the pipelines there are."""
    return _with("pipeline_class", pipeline_class, "pipelines")


def find_family(pipeline_class: str) -> Family | None:
    """As `family_of`, and None of a pipeline of no supported family."""
    return next((family for family in FAMILIES.values() if family.pipeline_class == pipeline_class), None)


def family_of_denoiser(denoiser_class: str) -> Family:
    """The first family whose denoiser has that class name; ValueError with the classes there are.

    Families that share a class have the same graph.
    """
    return _with("denoiser_class", denoiser_class, "denoisers")


def _with(attribute: str, value: str, kind: str) -> Family:
    found = {getattr(family, attribute): family for family in reversed(FAMILIES.values())}
    if value not in found:
        raise ValueError(f"{value} is of no supported family; supported {kind}: {', '.join(reversed(found))}.")
    return found[value]


__all__ = [
    "FAMILIES",
    "Family",
    "component_configs",
    "family_of",
    "family_of_denoiser",
    "find_family",
    "get_family",
    "moved",
]
