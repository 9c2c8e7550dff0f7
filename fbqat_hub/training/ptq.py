"""Quantization without training: a float pipeline to a packed one, a shard at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fbqat_hub.components import read_index
from fbqat_hub.config import FBQATConfig
from fbqat_hub.families import family_of
from fbqat_hub.integrations.diffusers import packed_layers
from fbqat_hub.pipelines import check_source, class_of, copy_parts, downloaded, load_pipeline, replacing
from fbqat_hub.training.recipe import Recipe
from fbqat_hub.training.teachers import resolve_teacher
from fbqat_hub.untrusted import read_json


def convert_pipeline(
    source: str, output: Path, settings: Mapping[str, Any] | None = None, variant: str | None = None
) -> Path:
    """Quantize the denoiser of a float pipeline to W4A8 as it is loaded, and save the whole pipeline.

    Memory stays near the packed model's: each weight is packed as it is read, and the other parts are copied as files,
    never loaded. All is checked before: each part by its class without its numbers, patterns against the denoiser's
    layers.

    Args:
        source: folder or Hub id of a float pipeline.
        output: new or empty folder.
        settings: fields of ``FBQATConfig``.
        variant: of the source's weights, e.g. "fp16"; see ``Component.weights``.

    Raises:
        FileExistsError: ``output`` has content.
        ValueError: ``source`` is no whole pipeline, is of no supported family, is quantized already, or holds a tensor
            that is not finite.
    """
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} exists and is not empty; give another --output.")
    teacher = resolve_teacher(source)
    check_source(teacher, variant)
    family = family_of(class_of(teacher))  # before the whole of it is downloaded
    options = {"module_overrides": family.activation_overrides, **(settings or {})}
    config = FBQATConfig(**options)
    folder = downloaded(teacher, variant)
    denoiser = read_index(folder)[1]["transformer"]
    if "quantization_config" in read_json(denoiser.folder / "config.json"):
        raise ValueError(f"{source} is quantized already; give the full-precision pipeline.")
    pipeline = load_pipeline(folder, variant=variant, meta=True)
    packed_layers(pipeline.transformer, config)
    recipe = Recipe(
        name=output.resolve().name,
        family=family.name,
        teacher=source,
        method="ptq-maxabs" if options.get("weight_clip") == "max_abs" else "ptq-mse",
        steps=0,
        quantization=dict(settings or {}),
        generation=family.native_size(pipeline),
    )
    with replacing(output) as partial:
        copy_parts(folder, partial, variant)
        denoiser.load(variant=variant, quantization_config=config).save_pretrained(partial / "transformer")
        recipe.save(partial / "recipe.yaml")
    return output
