import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fbqat_hub.quantization import WeightScheme
from fbqat_hub.quantization.quantize import quantize_weight
from fbqat_hub.quantization.sensitivity import output_sensitivity, rounding_errors, weight_sensitivity


class Net(nn.Module):
    """Two blocks on tokens, then a 1x1 convolution on a square of 4 of them."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Conv2d(8, 3, 1)
        self.checkpointed = checkpointed

    def block(self, x):
        return x + torch.nn.functional.silu(self.middle(x))

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        return self.last(x.mT.reshape(len(x), 8, 2, 2))


def net(**options) -> Net:
    torch.manual_seed(0)
    return Net(**options).eval()


def batches(count: int = 200, size: int = 1):
    random = torch.Generator().manual_seed(1)
    mixing = torch.randn(6, 6, generator=random)  # correlated inputs
    return [{"x": torch.randn(size, 4, 6, generator=random) @ mixing} for _ in range(count)]


def errors(model: Net, size: float = 1e-3) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(2)
    return {
        name: size * torch.randn(layer.weight.shape, generator=random)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


def predict(model, batch):
    return model(**batch)


def given(moves, scales={4: 1.0, 8: 0.1}):  # noqa: B006
    return {
        name: (lambda move=move: {bits: scale * move for bits, scale in scales.items()}) for name, move in moves.items()
    }


def measured(model: Net, moves, samples) -> dict[str, float]:
    """The mean squared change of the output when one weight moves, one layer at a time."""
    found = {}
    with torch.no_grad():
        for name, move in moves.items():
            other = copy.deepcopy(model)
            other.get_submodule(name).weight.add_(move)
            changes = [(predict(other, b) - predict(model, b)).square().mean() for b in samples]
            found[name] = torch.stack(changes).mean().item()
    return found


def test_scores_are_the_measured_errors_of_small_moves():
    model, samples = net(), batches()
    moves = errors(model)
    scores = output_sensitivity(model, given(moves), lambda: samples, predict, signs=8)
    for name, change in measured(model, moves, samples).items():
        assert scores[name][4] == pytest.approx(change, rel=0.15), (
            name
        )  # sqrt(2 / 1600) = 0.035, and the samples' spread
        assert scores[name][8] == pytest.approx(scores[name][4] / 100, rel=1e-4)


def test_scores_tell_layers_apart_at_the_size_of_rounding_errors():
    model, samples = net(), batches()
    with torch.no_grad():
        model.last.weight.mul_(8)
        model.middle.weight.mul_(0.3)
    weights = {name: layer.weight.detach() for name, layer in model.named_children()}
    steps = {name: weight.abs().max() / 7 for name, weight in weights.items()}
    moves = {name: (weight / steps[name]).round() * steps[name] - weight for name, weight in weights.items()}
    scores = output_sensitivity(model, given(moves), lambda: samples, predict)
    changes = measured(model, moves, samples)
    assert max(changes.values()) > 10 * min(changes.values())
    for name, change in changes.items():
        assert scores[name][4] == pytest.approx(change, rel=0.4), name


def test_errors_of_a_layer_that_is_used_twice_add_up_before_they_are_squared():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return self.layer(self.layer(x))

    torch.manual_seed(0)
    model, samples = Twice(), batches()
    moves = errors(model)
    scores = output_sensitivity(model, given(moves), lambda: samples, predict, signs=8)
    assert scores["layer"][4] == pytest.approx(measured(model, moves, samples)["layer"], rel=0.15)


def test_chunks_checkpointing_and_parameters_that_train_change_nothing():
    model, samples = net(), batches(3, size=2)
    before = output_sensitivity(model, given(errors(model)), lambda: samples, predict)
    in_chunks = output_sensitivity(model, given(errors(model)), lambda: samples, predict, max_bytes=1)
    saving = net(checkpointed=True).requires_grad_(False)
    assert in_chunks == before
    assert output_sensitivity(saving, given(errors(model)), lambda: samples, predict) == before
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_half_precision_gives_nearly_the_same():
    model, samples = net(), batches(20)
    before = output_sensitivity(model, given(errors(model)), lambda: samples, predict)
    half = [{"x": batch["x"].bfloat16()} for batch in samples]
    scores = output_sensitivity(model.bfloat16(), given(errors(model)), lambda: half, predict)
    for name, by_width in before.items():
        assert scores[name][4] == pytest.approx(by_width[4], rel=0.1)


def test_what_cannot_be_scored():
    model = net()
    moves = given(errors(model))
    with pytest.raises(ValueError, match="no layers"):
        output_sensitivity(model, {}, lambda: batches(1), predict)
    with pytest.raises(ValueError, match="no batches"):
        output_sensitivity(model, moves, list, predict)
    with pytest.raises(ValueError, match="signs is 0"):
        output_sensitivity(model, moves, lambda: batches(1), predict, signs=0)
    with pytest.raises(ValueError, match=r"error of first at 4 bits is \[2, 2\]"):
        output_sensitivity(model, {"first": lambda: {4: torch.zeros(2, 2)}}, lambda: batches(1), predict)
    with pytest.raises(ValueError, match="does not depend on last"):
        output_sensitivity(model, moves, lambda: batches(1), lambda m, b: m.middle(torch.tanh(m.first(b["x"]))))


def test_without_data_a_score_is_the_relative_error_of_the_weight():
    assert weight_sensitivity(torch.tensor([[3.0, 4.0]]), {4: torch.tensor([[0.0, 1.0]]), 8: torch.zeros(1, 2)}) == {
        4: pytest.approx(1 / 25),
        8: 0.0,
    }
    assert weight_sensitivity(torch.zeros(2, 2), {4: torch.zeros(2, 2)}) == {4: 0.0}


@pytest.mark.parametrize("clip", ["max_abs", "mse", "learned"])
@pytest.mark.parametrize("group_size", [None, 4])
def test_rounding_errors_are_those_of_the_codes_that_are_stored(clip, group_size):
    scheme = WeightScheme(clip=clip, group_size=group_size, granularity="per_group" if group_size else "per_channel")
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    errors = rounding_errors(weight[:, :, None, None], scheme, (4, 8))
    for bits, error in errors.items():
        codes, scales = quantize_weight(weight, replace(scheme, bits=bits))
        stored = codes.view(5, -1, group_size or 8) * scales.view(5, -1, 1)
        torch.testing.assert_close(error, stored.view(5, 8) - weight, atol=1e-6, rtol=0)
    assert errors[8].square().sum() < errors[4].square().sum() / 100
