"""Quantization without training: a float pipeline to a packed one, a shard at a time."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

from fbqat_hub.config import FBQATConfig
from fbqat_hub.families import component_configs, family_of
from fbqat_hub.integrations.diffusers import check_source, load_pipeline, save_pipeline
from fbqat_hub.training.recipe import Recipe
from fbqat_hub.training.teachers import resolve_teacher


def convert_pipeline(source: str, output: Path, settings: Mapping[str, Any] | None = None) -> Path:
    """Quantize the denoiser of a float pipeline to W4A8 as it is loaded, and save the whole pipeline.

    Memory stays near the packed model's: each weight is packed as it is read.

    Args:
        source: folder or Hub id of a float pipeline.
        output: new or empty folder.
        settings: fields of ``FBQATConfig``.

    Raises:
        FileExistsError: ``output`` has content.
        ValueError: ``source`` is no pipeline, is of no supported family, or is quantized already.
    """
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} exists and is not empty; give another --output.")
    teacher = resolve_teacher(source)
    check_source(teacher)
    config = diffusers.DiffusionPipeline.load_config(teacher)
    family = family_of(config["_class_name"])
    options = {"module_overrides": family.activation_overrides, **(settings or {})}
    denoiser = getattr(diffusers, config["transformer"][1])
    if "quantization_config" in denoiser.load_config(teacher, subfolder="transformer"):
        raise ValueError(f"{source} is quantized already; give the full-precision pipeline.")
    transformer = denoiser.from_pretrained(teacher, subfolder="transformer", quantization_config=FBQATConfig(**options))
    pipeline = load_pipeline(teacher, transformer=transformer)
    method = "ptq-maxabs" if options.get("weight_clip") == "max_abs" else "ptq-mse"
    recipe = Recipe(
        name=output.resolve().name,
        family=family.name,
        teacher=source,
        method=method,
        steps=0,
        quantization=dict(settings or {}),
        generation=family.native_size(component_configs(pipeline)),
    )
    output.mkdir(parents=True, exist_ok=True)
    try:
        recipe.save(output / "recipe.yaml")
        save_pipeline(pipeline, output, teacher)
    except BaseException:  # no space, Ctrl-C: the folder is left as empty as it was, for another try
        for path in output.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise
    return output
