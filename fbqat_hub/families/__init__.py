"""What one architecture needs, one short file each."""

from __future__ import annotations

from fbqat_hub.families.base import Family
from fbqat_hub.families.flux import Flux
from fbqat_hub.families.pixart_sigma import PixArtSigma
from fbqat_hub.families.sana import Sana
from fbqat_hub.families.sd3 import StableDiffusion3

FAMILIES: dict[str, Family] = {family.name: family for family in (Sana(), PixArtSigma(), StableDiffusion3(), Flux())}


def get_family(name: str) -> Family:
    """The family of that name; ValueError with the names there are."""
    if name not in FAMILIES:
        raise ValueError(f"family is {name!r}; supported: {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def family_of(pipeline_class: str) -> Family:
    """The family whose pipeline has that class name, as in model_index.json."""
    for family in FAMILIES.values():
        if family.pipeline_class == pipeline_class:
            return family
    known = ", ".join(family.pipeline_class for family in FAMILIES.values())
    raise ValueError(f"{pipeline_class} is of no supported family; supported pipelines: {known}.")


__all__ = ["FAMILIES", "Family", "family_of", "get_family"]
