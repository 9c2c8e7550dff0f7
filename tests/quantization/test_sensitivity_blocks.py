"""Scores of layers with one block in memory are those of the whole model."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
from torch import Tensor, nn

from fbqat_hub.quantization.convert import targets
from fbqat_hub.quantization.sensitivity import nearest_errors, output_sensitivity, rounding_errors
from fbqat_hub.quantization.sensitivity_blocks import block_sensitivity
from tests.quantization.test_gptq_blocks import ACTIVATIONS, NAMES, WEIGHTS, Model, batches


def of_blocks(model: Model, inputs: Any = None, **options: Any) -> dict[str, dict[int, float]]:
    own = dict(zip(NAMES, model.blocks, strict=True))
    chosen = targets(model, ACTIVATIONS)
    for block in model.blocks:
        block.to("meta")
    given = {"load": lambda name: copy.deepcopy(own[name]), **options}
    errors = nearest_errors(WEIGHTS, (4, 8))
    return block_sensitivity(
        model, NAMES, batches() if inputs is None else inputs, chosen, errors, lambda m, batch: m(**batch), **given
    )


def loaded_from(model: Model) -> Any:
    own = dict(zip(NAMES, copy.deepcopy(model).blocks, strict=True))
    return lambda name: copy.deepcopy(own[name])


@pytest.mark.parametrize("signs", [1, 3])
def test_equals_the_whole_model(signs: int) -> None:
    model = Model()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    errors = {
        name: lambda layer=layer: rounding_errors(layer.weight.detach(), WEIGHTS, (4, 8))
        for name, layer in layers.items()
    }
    wanted = output_sensitivity(model, errors, batches, lambda m, batch: m(**batch), signs=signs)
    load = loaded_from(model)
    found = of_blocks(model, load=load, signs=signs)
    assert set(found) == set(wanted)
    shares = [of_blocks(model, load=load, signs=signs, share=(own, 3)) for own in range(3)]
    for name, by_width in wanted.items():
        assert found[name] == pytest.approx(by_width, rel=1e-4), name
        assert by_width[4] > 10 * by_width[8] > 0
        for bits, score in found[name].items():
            assert sum(each[name][bits] for each in shares) == pytest.approx(score, rel=1e-12)


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


class Unread(Model):
    """Calls a layer whose output nothing reads, as the text's of a last block."""

    def __init__(self) -> None:
        super().__init__()
        self.unread = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.unread(x)
        return super().forward(x)


def test_a_layer_without_effect_loses_nothing() -> None:
    model = Unread()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    errors = {
        name: lambda layer=layer: rounding_errors(layer.weight.detach(), WEIGHTS, (4, 8))
        for name, layer in layers.items()
    }
    whole = output_sensitivity(model, errors, batches, lambda m, batch: m(**batch))
    in_blocks = of_blocks(model, load=loaded_from(model))
    assert whole["unread"] == in_blocks["unread"] == {4: 0.0, 8: 0.0}
    assert min(by_width[4] for name, by_width in in_blocks.items() if name != "unread") > 0


def test_what_is_wrong_is_said() -> None:
    model = Model()
    with pytest.raises(ValueError, match="no batches to score the layers with"):
        of_blocks(model, [], load=loaded_from(model))
    model = Model()
    model.apart = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="the output does not depend on apart"):
        of_blocks(model, load=loaded_from(model))
    assert isinstance(model.blocks[0], nn.Sequential)
