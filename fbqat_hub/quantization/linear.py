"""The layers: FakeQuantizedLinear for training, PackedLinear for deployment; a 1x1 convolution of each.

A 1x1 convolution is a linear layer by another name: its tokens are the positions of a picture. Sana's
feed-forward is made of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from fbqat_hub.quantization import clip as clips
from fbqat_hub.quantization.activation import fake_quantize_activation
from fbqat_hub.quantization.fake_quantize import (
    HARD,
    Rounding,
    check_bit_width,
    fake_quantize,
    fake_quantize_affine,
    grid,
    quantize,
    symmetric_scale,
)
from fbqat_hub.quantization.kernels import packed_linear
from fbqat_hub.quantization.kernels.reference import dequantize_weight
from fbqat_hub.quantization.packing import NIBBLE, pack, packed_dtype, packed_width, unpack
from fbqat_hub.quantization.scheme import ActivationScheme, WeightScheme


def is_pointwise(module: nn.Module) -> bool:
    """True for a 1x1 convolution that is a linear layer by another name: no stride, padding or groups."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.padding in ((0, 0), "valid")
        and module.groups == 1
    )


def group_count(group_size: int, in_features: int) -> int:
    """Scales of one output with per-group scales.

    A layer with no more inputs than a group has one. Where ``group_size`` does not divide the inputs, their groups are
    smaller, by less than half: of the largest even size that does.

    Raises:
        ValueError: there is no such size.

    >>> group_count(32, 320), group_count(32, 16), group_count(32, 400)  # of 32, 16 and 20 inputs
    (10, 1, 20)
    """
    if in_features <= group_size:
        return 1
    for size in range(group_size, group_size // 2 - 1, -2):
        if in_features % size == 0:
            return in_features // size
    raise ValueError(
        f"group_size {group_size} does not suit the layer's {in_features} inputs: no even number from "
        f"{group_size // 2} to {group_size} divides them."
    )


class _Float32Buffers(nn.Module):
    """Moves as any module does, but its float buffers stay fp32: ``.half()`` must not change a scale."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


class FakeQuantizedLinear(_Float32Buffers):
    """A linear layer that fake-quantizes its weight and its input: [..., in] -> [..., out].

    Attributes:
        weight: fp32 parameter, the shape of the layer it replaces. The output has the dtype of the input.
        bias: parameter [out] or None.
        log_clip: parameter, the logarithm of the clip of each scale (clip "learned" only). In the logarithm a
            step of Adam is relative, whatever the size of the weights.
        clip: buffer, the clip of each scale (clip "mse" only).
        input_scale, input_zero_point: fp32 and int32 scalar buffers, the static activation range; None until it is
            calibrated.
        bit_width, rounding: set by ``set_bit_width``.
    """

    clip: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv2d, weight_scheme: WeightScheme, activation_scheme: ActivationScheme):
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape[:2]
        self.weight_scheme = weight_scheme
        self.activation_scheme = activation_scheme
        size = weight_scheme.group_size
        self._groups = None if size is None else group_count(size, self.in_features)
        self.weight = nn.Parameter(layer.weight.detach().float().clone())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().float().clone())
        if weight_scheme.clip == "learned":
            self.log_clip = nn.Parameter(clips.max_abs(self._grouped()).log())
        elif weight_scheme.clip == "mse":
            self.register_buffer("clip", clips.max_abs(self._grouped()))
        self.register_buffer("input_scale", None)
        self.register_buffer("input_zero_point", None)
        self.enabled = True
        self.rounding = HARD
        self.bit_width = math.nan  # so that the first set_bit_width sets the clip
        self.set_bit_width(weight_scheme.bits)

    def set_bit_width(self, bit_width: float, rounding: Rounding = HARD) -> bool:
        """Move to a bit width and a rounding; a clip found by MSE, or learned, is set anew when the width changes.

        A clip that is right at 8 bits is wrong at 4. Returns True if a learned clip was set anew.
        """
        self.rounding = rounding
        if check_bit_width(bit_width) == self.bit_width:
            return False
        self.bit_width = float(bit_width)
        if self.weight_scheme.clip == "max_abs":
            return False
        with torch.no_grad():
            best = clips.mse_clip(self._grouped(), self.bit_width, narrow=self.weight_scheme.narrow)
            if self.weight_scheme.clip == "learned":
                self.log_clip.copy_(best.log())
            else:
                self.clip.copy_(best)
        return self.weight_scheme.clip == "learned"

    def set_input_range(self, scale: float, zero_point: int) -> None:
        """Give the layer its static activation range; real = scale * (code - zero_point)."""
        device = self.weight.device
        self.input_scale = torch.tensor(scale, dtype=torch.float32, device=device)
        self.input_zero_point = torch.tensor(zero_point, dtype=torch.int32, device=device)

    def current_clip(self) -> Tensor:
        """The clip of each scale, broadcastable to the grouped weight; carries a gradient if learned."""
        if self.weight_scheme.clip == "learned":
            # LSQ's gradient scale, 1 / sqrt(values per scale * largest code), arXiv 1902.08153 section 2.2
            _, largest_code = grid(self.bit_width)
            factor = 1 / math.sqrt(self.weight.numel() / self.log_clip.numel() * largest_code)
            fixed = self.log_clip.detach()
            return (fixed + (self.log_clip - fixed) * factor).exp()
        if self.weight_scheme.clip == "mse":
            return self.clip
        return clips.max_abs(self._grouped())

    def fake_quantized_weight(self) -> Tensor:
        """The weight on the grid of the current bit width, in float, the shape of ``weight``."""
        grouped = self._grouped()
        if self.weight_scheme.mapping == "affine":
            low, high = grouped.detach().amin(-1, keepdim=True), grouped.detach().amax(-1, keepdim=True)
            high = torch.maximum(high, low + clips.TINY_CLIP)
            on_grid = fake_quantize_affine(grouped, low, high, self.bit_width, rounding=self.rounding)
        else:
            on_grid = fake_quantize(
                grouped, self.current_clip(), self.bit_width, narrow=self.weight_scheme.narrow, rounding=self.rounding
            )
        return on_grid.view_as(self.weight)

    @torch.no_grad()
    def scale_and_codes(self) -> tuple[Tensor, Tensor]:
        """What is stored: fp32 scale [out] or [out, groups], and int8 codes [out, in].

        Raises:
            ValueError: affine weights, weights that are not finite, or more than 8 bits.
        """
        if self.weight_scheme.mapping != "symmetric":
            raise ValueError("format 1 stores symmetric weights only; train with mapping 'symmetric'.")
        if not bool(torch.isfinite(self.weight).all()):
            raise ValueError("the weight has values that are not finite.")
        scale = symmetric_scale(self.current_clip(), self.bit_width)
        codes = quantize(self._grouped(), scale, self.bit_width, narrow=self.weight_scheme.narrow)
        if self.weight_scheme.granularity == "per_group":
            scale = scale.squeeze(-1)
        else:
            scale = scale.reshape(-1).expand(self.out_features).contiguous()
        return scale, codes.view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self._linear(x, self.weight)
        x = fake_quantize_activation(x, self.activation_scheme, self.input_scale, self.input_zero_point)
        return self._linear(x, self.fake_quantized_weight())

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, weight.view(self.out_features, self.in_features).to(x.dtype), bias)

    def _grouped(self) -> Tensor:
        """The weight as [..., values that share a scale], fp32."""
        weight = self.weight.float()
        if self.weight_scheme.granularity == "per_tensor":
            return weight.reshape(1, -1)
        if self._groups is None:
            return weight.reshape(self.out_features, -1)
        return weight.reshape(self.out_features, self._groups, -1)

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


class FakeQuantizedPointwiseConv2d(FakeQuantizedLinear):
    """A 1x1 convolution that fake-quantizes: [N, in, H, W] -> [N, out, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class PackedLinear(_Float32Buffers):
    """A linear layer with weights of 2 to 8 bits: [..., in] -> [..., out]. Its tensors are those of docs/format.md.

    Attributes:
        weight_bits: of the codes. Up to 4 bits are stored two codes a byte, 5 to 8 bits one a byte.
        weight_packed: parameter, uint8 [out, ceil(in / 2)], low nibble first; above 4 bits int8 [out, in].
        weight_scale: fp32 buffer [out], or [out, groups] for per-group scales.
        input_scale, input_zero_point: fp32 and int32 scalar buffers for a static activation range, else None.
        bias: parameter [out] or None.

    Raises:
        ValueError: ``weight_bits`` above 8, or a group size that does not fit ``in_features`` (``group_count``).
    """

    weight_scale: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        weight_bits: int = 4,
        bias: bool = True,
        activation_scheme: ActivationScheme | None = None,
        group_size: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if weight_bits > 8:
            raise ValueError(f"weight_bits is {weight_bits}; a byte holds a code of at most 8.")
        self.in_features, self.out_features, self.weight_bits = in_features, out_features, weight_bits
        self.activation_scheme = activation_scheme or ActivationScheme()
        shape = (out_features, packed_width(in_features, weight_bits))
        packed = torch.empty(shape, dtype=packed_dtype(weight_bits), device=device)
        self.weight_packed = nn.Parameter(packed, requires_grad=False)
        scales = (out_features,) if group_size is None else (out_features, group_count(group_size, in_features))
        self.register_buffer("weight_scale", torch.empty(scales, dtype=torch.float32, device=device))
        static = self.activation_scheme.range == "static" and self.activation_scheme.bits < 32
        scalar = torch.empty((), dtype=torch.float32, device=device)
        self.register_buffer("input_scale", scalar if static else None)
        self.register_buffer("input_zero_point", scalar.to(torch.int32) if static else None)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), False) if bias else None
        self._prepared: Any = None  # what the kernel made of the weight for this device

    @classmethod
    def from_fake_quantized(cls, layer: FakeQuantizedLinear) -> PackedLinear:
        """The packed twin of a layer at its bit width, with bit-equal codes.

        Raises:
            ValueError: the layer is at more than 8 bits, or at a fraction of one above 4, or soft, or affine, or lacks
                its static range, or is not finite.
        """
        if layer.bit_width > 8 or (layer.bit_width > NIBBLE and layer.bit_width % 1):
            raise ValueError(
                f"the layer is at {layer.bit_width:g} bits; set_bit_width(4), or a whole number up to 8, before it is "
                "packed."
            )
        if layer.rounding.softness:
            raise ValueError(f"the layer has softness {layer.rounding.softness:g}; set_bit_width makes its grid hard.")
        scheme = layer.activation_scheme
        packed = cls(
            layer.in_features,
            layer.out_features,
            weight_bits=math.ceil(layer.bit_width),
            bias=layer.bias is not None,
            activation_scheme=scheme,
            group_size=layer.weight_scheme.group_size,
            dtype=layer.weight.dtype,
            device=layer.weight.device,
        )
        scale, codes = layer.scale_and_codes()
        packed.weight_packed.data.copy_(pack(codes, packed.weight_bits))
        packed.weight_scale.copy_(scale)
        if layer.bias is not None and packed.bias is not None:
            packed.bias.data.copy_(layer.bias.data)
        if packed.input_scale is not None and packed.input_zero_point is not None:
            if layer.input_scale is None or layer.input_zero_point is None:
                raise ValueError("the activation range is static, but the layer was never calibrated.")
            packed.input_scale.copy_(layer.input_scale)
            packed.input_zero_point.copy_(layer.input_zero_point)
        return packed

    @property
    def activation_bits(self) -> int:
        """8 or 16, or 32 for float activations."""
        return self.activation_scheme.bits

    def codes(self) -> Tensor:
        """int8 [out, in]."""
        return unpack(self.weight_packed, self.in_features)

    def dequantize(self) -> Tensor:
        """The real weight, fp32 [out, in]."""
        return dequantize_weight(self.weight_packed, self.weight_scale, self.in_features)

    def to_float(self) -> nn.Module:
        """The float layer with the dequantized weight."""
        layer = nn.Linear(self.in_features, self.out_features, device="meta")
        return self._fill(layer, self.dequantize())

    def _fill(self, layer: nn.Linear | nn.Conv2d, weight: Tensor) -> nn.Module:
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(self, x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._prepared = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._prepared = None
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}  # a copy prepares its own; an opaque tensor cannot be copied

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, W{self.weight_bits}, {self.activation_scheme}"


class PackedPointwiseConv2d(PackedLinear):
    """A 1x1 convolution with packed weights: [N, in, H, W] -> [N, out, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(self, x.movedim(1, -1)).movedim(-1, 1)

    def to_float(self) -> nn.Module:
        """The float 1x1 convolution with the dequantized weight."""
        layer = nn.Conv2d(self.in_features, self.out_features, 1, device="meta")
        return self._fill(layer, self.dequantize()[:, :, None, None])
