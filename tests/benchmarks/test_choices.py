"""Other choices of widths: within the average, and by what they say they go by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.method import choices
from benchmarks.method.choices import by_threshold, by_weights, first_and_last, learned, prepare_falling
from fbqat_hub.quantization.widths import average_width
from fbqat_hub.training.recipe import Recipe

SIDE, NAMES = 32, ("first", "spiky", "plain", "last")


class Chain(nn.Module):
    """Four layers of one size; ``spiky`` has outliers, which 4 bits lose most of."""

    def __init__(self) -> None:
        super().__init__()
        for name in NAMES:
            self.add_module(name, nn.Linear(SIDE, SIDE, bias=False))
        with torch.no_grad():
            self.spiky.weight[:, 0] *= 20

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


@pytest.fixture
def teacher() -> Chain:
    torch.manual_seed(0)
    return Chain().requires_grad_(False)


def recipe(average: float) -> Recipe:
    quantization = {"average_bits": average, "module_overrides": {}}
    return Recipe(name="x", family="sana", teacher="o/n", quantization=quantization, train_layers="all", steps=1)


def test_weights_alone_and_a_threshold_find_the_outliers(teacher: Chain) -> None:
    for choose in (by_weights, by_threshold):
        widths = choose(recipe(5), teacher, None, None)
        assert widths == dict.fromkeys(NAMES, 4) | {"spiky": 8}


@pytest.mark.parametrize("average", [4.0, 5.5, 6.0, 8.0])
def test_no_choice_has_more_than_the_average(teacher: Chain, average: float) -> None:
    widths = by_threshold(recipe(average), teacher, None, None)
    assert average_width(widths, dict.fromkeys(NAMES, SIDE**2)) == 4 + int(average - 4)


def test_first_and_last(teacher: Chain) -> None:
    assert first_and_last(recipe(6), teacher, None, None) == {"first": 8, "spiky": 4, "plain": 4, "last": 8}


class Inputs:
    """Draws of `Chain`, for ``learned``."""

    device = "cpu"

    def calibration(self, split: Any, samples: int) -> list[dict[str, Tensor]]:
        return [self.training(split, number, 8) for number in range(samples // 8)]

    def training(self, split: Any, step: int, batch_size: int) -> dict[str, Tensor]:
        return {"x": torch.randn(batch_size, SIDE, generator=torch.Generator().manual_seed(step))}

    def predict(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return model(**inputs)

    def error_weight(self, inputs: dict[str, Tensor]) -> None:
        return None


def test_layers_fall_one_by_one_and_the_last_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    fallen: list[str] = []
    initialize, step, steps_at_4 = choices.gptq_initialize, choices._step, []

    def noted(student: nn.Module, batches: Any, *, only: list[str], **options: Any) -> Any:
        fallen.extend(only)
        return initialize(student, batches, only=only, **options)

    def counted(recipe: Recipe, student: nn.Module, *rest: Any) -> Tensor:
        steps_at_4.append([name for name in NAMES if getattr(student, name).bit_width == 4])
        return step(recipe, student, *rest)

    monkeypatch.setattr(choices, "gptq_initialize", noted)
    monkeypatch.setattr(choices, "_step", counted)
    torch.manual_seed(0)
    draws: Any = Inputs()
    student = prepare_falling(replace(recipe(5), steps=9), Sum().requires_grad_(False), None, draws)
    assert fallen == ["spiky", *fallen[1:]]  # the output hardly has it
    assert sorted(fallen) == ["first", "last", "spiky"]
    assert [sorted(names) for names in steps_at_4] == [sorted(fallen[: 1 + at // 3]) for at in range(9)]
    widths = {name: getattr(student, name).bit_width for name in NAMES}
    assert widths == dict.fromkeys(NAMES, 4) | {"plain": 8}


class Sum(Chain):
    """The layers side by side; the output of ``plain`` counts most."""

    def forward(self, x: Tensor) -> Tensor:
        weights = {"plain": 30.0, "spiky": 0.01}
        return sum(weights.get(name, 1.0) * layer(x) for name, layer in self.named_children())


def test_learned_widths_are_wide_where_the_output_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their gradient, whatever the weights' own errors are."""
    monkeypatch.setattr(choices, "LEARNING_STEPS", 100)
    torch.manual_seed(0)
    draws: Any = Inputs()
    widths = learned(recipe(5), Sum().requires_grad_(False), None, draws)
    assert widths == dict.fromkeys(NAMES, 4) | {"plain": 8}
