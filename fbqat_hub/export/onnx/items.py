"""The inputs an export calibrates on and compares: checks, and what the packed model itself computes of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.onnx.float_graph import Feed, as_feed
from fbqat_hub.families.graph import Item, block_outputs


def check_items(kind: str, items: Sequence[Item], constants: Sequence[str]) -> None:
    """ExportError unless all items are finite tensors of batch 1 with the keys and shapes of the first.

    Args:
        kind: what they are called in the error.
        constants: names of tensors without a batch (`Family.constant_inputs`).
    """
    if not items:
        raise ExportError(f"{kind} is empty: give at least one item (keyword arguments of the transformer's forward)")
    for index, item in enumerate(items):
        for name, tensor in item.items():
            if not isinstance(tensor, Tensor):
                raise ExportError(f"{kind}[{index}][{name!r}] is {type(tensor).__name__}, not a tensor")
            expected = items[0][name].shape if name in items[0] else None
            if tensor.shape != expected or (name not in constants and tensor.shape[0] != 1):
                raise ExportError(
                    f"{kind}[{index}][{name!r}] has shape {tuple(tensor.shape)}; the graph is static, of batch 1, and "
                    f"every item needs the shape of the first ({None if expected is None else tuple(expected)})"
                )
            if not torch.isfinite(tensor).all():
                raise ExportError(f"{kind}[{index}][{name!r}] has values that are not finite")
        if item.keys() != items[0].keys():
            raise ExportError(f"{kind}[{index}] has the keys {sorted(item)}, the first item {sorted(items[0])}")


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """So many of ``items``, in order, or all; always the same, and not every second one, which may be of one branch."""
    places = torch.randperm(len(items), generator=torch.Generator().manual_seed(0))[:count]
    return [items[place] for place in sorted(places.tolist())]


def torch_outputs(transformer: nn.Module, items: Sequence[Item], blocks: Sequence[str]) -> list[Feed]:
    """What the packed model itself computes for each item: `sample` and its blocks' outputs, float32."""
    device = next(transformer.parameters()).device
    training = transformer.training
    transformer.eval()
    outputs = []
    try:
        with torch.no_grad():
            for item in items:
                with block_outputs(transformer, blocks) as found:
                    sample = transformer(**{k: v.to(device) for k, v in item.items()}, return_dict=False)[0]
                outputs.append(as_feed({"sample": sample, **found}))
    finally:
        transformer.train(training)
    return outputs
