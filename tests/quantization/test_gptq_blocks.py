"""GPTQ block by block gives the codes of GPTQ of the whole model, and holds one block."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fbqat_hub.quantization import ActivationScheme, PackedLayer, WeightScheme, convert, gptq_initialize, named_layers
from fbqat_hub.quantization.convert import prepare, targets
from fbqat_hub.quantization.gptq_blocks import gptq_blocks

NAMES = ("blocks.0", "blocks.1", "blocks.2")
WEIGHTS, ACTIVATIONS = WeightScheme(clip="mse"), ActivationScheme()


class Model(nn.Module):
    """Layers before, between and after its blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.between, self.last = (nn.Linear(8, 8) for _ in range(3))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(self.between(x))
        return self.last(x)


def batches() -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(5, 8, generator=random)} for _ in range(4)]


def of_blocks(model: Model, inputs: Any = None, **options: Any) -> dict[str, PackedLayer]:
    found: dict[str, PackedLayer] = {}
    own = dict(zip(NAMES, model.blocks, strict=True))
    given = {"load": lambda name: copy.deepcopy(own[name]), "save": found.__setitem__, **options}
    chosen = targets(model, ACTIVATIONS)
    gptq_blocks(model, NAMES, batches() if inputs is None else inputs, chosen, WEIGHTS, **given)
    return found


@pytest.mark.parametrize("max_bytes", [2**31, 4 * 8**2])  # all layers of a block at a time, or one
def test_equals_the_whole_model(max_bytes: int) -> None:
    whole = Model()
    prepare(whole, WEIGHTS, ACTIVATIONS)
    gptq_initialize(whole, batches)
    convert(whole)
    expected, found = dict(named_layers(whole, PackedLayer)), of_blocks(Model(), max_bytes=max_bytes)
    assert set(found) == set(expected)
    for name, layer in expected.items():
        assert torch.equal(found[name].weight_packed, layer.weight_packed), name
        assert torch.equal(found[name].weight_scale, layer.weight_scale), name


def test_one_block_at_a_time() -> None:
    model, loaded = Model(), []
    own = dict(zip(NAMES, model.blocks, strict=True))

    def load(name: str) -> nn.Module:
        gc.collect()
        assert [each() for each in loaded if each() is not None] == []
        block = copy.deepcopy(own[name])
        loaded.append(weakref.ref(block))
        return block

    of_blocks(model, load=load, save=lambda name, layer: None)
    assert len(loaded) == 3


def test_what_is_wrong_names_the_block() -> None:
    model = Model()
    with torch.no_grad():
        model.between.bias[0] = torch.inf
    with pytest.raises(ValueError, match=r"block blocks\.0: its inputs from batch 1 are not finite"):
        of_blocks(model)
    with pytest.raises(ValueError, match="no batches; give at least one"):
        of_blocks(Model(), [])


def test_a_layer_that_no_batch_reaches_names_the_block() -> None:
    model = Model()
    model.blocks[1].forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"block blocks\.1: no input of 0 was seen"):
        of_blocks(model)
