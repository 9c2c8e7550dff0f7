"""PackedLinear, the layer that is deployed, and its 1x1 convolution."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fbqat_hub.quantization.kernels import packed_linear
from fbqat_hub.quantization.kernels.reference import dequantize_weight
from fbqat_hub.quantization.layer import Pointwise, QuantizedLayer
from fbqat_hub.quantization.linear import FakeQuantizedLinear
from fbqat_hub.quantization.packing import NIBBLE, pack, packed_dtype, packed_width, unpack
from fbqat_hub.quantization.quantize import group_count
from fbqat_hub.quantization.scheme import ActivationScheme


class PackedLinear(QuantizedLayer):
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

    @classmethod
    @torch.no_grad()
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
        packed.weight_packed.copy_(pack(codes, packed.weight_bits))
        packed.weight_scale.copy_(scales)
        if layer.bias is not None and packed.bias is not None:
            packed.bias.copy_(layer.bias)
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
        self.check_input(x, self.weight_packed.device)
        return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        activation = (self.activation_scheme, self.input_scale, self.input_zero_point)
        return packed_linear(x, self.weight_packed, self.weight_scale, self.bias, *activation)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, W{self.weight_bits}, {self.activation_scheme}"


class PackedPointwiseConv2d(Pointwise, PackedLinear):
    """A 1x1 convolution with packed weights: [N, in, H, W] -> [N, out, H, W], or both without N."""

    def _compute(self, x: Tensor) -> Tensor:
        return super()._compute(x.movedim(-3, -1)).movedim(-1, -3)

    def to_float(self) -> nn.Module:
        """The float 1x1 convolution with the dequantized weight."""
        layer = nn.Conv2d(self.in_features, self.out_features, 1, device="meta")
        return self._fill(layer, self.dequantize()[:, :, None, None])
