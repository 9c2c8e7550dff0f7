"""A few lines of ours around a method of another library's class."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def around(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a method by ``wrapper(original, self or cls, ...)``. Once: a second call leaves it as it is."""
    original = owner.__dict__[name]
    function = original.__func__ if isinstance(original, classmethod) else original
    if getattr(function, "knows_packed", False):
        return

    @functools.wraps(function)
    def method(*args: Any, **kwargs: Any) -> Any:
        return wrapper(function, *args, **kwargs)

    method.knows_packed = True  # type: ignore[attr-defined]
    setattr(owner, name, classmethod(method) if isinstance(original, classmethod) else method)
