"""What an export needs of a run's data: inputs that set activation ranges, and others to measure on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fbqat_hub.families import get_family
from fbqat_hub.training.cache import cached_splits
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.lora_merge import float_pipeline
from fbqat_hub.training.recipe import Recipe

_CALIBRATION_SAMPLES, _HELD_OUT_SAMPLES = 100, 8


@dataclass(frozen=True, kw_only=True)
class ExportData:
    """Of a recipe, as training and evaluation draw it.

    Attributes:
        calibration: 100 inputs of the denoiser from the training split, batch 1.
        held_out: 8 from the test split.
        texts: captions of the former, to calibrate text encoders on.
        prompts: to generate: the recipe's own, or else captions of the test split.
    """

    calibration: list[dict[str, Tensor]]
    held_out: list[dict[str, Tensor]]
    texts: list[str]
    prompts: list[str]


def export_data(recipe: Recipe, scheduler: Any) -> ExportData:
    """The data of ``recipe``, encoded by its teacher or taken from the cache.

    Args:
        scheduler: of the pipeline that is exported.
    """
    splits = cached_splits(recipe, float_pipeline(recipe))
    draws = Draws(get_family(recipe.family), scheduler, recipe.generation, recipe.seed)
    return ExportData(
        calibration=list(draws.calibration(splits["train"], _CALIBRATION_SAMPLES)),
        held_out=list(itertools.islice(draws.held_out(splits["test"], 1, 1), _HELD_OUT_SAMPLES)),
        texts=list(dict.fromkeys(splits["train"].captions))[:_CALIBRATION_SAMPLES],
        prompts=recipe.prompts or list(dict.fromkeys(splits["test"].captions)),
    )


def teacher_draws(recipe: Recipe, scheduler: Any) -> tuple[Callable[[int], dict[str, Tensor]], nn.Module]:
    """What ``recipe`` trains on, and its teacher.

    Args:
        scheduler: of the pipeline that is trained.

    Returns:
        number -> a random sample of the training split, batch 1, the same for the same number; and the float denoiser.
    """
    pipeline = float_pipeline(recipe)
    split = cached_splits(recipe, pipeline)["train"]
    draws = Draws(get_family(recipe.family), scheduler, recipe.generation, recipe.seed)
    return lambda number: draws.training(split, number, 1), pipeline.transformer
