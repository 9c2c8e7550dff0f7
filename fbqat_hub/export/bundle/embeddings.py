"""A text encoded where the pipeline runs, for a bundle that has no text encoders."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fbqat_hub.export.bundle.pipeline import generate
from fbqat_hub.export.bundle.runtime.text import TEXT_INPUTS
from fbqat_hub.families import family_of
from fbqat_hub.files import whole


def save_embeddings(pipeline: Any, text: str, call: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Save what the denoiser's graph is given of `text`, for `generate.py --embeddings`; the denoiser runs one step.

    Args:
        pipeline: the packed pipeline that the bundle was made of.
        call: arguments of the pipeline call, as the bundle was made with.
        path: of the safetensors file: those of `TEXT_INPUTS` that the denoiser takes, float32.
    """
    from safetensors.torch import save_file

    item = generate(pipeline, text, {**call, "num_inference_steps": 1}, 0).items[-1]  # the last one has the prompt
    inputs = family_of(type(pipeline).__name__).graph(pipeline.transformer, item).host_inputs(item)
    with whole(Path(path)) as partial:
        save_file({name: inputs[name].contiguous() for name in TEXT_INPUTS if name in inputs}, partial)
