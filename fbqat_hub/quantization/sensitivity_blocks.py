"""How much each layer's width matters (`sensitivity`), for a model that memory does not hold.

A block is loaded when the forward comes to it and dropped behind it; on the way back it is loaded and run again, as
with gradient checkpointing, and what its layers' errors do is read off there. Memory holds one block with what its
backward pass needs, and what goes into every block for one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fbqat_hub.quantization.blocks import by_block, moved_tensors
from fbqat_hub.quantization.convert import Target
from fbqat_hub.quantization.sensitivity import ErrorsOf, Scores, frozen, recorded


def block_sensitivity(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Mapping[str, Any]],
    chosen: Iterable[Target],
    errors: ErrorsOf,
    predict: Callable[[nn.Module, Mapping[str, Any]], Tensor],
    *,
    load: Callable[[str], nn.Module],
    signs: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    share: tuple[int, int] = (0, 1),
    done: Callable[[], None] = lambda: None,
) -> Scores:
    """`sensitivity.output_sensitivity`, the same numbers.

    Args:
        model: in float, on the CPU; its blocks need no numbers. It is left as it was.
        names: of the blocks.
        batches: what ``predict`` takes.
        chosen: the layers to score (`convert.targets`).
        errors: of a layer, each time that a backward pass comes to it.
        predict: the output of the model whose squared error counts, of one shape for all batches.
        load: gives the block of a name with its numbers, in float, on the CPU; it is changed and dropped.
        signs: backward passes for each batch.
        device: where a block is run.
        share: (own, all): of so many processes this one takes every so-manieth batch. Their scores add up to those of
            one that takes all.
        done: is called when a batch is.

    Returns:
        First name of each layer -> width -> expected mean squared error of the output.

    Raises:
        ValueError: no batches, or a layer that no batch reached.
    """
    scored = _Scored(by_block(names, chosen), errors)
    blocks = {name: model.get_submodule(name) for name in names}
    random, drawn, count, elements = torch.Generator().manual_seed(seed), 0, 0, 0
    own, processes = share

    def sign(like: Tensor) -> Tensor:
        return (2.0 * torch.randint(0, 2, like.shape, generator=random) - 1).to(like)

    try:
        for name in names:
            model.set_submodule(name, _Loaded(scored, name, load, device))
        with frozen(model):
            for number, batch in enumerate(batches):
                count += 1
                if number % processes != own:
                    continue
                with torch.enable_grad(), scored.recorded(model, ""):
                    output = predict(model, batch)
                elements = output.numel()
                for _ in range(drawn, number * signs):
                    sign(output)  # of the other processes' batches
                drawn = (number + 1) * signs
                for left in reversed(range(signs)):
                    output.backward(sign(output), retain_graph=left > 0)
                    scored.add()
                done()
    finally:
        for name, block in blocks.items():
            model.set_submodule(name, block)
    if not count:
        raise ValueError("no batches to score the layers with; give at least one.")
    return scored.scores(count * elements * signs)


class _Scored:
    """The layers of all blocks and their scores so far.

    Args:
        layers: block, or "" of those outside -> its layers, named from there.
    """

    def __init__(self, layers: Mapping[str, Sequence[Target]], errors: ErrorsOf) -> None:
        self._layers, self._errors = layers, errors
        self._outside: dict[str, Any] = {}  # weights by full name
        self._inside: dict[str, Any] = {}  # of the block that was loaded last
        self._moved: dict[str, dict[int, float]] = {}
        self._sums: dict[str, dict[int, float]] = {}
        self._called: set[str] = set()

    def recorded(self, module: nn.Module, block: str) -> Any:
        """A context in which the forward of ``module``, a block or the model, is one that is scored on the way back."""
        full = {each.names[0]: _full(block, each) for each in self._layers[block]}
        weights = {full[name]: module.get_submodule(name).weight for name in full}
        if block:
            self._inside = weights
        else:
            self._outside = weights
        return recorded(
            module,
            full,
            lambda name, x, grad: self._record(full[name], x, grad),
            lambda name: self._called.add(full[name]),
        )

    def forget(self) -> None:
        """Let go of the block that was loaded last."""
        self._inside = {}

    def add(self) -> None:
        """The batch's backward pass is over."""
        for name, by_width in self._moved.items():
            own = self._sums.setdefault(name, dict.fromkeys(by_width, 0.0))
            for bits, value in by_width.items():
                own[bits] += value**2
        self._moved.clear()

    def scores(self, elements: int) -> Scores:
        """Means over so many elements of the output."""
        wanted = [_full(block, each) for block, layers in self._layers.items() for each in layers]
        if missed := [name for name in wanted if name not in self._called]:
            raise ValueError(
                f"the output does not depend on {missed[0]}; give batches that run through the whole model."
            )
        # what was called and has no effect on the output loses nothing
        nothing = dict.fromkeys(next(iter(self._sums.values())), 0.0)
        sums = {name: self._sums.get(name, nothing) for name in wanted}
        return {name: {bits: value / elements for bits, value in own.items()} for name, own in sums.items()}

    @torch.no_grad()
    def _record(self, name: str, x: Tensor, grad: Tensor) -> None:
        gradient = grad.float().T @ x.float()  # of the weight, [out, in]
        weight = self._inside[name] if name in self._inside else self._outside[name]
        own = self._moved.setdefault(name, {})
        for bits, error in self._errors(name, weight).items():
            own[bits] = own.get(bits, 0.0) + float((gradient * error).sum())


def _full(block: str, target: Target) -> str:
    return f"{block}.{target.names[0]}" if block else target.names[0]


class _Loaded(nn.Module):
    """In the place of a block: loads it for each forward, and for each backward again."""

    def __init__(
        self, scored: _Scored, name: str, load: Callable[[str], nn.Module], device: torch.device | str
    ) -> None:
        super().__init__()
        self._scored, self._name, self._load, self._device = scored, name, load, device

    def forward(self, *positional: Any, **named: Any) -> Any:
        return checkpoint(self._run, *positional, use_reentrant=False, **named)

    def _run(self, *positional: Any, **named: Any) -> Any:
        self._scored.forget()
        block = self._load(self._name).to(self._device).requires_grad_(False)
        positional, named = moved_tensors((positional, named), self._device)
        with self._scored.recorded(block, self._name):
            return moved_tensors(block(*positional, **named), "cpu")
