"""Generating with any pipeline: seeds on the CPU, a picture that is not finite an error, not black; changed calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fbqat_hub.families import find_family


@torch.no_grad()
def generate_pictures(pipeline: Any, prompts: Sequence[str], call: Mapping[str, Any], seeds: Sequence[int]) -> Tensor:
    """Pictures of the prompts, in one batch, the same to the bit as the pipeline's own PIL pictures.

    Args:
        call: arguments of the pipeline call, without prompt and generator. Of ``num_images_per_prompt`` those of one
            prompt follow each other.
        seeds: one for each picture, on the CPU whatever the device.

    Returns:
        uint8 [N, 3, H, W], on the CPU.

    Raises:
        ValueError: a picture that is not finite.
    """
    arguments = dict(call)
    # not the pipeline's own repeats: SanaPipeline's put the attention masks of several prompts in another order
    repeats = arguments.pop("num_images_per_prompt", 1)
    texts = [prompt for prompt in prompts for _ in range(repeats)]
    arguments = of_several(arguments, len(texts))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    pipeline.set_progress_bar_config(disable=True)
    levels = pipeline(prompt=texts, generator=generators, output_type="pt", **arguments).images.float().cpu()
    finite = torch.isfinite(levels).flatten(1).all(dim=1).tolist()
    if not all(finite):
        first = finite.index(False)
        raise ValueError(
            f"{finite.count(False)} of {len(texts)} pictures of {type(pipeline).__name__} are not finite (NaN), first "
            f"that of {texts[first]!r:.80}, seed {seeds[first]}: the model is broken, or its dtype too narrow. "
            "Nothing of them was saved."
        )
    return (levels * 255).round().to(torch.uint8)


def of_several(call: Mapping[str, Any], prompts: int) -> dict[str, Any]:
    """A call with its negative prompts written out for each of ``prompts``: ZImagePipeline repeats none.

    >>> of_several({"negative_prompt": "grey", "height": 32}, 2)
    {'negative_prompt': ['grey', 'grey'], 'height': 32}
    """
    return {
        name: [value] * prompts if name.startswith("negative_prompt") and isinstance(value, str) else value
        for name, value in call.items()
    }


def changed_call(pipeline_class: str, call: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A call with some of its arguments changed, and with them what follows from them (``Family.following``).

    >>> changed_call("FluxKontextPipeline", {"height": 64, "width": 64, "max_area": 4096}, {"width": 32})
    {'max_area': 2048, 'height': 64, 'width': 32}
    """
    family = find_family(pipeline_class)
    if family is None:
        return {**call, **changes}
    followed = family.following(call)
    own = {name: value for name, value in call.items() if name not in followed or value != followed[name]}
    changed = {**own, **changes}
    return {**family.following(changed), **changed}
