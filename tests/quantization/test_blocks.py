"""A forward that goes block by block is the forward, and what cannot go so says it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fbqat_hub.quantization.blocks import BlockWalk, moved_tensors


class Two(nn.Module):
    """A model with something before, between and after its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks, self.last = (
            nn.Linear(4, 4),
            nn.ModuleList(nn.Linear(4, 4) for _ in range(2)),
            nn.Tanh(),
        )

    def forward(self, x: Tensor, order: tuple[int, ...] = (0, 1)) -> Tensor:
        x = self.first(x)
        for index in order:
            x = self.blocks[index](x) + 1
        return self.last(x)


NAMES = ("blocks.0", "blocks.1")


@pytest.fixture
def model() -> Two:
    torch.manual_seed(0)
    return Two()


def test_batches_go_through_each_block_before_the_next(model: Two) -> None:
    batches = [{"x": torch.randn(3, 4)} for _ in range(3)]
    wanted = [model(**batch) for batch in batches]
    blocks, seen = list(model.blocks), []

    with BlockWalk(model, NAMES, batches) as walk:
        assert walk.blocks == blocks
        for number, block in enumerate(blocks):

            def outputs(number: int = number, block: nn.Module = block) -> Any:
                for call in walk.calls:
                    seen.append(number)
                    yield call.run(block)

            results = walk.advance(outputs())
        assert walk.calls == []
    assert seen == [0, 0, 0, 1, 1, 1]
    assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))
    assert not any(each.requires_grad for each in results)
    assert torch.is_grad_enabled()
    assert list(model.blocks) == blocks


def test_a_walk_that_is_left_gives_the_blocks_back(model: Two) -> None:
    blocks = list(model.blocks)
    with BlockWalk(model, NAMES, [{"x": torch.zeros(1, 4)}] * 2) as walk:
        walk.advance(call.run(walk.blocks[0]) for call in list(walk.calls))
    assert list(model.blocks) == blocks
    assert torch.is_grad_enabled()


def test_a_run_without_gradients_that_is_left_does_not_switch_them_off(model: Two) -> None:
    run = torch.no_grad()(lambda batch: model(**batch))
    with BlockWalk(model, NAMES, [{"x": torch.zeros(1, 4)}] * 2, run=run) as walk:
        walk.advance(call.run(walk.blocks[0]) for call in list(walk.calls))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("order", "came"), [((1, 0), "came to blocks.1"), ((), "came to the end"), ((0, 0), "came to blocks.0")]
)
def test_another_order_is_refused(model: Two, order: tuple[int, ...], came: str) -> None:
    blocks = list(model.blocks)
    batch = {"x": torch.zeros(1, 4), "order": order}
    with pytest.raises(ValueError, match=came), BlockWalk(model, NAMES, [batch]) as walk:
        walk.advance(call.run(walk.blocks[0]) for call in walk.calls)
    assert list(model.blocks) == blocks


def test_an_error_in_the_forward_comes_out(model: Two) -> None:
    blocks = list(model.blocks)
    walk = BlockWalk(model, NAMES, [{"x": torch.zeros(1, 5)}])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        walk.__enter__()
    assert list(model.blocks) == blocks


def test_only_floats_change_their_dtype() -> None:
    moved = moved_tensors({"x": [torch.ones(1)], "ids": (torch.ones(1, dtype=torch.int64), None)}, dtype=torch.bfloat16)
    assert moved["x"][0].dtype == torch.bfloat16
    assert moved["ids"][0].dtype == torch.int64
