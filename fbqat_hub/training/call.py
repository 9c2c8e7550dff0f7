"""The arguments of a pipeline's call, checked against its signature before anything is loaded."""

from __future__ import annotations

import functools
import inspect
import math
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin

from fbqat_hub.config import unknown_key_error
from fbqat_hub.families import find_family

# What a recipe or a command line can say. Tensors, callbacks and the like cannot be written there.
_WORDS = {
    bool: "true or false",
    int: "a whole number of at least 0",
    float: "a number",
    str: "text",
    list: "a list",
    tuple: "a list",
    dict: "a mapping of keys to values",
}
# These are given by whoever makes the call.
_OURS = {"self", "prompt", "prompt_2", "prompt_3", "generator", "latents", "output_type", "return_dict"}
# (least, most); a recipe that came with a model must not fill the memory of who generates with it.
_RANGES = {
    "height": (1, 8192),
    "width": (1, 8192),
    "num_inference_steps": (1, 1000),
    "num_images_per_prompt": (1, 64),
    "max_sequence_length": (1, 4096),
}
# What the sides of pictures are multiples of, of a pipeline of no family.
_SIZE_MULTIPLE = 8
# What the sampler is to visit; none of them is no step at all, and noise for a picture.
_VISITED = ("timesteps", "sigmas")


def check_call(pipeline_class: str, arguments: Mapping[str, Any], where: str = "") -> None:
    """Refuse arguments that the call of a pipeline would not take, or could not do anything sensible with.

    Args:
        pipeline_class: a class of diffusers by name, e.g. "SanaPipeline"; no weights are loaded.
        arguments: of its call, without the prompt and the generator.
        where: what stands before an argument's name in errors, e.g. "recipe: generation.".

    Raises:
        ValueError: an unknown argument (the nearest is named), one of the wrong type, or one out of range.
    """
    allowed = call_types(pipeline_class)
    if unknown := set(map(str, arguments)) - set(allowed):
        what = f"{where.strip(' .')} (the call of {pipeline_class})" if where else f"the call of {pipeline_class}"
        raise unknown_key_error(what, unknown, allowed)
    for name, value in arguments.items():
        if problem := _problem(name, value, allowed[name], pipeline_class):
            raise ValueError(f"{where}{name} is {value!r:.80}; it must be {problem}.")


def check_following(pipeline_class: str, call: Mapping[str, Any], where: str, why: str = "") -> None:
    """Refuse a call whose arguments contradict each other: one does not follow from the others (``Family.following``).

    Args:
        where: as `check_call`.
        why: what of it is not in ``call``, for the error.

    Raises:
        ValueError: names the argument and what it must be.
    """
    family = find_family(pipeline_class)
    for name, value in (family.following(call) if family else {}).items():
        if name in call and call[name] != value:
            must = "null" if value is None else value
            raise ValueError(f"{where}{name} is {call[name]!r:.80}; {why}it must be {must}, or be left out.")


@functools.cache
def call_types(pipeline_class: str) -> dict[str, tuple[Any, ...]]:
    """The arguments of a pipeline's call that can be written in a recipe -> the types that each takes.

    Raises:
        ValueError: diffusers has no pipeline of that name.
    """
    import diffusers

    if not pipeline_class.endswith("Pipeline") or not hasattr(diffusers, pipeline_class):
        raise ValueError(f"diffusers has no pipeline {pipeline_class!r}.")
    parameters = inspect.signature(getattr(diffusers, pipeline_class).__call__).parameters.values()
    family = find_family(pipeline_class)
    may_be_none = family.may_be_none if family else frozenset()
    found = {
        each.name: _types(each, each.name in may_be_none) for each in parameters if each.kind is not each.VAR_KEYWORD
    }
    return {name: kinds for name, kinds in found.items() if kinds and name not in _OURS and "callback" not in name}


def _types(parameter: inspect.Parameter, may_be_none: bool) -> tuple[Any, ...]:
    """Of the annotation, and NoneType where the default is None; empty where one of them is no plain type."""
    annotation = parameter.annotation
    parts = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    kinds = {get_origin(part) or part for part in parts}
    # a list can be left out, as Sana's instruction before a prompt
    if parameter.default is None or list in kinds or may_be_none:
        parts = (*parts, type(None))
    return tuple(parts) if kinds <= {*_WORDS, type(None)} else ()


def _problem(name: str, value: Any, allowed: tuple[Any, ...], pipeline_class: str) -> str:
    """What the value must be; empty if it is."""
    family = find_family(pipeline_class)
    if name in _RANGES:
        least, most = _RANGES[name]
        if name == "max_sequence_length" and family and family.most_text_tokens:
            most = family.most_text_tokens
        step = (family.size_multiple if family else _SIZE_MULTIPLE) if name in ("height", "width") else 1
        good = type(value) is int and max(least, step) <= value <= most and value % step == 0
        kind = "a whole number" if step == 1 else f"a multiple of {step}"
        return "" if good else f"{kind} from {max(least, step)} to {most}"
    if name in _VISITED and value is not None:
        good = type(value) is list and bool(value) and all(_fits(each, float) and each >= 0 for each in value)
        return "" if good else "a list of numbers of at least 0, one or more"
    if name.startswith("negative_prompt") and isinstance(value, list):
        return "text, the same for every prompt"
    if any(_fits(value, kind) for kind in allowed):
        return ""
    return " or ".join(dict.fromkeys(_WORDS[get_origin(kind) or kind] for kind in allowed if kind is not type(None)))


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) in (list, tuple):
        return type(value) is list and all(_fits(each, get_args(kind)[0]) for each in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is (get_origin(kind) or kind) and not (kind is int and value < 0)
