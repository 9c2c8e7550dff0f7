"""Parts of a method that were tried beside the rounding itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fbqat_hub.quantization import FakeQuantizedLinear, named_layers
from fbqat_hub.quantization.fake_quantize import quantize, symmetric_scale
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
        grouped = layer._grouped()
        return quantize(grouped, symmetric_scale(layer.current_clip(), layer.bit_width), layer.bit_width)

    @torch.no_grad()
    def update(self, progress: float) -> None:
        """After an optimizer step: count changes of code, freeze what oscillates, hold what is frozen."""
        threshold = self.threshold * (1 + 3 * (0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * progress)).item()))
        for layer, state in self._layers:
            scale = symmetric_scale(layer.current_clip(), layer.bit_width)
            weight = layer._grouped()
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
