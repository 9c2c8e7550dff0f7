"""LogicalWeight: the weight of a packed layer as other libraries look at it, in no memory of its own.

diffusers and peft read ``layer.weight``: its shape, dtype and device in most places, its values in few (DoRA, fused
projections). A packed layer gives them this view. What reads values gets the dequantized ones. What would write into
them is an error: the write would change a temporary tensor, and be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

READ_ONLY = (
    "the weight of a packed layer cannot be written: it is stored as codes and scales. To put an adapter into it use "
    "fuse_lora (PeftModel: merge_adapter), which keeps it beside the codes; for other weights convert the float model."
)


class LogicalWeight(Tensor):
    """A read-only view: float [out, in], or [out, in, 1, 1] of a 1x1 convolution.

    Raises:
        ValueError: something writes into it, or assigns its ``data``.
    """

    # operators see the tensor itself (below); torch.Tensor's own would wrap plain results into this class
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    # transformers fills what has not this mark with first values, after it has loaded a model
    _is_hf_initialized = True
    _read: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls, read: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> LogicalWeight:
        made: LogicalWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made._read = read
        return made

    def __init__(self, *_: Any) -> None:
        """All is done in ``__new__``, as of any tensor."""

    def dequantize(self) -> Tensor:
        """The values, as a plain tensor of this shape and dtype."""
        return self._read().reshape(self.shape).to(self.dtype)

    @property
    def data(self) -> Tensor:
        return self

    @data.setter
    def data(self, value: Tensor) -> NoReturn:
        raise ValueError(READ_ONLY)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = func._schema.arguments
        given = [*zip(schema, args, strict=False), *((each, kwargs.get(each.name)) for each in schema)]
        if any(
            isinstance(value, LogicalWeight) and each.alias_info is not None and each.alias_info.is_write
            for each, value in given
        ):
            raise ValueError(READ_ONLY)
        if func is torch.ops.aten.detach.default:
            (weight,) = args
            return LogicalWeight(weight._read, weight.shape, weight.dtype, weight.device)

        def plain(value: Any) -> Any:
            return value.dequantize() if isinstance(value, LogicalWeight) else value

        return func(*tree_map(plain, args), **tree_map(plain, dict(kwargs)))

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.dequantize()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dequantize().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LogicalWeight({tuple(self.shape)}, dtype={self.dtype}, device={self.device})"
