"""What fake-quantized and packed layers share: they check their input, and their float buffers stay fp32.

A 1x1 convolution is a linear layer by another name: its tokens are the positions of a picture. Sana's
feed-forward is made of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def are_scales(values: Tensor) -> bool:
    """Whether all are finite and above 0."""
    return bool((torch.isfinite(values) & (values > 0)).all())


def is_pointwise(module: nn.Module) -> bool:
    """True for a 1x1 convolution that is a linear layer by another name: no stride, padding or groups."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.padding in ((0, 0), "valid")
        and module.groups == 1
    )


class QuantizedLayer(nn.Module):
    """What both kinds of layers share: they check their input, and their float buffers stay fp32."""

    in_features: int
    out_features: int

    def check_input(self, x: Tensor, device: torch.device) -> None:
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

    def numbers(self) -> dict[str, Tensor | None]:
        """Name -> what is stored of the layer in float, as it is now; names of scales end in ``scale``."""
        raise NotImplementedError

    @torch.no_grad()
    def check_numbers(self) -> None:
        """Raise ValueError, which names the tensor, for numbers that a stored layer cannot have."""
        for name, value in self.numbers().items():
            if value is not None and name.endswith("scale") and not are_scales(value):
                raise ValueError(f"its {name} has values that are not finite and above 0.")
            if value is not None and not bool(torch.isfinite(value).all()):
                raise ValueError(f"its {name} has values that are not finite.")

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


class Pointwise(QuantizedLayer):
    """A 1x1 convolution: its tokens are the positions of a picture."""

    def _fits(self, x: Tensor) -> bool:
        return x.dim() in (3, 4) and x.shape[-3] == self.in_features

    def _shape(self, features: int) -> str:
        return f"[N, {features}, H, W] or [{features}, H, W]"
