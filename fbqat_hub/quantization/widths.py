"""Which layer gets how many bits: the least expected damage that a budget of stored bits allows.

Each layer takes one of a few widths, with a score (what the model loses, `sensitivity`) and a cost (bits stored) at
each. Choosing the widths with the least sum of scores is a multiple-choice knapsack. Costs of a model are multiples of
a large number of bits, so it is solved exactly, by dynamic programming over the budget in that unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

WIDTHS = (4, 8)
# Layers x budget in units that are held at most, 8 bytes each; beyond it the unit is coarser.
_CELLS = 2**25


def widths_of_average(
    scores: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], average_bits: float
) -> dict[str, int]:
    """The best widths whose codes have at most ``average_bits`` a weight on average; scales do not count.

    Args:
        scores: layer -> width -> what the model loses. Every layer has the same widths.
        sizes: weights of the same layers.

    Raises:
        ValueError: an average below the smallest width or above the largest.

    >>> sizes = {"a": 64, "b": 64, "c": 64}
    >>> widths_of_average({"a": {4: 1.0, 8: 0.1}, "b": {4: 5.0, 8: 0.1}, "c": {4: 2.0, 8: 0.0}}, sizes, 5.5)
    {'a': 4, 'b': 8, 'c': 4}
    """
    widths = _widths(scores)
    if not widths[0] <= average_bits <= widths[-1]:
        raise ValueError(
            f"average_bits is {average_bits}; with widths of {' and '.join(map(str, widths))} bits it can be from "
            f"{widths[0]} to {widths[-1]}."
        )
    costs = {name: {bits: bits * sizes[name] for bits in widths} for name in scores}
    # a hair more, or 4.1 x 10 weights would be 40 bits
    budget = math.floor(average_bits * sum(sizes.values()) * (1 + 1e-12))
    return choose_widths(scores, costs, budget)


def choose_widths(
    scores: Mapping[str, Mapping[int, float]], costs: Mapping[str, Mapping[int, int]], budget: int
) -> dict[str, int]:
    """The widths with the least sum of scores whose costs are within the budget; of equal sums the cheapest.

    The same scores give the same widths. It is exact while layers x budget, in units of the costs' greatest common
    divisor, is within 2^25; beyond that costs are rounded up to a coarser unit.

    Args:
        scores: layer -> width -> score.
        costs: layer -> width -> cost, whole, of the same layers and widths.
        budget: of costs, in total.

    Raises:
        ValueError: no choice is within the budget, or a score is not finite.
    """
    for name, by_width in scores.items():
        if set(by_width) != set(costs[name]) or not all(math.isfinite(score) for score in by_width.values()):
            raise ValueError(f"{name} needs a finite score and a cost at each width; it has {dict(by_width)}.")
    cheapest = {name: min(by_width.values()) for name, by_width in costs.items()}
    room = budget - sum(cheapest.values())
    if room < 0:
        raise ValueError(f"the budget is {budget}; the cheapest widths cost {sum(cheapest.values())}.")
    best = {
        name: min(by_width, key=lambda bits: (by_width[bits], costs[name][bits])) for name, by_width in scores.items()
    }
    more = {name: {bits: cost - cheapest[name] for bits, cost in by_width.items()} for name, by_width in costs.items()}
    if sum(more[name][bits] for name, bits in best.items()) <= room:
        return best
    unit = math.gcd(*(cost for by_width in more.values() for cost in by_width.values()))
    unit *= max(1, -(-len(more) * (room // unit + 1) // _CELLS))
    units = {name: {bits: -(-cost // unit) for bits, cost in by_width.items()} for name, by_width in more.items()}
    return _knapsack(scores, {name: units[name] for name in scores}, room // unit)


def _knapsack(
    scores: Mapping[str, Mapping[int, float]], units: Mapping[str, Mapping[int, int]], room: int
) -> dict[str, int]:
    # least[r]: the least sum of the layers so far with at most r units; the choices that gave it are kept to walk back
    least = torch.zeros(room + 1, dtype=torch.float64)
    choices: list[Tensor] = []
    for name, by_width in scores.items():
        options = torch.full((len(by_width), room + 1), math.inf, dtype=torch.float64)
        for option, bits in zip(options, _by_cost(units[name]), strict=True):
            cost = units[name][bits]
            if cost <= room:
                option[cost:] = least[: room + 1 - cost] + by_width[bits]
        least = options.amin(0)
        choices.append(options.argmin(0).to(torch.uint8))  # of equals the first, which is the cheapest
    left = int(least.argmin())
    chosen: dict[str, int] = {}
    for name, choice in zip(reversed(list(units)), reversed(choices), strict=True):
        chosen[name] = _by_cost(units[name])[int(choice[left])]
        left -= units[name][chosen[name]]
    return {name: chosen[name] for name in scores}


def _by_cost(by_width: Mapping[int, int]) -> list[int]:
    return sorted(by_width, key=lambda bits: (by_width[bits], bits))


def average_width(widths: Mapping[str, int], sizes: Mapping[str, int]) -> float:
    """Bits a weight on average, scales not counted."""
    return sum(bits * sizes[name] for name, bits in widths.items()) / sum(sizes[name] for name in widths)


def _widths(scores: Mapping[str, Mapping[int, float]]) -> list[int]:
    if not scores:
        raise ValueError("no layers to choose widths for.")
    first, *others = (sorted(by_width) for by_width in scores.values())
    if not first or any(widths != first for widths in others):
        raise ValueError("every layer needs a score at the same widths.")
    return first
