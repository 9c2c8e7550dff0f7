"""A run to a device: calibration and held-out inputs from its recipe, or from prompts, then the exporter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fbqat_hub.export import ExportError
from fbqat_hub.export.bundle.export import export_bundle
from fbqat_hub.families import family_of, get_family
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training.distill import Draws, cached_splits
from fbqat_hub.training.recipe import Recipe, load_recipe
from fbqat_hub.training.teachers import resolve_teacher

_CALIBRATION_SAMPLES, _HELD_OUT_SAMPLES = 100, 8


def export_run(
    run: str | Path,
    output: Path,
    *,
    soc: str = "sm8750",
    precision: str = "w4a8",
    a16: Sequence[str] = (),
    graphs: int = 1,
    prompts: Sequence[str] = (),
    pictures: int = 2,
    progress: bool = True,
) -> dict[str, Any]:
    """Compile a packed pipeline for a Snapdragon's NPU; returns the certificate (see ``export_bundle``).

    Ranges that training did not set are calibrated on 100 training samples of the run's recipe, and the certificate is
    measured on 8 samples of the test split. With ``prompts``, or without a recipe, both come from what the pipeline
    feeds its denoiser while it draws the prompts; the last one is held out.

    Args:
        run: folder of a run, or a folder or Hub id of any packed pipeline.
        soc, precision, a16, graphs: as ``export_bundle``.
        prompts: to calibrate on and to draw; the recipe's if there are none.
        pictures: drawn with the emulator in the loop, of the first prompts.

    Raises:
        ExportError: no recipe and fewer than two prompts, or what ``export_bundle`` raises.
    """
    saved = Path(run) / "recipe.yaml"
    recipe = load_recipe(saved) if saved.is_file() else None
    if len(prompts) < 2 and (prompts or recipe is None):
        raise ExportError(
            f"{run}: {'one prompt was given' if prompts else 'there is no recipe.yaml'}; calibration needs at least "
            "two prompts, of which the last is held out: --prompts FILE, one a line"
        )
    pipeline = load_pipeline(run, torch.float32)
    call = recipe.generation if recipe else family_of(type(pipeline).__name__).native_size(pipeline)
    calibration, held_out, shown, texts = None, None, list(prompts), list(prompts)
    if recipe and not prompts:
        calibration, held_out, texts, captions = _from_recipe(recipe, pipeline)
        shown = recipe.prompts or captions
    return export_bundle(
        pipeline,
        output,
        prompts=shown,
        call=call,
        calibration=calibration,
        held_out=held_out,
        soc=soc,
        precision=precision,
        a16=a16,
        graphs=graphs,
        pictures=min(pictures, len(shown)),
        texts=texts,
        progress=progress,
    )


def _from_recipe(
    recipe: Recipe, pipeline: Any
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]], list[str], list[str]]:
    """Calibration and held-out inputs from the recipe's data, as training and evaluation draw them; captions to
    calibrate text encoders on; test captions."""
    splits = cached_splits(recipe, load_pipeline(resolve_teacher(recipe.teacher), torch.float32))
    draws = Draws(get_family(recipe.family), pipeline.scheduler, recipe.seed)
    held_out: list[dict[str, Tensor]] = []
    for inputs in draws.held_out(splits["test"], 1, 1):
        if len(held_out) == _HELD_OUT_SAMPLES:
            break
        held_out.append(inputs)
    calibration = list(draws.calibration(splits["train"], _CALIBRATION_SAMPLES))
    return calibration, held_out, splits["train"].captions[:_CALIBRATION_SAMPLES], splits["test"].captions
