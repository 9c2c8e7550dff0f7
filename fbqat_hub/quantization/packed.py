"""PackedLinear, the layer that is deployed, and its 1x1 convolution.

They are an ``nn.Linear`` and an ``nn.Conv2d`` to other libraries, whose ``weight`` is a view that takes no memory
(``logical.py``); docs/decisions.md says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from fbqat_hub.quantization.kernels import packed_linear
from fbqat_hub.quantization.kernels.reference import dequantize_weight
from fbqat_hub.quantization.layer import Pointwise, QuantizedLayer, are_scales
from fbqat_hub.quantization.linear import FakeQuantizedLinear
from fbqat_hub.quantization.logical import READ_ONLY, LogicalWeight
from fbqat_hub.quantization.packing import NIBBLE, check_codes, pack, packed_dtype, packed_width, unpack
from fbqat_hub.quantization.quantize import group_count
from fbqat_hub.quantization.scheme import ActivationScheme

# The parameter that a packed layer has while its scales are trained (``tuning.py``).
SCALE_FACTOR = "scale_factor"
# What a packed layer stores beside its codes and bias, in these dtypes whatever the model's is (docs/format.md).
BUFFERS: Mapping[str, torch.dtype] = {
    "weight_scale": torch.float32,
    "input_scale": torch.float32,
    "input_zero_point": torch.int32,
}


class PackedLayer(QuantizedLayer):
    """What packed linear layers and 1x1 convolutions share. Their tensors are those of docs/format.md.

    Attributes:
        weight: read-only view of the real weight (``LogicalWeight``), of the float layer's shape and dtype.
        weight_bits: of the codes. Up to 4 bits are stored two codes a byte, 5 to 8 bits one a byte.
        weight_packed: parameter, uint8 [out, ceil(in / 2)], low nibble first; above 4 bits int8 [out, in].
        weight_scale: fp32 buffer [out], or [out, groups] for per-group scales.
        input_scale, input_zero_point: fp32 and int32 scalar buffers for a static activation range, else None.
        bias: parameter [out] or None.
        delta_down, delta_up: buffers [rank, in] and [out, rank] of adapters that were fused, else None. They are added
            in float, for a step of the grid is wider than most adapters' change.

    Raises:
        ValueError: ``weight_bits`` not from 2 to 8, or a group size that does not fit ``in_features``
            (``group_count``); at ``forward`` an input of another shape, dtype or device.
    """

    weight_scale: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    delta_down: Tensor | None
    delta_up: Tensor | None
    # what follows [out, in] in the shape of the float layer's weight
    kernel: ClassVar[tuple[int, ...]] = ()

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
        nn.Module.__init__(self)  # not that of nn.Linear, which would make a float weight
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
        self.register_buffer("delta_down", None)
        self.register_buffer("delta_up", None)
        self._weight_dtype = dtype or torch.get_default_dtype()

    @property
    def weight(self) -> Tensor:
        shape = (self.out_features, self.in_features, *self.kernel)
        # the making of a view cannot be traced; values that nobody reads are left out of a graph
        if torch.compiler.is_compiling():
            return self.real_weight().reshape(shape).to(self._weight_dtype)
        return LogicalWeight(self.real_weight, shape, self._weight_dtype, self.weight_packed.device)

    @weight.setter
    def weight(self, value: object) -> NoReturn:
        raise ValueError(READ_ONLY)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            raise ValueError(READ_ONLY)
        super().register_parameter(name, param)

    def reset_parameters(self) -> NoReturn:
        """Not possible; that of nn.Linear would write random numbers."""
        raise ValueError(READ_ONLY)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._weight_dtype = fn(torch.empty(0, dtype=self._weight_dtype, device=self.weight_packed.device)).dtype
        return super()._apply(fn, recurse)

    @classmethod
    @torch.no_grad()
    def from_fake_quantized(cls, layer: FakeQuantizedLinear) -> Self:
        """The packed twin of a layer at its bit width, with bit-equal codes.

        Raises:
            ValueError: the layer is at more than 8 bits, or at a fraction of one above 4, or it lacks its static range,
                or has what `check_stored` refuses: a tensor that is not finite, a scale that is not above 0.
        """
        if layer.bit_width > 8 or (layer.bit_width > NIBBLE and layer.bit_width % 1):
            raise ValueError(
                f"the layer is at {layer.bit_width:g} bits; set_bit_width(4), or a whole number up to 8, before it is "
                "packed."
            )
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
        packed.check_numbers()
        return packed

    def numbers(self) -> dict[str, Tensor | None]:
        factor = getattr(self, SCALE_FACTOR, None)
        scale = self.weight_scale if factor is None else self.weight_scale * factor
        return {"weight_scale": scale, "input_scale": self.input_scale, "bias": self.bias}

    def check_stored(self, tensor: str, value: Tensor, place: str) -> None:
        """Raise ValueError if a tensor is not what docs/format.md has in its place.

        Args:
            tensor: its name, "weight_packed" or one of ``BUFFERS``.
            place: what an error calls it, e.g. its file and its full name.
        """
        own = getattr(self, tensor)
        dtype = own.dtype if tensor == "weight_packed" else BUFFERS[tensor]
        if value.dtype != dtype:
            raise ValueError(f"{place} is {value.dtype}; docs/format.md has {dtype} there.")
        if value.shape != own.shape:
            raise ValueError(f"{place} has shape {tuple(value.shape)}; this model needs {tuple(own.shape)}.")
        if tensor == "weight_packed":
            self._check_codes(place, value)
        else:
            self._check_range(place, value)

    def _check_codes(self, place: str, value: Tensor) -> None:
        """Two codes of four bits fill a byte, whatever they are; those of other widths can leave their grid. In the
        last byte of an odd row the second is 0."""
        if value.dtype == torch.uint8 and self.in_features % 2 and bool((value[:, -1] >> 4).any()):
            raise ValueError(f"{place} has a code beyond its {self.in_features} inputs; the file is damaged.")
        if self.weight_bits != NIBBLE:
            try:
                check_codes(value if value.dtype == torch.int8 else unpack(value, self.in_features), self.weight_bits)
            except ValueError as error:
                raise ValueError(f"{place}: {error} The file is damaged.") from None

    def _check_range(self, place: str, value: Tensor) -> None:
        if value.is_floating_point():
            if not are_scales(value):
                raise ValueError(f"{place} has scales that are not finite and above 0; the file is damaged.")
            return
        highest = 2**self.activation_bits - 1
        if not 0 <= int(value) <= highest:
            raise ValueError(
                f"{place} is {int(value)}; with {self.activation_bits}-bit activations it must be from 0 to {highest}."
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """That of nn.Module, for tensors that are what they must be; ``load_state_dict`` raises for others."""
        errors = rest[-1]
        for tensor in ("weight_packed", *BUFFERS):
            value: Any = state_dict.get(prefix + tensor)
            plain = type(value) in (Tensor, nn.Parameter) and not value.is_meta  # no numbers to look at in others
            if plain and getattr(self, tensor) is not None:
                try:
                    self.check_stored(tensor, value, prefix + tensor)
                except ValueError as error:
                    errors.append(str(error))
                    return
        super()._load_from_state_dict(state_dict, prefix, *rest)

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

    def real_weight(self) -> Tensor:
        """What the layer multiplies with but for the rounding of its input: dequantized, and what was fused; [out, in].

        fp32, whatever the dtype of ``weight``.
        """
        weight = self.dequantize()
        if self.delta_down is None or self.delta_up is None:
            return weight
        return weight + self.delta_up.float() @ self.delta_down.float()

    def to_float(self) -> nn.Linear | nn.Conv2d:
        """The float layer with ``real_weight``."""
        layer = self._empty_float()
        weight = self.real_weight().reshape(self.out_features, self.in_features, *self.kernel)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return layer

    def _empty_float(self) -> nn.Linear | nn.Conv2d:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x, self.weight_packed.device)
        return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        # torch's operators without a rule for it would pass it on as 0
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError("a packed layer has no forward-mode derivative (jvp); the float model has.")
        activation = (self.activation_scheme, self.input_scale, self.input_zero_point)
        y = packed_linear(x, self.weight_packed, self.weight_scale, self.bias, *activation)
        if self.delta_down is None or self.delta_up is None:
            return y
        return y + F.linear(F.linear(x.to(self.delta_down.dtype), self.delta_down), self.delta_up).to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, W{self.weight_bits}, {self.activation_scheme}"


class PackedLinear(PackedLayer, nn.Linear):  # type: ignore[misc]
    """A linear layer with packed weights: [..., in] -> [..., out]. ``PackedLayer`` says what it holds."""

    @classmethod
    @torch.no_grad()
    def concatenated(cls, layers: Sequence[PackedLayer]) -> PackedLinear:
        """One layer that gives the outputs of several of the same input, one after the other.

        Codes and scales are theirs, and so are the outputs to the bit where a kernel sums integers; the reference sums
        floats, perhaps in another order.

        Raises:
            ValueError: they take inputs of different widths, round them differently, have groups of different sizes,
                or not all a bias.
        """
        first = layers[0]
        for other in layers[1:]:
            for what, same in {
                "inputs": other.in_features == first.in_features,
                "an activation scheme": other.activation_scheme == first.activation_scheme,
                "an activation range": _equal(other.input_scale, first.input_scale)
                and _equal(other.input_zero_point, first.input_zero_point),
                "groups": other.weight_scale.shape[1:] == first.weight_scale.shape[1:],
                "a bias": (other.bias is None) == (first.bias is None),
            }.items():
                if not same:
                    raise ValueError(f"packed layers can be joined only with {what} in common, and these differ in it.")
        scale = torch.cat([layer.weight_scale for layer in layers])
        joined = cls(
            first.in_features,
            sum(layer.out_features for layer in layers),
            weight_bits=max(layer.weight_bits for layer in layers),
            bias=first.bias is not None,
            activation_scheme=first.activation_scheme,
            dtype=first.weight.dtype,
            device="meta",
        )
        codes = torch.cat([layer.codes() for layer in layers])
        joined.weight_packed = nn.Parameter(pack(codes, joined.weight_bits), requires_grad=False)
        joined.weight_scale, joined.input_scale, joined.input_zero_point = (
            scale,
            first.input_scale,
            first.input_zero_point,
        )
        if first.bias is not None:
            biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
            joined.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
        return joined

    def _empty_float(self) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features, device="meta")


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


class PackedPointwiseConv2d(Pointwise, PackedLayer, nn.Conv2d):  # type: ignore[misc]
    """A 1x1 convolution with packed weights: [N, in, H, W] -> [N, out, H, W], or both without N."""

    kernel: ClassVar[tuple[int, ...]] = (1, 1)
    # what other libraries read of an nn.Conv2d
    kernel_size, stride, padding, dilation, groups, padding_mode = (1, 1), (1, 1), (0, 0), (1, 1), 1, "zeros"

    @property
    def in_channels(self) -> int:  # type: ignore[override]
        return self.in_features

    @property
    def out_channels(self) -> int:  # type: ignore[override]
        return self.out_features

    def _compute(self, x: Tensor) -> Tensor:
        return super()._compute(x.movedim(-3, -1)).movedim(-1, -3)

    def _empty_float(self) -> nn.Conv2d:
        return nn.Conv2d(self.in_features, self.out_features, 1, device="meta")
