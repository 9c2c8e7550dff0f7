"""GPTQ block by block, for a model that memory does not hold: one block, and what goes into it, at a time.

The second moments that GPTQ needs are of the float model's activations. So one walk through the float model is enough:
a block is loaded, run for all batches, rounded and given away, and its float outputs go to the next one. The codes are
those of `gptq_initialize` for the whole model, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fbqat_hub.quantization.blocks import BlockWalk, Call, by_block, check_calls, moved_tensors
from fbqat_hub.quantization.convert import Target, convert, named_layers, prepare_layers
from fbqat_hub.quantization.gptq import gptq_initialize
from fbqat_hub.quantization.packed import PackedLayer
from fbqat_hub.quantization.scheme import WeightScheme


@torch.no_grad()
def gptq_blocks(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Mapping[str, Any]],
    chosen: Iterable[Target],
    weights: WeightScheme,
    *,
    load: Callable[[str], nn.Module],
    save: Callable[[str, PackedLayer], None],
    damping: float = 0.01,
    max_bytes: int = 2**31,
    device: torch.device | str = "cpu",
    done: Callable[[], None] = lambda: None,
) -> None:
    """Give the packed layers of a float model, at GPTQ's codes, to ``save``.

    Args:
        model: in float, on the CPU; its blocks need no numbers. Afterwards its layers outside the blocks are packed.
        names: of the blocks, in the order in which the forward runs them.
        batches: keyword arguments of ``model.forward``.
        chosen: the layers of ``model`` to quantize (`convert.targets`).
        weights: their scheme. Its clip must not depend on the codes, as "max_abs" does.
        load: gives the block of a name with its numbers, in float, on the CPU; it is changed and dropped.
        save: takes a layer's full name and the layer, of one block after the other and at last those outside.
        damping: as `gptq_initialize`.
        max_bytes: of second moments of a block held at a time, as `gptq_initialize`; a block with more is run again.
        device: where a block is run and rounded.
        done: is called when a block is.

    Raises:
        ValueError: no batches, a model that cannot go block by block, a block with inputs that are not finite, or a
            layer that no batch reached; names the block.
    """
    found = by_block(names, chosen)

    def rounded(name: str, module: nn.Module, inputs: Sequence[Any], run: Callable[[nn.Module, Any], None]) -> None:
        if not found[name]:
            return run(module, inputs)
        prepare_layers(module, list(found[name]), weights)
        gptq_initialize(module, lambda: inputs, run=run, damping=damping, max_bytes=max_bytes if name else 2**62)
        convert(module)
        for layer_name, layer in named_layers(module, PackedLayer):
            save(f"{name}.{layer_name}" if name else layer_name, layer.to("cpu"))

    def through_blocks(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
        with BlockWalk(model, names, batches) as walk:
            for name in names:
                outputs: list[Any] = []

                def run(block: nn.Module, calls: Sequence[Call], outputs: list[Any] = outputs) -> None:
                    first = not outputs
                    for call in calls:
                        output = moved_tensors(call, device).run(block)
                        if first:
                            outputs.append(moved_tensors(output, "cpu"))

                check_calls(name, walk.calls)
                with _naming(name):
                    rounded(name, load(name).to(device), walk.calls, run)
                done()
                walk.advance(outputs)

    rounded("", model, batches, through_blocks)


@contextmanager
def _naming(block: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"block {block}: {error}") from error
