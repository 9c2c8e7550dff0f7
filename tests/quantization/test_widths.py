import itertools
import random

import pytest

from fbqat_hub.quantization import widths as module
from fbqat_hub.quantization.widths import (
    average_width,
    choose_widths,
    widths_of_average,
)


def problem(seed: int, layers: int, widths: tuple[int, ...] = (4, 8)) -> tuple[dict, dict[str, int]]:
    rng = random.Random(seed)
    sizes = {f"layer{i}": rng.choice((8, 16, 48)) * rng.choice((7, 12, 32)) for i in range(layers)}
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
        costs = {name: {bits: bits * sizes[name] for bits in widths} for name in scores}
        budget = average * sum(sizes.values())
        assert total(scores, chosen) == pytest.approx(brute_force(scores, costs, budget), rel=1e-12)


def test_the_extremes_are_uniform():
    scores, sizes = problem(1, 8)
    assert set(widths_of_average(scores, sizes, 4).values()) == {4}
    assert set(widths_of_average(scores, sizes, 8).values()) == {8}


def test_nothing_is_spent_where_it_does_not_help():
    sizes = {"a": 64, "b": 64}
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


def test_scores_that_cannot_be_compared():
    sizes = {"a": 64, "b": 64}
    with pytest.raises(ValueError, match="no layers"):
        widths_of_average({}, sizes, 4.5)
    with pytest.raises(ValueError, match="same widths"):
        widths_of_average({"a": {4: 1.0, 8: 0.0}, "b": {4: 1.0}}, sizes, 4.5)
    with pytest.raises(ValueError, match="b needs a finite score"):
        widths_of_average({"a": {4: 1.0, 8: 0.0}, "b": {4: float("nan"), 8: 0.0}}, sizes, 4.5)
    with pytest.raises(ValueError, match="budget is 10; the cheapest widths cost 20"):
        choose_widths({"a": {4: 1.0}}, {"a": {4: 20}}, 10)
