"""What packed layers keep beside their packed bytes: a weight in the form that a kernel multiplies.

It is kept as an attribute of the storage whose bytes it was made of, and goes where they go: bytes that replace them
(``.to``, ``.data =``, a load, offloading) have none, and a copy makes its own. Writes into the same bytes are seen on a
CPU by their sum, which takes a hundredth of the product's time or less. On a GPU they are told by the tensor's version,
which torch counts; writes through ``.data``, and FSDP2's into its own buffers, are not counted, and so not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Memory = Literal["small", "fast", "large"]
_memory: Memory = "fast"
_KEPT = "fbqat_prepared"


def set_memory(memory: Memory) -> None:
    """What packed layers keep in memory, for the whole process. Weights that were unpacked before go, if they are not
    to be kept, at the next forward.

    Args:
        memory: What is kept of a 4-bit weight:

            - "small": the packed bytes and nothing else, half a byte per weight.
            - "fast", the default: on a CPU with AMX, or without a C compiler, an int8 copy too, 1.5 bytes per weight.
              On any other CPU, and on a GPU, the packed bytes.
            - "large": as "fast", and on a GPU an int8 copy too. It is not made anew when bytes are overwritten in a
              way that torch does not count (through ``.data``, or by FSDP2): not for weights that change.

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
    on_cpu = weight_packed.device.type == "cpu"
    if weight_packed.is_inference() and not on_cpu:  # torch counts no versions of it, so nothing can be kept
        return make(weight_packed, in_features)
    bytes_now = _sum(weight_packed) if on_cpu else weight_packed._version
    of_storage = weight_packed.untyped_storage().__dict__.setdefault(_KEPT, {})
    place = (weight_packed.storage_offset(), *weight_packed.shape, *weight_packed.stride(), in_features)
    kept = of_storage.get(place)
    if kept is None or kept[0] != bytes_now:
        kept = of_storage[place] = (bytes_now, make(weight_packed, in_features))
    return kept[1]


def _sum(codes: Tensor) -> int:
    """Of all bytes, eight at a time where they lie so."""
    whole = codes.is_contiguous() and codes.numel() % 8 == 0 and codes.storage_offset() % 8 == 0
    return int(codes.view(-1).view(torch.int64).sum() if whole else codes.sum(dtype=torch.int64))


def forget(weight_packed: Tensor) -> None:
    """Drop what was kept for these bytes, if anything."""
    weight_packed.untyped_storage().__dict__.pop(_KEPT, None)
