"""Dataclasses for what a user writes: checked by pydantic when they are made, and every error is one line.

>>> @checked("the tea")
... class Tea:
...     minutes: Count = 3
>>> Tea(minutes=0)
Traceback (most recent call last):
ValueError: the tea: minutes is 0; it must be a whole number of at least 1, at most 10000000.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from fbqat_hub.config import unknown_key_error
from fbqat_hub.inputs import MAX_SEED

Made = TypeVar("Made")

# Of steps, samples, pictures: what is computed of so many stays within the numbers of Python's and torch's types.
MOST = 10**7
# Strict: what YAML says is a number, and no text that looks like one. The description ends the error's line.
Text = Annotated[str, Field(strict=True, pattern=r"\S", description="text that is not empty")]
Texts = Annotated[list[Text], Field(description="a list of texts that are not empty")]
Flag = Annotated[bool, Field(strict=True, description="true or false")]
Whole = Annotated[int, Field(strict=True, ge=0, le=MOST, description=f"a whole number of at least 0, at most {MOST}")]
Seed = Annotated[int, Field(strict=True, ge=0, le=MAX_SEED, description=f"a whole number from 0 to {MAX_SEED}")]
Count = Annotated[int, Field(strict=True, ge=1, le=MOST, description=f"a whole number of at least 1, at most {MOST}")]
Amount = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False, description="a number of at least 0")]
Options = Annotated[dict[str, Any], Field(description="a mapping of keys to values")]


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,))
def checked(what: str) -> Callable[[type[Made]], type[Made]]:
    """Make a class a frozen, keyword-only dataclass whose fields are checked against their types.

    ``dataclasses.replace``, ``asdict`` and ``fields`` work as of any dataclass. An unknown or wrong field is a
    ValueError of one line that begins with ``what``.
    """

    def make(cls: type[Made]) -> type[Made]:
        made: Any = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))(cls)
        plain = made.__init__

        @functools.wraps(plain)
        def init(self: Any, **given: Any) -> None:
            try:
                plain(self, **given)
            except ValidationError as error:
                raise ValueError(_line(what, made, given, error)) from None

        made.__init__ = init
        checked_class: type[Made] = made
        return checked_class

    return make


def one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``; it lists them and names the nearest."""
    known = list(allowed)
    if not isinstance(value, str) or value not in known:
        near = difflib.get_close_matches(value, known, n=1) if isinstance(value, str) else []
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{name} is {value!r:.80}{hint}; allowed: {', '.join(known)}.")


def _line(what: str, kind: Any, given: Any, error: ValidationError) -> str:
    """The first error, in our words: what was given, and what is allowed."""
    found = error.errors(include_url=False)[0]
    if found["type"] == "value_error":
        return str(found["ctx"]["error"])
    names: list[str] = []
    must = "a mapping of keys to values"
    for part in found["loc"]:
        if not dataclasses.is_dataclass(kind):
            break
        fields: Mapping[Any, Any] = getattr(kind, "__pydantic_fields__")  # noqa: B009
        if part not in fields:
            return str(unknown_key_error(".".join([what, *names]), [str(part)], fields))
        names.append(str(part))
        given = given.get(part, found["input"]) if isinstance(given, Mapping) else found["input"]
        kind, must = fields[part].annotation, fields[part].description or must
    if found["type"] == "missing":
        return f"{what} lacks {'.'.join(names)}."
    hint = ""
    if isinstance(given, str) and _is_number(given) and not ("e" in given.lower() and "whole" in must):
        hint = " (write 1.0e-4, not 1e-4: YAML reads that as text)" if "e" in given.lower() else " (without quotes)"
    return f"{what}: {'.'.join(names)} is {given!r:.200}; it must be {must}{hint}."


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
