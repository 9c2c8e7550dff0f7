"""FakeQuantizedLinear, the layer that is trained, and its 1x1 convolution."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fbqat_hub.quantization.activation import fake_quantize_activation
from fbqat_hub.quantization.clip import CLIPS
from fbqat_hub.quantization.fake_quantize import check_bit_width, fake_quantize, symmetric_scale
from fbqat_hub.quantization.half import HALF, compute_dtype, half_linear
from fbqat_hub.quantization.layer import Pointwise, QuantizedLayer
from fbqat_hub.quantization.quantize import grouped, quantize_weight
from fbqat_hub.quantization.rounding import NEAREST, Rounding
from fbqat_hub.quantization.scheme import ActivationScheme, WeightScheme


class FakeQuantizedLinear(QuantizedLayer):
    """A linear layer that fake-quantizes its weight and its input: [..., in] -> [..., out].

    Attributes:
        weight: fp32 parameter, the shape of the layer it replaces.
        bias: parameter [out] or None.
        clip: the clip of each scale, with its buffer or parameter (``clip.py``).
        input_scale, input_zero_point: fp32 and int32 scalar buffers, the static activation range; None until it is
            calibrated.
        bit_width, rounding: set by ``set_bit_width``.
        keeps_width: whether ``weight_scheme.bits`` is its own, which ``convert.set_bit_width`` of a model leaves.

    The output has the dtype of the input, or that of autocast. In half precision codes are multiplied (``half.py``).

    Raises:
        ValueError: a group size that does not suit the layer, and at ``forward`` an input of another shape, dtype or
            device.
    """

    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv2d, weight_scheme: WeightScheme, activation_scheme: ActivationScheme):
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape[:2]
        self.weight_scheme = weight_scheme
        self.activation_scheme = activation_scheme
        self.weight = nn.Parameter(layer.weight.detach().float().clone())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().float().clone())
        self.clip = CLIPS[weight_scheme.clip](self.grouped_weight())
        self.register_buffer("input_scale", None)
        self.register_buffer("input_zero_point", None)
        self.enabled = True
        self.keeps_width = False
        self.rounding: Rounding = NEAREST
        self.bit_width = math.nan  # so that the first set_bit_width sets the clip
        self.set_bit_width(weight_scheme.bits)

    def set_bit_width(self, bit_width: float, rounding: Rounding = NEAREST) -> list[nn.Parameter]:
        """Move to a bit width and a rounding; where the width changes, the clip is found anew.

        Returns:
            The parameters that were set anew (``Clip.on_width``); none where the width stays.
        """
        self.rounding = rounding
        if check_bit_width(bit_width) == self.bit_width:
            return []
        self.bit_width = float(bit_width)
        return self.clip.on_width(self.grouped_weight(), self.bit_width)

    def set_input_range(self, scale: float, zero_point: int) -> None:
        """Give the layer its static activation range; real = scale * (code - zero_point)."""
        device = self.weight.device
        self.input_scale = torch.tensor(scale, dtype=torch.float32, device=device)
        self.input_zero_point = torch.tensor(zero_point, dtype=torch.int32, device=device)

    def current_clip(self) -> Tensor:
        """The clip of each scale, broadcastable to the grouped weight; carries a gradient if learned."""
        return self.clip.value(self.grouped_weight(), self.bit_width)

    def fake_quantized_weight(self) -> Tensor:
        """The weight on the grid of the current bit width, in float, the shape of ``weight``."""
        return self._on_grid(self.current_clip()).view_as(self.weight)

    def codes_and_scales(self) -> tuple[Tensor, Tensor]:
        """What is stored, as ``quantize_weight`` gives it: int8 codes [out, in], fp32 scales [out] or [out, groups]."""
        return quantize_weight(self.weight, self.weight_scheme, clip=self.current_clip(), bit_width=self.bit_width)

    def numbers(self) -> dict[str, Tensor | None]:
        scale = symmetric_scale(self.current_clip(), self.bit_width)
        return {"weight": self.weight, "weight_scale": scale, "bias": self.bias}

    def grouped_weight(self) -> Tensor:
        """The weight as [..., values that share a scale], fp32."""
        return grouped(self.weight, self.weight_scheme)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x, self.weight.device)
        return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self._linear(x, self.weight)
        clip = self.current_clip()
        weight = self._on_grid(clip).view(self.out_features, self.in_features)
        activation = (self.activation_scheme, self.input_scale, self.input_zero_point)
        if (dtype := compute_dtype(x)) in HALF:
            return half_linear(x, weight, symmetric_scale(clip.detach(), self.bit_width), self.bias, dtype, *activation)
        return self._linear(fake_quantize_activation(x, *activation), weight)

    def _on_grid(self, clip: Tensor) -> Tensor:
        return fake_quantize(self.grouped_weight(), clip, self.bit_width, rounding=self.rounding)

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, weight.view(self.out_features, self.in_features).to(x.dtype), bias)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.bit_width, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.bit_width = float(state)  # the clip was saved with it and must not be searched again

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("input_scale", "input_zero_point"):  # None until calibrated, so make room for what was saved
            saved = state_dict.get(prefix + name)
            if saved is not None and getattr(self, name) is None:
                setattr(self, name, torch.empty_like(saved, device=self.weight.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.bit_width:g} bits, {self.weight_scheme}"


class FakeQuantizedPointwiseConv2d(Pointwise, FakeQuantizedLinear):
    """A 1x1 convolution that fake-quantizes: [N, in, H, W] -> [N, out, H, W], or both without N."""

    def _compute(self, x: Tensor) -> Tensor:
        return super()._compute(x.movedim(-3, -1)).movedim(-1, -3)
