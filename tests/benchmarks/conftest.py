"""A layer with outliers, a short benchmark setting on the tiny Sana, and what every baseline's student must keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.method.baselines import Pointwise
from fbqat_hub.families import get_family
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.quantization import named_layers
from fbqat_hub.training.cache import CachedSplit, cached_splits
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.loss import held_out_loss
from fbqat_hub.training.recipe import Recipe


@pytest.fixture(scope="session")
def outliers() -> tuple[nn.Linear, Tensor]:
    """A layer of 48 inputs with three large ones, and its input, whose activations are large in two others."""
    torch.manual_seed(0)
    linear = nn.Linear(48, 32)
    linear.weight.data[:, [3, 17, 40]] *= 20
    tokens = torch.randn(256, 48)
    tokens[:, [5, 30]] *= 20
    return linear, tokens


@dataclass(frozen=True)
class Scene:
    """What a ``prepare_...`` is given."""

    recipe: Recipe
    teacher: nn.Module
    splits: dict[str, CachedSplit]
    draws: Draws

    @property
    def arguments(self) -> tuple[Recipe, nn.Module, CachedSplit, Draws]:
        return self.recipe, self.teacher, self.splits["train"], self.draws


@pytest.fixture(scope="session")
def scene(recipe_fields: dict[str, Any]) -> Scene:
    recipe = Recipe(
        **{**recipe_fields, "method": "vqat", "train_layers": "feed_forward", "calibration": {"samples": 4}}
    )
    pipeline = load_pipeline(recipe.teacher)
    draws = Draws(get_family("sana"), pipeline.scheduler, recipe.generation, recipe.seed)
    return Scene(recipe, pipeline.transformer, cached_splits(recipe, pipeline), draws)


def assert_feed_forward_trains(scene: Scene, student: nn.Module, weights: tuple[str, ...], bias: str) -> None:
    """A gradient reaches these parameters of the feed-forward's 1x1 convolutions, and nothing else is trainable."""
    batch = scene.draws.training(scene.splits["train"], 0, 4)
    scene.draws.predict(student, batch).square().sum().backward()
    reached = {name for name, each in student.named_parameters() if each.grad is not None and each.grad.abs().sum()}
    names = {f"transformer_blocks.{block}.ff.{conv}" for block in range(2) for conv in ("conv_inverted", "conv_point")}
    expected = {f"{name}.linear.{part}" for name in names for part in weights}
    expected |= {f"{name}.linear.{bias}" for name in names if "inverted" in name}
    assert reached == expected
    assert {name for name, each in student.named_parameters() if each.requires_grad} == expected
    assert all(each.grad is None for each in scene.teacher.parameters())


def assert_every_layer_is(scene: Scene, student: nn.Module, kind: type[nn.Module]) -> None:
    """All 27, 1x1 convolutions among them, and the student is close to the teacher but not equal."""
    layers = dict(named_layers(student, kind))
    assert len(layers) == 27
    convolutions = {name for name, _ in named_layers(student, Pointwise)}
    assert convolutions == {
        name.removesuffix(".linear") for name in layers if name.endswith(".linear") and "ff." in name
    } | {"patch_embed.proj"}
    loss = held_out_loss(student, scene.teacher, scene.splits["test"], scene.draws)
    scale = scene.draws.predict(scene.teacher, next(scene.draws.held_out(scene.splits["test"], 1, 4))).square().mean()
    assert 0 < sum(loss) / len(loss) < 0.1 * scale
