"""Quick measurements are those of the full functions, leave the student alone and are honest about their spread."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from fbqat_hub.families import get_family
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.quantization import FakeQuantizedLinear, Rounding, named_layers, set_bit_width
from fbqat_hub.training import probe
from fbqat_hub.training.cache import CachedSplit, cached_splits
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.loop import distill
from fbqat_hub.training.loss import held_out_loss
from fbqat_hub.training.probe import Estimate, Probe, advise, loss_against_width, probe_layers, relative_difference
from fbqat_hub.training.recipe import Recipe
from fbqat_hub.training.student import prepare_student


class Bench:
    """The tiny Sana; its ten training pictures stand in for a validation split of more than one."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.recipe = Recipe(**fields)
        pipeline = load_pipeline(self.recipe.teacher)
        train = cached_splits(self.recipe, pipeline)["train"]
        self.teacher, self.splits = pipeline.transformer, {"train": train, "validation": train}
        self.draws = Draws(get_family("sana"), pipeline.scheduler, self.recipe.generation, self.recipe.seed)

    def student(self, **changes: Any) -> Any:
        return prepare_student(replace(self.recipe, **changes), self.teacher, self.splits["train"], self.draws)

    def losses(self, student: Any, split: CachedSplit | None = None) -> list[float]:
        return held_out_loss(student, self.teacher, split or self.splits["train"], self.draws, repeats=probe.DRAWS)


@pytest.fixture(scope="module")
def bench(recipe_fields: dict[str, Any]) -> Bench:
    return Bench({**recipe_fields, "initialization": "nearest"})


@pytest.mark.parametrize("clip", ["max_abs", "mse", "learned"])
def test_curve_is_the_held_out_loss_at_each_width_and_the_student_is_as_before(clip: str, bench: Bench) -> None:
    student = bench.student(quantization={"weight_clip": clip})
    rounding = Rounding(0.3)
    set_bit_width(student, 5, rounding)
    before = copy.deepcopy(student.state_dict())
    curve = loss_against_width(student, bench.teacher, bench.splits["validation"], bench.draws, [8, 4.25])
    after = student.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    layers = [layer for _, layer in named_layers(student, FakeQuantizedLinear)]
    assert {(layer.bit_width, layer.rounding) for layer in layers} == {(5, rounding)}

    assert list(curve) == [8, 4.25]
    for width, loss in curve.items():
        set_bit_width(student, width)
        assert loss.mean == pytest.approx(fmean(bench.losses(student)), rel=1e-6)
    assert curve[4.25].mean > 10 * curve[8].mean


def test_standard_error_is_over_pictures_not_draws(bench: Bench) -> None:
    """Two draws of a picture count once: n is 10, not 20."""
    student = bench.student()
    loss = loss_against_width(student, bench.teacher, bench.splits["validation"], bench.draws, [4])[4]
    losses, n = bench.losses(student), len(bench.splits["validation"])
    assert len(losses) == 2 * n
    pictures = [(losses[index] + losses[n + index]) / 2 for index in range(n)]
    assert loss.error == pytest.approx(stdev(pictures) / math.sqrt(n))


def test_of_a_large_split_the_first_pictures_are_measured(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "PICTURES", 3)
    student, split = bench.student(), bench.splits["validation"]
    loss = loss_against_width(student, bench.teacher, split, bench.draws, [4])[4]
    first = copy.copy(split)
    first.captions = split.captions[:3]
    assert loss.mean == pytest.approx(fmean(bench.losses(student, first)), rel=1e-6)
    assert len(split) > 3


def test_one_picture_has_no_standard_error() -> None:
    assert Estimate.of([0.5]) == (0.5, None)
    assert Estimate.of([1.0, 3.0]) == (2.0, pytest.approx(1.0))


def test_a_probe_is_the_recipe_in_small(bench: Bench, tmp_path: Path) -> None:
    """Every group starts from the same student: the third one's losses are those of a run of its own."""
    probes = probe_layers(bench.recipe, bench.teacher, bench.splits, bench.draws, Accelerator(), steps=3)
    assert list(probes) == ["feed_forward", "attention", "blocks", "all"]

    student = bench.student()
    parameters = dict(student.named_parameters())
    total = sum(parameter.numel() for parameter in parameters.values())
    layers = [name for name, _ in named_layers(student, FakeQuantizedLinear) if name.startswith("transformer_blocks.")]
    blocks = {
        name: parameter.numel()
        for name, parameter in parameters.items()
        if any(name.startswith(f"{layer}.") for layer in layers)
    }
    assert probes["blocks"].trained_parameters == sum(blocks.values())
    assert probes["attention"].trained_parameters == sum(size for name, size in blocks.items() if ".attn" in name)
    assert probes["feed_forward"].trained_parameters == sum(size for name, size in blocks.items() if ".ff." in name)
    assert all(each.share == each.trained_parameters / total for each in probes.values())
    assert all(each.seconds_per_step > 0 for each in probes.values())

    optimizer = replace(bench.recipe.optimizer, warmup_steps=1)
    small = replace(bench.recipe, steps=3, optimizer=optimizer, save_every=0)
    distill(small, student, bench.teacher, bench.splits, bench.draws, tmp_path, Accelerator(), False, False)
    set_bit_width(student, 4)
    losses, n = bench.losses(student), len(bench.splits["validation"])
    by_picture = [(losses[index] + losses[n + index]) / 2 for index in range(n)]
    assert probes["blocks"].losses == pytest.approx(by_picture, rel=1e-6)
    assert len({tuple(each.losses) for each in probes.values()}) == 4


def made(parameters: int, losses: list[float]) -> Probe:
    return Probe(parameters, parameters / 100, losses, 1.0, None)


ALL = made(90, [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("others", "group", "words"),
    [
        # each picture 2% of the mean worse: sure, and fewer parameters than blocks
        (
            {"attention": made(30, [1.04, 2.04, 3.04]), "blocks": made(80, [1, 2, 3])},
            "attention",
            "30% .* \\+2.0% ± 0.0%",
        ),
        # the same mean, but with a standard error of 5%: not sure
        ({"attention": made(30, [0.867, 2.213, 3.04]), "blocks": made(80, [1, 2, 3])}, "blocks", "80% .* \\+0.0%"),
        ({"attention": made(30, [0.5, 1.5, 2.5])}, "attention", "-25.0%"),
        ({"attention": made(30, [1.2, 2.2, 3.2]), "blocks": made(80, [1.2, 2.2, 3.2])}, "all", "no smaller group"),
    ],
)
def test_advice_is_the_smallest_group_that_is_surely_close(others: dict[str, Probe], group: str, words: str) -> None:
    name, text = advise({**others, "all": ALL})
    assert name == group
    assert text.startswith(f"train {group}: ")
    assert re.search(words, text), text


def test_one_picture_is_sure_of_nothing() -> None:
    assert advise({"attention": made(30, [0.5]), "all": made(90, [1.0])})[0] == "all"


def test_differences_are_paired_by_picture() -> None:
    """Pictures differ twentyfold, their differences do not: 0.5 of a mean of 10."""
    difference = relative_difference([1.5, 19.5], [1.0, 19.0])
    assert difference.mean == pytest.approx(0.05)
    assert difference.error == pytest.approx(0.0, abs=1e-12)
