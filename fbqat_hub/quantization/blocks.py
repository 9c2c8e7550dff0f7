"""A model's forward, one block at a time for many batches, so that memory need hold no more than one block.

The forward of every batch is stopped where it calls a block, with what it calls it with. The block is then run for
all batches, wherever and however often the caller likes, and each forward goes on with an output to the next block.
What the model does before, between and after its blocks is its own code: nothing is known here of an architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from greenlet import getcurrent, greenlet
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fbqat_hub.quantization.convert import Target


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


def outputs_of(
    block: nn.Module, calls: Iterable[Call], device: torch.device | str, kept: torch.device | str = "cpu"
) -> Iterator[Any]:
    """What a block on ``device`` makes of calls that are kept elsewhere, kept there as well; one at a time."""
    for call in calls:
        yield moved_tensors(moved_tensors(call, device).run(block), kept)


def check_calls(block: str, calls: Iterable[Call]) -> None:
    """Raise ValueError if what a block is called with is not finite; names the block and the batch."""
    for number, call in enumerate(calls):
        for tensor in tree_leaves(tuple(call)):
            if isinstance(tensor, torch.Tensor) and not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"block {block}: its inputs from batch {number + 1} are not finite: a block before it, or what the "
                    "model was given, is broken. Check the model in float32."
                )


def by_block(names: Sequence[str], chosen: Iterable[Target]) -> dict[str, list[Target]]:
    """Layers to quantize by the block that they are in, "" if in none, and named from there."""
    found: dict[str, list[Target]] = {name: [] for name in (*names, "")}
    for target in chosen:
        own = next((name for name in names if target.names[0].startswith(f"{name}.")), "")
        found[own].append(target._replace(names=[each.removeprefix(f"{own}.") for each in target.names]))
    return found


class BlockWalk:
    """Several batches on their way through a model's blocks, without gradients. Use it in a ``with`` statement.

    While it is open, the blocks are out of the model.

    Args:
        model: its forward calls each block once, in the order of ``names``.
        names: of the blocks.
        batches: keyword arguments of ``model.forward``, or what ``run`` takes.
        run: is given each of ``batches``, and runs the model as often as it likes, all batches alike: a sampler, say.
            After the last block the walk is then at the first one again. By default the model is run once.

    Attributes:
        blocks: the blocks, in order.
        calls: what the next block is called with, one for each batch; empty when all blocks were run.

    Raises:
        ValueError: a forward that calls its blocks in another order, or leaves one out; no batches.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        batches: Iterable[Any],
        run: Callable[[Any], Any] | None = None,
    ) -> None:
        self._model, self._names, self._batches = model, list(names), batches
        self._run = run or (lambda batch: model(**batch))
        self._once = run is None
        self.blocks = [model.get_submodule(name) for name in names]
        self.calls: list[Call] = []
        self._forwards: list[greenlet] = []
        self._next = 0

    def __enter__(self) -> Self:
        for index, name in enumerate(self._names):
            self._model.set_submodule(name, _Stop(index))
        try:
            for batch in self._batches:
                self._forwards.append(greenlet(lambda batch=batch: self._run(batch)))
                self.calls.append(self._go_on(self._forwards[-1]))
            if not self._forwards:
                raise ValueError("no batches; give at least one.")
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
            Where the forwards ended, what each returned, else nothing.
        """
        self._next += 1
        results = []
        made = iter(outputs)
        for index, forward in enumerate(self._forwards):
            with torch.no_grad():
                output = next(made)
            after = self._go_on(forward, output)
            if forward.dead:
                results.append(after)
            else:
                self.calls[index] = after
        self._next %= len(self.blocks)
        if results:
            self.calls = []
        return results

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():  # what a forward set when it was started here, it sets again as it ends
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
        came = None if forward.dead else stopped[0]
        wanted: tuple[int | None, ...] = (self._next,)
        if self._next == len(self.blocks):
            wanted = (None,) if self._once else (None, 0)
        if forward is not self._forwards[0]:  # all alike
            wanted = (None,) if self._forwards[0].dead else (self._next % len(self.blocks),)
        if came not in wanted:
            raise ValueError(
                f"the forward of {type(self._model).__name__} came to {self._place(came)} where "
                f"{self._place(wanted[0])} was expected; it cannot go block by block."
            )
        return stopped if came is None else stopped[1]

    def _place(self, index: int | None) -> str:
        return "the end" if index is None else self._names[index]


def walk_through(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Any],
    device: torch.device | str,
    kept: torch.device | str = "cpu",
    load: Callable[[str], nn.Module] | None = None,
) -> None:
    """The forward of all batches, kept where they are, with a copy of one block on ``device`` at a time.

    Args:
        load: gives the copy of a name; None copies the model's own.
    """
    with BlockWalk(model, names, batches) as walk:
        for name, block in zip(names, walk.blocks, strict=True):
            here = (copy.deepcopy(block) if load is None else load(name)).to(device)
            walk.advance(outputs_of(here, walk.calls, device, kept))


class _Stop(nn.Module):
    """In the place of a block: gives its call to the walk, and returns what it is sent."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self._index = index

    def forward(self, *positional: Any, **named: Any) -> Any:
        return getcurrent().parent.switch((self._index, Call(positional, named)))
