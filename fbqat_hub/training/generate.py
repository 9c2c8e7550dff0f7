"""Pictures from any pipeline folder, with the arguments that its recipe gives."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fbqat_hub.config import unknown_key_error
from fbqat_hub.evaluation.pictures import grid
from fbqat_hub.files import whole
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training.recipe import load_recipe
from fbqat_hub.training.teachers import resolve_teacher


def generate(
    model: str, prompts: Sequence[str], output: Path, *, seed: int = 0, call: Mapping[str, Any] | None = None
) -> Path:
    """Draw the prompts and write one PNG, a grid if there are several.

    Args:
        model: folder or Hub id; arguments of the call come from its ``recipe.yaml``, if it has one.
        seed: of the first picture; the next one has the next seed.
        call: arguments of the pipeline call that replace the recipe's.

    Raises:
        ValueError: no prompt, an output that is not a PNG, or an argument that the pipeline does not take.
    """
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError("no prompt, or an empty one; say what to draw, e.g. fbqat generate MODEL 'red heart'.")
    if output.suffix.lower() != ".png" or output.is_dir():
        raise ValueError(f"output is {output}; it must be a file that ends in .png.")
    recipe = Path(model) / "recipe.yaml"
    arguments = {**(load_recipe(recipe).generation if recipe.is_file() else {}), **(call or {})}
    pipeline = load_pipeline(resolve_teacher(model), torch.float32)
    allowed = set(inspect.signature(type(pipeline).__call__).parameters) - {"self"}
    if extra := set(arguments) - allowed:
        raise unknown_key_error(f"the call of {type(pipeline).__name__}", extra, allowed)
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    images = pipeline(list(prompts), generator=generators, **arguments).images
    picture = images[0] if len(images) == 1 else grid(images, min(8, len(images)))
    with whole(output) as partial:
        picture.save(partial, format="PNG")
    return output
