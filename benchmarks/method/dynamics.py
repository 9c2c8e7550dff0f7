"""What training did to the codes: how far weights moved, how many codes changed, how many still flip at the end."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fbqat_hub.quantization import FakeQuantizedLinear, named_layers, set_bit_width
from fbqat_hub.quantization.fake_quantize import symmetric_scale
from fbqat_hub.quantization.quantize import quantize


class Dynamics:
    """Follows a student's trained layers.

    Args:
        bits: of the final grid; codes are of that grid, whatever the width of the moment.
        last_steps: the steps over which flips are counted.
    """

    def __init__(self, student: nn.Module, bits: int, steps: int, last_steps: int = 20) -> None:
        layers = [layer for _, layer in named_layers(student, FakeQuantizedLinear) if layer.weight.requires_grad]
        self._layers, self._student, self._bits = layers, student, bits
        self._first_counted = steps - last_steps
        set_bit_width(student, bits)
        self._start_weights = [layer.weight.detach().clone() for layer in layers]
        self._start_codes = self._codes()
        self._previous = self._start_codes
        self._flips, self._counted = 0, 0

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After an optimizer step."""
        if step < self._first_counted:
            return
        codes = self._codes()
        if step > self._first_counted:
            self._flips += sum(int((a != b).sum()) for a, b in zip(codes, self._previous, strict=True))
            self._counted += sum(code.numel() for code in codes)
        self._previous = codes

    @torch.no_grad()
    def summary(self) -> dict[str, float]:
        """``moved``: mean distance of a weight from its start, in steps of the final grid. ``codes_changed``: share of
        the codes that are not those of the start. ``flips``: share of the codes that change in one of the last steps.
        """
        moved, changed, count = 0.0, 0, 0
        for layer, weight, start in zip(self._layers, self._start_weights, self._start_codes, strict=True):
            bits = self._bits_of(layer)
            scale = symmetric_scale(layer.current_clip(), bits)
            moved += float(((layer.weight - weight).view_as(start) / scale).abs().sum())
            changed += int((quantize(layer.grouped_weight(), scale, bits) != start).sum())
            count += start.numel()
        if not count:  # another library's layers
            return {}
        flips = self._flips / self._counted if self._counted else 0.0
        return {"moved": moved / count, "codes_changed": changed / count, "flips": flips}

    def _bits_of(self, layer: FakeQuantizedLinear) -> float:
        """Of the final grid; a layer that keeps a width of its own is at it already."""
        return layer.bit_width if layer.keeps_width else self._bits

    def _codes(self) -> list[Tensor]:
        return [
            quantize(layer.grouped_weight(), symmetric_scale(layer.current_clip(), bits), bits)
            for layer, bits in ((layer, self._bits_of(layer)) for layer in self._layers)
        ]
