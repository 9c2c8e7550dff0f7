"""What packed layers keep beside their packed bytes: a weight in the form that a kernel multiplies.

It is kept as an attribute of the storage whose bytes it was made of, and goes where they go: bytes that replace them
(``.to``, ``.data =``, a load, offloading) have none, and a copy makes its own. Writes into the same bytes are told by
the tensor's version, which torch counts; writes through ``.data`` are not counted, and so not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from torch import Tensor

Memory = Literal["small", "fast", "large"]
_memory: Memory = "fast"
_KEPT = "fbqat_prepared"


def set_memory(memory: Memory) -> None:
    """What packed layers keep in memory, for the whole process. Weights that were unpacked before go, if they are not
    to be kept, at the next forward.

    Args:
        memory: What is kept of a 4-bit weight:

            - "small": the packed bytes and nothing else, half a byte a weight.
            - "fast", the default: on a CPU with VNNI, or without a C compiler, an int8 copy too, 1.5 bytes a weight.
              On a CPU with AVX2 alone and a C compiler, and on a GPU, the packed bytes.
            - "large": as "fast", and on a GPU an int8 copy too.

    Raises:
        ValueError: another word.
    """
    if memory not in get_args(Memory):
        raise ValueError(f"memory is {memory!r}; allowed: {', '.join(map(repr, get_args(Memory)))}.")
    global _memory
    _memory = memory


def get_memory() -> Memory:
    """What ``set_memory`` was given last."""
    return _memory


def keep(weight_packed: Tensor, in_features: int, make: Callable[[Tensor, int], Any]) -> Any:
    """``make(weight_packed, in_features)``, made once for these bytes."""
    if weight_packed.is_inference():  # torch counts no versions of it, so nothing can be kept
        return make(weight_packed, in_features)
    of_storage = weight_packed.untyped_storage().__dict__.setdefault(_KEPT, {})
    place = (weight_packed.storage_offset(), *weight_packed.shape, *weight_packed.stride(), in_features)
    kept = of_storage.get(place)
    if kept is None or kept[0] != weight_packed._version:
        kept = of_storage[place] = (weight_packed._version, make(weight_packed, in_features))
    return kept[1]


def forget(weight_packed: Tensor) -> None:
    """Drop what was kept for these bytes, if anything."""
    weight_packed.untyped_storage().__dict__.pop(_KEPT, None)
