"""A model's forward, one block at a time for many batches, so that memory need hold no more than one block.

The forward of every batch is stopped where it calls a block, with what it calls it with. The block is then run for
all batches, wherever and however often the caller likes, and each forward goes on with an output to the next block.
What the model does before, between and after its blocks is its own code: nothing is known here of an architecture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from greenlet import getcurrent, greenlet
from torch import nn
from torch.utils._pytree import tree_map_only


class Call(NamedTuple):
    """What a block is called with.

    Attributes:
        positional, named: its arguments.
    """

    positional: tuple[Any, ...]
    named: dict[str, Any]

    def run(self, block: nn.Module) -> Any:
        """What ``block`` makes of it."""
        return block(*self.positional, **self.named)


def moved_tensors(value: Any, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
    """A nest of tuples, lists and mappings with its tensors on a device, and those of floats in a dtype."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

    return tree_map_only(torch.Tensor, move, value)


class BlockWalk:
    """Several batches on their way through a model's blocks, without gradients. Use it in a ``with`` statement.

    While it is open, the blocks are out of the model.

    Args:
        model: its forward calls each block once, in the order of ``names``.
        names: of the blocks.
        batches: keyword arguments of ``model.forward``.

    Attributes:
        blocks: the blocks, in order.
        calls: what the next block is called with, one for each batch; empty when all blocks were run.

    Raises:
        ValueError: a forward that calls its blocks in another order, or leaves one out.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], batches: Iterable[Mapping[str, Any]]) -> None:
        self._model, self._names, self._batches = model, list(names), batches
        self.blocks = [model.get_submodule(name) for name in names]
        self.calls: list[Call] = []
        self._forwards: list[greenlet] = []
        self._next = 0

    def __enter__(self) -> Self:
        for index, name in enumerate(self._names):
            self._model.set_submodule(name, _Stop(index))
        try:
            for batch in self._batches:
                self._forwards.append(greenlet(lambda batch=batch: self._model(**batch)))
                self.calls.append(self._go_on(self._forwards[-1]))
        except BaseException:
            self.__exit__()
            raise
        return self

    def advance(self, outputs: Iterable[Any]) -> list[Any]:
        """Take all batches to the next block, and from the last one to the end of the forward.

        Args:
            outputs: what the block makes of each of ``calls``, in their order. A generator is asked for one at a time,
                so that an input can go when its output comes.

        Returns:
            From the last block what each forward returned, else nothing.
        """
        self._next += 1
        results = []
        made = iter(outputs)
        for index, forward in enumerate(self._forwards):
            with torch.no_grad():
                output = next(made)
            after = self._go_on(forward, output)
            if self._next < len(self.blocks):
                self.calls[index] = after
            else:
                results.append(after)
        if results:
            self.calls = []
        return results

    def __exit__(self, *_: object) -> None:
        for forward in self._forwards:
            forward.throw()  # ends one that was left on its way
        self._forwards.clear()
        self.calls.clear()
        for name, block in zip(self._names, self.blocks, strict=True):
            self._model.set_submodule(name, block)

    def _go_on(self, forward: greenlet, *output: Any) -> Any:
        """The next call, or what the forward returned; ``output`` is of the block at which it stopped, if it did."""
        with torch.no_grad():
            stopped = forward.switch(*output)
        wanted = self._next if self._next < len(self.blocks) else None
        if forward.dead != (wanted is None) or (wanted is not None and stopped[0] != wanted):
            came = "the end" if forward.dead else self._names[stopped[0]]
            raise ValueError(
                f"the forward of {type(self._model).__name__} came to {came} where "
                f"{'the end' if wanted is None else self._names[wanted]} was expected; it cannot go block by block."
            )
        return stopped if wanted is None else stopped[1]


class _Stop(nn.Module):
    """In the place of a block: gives its call to the walk, and returns what it is sent."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self._index = index

    def forward(self, *positional: Any, **named: Any) -> Any:
        return getcurrent().parent.switch((self._index, Call(positional, named)))
