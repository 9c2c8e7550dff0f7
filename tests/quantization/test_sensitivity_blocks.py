"""Scores of layers with one block in memory are those of the whole model."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
from torch import nn

from fbqat_hub.quantization.convert import targets
from fbqat_hub.quantization.sensitivity import output_sensitivity, rounding_errors
from fbqat_hub.quantization.sensitivity_blocks import block_sensitivity
from tests.quantization.test_gptq_blocks import ACTIVATIONS, NAMES, WEIGHTS, Model, batches


def of_blocks(model: Model, inputs: Any = None, **options: Any) -> dict[str, dict[int, float]]:
    own = dict(zip(NAMES, model.blocks, strict=True))
    chosen = targets(model, ACTIVATIONS)
    for block in model.blocks:
        block.to("meta")
    given = {"load": lambda name: copy.deepcopy(own[name]), **options}
    return block_sensitivity(
        model, NAMES, batches() if inputs is None else inputs, chosen, WEIGHTS, lambda m, batch: m(**batch), **given
    )


def loaded_from(model: Model) -> Any:
    own = dict(zip(NAMES, copy.deepcopy(model).blocks, strict=True))
    return lambda name: copy.deepcopy(own[name])


def test_equals_the_whole_model() -> None:
    model = Model()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    errors = {
        name: lambda layer=layer: rounding_errors(layer.weight.detach(), WEIGHTS, (4, 8))
        for name, layer in layers.items()
    }
    wanted = output_sensitivity(model, errors, batches, lambda m, batch: m(**batch), signs=1)
    found = of_blocks(model, load=loaded_from(model))
    assert set(found) == set(wanted)
    for name, by_width in wanted.items():
        assert found[name] == pytest.approx(by_width, rel=1e-4), name
        assert by_width[4] > 10 * by_width[8] > 0


def test_one_block_is_held_at_a_time() -> None:
    model, held, most = Model(), weakref.WeakSet(), []
    load = loaded_from(model)

    def watched(name: str) -> nn.Module:
        most.append(len(held))
        block = load(name)
        held.add(block[0].weight)
        return block

    of_blocks(model, load=watched)
    assert len(most) == 2 * 3 * 4  # there and back, for each batch
    assert max(most) <= 1
    assert all(parameter.is_meta for block in model.blocks for parameter in block.parameters())


def test_what_is_wrong_is_said() -> None:
    model = Model()
    with pytest.raises(ValueError, match="no batches to score the layers with"):
        of_blocks(model, [], load=loaded_from(model))
    model = Model()
    model.apart = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="the output does not depend on apart"):
        of_blocks(model, load=loaded_from(model))
    assert isinstance(model.blocks[0], nn.Sequential)
