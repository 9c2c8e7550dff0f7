"""What a phone's processor computes or stores beside the graphs: sampler, timestep embeddings, noise, prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fbqat_hub.export.bundle.pipeline import Generated
from fbqat_hub.export.bundle.sampler import sampler_matrix
from fbqat_hub.export.errors import ExportError
from fbqat_hub.families import family_of
from fbqat_hub.families.base import call_arguments
from fbqat_hub.families.graph import MASK_BIAS, GraphWrapper

#: Largest difference of the host's own sampler to the pipeline's latents, over the latents' largest value.
MAX_SAMPLER_ERROR = 1e-3


def host_parts(
    generated: Sequence[Generated], pipeline: Any, wrapper: GraphWrapper, call: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the host computes or stores, checked against what the pipeline did.

    Returns:
        Tensors (`sampler` [steps, 1 + steps], `timestep_embedding` [steps, 256], for each prompt `noise.<i>` and
        `prompt.<i>.<branch>.<input>`), and the manifest's `sampler`: steps, branches, guidance_scale, token_grid
        (height and width of latents that the denoiser takes as tokens; null of others), picture_size (height, width),
        mask_bias (what a padded text token adds to an attention score; null where the denoiser is not told them).

    Raises:
        ExportError: the sampler is not linear, or its matrix does not reproduce the pipeline's latents.
    """
    family = family_of(type(pipeline).__name__)
    matrix = torch.from_numpy(sampler_matrix(pipeline.scheduler))
    steps = len(matrix)
    branches = len(generated[0].items) // steps
    scale = 1.0 if branches == 1 else float(call_arguments(pipeline, call, ("guidance_scale",))["guidance_scale"])
    tensors = {"sampler": matrix}
    for index, each in enumerate(generated):
        inputs = [wrapper.host_inputs(item) for item in each.items]
        noise = inputs[0]["hidden_states"]
        tensors[f"noise.{index}"] = noise
        tensors["timestep_embedding"] = torch.cat([item["timestep_embedding"] for item in inputs[::branches]])
        for branch in range(branches):
            for name, value in inputs[branch].items():
                if name not in ("hidden_states", "timestep_embedding"):
                    tensors[f"prompt.{index}.{branch}.{name}"] = value
        terms = [noise]
        for step in range(steps):
            outputs = [family.prediction(value).float() for value in each.outputs[step * branches :][:branches]]
            terms.append(outputs[0] if branches == 1 else outputs[0] + scale * (outputs[1] - outputs[0]))
        latents = torch.tensordot(matrix[-1], torch.stack(terms), dims=1)
        error = float((latents - each.latents).abs().max() / each.latents.abs().max())
        if not error <= MAX_SAMPLER_ERROR:
            raise ExportError(
                f"the host's sampler is off by {error:.2g} of the pipeline's latents (at most {MAX_SAMPLER_ERROR:g}); "
                f"does {type(pipeline).__name__} change latents or guidance between steps?"
            )
    tokens = generated[0].latents.ndim == 3
    size = list(generated[0].picture.shape[:2])
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    return contiguous, {
        "steps": steps,
        "branches": branches,
        "guidance_scale": scale,
        "token_grid": [side // pipeline.vae_scale_factor for side in size] if tokens else None,
        "picture_size": size,
        "mask_bias": MASK_BIAS if "encoder_attention_bias" in inputs[0] else None,
    }
