"""A recipe's average_bits: the layers that matter have 8 bits, from preparation to the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from fbqat_hub.families import get_family
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.quantization import FakeQuantizedLinear, PackedLayer, gptq, named_layers
from fbqat_hub.training.cache import cached_splits
from fbqat_hub.training.distill import train
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.loss import held_out_loss
from fbqat_hub.training.recipe import Recipe, load_recipe
from fbqat_hub.training.student import prepare_student, started_student


def average_of(layers: Any) -> float:
    sizes = [(layer.in_features * layer.out_features, bits) for layer, bits in layers]
    return sum(size * bits for size, bits in sizes) / sum(size for size, _ in sizes)


def test_half_a_bit_where_it_matters_lowers_the_loss(recipe_fields: dict[str, Any]) -> None:
    losses = {}
    for average in (None, 4.5, 5.0):
        recipe = Recipe(**{**recipe_fields, "quantization": {"average_bits": average}})
        pipeline = load_pipeline(recipe.teacher, torch.float32)
        splits = cached_splits(recipe, pipeline)
        draws = Draws(get_family("sana"), pipeline.scheduler, recipe.generation, recipe.seed)
        student = prepare_student(recipe, pipeline.transformer, splits["train"], draws)
        layers = [layer for _, layer in named_layers(student, FakeQuantizedLinear)]
        assert {layer.bit_width for layer in layers} == ({4.0} if average is None else {4.0, 8.0})
        assert average_of((layer, layer.bit_width) for layer in layers) <= (average or 4)
        losses[average] = fmean(held_out_loss(student, pipeline.transformer, splits["train"], draws))
    assert losses[5.0] < losses[4.5] < 0.9 * losses[None]


@pytest.mark.parametrize("changes", [{}, {"quantization": {"activation_range": "static", "average_bits": 5.0}}])
def test_only_layers_that_became_wider_are_started_again(changes: dict[str, Any], scene_of, monkeypatch) -> None:
    """And the student is, bit for bit, the one whose layers all are."""
    scene = scene_of(**{"quantization": {"average_bits": 5.0}, **changes})
    rounded: list[int] = []
    codes = gptq._codes
    monkeypatch.setattr(
        gptq, "_codes", lambda name, layer, *rest: (rounded.append(layer.bit_width), codes(name, layer, *rest))[1]
    )
    student = scene.student()
    layers = dict(named_layers(student, FakeQuantizedLinear))
    wider = {name: 8 for name, layer in layers.items() if layer.bit_width == 8}
    assert 0 < len(wider) < 27
    assert (rounded.count(4), rounded.count(8)) == (27, len(wider))
    wanted = started_student(scene.recipe, scene.teacher, scene.splits["train"], scene.draws, wider).state_dict()
    found = student.state_dict()
    assert set(found) == set(wanted)
    assert [name for name, value in wanted.items() if not torch.equal(found[name], value)] == []


def test_widths_are_trained_stored_and_loaded(recipe_fields: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe(**{**recipe_fields, "steps": 2, "quantization": {"average_bits": 5.0}})
    run = train(recipe, tmp_path / "run", progress=False)
    config = json.loads((run / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2
    assert set(config["weight_bits_by_module"].values()) == {8}
    assert load_recipe(run / "recipe.yaml") == recipe
    layers = dict(named_layers(load_pipeline(run).transformer, PackedLayer))
    assert {name for name, layer in layers.items() if layer.weight_bits == 8} == set(config["weight_bits_by_module"])
    assert 4.5 < average_of((layer, layer.weight_bits) for layer in layers.values()) <= 5.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": {"average_bits": 3.5}}, "average_bits is 3.5; it must be a number from 4 to 8, or null"),
        ({"quantization": {"average_bits": 4.5, "weight_bits": 3}}, "weight_bits must be 4"),
        ({"quantization": {"average_bits": 4.5}, "method": "fbqat-paper"}, "schedule.stages constant"),
    ],
)
def test_what_has_no_average(changes: dict[str, Any], message: str, recipe_fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**recipe_fields | changes)
