"""What a pipeline feeds its denoiser, and a pipeline with another denoiser in its place. No diffusers import."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fbqat_hub.export.onnx.wrappers import POSITIONS, Item


def split_batch(arguments: Mapping[str, Any]) -> list[Item]:
    """Keyword arguments of a denoiser's forward, a batch at once -> one item a sample, tensors only."""
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    count = len(tensors["hidden_states"])
    tensors["timestep"] = tensors["timestep"].reshape(-1).expand(count)
    return [
        {name: value if name in POSITIONS else value[index : index + 1].clone() for name, value in tensors.items()}
        for index in range(count)
    ]


@contextmanager
def denoiser_replaced(pipeline: Any, denoise: Callable[[Item], Tensor]) -> Iterator[None]:
    """Within the block, `pipeline` calls `denoise` for each sample (an item of batch 1) instead of its transformer."""
    transformer = pipeline.transformer
    signature, own = inspect.signature(transformer.forward), transformer.forward

    def forward(*positional: Any, **keywords: Any) -> tuple[Tensor]:
        items = split_batch(signature.bind(*positional, **keywords).arguments)
        return (torch.cat([denoise(item) for item in items]),)

    transformer.forward = forward
    try:
        yield
    finally:
        transformer.forward = own


@torch.no_grad()
def record_inputs(pipeline: Any, prompts: Sequence[str], call: Mapping[str, Any], *, seed: int = 0) -> list[Item]:
    """What the denoiser is given while `pipeline` draws `prompts`, in order: one item a prompt, step and branch.

    Args:
        call: arguments of the pipeline call.
        seed: of the first prompt's noise; the next one has the next seed.
    """
    items: list[Item] = []
    own = pipeline.transformer.forward

    def denoise(item: Item) -> Tensor:
        items.append(item)
        output: Tensor = own(**item, return_dict=False)[0]
        return output

    pipeline.set_progress_bar_config(disable=True)
    with denoiser_replaced(pipeline, denoise):
        for index, prompt in enumerate(prompts):
            generator = torch.Generator().manual_seed(seed + index)
            pipeline([prompt], generator=generator, **{**call, "output_type": "latent"})
    return items
