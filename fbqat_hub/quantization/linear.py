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

from fbqat_hub.quantization.activation import fake_quantize_activation
from fbqat_hub.quantization.clip import CLIPS
from fbqat_hub.quantization.fake_quantize import check_bit_width, fake_quantize, symmetric_scale
from fbqat_hub.quantization.half import HALF, compute_dtype, half_linear
from fbqat_hub.quantization.kernels import packed_linear
from fbqat_hub.quantization.kernels.reference import dequantize_weight
from fbqat_hub.quantization.packing import NIBBLE, pack, packed_dtype, packed_width, unpack
from fbqat_hub.quantization.quantize import group_count, grouped, quantize_weight
from fbqat_hub.quantization.rounding import HARD, Rounding
from fbqat_hub.quantization.scheme import ActivationScheme, WeightScheme

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_pointwise(module: nn.Module) -> bool:
    """True for a 1x1 convolution that is a linear layer by another name: no stride, padding or groups."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.padding in ((0, 0), "valid")
        and module.groups == 1
    )


class _QuantizedLayer(nn.Module):
    """What both kinds of layers share: they check their input, and their float buffers stay fp32."""

    in_features: int
    out_features: int

    def _check_input(self, x: Tensor, device: torch.device) -> None:
        """Raise ValueError for an input that this layer cannot take, with what it takes."""
        if x.dtype not in FLOATS:
            raise ValueError(
                f"the input is {x.dtype}; a quantized layer takes {', '.join(str(each)[6:] for each in FLOATS)}."
            )
        if not self._fits(x):
            raise ValueError(
                f"the input has shape {tuple(x.shape)}; the layer takes {self._shape(self.in_features)} and gives "
                f"{self._shape(self.out_features)}."
            )
        if x.device != device:
            raise ValueError(f"the input is on {x.device}, the layer on {device}; move one to the other.")

    def _fits(self, x: Tensor) -> bool:
        return x.dim() > 0 and x.shape[-1] == self.in_features

    def _shape(self, features: int) -> str:
        return f"[..., {features}]"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves as any module does, but ``.half()`` must not change a scale."""
        before = [(module, dict(module._buffers)) for module in self.modules()]
        super()._apply(fn, recurse)
        for module, buffers in before:
            for name, buffer in buffers.items():
                moved = module._buffers[name]
                if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                    module._buffers[name] = buffer.to(moved.device)
        return self


class _Pointwise(_QuantizedLayer):
    """A 1x1 convolution: its tokens are the positions of a picture."""

    def _fits(self, x: Tensor) -> bool:
        return x.dim() in (3, 4) and x.shape[-3] == self.in_features

    def _shape(self, features: int) -> str:
        return f"[N, {features}, H, W] or [{features}, H, W]"


class FakeQuantizedLinear(_QuantizedLayer):
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
        self.rounding: Rounding = HARD
        self.bit_width = math.nan  # so that the first set_bit_width sets the clip
        self.set_bit_width(weight_scheme.bits)

    def set_bit_width(self, bit_width: float, rounding: Rounding = HARD) -> list[nn.Parameter]:
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

    def grouped_weight(self) -> Tensor:
        """The weight as [..., values that share a scale], fp32."""
        return grouped(self.weight, self.weight_scheme)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x, self.weight.device)
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


class FakeQuantizedPointwiseConv2d(_Pointwise, FakeQuantizedLinear):
    """A 1x1 convolution that fake-quantizes: [N, in, H, W] -> [N, out, H, W], or both without N."""

    def _compute(self, x: Tensor) -> Tensor:
        return super()._compute(x.movedim(-3, -1)).movedim(-1, -3)


class PackedLinear(_QuantizedLayer):
    """A linear layer with weights of 2 to 8 bits: [..., in] -> [..., out]. Its tensors are those of docs/format.md.

    Attributes:
        weight_bits: of the codes. Up to 4 bits are stored two codes a byte, 5 to 8 bits one a byte.
        weight_packed: parameter, uint8 [out, ceil(in / 2)], low nibble first; above 4 bits int8 [out, in].
        weight_scale: fp32 buffer [out], or [out, groups] for per-group scales.
        input_scale, input_zero_point: fp32 and int32 scalar buffers for a static activation range, else None.
        bias: parameter [out] or None.

    Raises:
        ValueError: ``weight_bits`` not from 2 to 8, or a group size that does not fit ``in_features``
            (``group_count``); at ``forward`` an input of another shape, dtype or device.
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
        if weight_bits not in range(2, 9):
            raise ValueError(f"weight_bits is {weight_bits}; it must be a whole number from 2 to 8.")
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
            ValueError: the layer is at more than 8 bits, or at a fraction of one above 4, or its grid is soft, or it
                lacks its static range, or is not finite.
        """
        if layer.bit_width > 8 or (layer.bit_width > NIBBLE and layer.bit_width % 1):
            raise ValueError(
                f"the layer is at {layer.bit_width:g} bits; set_bit_width(4), or a whole number up to 8, before it is "
                "packed."
            )
        if not layer.rounding.hard:
            raise ValueError(f"the layer's rounding is {layer.rounding}; set_bit_width makes its grid hard.")
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
        codes, scales = layer.codes_and_scales()
        packed.weight_packed.data.copy_(pack(codes, packed.weight_bits))
        packed.weight_scale.copy_(scales)
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
        self._check_input(x, self.weight_packed.device)
        return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
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


class PackedPointwiseConv2d(_Pointwise, PackedLinear):
    """A 1x1 convolution with packed weights: [N, in, H, W] -> [N, out, H, W], or both without N."""

    def _compute(self, x: Tensor) -> Tensor:
        return super()._compute(x.movedim(-3, -1)).movedim(-1, -3)

    def to_float(self) -> nn.Module:
        """The float 1x1 convolution with the dequantized weight."""
        layer = nn.Conv2d(self.in_features, self.out_features, 1, device="meta")
        return self._fill(layer, self.dequantize()[:, :, None, None])
