"""The student before training: fake-quantized layers, calibrated, at the codes that the recipe starts from."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

from torch import nn

from fbqat_hub.families import get_family
from fbqat_hub.quantization import FakeQuantizedLinear, calibrate, gptq_initialize, named_layers, prepare
from fbqat_hub.quantization.convert import matches
from fbqat_hub.training.cache import CachedSplit
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.recipe import Recipe


def prepare_student(recipe: Recipe, teacher: nn.Module, train_split: CachedSplit, draws: Draws) -> Any:
    """A copy of the teacher with fake-quantized layers, calibrated, with the recipe's layers trainable."""
    config = recipe.config()
    student = copy.deepcopy(teacher).to(draws.device).requires_grad_(False)
    prepare(
        student,
        config.weight_scheme(),
        config.activation_scheme(),
        not_convert=config.modules_to_not_convert,
        overrides=config.module_overrides,
    )
    if config.needs_calibration:
        options = asdict(recipe.calibration)
        calibrate(student, draws.calibration(train_split, options.pop("samples")), **options)
    if recipe.initialization == "gptq":
        options = asdict(recipe.gptq)
        samples = options.pop("samples")
        softness = recipe.schedule.softness
        gptq_initialize(student, lambda: draws.calibration(train_split, samples), softness=softness, **options)
    patterns = get_family(recipe.family).layer_groups[recipe.train_layers]
    for name, layer in named_layers(student, FakeQuantizedLinear):
        layer.requires_grad_(matches(name, patterns))
    return student
