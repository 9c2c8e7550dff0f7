"""A run to a device: calibration and held-out inputs from its recipe, then the exporter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from fbqat_hub.export import export_htp
from fbqat_hub.families import get_family
from fbqat_hub.integrations.diffusers import load_pipeline
from fbqat_hub.training.distill import Draws, cached_splits
from fbqat_hub.training.recipe import load_recipe
from fbqat_hub.training.teachers import resolve_teacher

_CALIBRATION_SAMPLES, _HELD_OUT_SAMPLES = 100, 8


def export_run(run: Path, output: Path, *, soc: str = "sm8750", progress: bool = True) -> dict[str, Any]:
    """Compile a run's denoiser for a Snapdragon's NPU; returns the certificate (see ``export_htp``).

    Ranges that training did not set are calibrated on 100 training samples; the certificate is measured on 8 samples
    of the test split.
    """
    recipe = load_recipe(run / "recipe.yaml")
    pipeline = load_pipeline(run)
    splits = cached_splits(recipe, load_pipeline(resolve_teacher(recipe.teacher)))
    draws = Draws(get_family(recipe.family), pipeline.scheduler, recipe.seed)
    calibration = list(draws.calibration(splits["train"], _CALIBRATION_SAMPLES))
    held_out: list[dict[str, Tensor]] = []
    for inputs in draws.held_out(splits["test"], 1, 1):
        if len(held_out) == _HELD_OUT_SAMPLES:
            break
        held_out.append(inputs)
    return export_htp(pipeline.transformer, calibration, held_out, output, soc=soc, progress=progress)
