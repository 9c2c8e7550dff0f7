"""A pipeline that generates with another denoiser in its place, and what it feeds its denoiser. No diffusers import."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fbqat_hub.evaluation.metrics import psnr
from fbqat_hub.families import family_of
from fbqat_hub.families.graph import Item

#: What is recorded as the PSNR of two equal pictures, since JSON has no infinity; two pictures of 64 px that differ in
#: one value by one step of 255 are at 89 dB.
EQUAL_DB = 99.0


def split_batch(arguments: Mapping[str, Any], constants: Sequence[str]) -> list[Item]:
    """Keyword arguments of a denoiser's forward, a batch at once -> one item a sample, tensors only.

    Args:
        constants: names of tensors without a batch (`Family.constant_inputs`).
    """
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    count = len(tensors["hidden_states"])
    tensors["timestep"] = tensors["timestep"].reshape(-1).expand(count)
    return [
        {name: value if name in constants else value[index : index + 1].clone() for name, value in tensors.items()}
        for index in range(count)
    ]


@contextmanager
def denoiser_replaced(pipeline: Any, denoise: Callable[[Item], Tensor]) -> Iterator[None]:
    """Within the block, `pipeline` calls `denoise` for each sample (an item of batch 1) instead of its transformer."""
    transformer, constants = pipeline.transformer, family_of(type(pipeline).__name__).constant_inputs
    signature, own = inspect.signature(transformer.forward), transformer.forward

    def forward(*positional: Any, **keywords: Any) -> tuple[Tensor]:
        items = split_batch(signature.bind(*positional, **keywords).arguments, constants)
        return (torch.cat([denoise(item) for item in items]),)

    transformer.forward = forward
    try:
        yield
    finally:
        transformer.forward = own


class _EncodedError(Exception):
    """The pipeline has come to its denoiser."""


def encode_prompts(pipeline: Any, prompts: Sequence[str], call: Mapping[str, Any]) -> None:
    """Call `pipeline` for each prompt up to its denoiser; denoiser and autoencoder are not used.

    Args:
        call: arguments of the pipeline call.
    """

    def stop(_item: Item) -> Tensor:
        raise _EncodedError

    pipeline.set_progress_bar_config(disable=True)
    with denoiser_replaced(pipeline, stop):
        for prompt in prompts:
            with suppress(_EncodedError):
                pipeline(prompt=[prompt], **{**call, "output_type": "latent"})


@contextmanager
def remembering(owner: Any, method: str) -> Iterator[None]:
    """Within the block, a method of `owner` remembers what it has made of what; tensors are the same by their numbers.

    A pipeline whose `encode_prompt` does goes on without its text encoders once it has encoded its prompts.
    """
    own, known = getattr(owner, method), {}

    def key(value: Any) -> Any:
        return (
            value.cpu().contiguous().view(torch.uint8).numpy().tobytes() if isinstance(value, Tensor) else repr(value)
        )

    def call(*positional: Any, **keywords: Any) -> Any:
        asked = (*map(key, positional), *((name, key(value)) for name, value in sorted(keywords.items())))
        if asked not in known:
            known[asked] = own(*positional, **keywords)
        return known[asked]

    setattr(owner, method, call)
    try:
        yield
    finally:
        delattr(owner, method)


@dataclass(frozen=True, kw_only=True)
class Generated:
    """One prompt as a packed pipeline generated it.

    Attributes:
        prompt: the text.
        items: the denoiser's inputs, one a step and branch (without the prompt, with it).
        outputs: the denoiser's outputs for them.
        latents: after the last step, as the sampler leaves them.
        picture: uint8 [H, W, 3].
    """

    prompt: str
    items: list[Item]
    outputs: list[Tensor]
    latents: Tensor
    picture: np.ndarray


@torch.no_grad()
def generate(
    pipeline: Any, prompt: str, call: Mapping[str, Any], seed: int, denoise: Callable[[Item], Tensor] | None = None
) -> Generated:
    """Generate one prompt's picture.

    Args:
        call: arguments of the pipeline call.
        seed: of the first noise.
        denoise: an item -> the denoiser's output, in the transformer's place; the transformer itself if None.
    """
    own = pipeline.transformer.forward
    items: list[Item] = []
    outputs: list[Tensor] = []
    last: list[Tensor] = []

    def recorded(item: Item) -> Tensor:
        items.append(item)
        outputs.append(denoise(item) if denoise else own(**item, return_dict=False)[0])
        return outputs[-1]

    def keep(_pipeline: Any, _step: int, _time: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        last[:] = [values["latents"]]
        return values

    arguments = {**call, "output_type": "np"}
    if "callback_on_step_end" in inspect.signature(type(pipeline).__call__).parameters:
        arguments["callback_on_step_end"] = keep
    else:  # diffusers' older form
        arguments["callback"] = lambda _step, _time, latents: last.__setitem__(slice(None), [latents])
    pipeline.set_progress_bar_config(disable=True)
    with denoiser_replaced(pipeline, recorded):
        images = pipeline(prompt=[prompt], generator=torch.Generator().manual_seed(seed), **arguments).images
    picture = (255 * images[0]).round().astype(np.uint8)
    return Generated(prompt=prompt, items=items, outputs=outputs, latents=last[0], picture=picture)


@torch.no_grad()
def record_inputs(pipeline: Any, prompts: Sequence[str], call: Mapping[str, Any], *, seed: int = 0) -> list[Item]:
    """What the denoiser is given while `pipeline` generates `prompts`, in order: one item a prompt, step and branch.

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
            pipeline(prompt=[prompt], generator=generator, **{**call, "output_type": "latent"})
    return items


def picture_psnr(first: np.ndarray, second: np.ndarray) -> float:
    """PSNR in dB of two pictures, uint8 [H, W, 3]; `EQUAL_DB` where they are equal.

    >>> picture_psnr(np.zeros((1, 1, 3), np.uint8), np.full((1, 1, 3), 51, np.uint8))  # 10 log10(255^2 / 51^2)
    13.979
    """
    pictures = (torch.from_numpy(each).movedim(-1, 0)[None].double() / 255 for each in (first, second))
    return round(min(float(psnr(*pictures)), EQUAL_DB), 3)
