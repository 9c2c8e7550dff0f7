"""Parts of a method that were tried beside the rounding itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fbqat_hub.quantization import FakeQuantizedLinear, named_layers
from fbqat_hub.quantization.fake_quantize import symmetric_scale
from fbqat_hub.quantization.quantize import quantize
from fbqat_hub.training.distill import Draws


def weight_average(student: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of the latent weights, biases and clips."""
    return AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay))


class Freezing:
    """Freezes weights whose code oscillates (Nagel et al., ICML 2022, arXiv 2203.11086, section 4.3).

    A weight oscillates when its code changes in the direction opposite to its last change. The frequency is an
    exponential moving average; above a threshold, which falls from four times ``threshold`` to ``threshold`` over
    training by a cosine, the weight stays at its mean code.
    """

    _MOMENTUM = 0.01

    def __init__(self, student: nn.Module, threshold: float) -> None:
        self.threshold = threshold
        layers = [layer for _, layer in named_layers(student, FakeQuantizedLinear) if layer.weight.requires_grad]
        self._layers = [(layer, self._start(layer)) for layer in layers]

    def _start(self, layer: FakeQuantizedLinear) -> dict[str, Tensor]:
        codes = self._codes(layer).float()
        zeros = torch.zeros_like(codes)
        return {
            "codes": codes,
            "direction": zeros.clone(),
            "frequency": zeros.clone(),
            "mean": codes.clone(),
            "frozen": torch.zeros_like(codes, dtype=torch.bool),
            "at": codes.clone(),
        }

    @staticmethod
    def _codes(layer: FakeQuantizedLinear) -> Tensor:
        return quantize(layer.grouped_weight(), symmetric_scale(layer.current_clip(), layer.bit_width), layer.bit_width)

    @torch.no_grad()
    def update(self, progress: float) -> None:
        """After an optimizer step: count changes of code, freeze what oscillates, hold what is frozen."""
        threshold = self.threshold * (1 + 3 * (0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * progress)).item()))
        for layer, state in self._layers:
            scale = symmetric_scale(layer.current_clip(), layer.bit_width)
            weight = layer.grouped_weight()
            held = torch.where(state["frozen"], state["at"] * scale, weight)
            layer.weight.copy_(held.view_as(layer.weight))
            codes = quantize(held, scale, layer.bit_width).float()
            change = (codes - state["codes"]).sign()
            oscillates = (change * state["direction"] < 0).float()
            state["direction"] = torch.where(change != 0, change, state["direction"])
            state["frequency"].lerp_(oscillates, self._MOMENTUM)
            state["mean"].lerp_(codes, self._MOMENTUM)
            state["codes"] = codes
            new = (state["frequency"] > threshold) & ~state["frozen"]
            state["at"] = torch.where(new, state["mean"].round(), state["at"])
            state["frozen"] |= new


class LearnedWidths:
    """A width a layer around the schedule's, learned: where the schedule is above the final bits, so is their mean.

    At a scheduled width B, layer l has 4 + (B - 4) exp(o_l) / m for 4 final bits, where m keeps the mean over all
    weights at B. The offsets o_l start at 0 and get their gradient through the grid (`fake_quantize` takes a width that
    is a tensor). Only for weights whose clip does not depend on the width (``max_abs``).
    """

    _RATE = 100.0  # the optimizer's rate is meant for weights: at 1e-4 an offset may move by 0.01 a step

    def __init__(self, student: nn.Module, final_bits: float) -> None:
        self.final_bits = final_bits
        self._layers = [layer for _, layer in named_layers(student, FakeQuantizedLinear)]
        sizes = torch.tensor([float(layer.weight.numel()) for layer in self._layers])
        self._shares = sizes / sizes.sum()
        for layer in self._layers:
            layer.register_parameter("width_offset", nn.Parameter(torch.zeros(())))
        self._scheduled = final_bits
        student.register_forward_pre_hook(self._to_own)
        student.register_forward_hook(self._to_schedule)

    def widths(self, scheduled: float) -> Tensor:
        """The layers' widths where the schedule has ``scheduled`` bits, [layers]."""
        factors = torch.stack([self._RATE * layer.get_parameter("width_offset") for layer in self._layers]).exp()
        widths = self.final_bits + (scheduled - self.final_bits) * factors / (self._shares * factors).sum()
        return widths.clamp(2, 16)

    def _to_own(self, *_: Any) -> None:
        self._scheduled = self._layers[0].bit_width
        for layer, width in zip(self._layers, self.widths(self._scheduled), strict=True):
            layer.bit_width = width  # type: ignore[assignment]  # a tensor, so that it gets a gradient

    def _to_schedule(self, *_: Any) -> None:
        for layer in self._layers:
            layer.bit_width = self._scheduled


class FeatureDraws(Draws):
    """Draws whose predictions carry the blocks' outputs along, so that the loss is also feature distillation.

    Attributes:
        features: weight of the mean squared distance of the blocks' outputs, each relative to its size; 0 is off.
    """

    features = 0.0
    _sizes: list[Tensor] | None = None

    def predict(self, denoiser: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        if not self.features:
            return super().predict(denoiser, inputs)
        outputs: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            for value in output if isinstance(output, tuple) else (output,):
                if value is not None:
                    outputs.append(value)

        blocks = [block for name, block in denoiser.named_modules() if name.endswith("blocks") for block in block]
        hooks = [block.register_forward_hook(keep) for block in blocks]
        try:
            prediction = super().predict(denoiser, inputs)
        finally:
            for hook in hooks:
                hook.remove()
        if self._sizes is None:  # the teacher's, which is asked first
            self._sizes = [value.square().mean().sqrt() for value in outputs]
        weighted = [
            value.flatten() * (self.features * prediction.numel() / value.numel()) ** 0.5 / size
            for value, size in zip(outputs, self._sizes, strict=True)
        ]
        return torch.cat([prediction.flatten(), *weighted])
