"""A recipe with changes, and what its run begins with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from fbqat_hub.families import get_family
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training.cache import CachedSplit, cached_splits
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.loop import Loop, accelerator_of, distill
from fbqat_hub.training.method import METHODS
from fbqat_hub.training.recipe import Recipe
from fbqat_hub.training.student import prepare_student

# Quantizes no layer of a group, and trains that group.
NO_ATTENTION = {
    "train_layers": "attention",
    "quantization": {"modules_to_not_convert": ["transformer_blocks.*.attn*"]},
}


@pytest.fixture
def recipe_of(recipe_fields: dict[str, Any]) -> Callable[..., Recipe]:
    def make(**changes: Any) -> Recipe:
        """The recipe of six steps with some fields changed; a method that does not train has no steps."""
        without = {} if METHODS[changes.get("method", "fbqat")].trains else {"steps": 0}
        return Recipe(**{**recipe_fields, **without, **changes})

    return make


@dataclass
class Scene:
    """What a recipe's run begins with, and the run itself."""

    recipe: Recipe
    teacher: nn.Module
    splits: dict[str, CachedSplit]
    draws: Draws

    def student(self) -> Any:
        """A fresh one."""
        torch.manual_seed(self.recipe.seed)
        return prepare_student(self.recipe, self.teacher, self.splits["train"], self.draws)

    def loop(self, student: nn.Module, output: Path) -> Loop:
        """Not started."""
        output.mkdir(exist_ok=True)
        return Loop(self.recipe, student, self.teacher, self.splits, self.draws, output, accelerator_of(self.recipe))

    def distill(self, student: nn.Module, output: Path, after_step: Callable[[int], None] | None = None) -> None:
        """Every step of the recipe."""
        output.mkdir(exist_ok=True)
        settings = (self.recipe, student, self.teacher, self.splits, self.draws, output)
        distill(*settings, accelerator_of(self.recipe), False, False, after_step)


@pytest.fixture
def scene_of(recipe_of: Callable[..., Recipe]) -> Callable[..., Scene]:
    def make(**changes: Any) -> Scene:
        recipe = recipe_of(**changes)
        pipeline = load_pipeline(recipe.teacher)
        draws = Draws(get_family(recipe.family), pipeline.scheduler, recipe.generation, recipe.seed)
        return Scene(recipe, pipeline.transformer, cached_splits(recipe, pipeline), draws)

    return make


@pytest.fixture
def other_precision() -> Iterator[None]:
    """accelerate takes one precision a process; within the test another one can be asked for."""
    AcceleratorState._reset_state(reset_partial_state=False)
    yield
    AcceleratorState._reset_state(reset_partial_state=False)
