"""Pictures from any pipeline folder, with the arguments that its recipe gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fbqat_hub.components import read_index
from fbqat_hub.evaluation.pictures import grid
from fbqat_hub.families import Family, find_family
from fbqat_hub.files import whole
from fbqat_hub.generation import changed_call, generate_pictures
from fbqat_hub.inputs import checked_device, output_picture, seeds
from fbqat_hub.pictures import as_image, is_one_colour
from fbqat_hub.pipelines import downloaded, load_pipeline
from fbqat_hub.training.call import check_call
from fbqat_hub.training.recipe import load_recipe, recipe_of_run
from fbqat_hub.training.teachers import SHIPPED, resolve_teacher


def generate(
    model: str,
    prompts: Sequence[str],
    output: Path,
    *,
    seed: int = 0,
    call: Mapping[str, Any] | None = None,
    device: str | None = None,
) -> Path:
    """Generate a picture of each prompt and write one PNG, a grid if there are several.

    Args:
        model: folder or Hub id; arguments of the call come from its ``recipe.yaml``, if it has one, and else are
            those of ``Family.own_call``.
        seed: of the first picture; the next one has the next seed.
        call: arguments of the pipeline call that replace the recipe's; of ``num_images_per_prompt`` each has its own
            seed.
        device: where networks run; a GPU if there is one and None is given.

    Raises:
        ValueError: no prompt, a seed out of range, an output that is not a PNG, a device that is not there, an argument
            that the pipeline does not take, or a picture that only a broken model makes: not finite, or of one colour.
    """
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError("no prompt, or an empty one; say what is to be seen, e.g. fbqat generate MODEL 'red heart'.")
    output_picture(output)
    device = checked_device(device)
    folder = downloaded(resolve_teacher(model))
    pipeline_class, _ = read_index(folder)
    check_call(pipeline_class, call or {}, "--set ")
    count = len(prompts) * (call or {}).get("num_images_per_prompt", 1)  # a recipe has it as 1 only
    each_seed = seeds(seed, count)
    pipeline = load_pipeline(folder, torch.float32).to(device)
    whole_call = changed_call(pipeline_class, generation_of(folder, pipeline), call or {})
    pictures = generate_pictures(pipeline, prompts, whole_call, each_seed)
    for number, picture in enumerate(pictures):
        if is_one_colour(picture):
            raise ValueError(
                f"picture {number + 1} of {count}, seed {each_seed[number]}, is of one colour throughout, as those of "
                "a broken model are; nothing was saved. Look at the model with fbqat evaluate, or try another --seed."
            )
    images = [as_image(picture) for picture in pictures]
    with whole(output) as partial:
        (images[0] if count == 1 else grid(images, min(8, count))).save(partial, format="PNG")
    return output


def generation_of(folder: Path, pipeline: Any) -> dict[str, Any]:
    """Arguments of a pipeline's call: those of the ``recipe.yaml`` in its folder, of a teacher that ships those of its
    recipe, else those of ``Family.own_call``; nothing of a pipeline of no family.
    """
    recipe = folder / "recipe.yaml"
    if recipe.is_file():
        return dict(recipe_of_run(recipe).generation)
    family = find_family(type(pipeline).__name__)
    if family is None:
        return {}
    return shipped_call(folder, family) or family.own_call(pipeline)


def shipped_call(folder: Path, family: Family) -> dict[str, Any]:
    """The arguments that the recipe of a teacher which ships calls its pipeline with; none of any other folder."""
    if family.tiny is None or folder.resolve() not in SHIPPED.values():
        return {}
    return dict(load_recipe(family.tiny).generation)
