"""Prompt embeddings without their padding, on disk.

A family that masks its texts says so by a tensor [N, tokens] whose name ends in ``_mask``; `TEXT`, [N, tokens, D], is
then kept as the rows that are needed, one after the other, and is read with zeros in the other places:

    TEXT [2, 3, D]      _mask [2, 3]         stored: TEXT [3, D], KEPT [2, 3], and the mask
    a0 a1 __            1 1 0                a0
    b0 __ __            1 0 0                a1
                                             b0

In half precision the needed rows are those of the mask. In the encoder's own precision also those that are not zero, so
that what is read equals what was computed: statistics of GPTQ and of static ranges see masked rows too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

TEXT = "encoder_hidden_states"
KEPT = "kept_tokens"


def without_padding(conditioning: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Conditioning of N prompts, every tensor [N, ...], as it is stored.

    Args:
        dtype: half precision for the embeddings; None keeps every tensor as it is.
    """
    stored = {name: _in(value, dtype) for name, value in conditioning.items()}
    mask = next((value for name, value in conditioning.items() if name.endswith("_mask")), None)
    if mask is not None:
        kept = mask.bool()
        if dtype is None:
            kept = kept | (conditioning[TEXT] != 0).any(-1)
        stored |= {TEXT: stored[TEXT][kept], KEPT: kept}
    return stored


class Embeddings:
    """The prompts of one shard, as `without_padding` stored them."""

    def __init__(self, stored: Mapping[str, Tensor]) -> None:
        self._stored = {name: value for name, value in stored.items() if name != KEPT}
        self._kept = stored.get(KEPT)
        if self._kept is not None:
            self._ends = self._kept.sum(1).cumsum(0).tolist()

    def row(self, index: int) -> dict[str, Tensor]:
        """Conditioning of one prompt, padded again, every tensor without a batch."""
        found = {name: value[index] for name, value in self._stored.items() if self._kept is None or name != TEXT}
        if self._kept is not None:
            kept, rows = self._kept[index], self._stored[TEXT]
            text = rows.new_zeros(len(kept), rows.shape[1])
            text[kept] = rows[self._ends[index] - int(kept.sum()) : self._ends[index]]
            found[TEXT] = text
        return found


def _in(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Numbers of which a prompt has many; one number, a guidance scale say, stays exact."""
    return value.to(dtype) if dtype and value.is_floating_point() and value.ndim > 1 else value
