"""FBQATConfig: the ``quantization_config`` of a component's config.json, formats 1 and 2 (docs/format.md)."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from enum import StrEnum
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from transformers.utils.quantization_config import QuantizationConfigMixin as TransformersConfigMixin

from fbqat_hub.quantization.scheme import ActivationRange, ActivationScheme, ClipName, Granularity, WeightScheme
from fbqat_hub.version import __version__

# The newest format that is read. What is written is 2 where weights have several widths, and 1 where they do not.
FORMAT_VERSION = 2


class FBQATMethod(StrEnum):
    """diffusers asks for an Enum member as ``quant_method``."""

    FBQAT = "fbqat"


def unknown_key_error(what: str, unknown: Iterable[str], allowed: Iterable[str]) -> ValueError:
    """A ValueError that names each unknown key and its nearest allowed one."""
    allowed = sorted(allowed)
    lines = []
    for key in sorted(unknown):
        nearest = difflib.get_close_matches(key, allowed, n=1, cutoff=0.5)
        lines.append(f"{key!r}" + (f" (did you mean {nearest[0]!r}?)" if nearest else ""))
    return ValueError(f"unknown key in {what}: {', '.join(lines)}. Allowed: {', '.join(allowed)}.")


class FBQATConfig(QuantizationConfigMixin, TransformersConfigMixin):
    """W4A8 for a model of diffusers, or a text encoder of transformers.

    Written into config.json, or given to ``from_pretrained`` of either to quantize on load.

    Args:
        weight_bits: 4 (two codes a byte), or 3 for experiments: codes of -4..3, stored in the same four bits. 5 to 8:
            one code a byte.
        weight_granularity: "per_channel", "per_tensor" or "per_group".
        group_size: inputs that share a scale, for "per_group"; somewhat less in a layer whose inputs it does not
            divide.
        weight_clip: how quantize-on-load finds the scale, "max_abs" or "mse"; a trained checkpoint has its own.
        activation_bits: 8 or 16, or 32 for float activations.
        activation_range: "per_token", "per_tensor" (both dynamic) or "static" (needs a calibrated checkpoint).
        modules_to_not_convert: names, or fnmatch patterns, of modules left in float. Written out as sorted names. A
            name is a whole one: ``proj_out`` is the last layer, ``*.proj_out`` are those in blocks.
        module_overrides: pattern -> {"bits": 16} and/or {"range": ...}, activation settings that differ there.
        weight_bits_by_module: name or pattern -> bits of the modules whose weights have not ``weight_bits``; of several
            that match the last one. Written out as sorted names.
        average_bits: from 4 to 8: quantize-on-load gives so many bits per weight on average, 8 to the layers whose
            weights lose most at 4 (``quantization.sensitivity.weight_sensitivity``). `fbqat train` chooses them by
            their effect on the model's output, which is better. It is not written: the widths are.
        format_version: 2 where modules have widths of their own, else 1, which is what is taken if it is left out.
        fbqat_version: the package that wrote the checkpoint.

    Raises:
        ValueError: an unknown key, a value out of range, a newer format, or one that does not suit the other keys.
            ``weight_narrow: false`` is read and dropped, for older versions wrote it.

    >>> FBQATConfig(weight_bitz=4)
    Traceback (most recent call last):
    ValueError: unknown key in FBQATConfig: 'weight_bitz' (did you mean 'weight_bits'?). ...
    """

    def __init__(
        self,
        weight_bits: int = 4,
        weight_granularity: Granularity = "per_channel",
        group_size: int | None = None,
        weight_clip: ClipName = "mse",
        activation_bits: int = 8,
        activation_range: ActivationRange = "per_token",
        modules_to_not_convert: list[str] | None = None,
        module_overrides: dict[str, dict[str, Any]] | None = None,
        weight_bits_by_module: dict[str, int] | None = None,
        average_bits: float | None = None,
        format_version: int | None = None,
        fbqat_version: str = __version__,
        quant_method: str = FBQATMethod.FBQAT,
        **unknown: Any,
    ) -> None:
        needed = 2 if weight_bits_by_module else 1
        format_version = needed if format_version is None else format_version
        if not _is_whole(format_version) or format_version < 1:
            raise ValueError(f"format_version is {format_version!r}; it must be a whole number from 1.")
        if format_version > FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint has format_version {format_version}, written by fbqat_hub {fbqat_version}; this is "
                f"fbqat_hub {__version__}, which reads up to {FORMAT_VERSION}. Update with: pip install -U fbqat_hub"
            )
        if unknown.pop("weight_narrow", False) is not False:  # of a version before the narrow grid left
            raise ValueError(
                "weight_narrow is set, which asks for codes without the lowest one; this version has no such grid. "
                "Leave it out and quantize the float model again."
            )
        if unknown:
            allowed = set(inspect.signature(FBQATConfig).parameters) - {"unknown"}
            raise unknown_key_error("FBQATConfig", unknown, allowed)
        if quant_method != FBQATMethod.FBQAT:
            raise ValueError(f"quant_method is {quant_method!r}; FBQATConfig is for 'fbqat'.")
        if format_version != needed:
            raise ValueError(
                f"format_version is {format_version}, and weight_bits_by_module is {weight_bits_by_module!r:.100}: "
                "format 2 has it, not empty, and format 1 does not have it."
            )
        _check_bits("weight_bits", weight_bits)
        if average_bits is not None and (needed == 2 or weight_bits != 4 or not _is_average(average_bits)):
            raise ValueError(
                f"average_bits is {average_bits!r}; it must be a number from 4 to 8, without weight_bits_by_module and "
                "with weight_bits 4, which it chooses from."
            )
        if group_size is not None and not _is_whole(group_size):
            raise ValueError(f"group_size is {group_size!r}; it must be a whole number, or left out.")
        self.quant_method = FBQATMethod.FBQAT
        self.weight_bits = weight_bits
        self.weight_granularity = weight_granularity
        self.group_size = group_size
        self.weight_clip = weight_clip
        self.activation_bits = activation_bits
        self.activation_range = activation_range
        self.modules_to_not_convert = _sorted_names(modules_to_not_convert)
        self.module_overrides = _overrides(module_overrides)
        self.weight_bits_by_module = _widths(weight_bits_by_module)
        self.average_bits = average_bits
        self.format_version = format_version
        self.fbqat_version = fbqat_version
        # building the schemes checks every value
        self.weight_scheme()
        scheme = self.activation_scheme()
        for changes in self.module_overrides.values():
            replace(scheme, **changes)

    def weight_scheme(self) -> WeightScheme:
        """The weights' part, as the quantization package takes it."""
        return WeightScheme(
            bits=self.weight_bits,
            granularity=self.weight_granularity,
            group_size=self.group_size,
            clip=self.weight_clip,
        )

    def activation_scheme(self) -> ActivationScheme:
        """The activations' part, as the quantization package takes it."""
        return ActivationScheme(bits=self.activation_bits, range=self.activation_range)

    def layer_options(self) -> dict[str, Any]:
        """Which layers are quantized and how their inputs are, as arguments of ``quantization.prepare``."""
        return {
            "activations": self.activation_scheme(),
            "not_convert": self.modules_to_not_convert,
            "overrides": self.module_overrides,
            "widths": self.weight_bits_by_module,
        }

    def with_widths(self, widths: Mapping[str, int]) -> FBQATConfig:
        """The same with these widths by module, of which those that are ``weight_bits`` are left out; no average."""
        own = {name: bits for name, bits in sorted(widths.items()) if bits != self.weight_bits}
        left_out = {"average_bits", "format_version", "weight_bits_by_module"}
        same = {key: value for key, value in self.to_dict().items() if key not in left_out}
        return FBQATConfig(**same, weight_bits_by_module=own)

    @property
    def needs_calibration(self) -> bool:
        """True if a module may have a static activation range."""
        return "static" in (self.activation_range, *(each.get("range") for each in self.module_overrides.values()))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the same for the same config whatever the order it was given in.

        What only format 2 has, and what is an instruction and no format, is left out where it says nothing.
        """
        absent = {name for name in ("weight_bits_by_module", "average_bits") if not getattr(self, name)}
        plain = {name: value for name, value in self.__dict__.items() if name not in absent}
        return {**plain, "quant_method": self.quant_method.value}

    def to_diff_dict(self) -> dict[str, Any]:
        """As ``to_dict``: every field is written, so that a reader needs no defaults."""
        return self.to_dict()


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is that of a model which this package quantized."""
    given = config.get("quantization_config")
    return isinstance(given, Mapping) and given.get("quant_method") == FBQATMethod.FBQAT


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_bits(what: str, bits: object) -> None:
    if not _is_whole(bits) or bits not in range(3, 9):
        raise ValueError(f"{what} is {bits!r:.100}; codes of 3 to 8 bits are stored.")


def _is_average(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 4 <= value <= 8


def _widths(widths: object) -> dict[str, int]:
    if widths is None:
        return {}
    if not isinstance(widths, Mapping) or not all(isinstance(name, str) for name in widths):
        raise ValueError(f"weight_bits_by_module is {widths!r:.100}; it must be like {{'proj_out': 8}}.")
    for name, bits in widths.items():
        _check_bits(f"weight_bits_by_module[{name!r}]", bits)
    return dict(widths)


def _sorted_names(names: object) -> list[str]:
    if names is None:
        return []
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"modules_to_not_convert is {names!r}; it must be a list of names or patterns.")
    return sorted(names)


def _overrides(overrides: object) -> dict[str, dict[str, Any]]:
    if overrides is None:
        return {}
    if not isinstance(overrides, Mapping) or not all(
        isinstance(pattern, str) and isinstance(changes, Mapping) for pattern, changes in overrides.items()
    ):
        raise ValueError(f"module_overrides is {overrides!r}; it must be like {{'proj_out': {{'bits': 16}}}}.")
    for pattern, changes in overrides.items():
        if extra := set(changes) - {"bits", "range"}:
            raise unknown_key_error(f"module_overrides[{pattern!r}]", extra, {"bits", "range"})
    return {pattern: dict(changes) for pattern, changes in overrides.items()}
