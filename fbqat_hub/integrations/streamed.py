"""A float denoiser whose blocks are read from its files when they are needed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn

from fbqat_hub.components import Component


class StreamedDenoiser:
    """Of a denoiser in float32 all but its blocks, on the CPU.

    Args:
        denoiser: in float, checked.
        names: of its blocks.
        read: gives a tensor of its files by name.

    Attributes:
        model: its blocks have no numbers; they are on the meta device.
    """

    def __init__(self, denoiser: Component, names: Callable[[nn.Module], Sequence[str]], read: Callable[[str], Tensor]):
        # what a class computes when it is made, and does not store, is computed: only parameters are left out
        with init_empty_weights(include_buffers=False):
            self.model: Any = denoiser.kind.from_config(denoiser.kind.load_config(denoiser.folder))
        self.model.eval().requires_grad_(False)
        self.names = tuple(names(self.model))
        self._read = read
        self._empty = {name: self.model.get_submodule(name) for name in self.names}
        inside = tuple(f"{name}." for name in self.names)
        self._fill(self.model, "", [name for name in self.model.state_dict() if not name.startswith(inside)])

    def block(self, name: str) -> Any:
        """A block in float32, on the CPU; a new one at each call."""
        block = copy.deepcopy(self._empty[name])
        self._fill(block, f"{name}.", list(block.state_dict()))
        return block

    def _fill(self, module: nn.Module, prefix: str, names: Sequence[str]) -> None:
        for name in names:
            value = self._read(f"{prefix}{name}")
            dtype = torch.float32 if value.is_floating_point() else None
            set_module_tensor_to_device(module, name, "cpu", value=value.to(dtype or value.dtype), dtype=dtype)
