"""The student before training: fake-quantized layers, calibrated, at the codes that the recipe starts from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from fbqat_hub.families import get_family
from fbqat_hub.quantization import FakeQuantizedLinear, calibrate, gptq_initialize, named_layers, prepare
from fbqat_hub.quantization.convert import matches, run_batches
from fbqat_hub.training.cache import CachedSplit
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.recipe import Recipe
from fbqat_hub.training.widths import chosen_widths


def prepare_student(recipe: Recipe, teacher: nn.Module, train_split: CachedSplit, draws: Draws) -> Any:
    """A copy of the teacher with fake-quantized layers, calibrated, with the recipe's layers trainable."""
    student = started_student(recipe, teacher, train_split, draws)
    if recipe.quantization.average_bits is not None:
        widths = chosen_widths(recipe, student, teacher, train_split, draws)
        wider = {name: 8 for name in widths if widths[name] == 8}
        if wider:
            student = started_student(recipe, teacher, train_split, draws, wider, started=student)
    patterns = get_family(recipe.family).layer_groups[recipe.train_layers]
    for name, layer in named_layers(student, FakeQuantizedLinear):
        layer.requires_grad_(matches(name, patterns))
    return student


def started_student(
    recipe: Recipe,
    teacher: nn.Module,
    train_split: CachedSplit,
    draws: Draws,
    widths: Mapping[str, int] | None = None,
    started: nn.Module | None = None,
) -> Any:
    """The student at the codes that training starts from, nothing trainable.

    Args:
        widths: name -> bits of layers that do not have the recipe's ``weight_bits``.
        started: the same without ``widths``. Its weights are those of the other layers, which are not started again.
    """
    config = recipe.config()
    student = copy.deepcopy(teacher).to(draws.device).requires_grad_(False)
    prepare(student, config.weight_scheme(), **config.layer_options() | {"widths": widths})
    start(
        recipe,
        student,
        lambda samples: draws.calibration(train_split, samples),
        only=None if started is None else widths,
    )
    if started is not None:
        own = dict(named_layers(student, FakeQuantizedLinear))
        with torch.no_grad():
            for name, layer in named_layers(started, FakeQuantizedLinear):
                if name not in (widths or {}):
                    own[name].weight.copy_(layer.weight)
    return student


def start(
    recipe: Recipe,
    prepared: nn.Module,
    samples: Callable[[int], Iterable[Any]],
    run: Callable[[nn.Module, Iterable[Any]], None] = run_batches,
    only: Container[str] | None = None,
) -> None:
    """Bring a prepared model, or a part of one, to the codes that training starts from, calibrated where it must be.

    Args:
        samples: gives the first so many training samples, as ``run`` takes them; the same ones at every call.
        run: runs the model on all of them.
        only: names of the layers that get GPTQ's codes; None for all.
    """
    if recipe.config().needs_calibration:
        options = asdict(recipe.calibration)
        calibrate(prepared, samples(options.pop("samples")), run=run, **options)
    if recipe.initialization == "gptq":
        options = asdict(recipe.gptq)
        count = options.pop("samples")
        gptq_initialize(prepared, lambda: samples(count), run=run, only=only, **options)
