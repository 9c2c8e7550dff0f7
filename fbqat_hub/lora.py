"""Low-rank adapters (LoRA): which tensors of a file are the two sides of one pair."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from fbqat_hub.text import names

# The side of a pair that a tensor's name says: ``lora_A``, ``lora_down``, ``lora.down``.
_SIDE = re.compile(r"[._]lora[_.](A|B|down|up)\b")


class AdapterError(ValueError):
    """An adapter that is refused; the text says why, and what to do."""


def pairs_of(shapes: Mapping[str, Sequence[int]], what: str) -> dict[str, tuple[Sequence[int], Sequence[int]]]:
    """Module -> shapes of its pair: [rank, in, ...] and [out, rank, ...].

    Args:
        shapes: of an adapter's tensors, by name. What is no side of a pair (biases, magnitudes, alphas) is passed over.
        what: the adapter, as a sentence begins with it.

    Raises:
        AdapterError: half of a pair, which libraries fill up with zeros or random numbers; or sides of two ranks.

    >>> pairs_of({"to_q.lora_A.weight": (4, 16), "to_q.lora_B.weight": (8, 4)}, "it")
    {'to_q': ((4, 16), (8, 4))}
    """
    sides: dict[str, dict[bool, Sequence[int]]] = {}
    for key, shape in shapes.items():
        if len(shape) > 1 and (found := _SIDE.search(key)):
            sides.setdefault(key[: found.start()], {})[found[1] in ("A", "down")] = shape
    if halves := sorted(module for module, found in sides.items() if len(found) == 1):
        raise AdapterError(f"{what} has half of a low-rank pair of {names(halves)}; it is damaged. Download it again.")
    pairs = {module: (found[True], found[False]) for module, found in sides.items()}
    for module, (down, up) in pairs.items():
        if down[0] != up[1]:
            raise AdapterError(
                f"{what} has two ranks in {module}: {down[0]} of lora_A and {up[1]} of lora_B; it is damaged. Download "
                "it again."
            )
    return pairs
