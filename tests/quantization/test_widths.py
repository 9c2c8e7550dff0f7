import itertools
import random

import pytest
import torch

from fbqat_hub.quantization import widths as module
from fbqat_hub.quantization.widths import (
    LayerSize,
    average_width,
    choose_widths,
    widths_of_average,
    widths_of_bytes,
)


def problem(seed: int, layers: int, widths: tuple[int, ...] = (4, 8)) -> tuple[dict, dict[str, LayerSize]]:
    rng = random.Random(seed)
    sizes = {
        f"layer{i}": LayerSize(rng.choice((8, 16, 48)), rng.choice((7, 12, 32)), rng.choice((1, 3)))
        for i in range(layers)
    }
    scores = {name: {bits: rng.random() * 4.0**-bits for bits in widths} for name in sizes}
    return scores, sizes


def brute_force(scores: dict, costs: dict, budget: int) -> float:
    choices = itertools.product(
        *[[(score, costs[name][bits]) for bits, score in by.items()] for name, by in scores.items()]
    )
    return min(sum(score for score, _ in choice) for choice in choices if sum(cost for _, cost in choice) <= budget)


def total(scores: dict, chosen: dict) -> float:
    return sum(scores[name][bits] for name, bits in chosen.items())


@pytest.mark.parametrize("average", [4, 4.2, 4.5, 5.3, 7.9, 8])
@pytest.mark.parametrize("widths", [(4, 8), (3, 4, 6, 8)])
def test_an_average_gets_the_best_widths_that_there_are(average, widths):
    for seed in range(5):
        scores, sizes = problem(seed, 8 if len(widths) == 2 else 5, widths)
        chosen = widths_of_average(scores, sizes, average)
        assert list(chosen) == list(scores)
        assert average_width(chosen, sizes) <= average
        costs = {name: {bits: bits * sizes[name].weights for bits in widths} for name in scores}
        budget = average * sum(size.weights for size in sizes.values())
        assert total(scores, chosen) == pytest.approx(brute_force(scores, costs, budget), rel=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_bytes_count_padding_and_scales(share):
    scores, sizes = problem(3, 8)
    costs = {name: {bits: size.stored_bits(bits) for bits in (4, 8)} for name, size in sizes.items()}
    least, most = (sum(by[bits] for by in costs.values()) for bits in (4, 8))
    budget = int(least + share * (most - least)) // 8
    chosen = widths_of_bytes(scores, sizes, budget)
    assert sum(costs[name][bits] for name, bits in chosen.items()) <= 8 * budget
    assert total(scores, chosen) == pytest.approx(brute_force(scores, costs, 8 * budget), rel=1e-12)


def test_the_extremes_are_uniform():
    scores, sizes = problem(1, 8)
    assert set(widths_of_average(scores, sizes, 4).values()) == {4}
    assert set(widths_of_average(scores, sizes, 8).values()) == {8}


def test_nothing_is_spent_where_it_does_not_help():
    sizes = {"a": LayerSize(8, 8), "b": LayerSize(8, 8)}
    assert widths_of_average({"a": {4: 0.0, 8: 0.0}, "b": {4: 1.0, 8: 0.5}}, sizes, 8) == {"a": 4, "b": 8}
    assert widths_of_average({"a": {4: 1.0, 8: 1.0}, "b": {4: 1.0, 8: 0.5}}, sizes, 6) == {"a": 4, "b": 8}


def test_order_of_layers_and_widths_does_not_matter():
    scores, sizes = problem(5, 10)
    chosen = widths_of_average(scores, sizes, 5)
    reordered = {name: dict(reversed(scores[name].items())) for name in reversed(scores)}
    assert widths_of_average(reordered, dict(reversed(sizes.items())), 5) == chosen


def test_a_coarse_unit_stays_within_the_budget_and_near_the_best(monkeypatch):
    scores, sizes = problem(7, 40)
    best = total(scores, widths_of_average(scores, sizes, 5))
    monkeypatch.setattr(module, "_CELLS", 40 * 200)
    chosen = widths_of_average(scores, sizes, 5)
    assert average_width(chosen, sizes) <= 5
    assert best <= total(scores, chosen) <= 1.1 * best


def test_as_many_layers_as_a_large_model_has():
    scores, sizes = problem(9, 500)
    chosen = widths_of_average(scores, sizes, 4.5)
    assert 4.45 < average_width(chosen, sizes) <= 4.5


@pytest.mark.parametrize("average", [3.9, 8.1, float("nan")])
def test_an_average_out_of_range(average):
    scores, sizes = problem(1, 3)
    with pytest.raises(ValueError, match=r"average_bits is .* from 4 to 8"):
        widths_of_average(scores, sizes, average)


def test_bytes_too_few():
    scores, sizes = problem(1, 3)
    least = sum(size.stored_bits(4) for size in sizes.values()) // 8
    assert set(widths_of_bytes(scores, sizes, least).values()) == {4}
    with pytest.raises(ValueError, match=f"at 4 bits everywhere they take {least}"):
        widths_of_bytes(scores, sizes, least - 1)


def test_scores_that_cannot_be_compared():
    sizes = {"a": LayerSize(8, 8), "b": LayerSize(8, 8)}
    with pytest.raises(ValueError, match="no layers"):
        widths_of_average({}, sizes, 4.5)
    with pytest.raises(ValueError, match="same widths"):
        widths_of_average({"a": {4: 1.0, 8: 0.0}, "b": {4: 1.0}}, sizes, 4.5)
    with pytest.raises(ValueError, match="b needs a finite score"):
        widths_of_average({"a": {4: 1.0, 8: 0.0}, "b": {4: float("nan"), 8: 0.0}}, sizes, 4.5)
    with pytest.raises(ValueError, match="budget is 10; the cheapest widths cost 20"):
        choose_widths({"a": {4: 1.0}}, {"a": {4: 20}}, 10)


def test_stored_bits_are_those_of_a_packed_layer():
    from fbqat_hub.quantization import PackedLinear

    for bits, in_features, group in itertools.product((3, 4, 5, 8), (7, 32, 64), (None, 32)):
        layer = PackedLinear(in_features, 5, weight_bits=bits, group_size=group)
        size = LayerSize(5, in_features, layer.weight_scale.numel() // 5)
        assert size.stored_bits(bits) == 8 * (layer.weight_packed.nbytes + layer.weight_scale.nbytes)
        assert size.weights == torch.Size([5, in_features]).numel()
