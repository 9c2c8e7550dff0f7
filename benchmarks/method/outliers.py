"""Outlier channels as large models have them, in a tiny teacher, without a change of what it computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# A power of two: products and sums keep every bit, so the teacher's predictions stay equal.
FACTOR = 16.0
SHARE = 1 / 16


@contextmanager
def outlier_channels(model: nn.Module) -> Iterator[None]:
    """Within, a share of the channels between an attention's values and its output is out of scale.

    Attention is linear in its values, so a channel that is ``FACTOR`` times larger leaves the function as it was where
    the output projection's column is as much smaller. Half of the chosen channels are larger (outliers among the
    activations), half are smaller (outliers among the output projection's weights); which ones is the same every time.

    Args:
        model: a diffusers transformer; scaled in place, and back when the context ends.

    Raises:
        ValueError: no attention of the model has both a value and an output projection.
    """
    generator = torch.Generator().manual_seed(0)
    scaled: list[tuple[nn.Module, nn.Module | None, Tensor]] = []
    for attention in model.modules():
        outputs = getattr(attention, "to_out", None)
        if outputs is None or not hasattr(attention, "to_v"):
            continue
        channels = attention.to_v.out_features
        chosen = torch.randperm(channels, generator=generator)[: max(2, int(channels * SHARE))]
        factors = torch.ones(channels)
        factors[chosen[::2]], factors[chosen[1::2]] = FACTOR, 1 / FACTOR
        scaled.append((attention.to_v, outputs[0], factors))
        if getattr(attention, "add_v_proj", None) is not None:  # the text's values, in the same channels
            scaled.append((attention.add_v_proj, getattr(attention, "to_add_out", None), factors))
    if not scaled:
        raise ValueError(f"{type(model).__name__} has no attention with to_v and to_out, between which channels lie.")

    def scale(direction: int) -> None:
        with torch.no_grad():
            for values, output, factors in scaled:
                by = factors.to(values.weight) ** direction
                values.weight *= by[:, None]
                if values.bias is not None:
                    values.bias *= by
                if output is not None:
                    output.weight /= by

    scale(1)
    try:
        yield
    finally:
        scale(-1)
