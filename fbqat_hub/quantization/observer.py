"""Activation ranges from calibration: mean +- 3 sigma (the paper), min-max, percentile."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

# An input that is always 0 would give a scale of 0.
MIN_RANGE = 1e-6

RangeRule = Literal["mean_3sigma", "min_max", "percentile"]


class RangeObserver:
    """Collects the statistics of one layer's input over calibration batches.

    Mean and variance are exact (pooled in float64). Percentiles come from a random sample of at most 2^18 values, as
    many of each batch; it is drawn from a generator of its own, so that a result does not depend on a random state.

    Args:
        name: whose input it is, for error messages.
    """

    _SAMPLE = 2**18

    def __init__(self, name: str = "the layer") -> None:
        self.name = name
        self.count = 0
        self.mean = 0.0
        self._squares = 0.0  # sum of squared distances to the mean
        self.low, self.high = math.inf, -math.inf
        self._samples: list[Tensor] = []  # of each batch, in random order
        self._per_batch = self._SAMPLE
        self._random = torch.Generator().manual_seed(0)

    def observe(self, values: Tensor) -> None:
        """Add one batch (any float shape)."""
        flat = values.detach().flatten()
        if not flat.numel():
            return
        if not bool(torch.isfinite(flat).all()):
            raise ValueError(f"the input of {self.name} is not finite during calibration; check the model in float32.")
        # Chan et al. 1979: pooling of means and squared distances.
        wide = flat.double()
        count, mean = flat.numel(), wide.mean().item()
        squares = (wide - mean).square().sum().item()
        total, distance = self.count + count, mean - self.mean
        self._squares += squares + distance**2 * self.count * count / total
        self.mean += distance * count / total
        self.count = total
        self.low, self.high = min(self.low, flat.min().item()), max(self.high, flat.max().item())
        self._add_sample(flat)

    def _add_sample(self, flat: Tensor) -> None:
        count = len(flat)
        if count > self._per_batch:
            indices = torch.randint(count, (self._per_batch,), generator=self._random)
        else:
            indices = torch.randperm(count, generator=self._random)
        self._samples.append(flat[indices.to(flat.device)].float().cpu())
        while sum(map(len, self._samples)) > self._SAMPLE:
            self._per_batch //= 2
            self._samples = [sample[: self._per_batch] for sample in self._samples]

    def range(self, rule: RangeRule = "min_max", percentile: float = 99.9) -> tuple[float, float]:
        """The range (low, high) of real values, always containing 0.

        Args:
            rule: "mean_3sigma" is mean +- 3 standard deviations, cut to what was seen; "min_max" is what was seen;
                "percentile" leaves out (100 - percentile)/2 percent at each end.
        """
        if self.count == 0:
            raise ValueError(f"no input of {self.name} was observed; run calibration batches through the model first.")
        if rule == "mean_3sigma":
            sigma = math.sqrt(self._squares / self.count)
            low, high = max(self.low, self.mean - 3 * sigma), min(self.high, self.mean + 3 * sigma)
        elif rule == "min_max":
            low, high = self.low, self.high
        elif rule == "percentile":
            if not 0 < percentile <= 100:
                raise ValueError(f"percentile is {percentile}; it must be above 0 and at most 100.")
            tail = (1 - percentile / 100) / 2
            low, high = torch.quantile(torch.cat(self._samples), torch.tensor([tail, 1 - tail])).tolist()
        else:
            raise ValueError(f"range rule is {rule!r}; allowed: {', '.join(map(repr, get_args(RangeRule)))}.")
        return min(low, 0.0), max(high, 0.0)


def affine_parameters(low: float, high: float, bits: int) -> tuple[float, int]:
    """Scale and zero_point of unsigned codes 0 .. 2^bits - 1 that cover [low, high] and 0.

    Returns:
        scale, a number that float32 holds, and zero_point; real = scale * (q - zero_point).

    >>> affine_parameters(0.5, 255.0, 8)
    (1.0, 0)
    """
    low, high = min(low, 0.0), max(high, 0.0)
    levels = 2**bits - 1
    scale = torch.tensor(max(high - low, MIN_RANGE) / levels, dtype=torch.float32).item()
    return scale, min(levels, max(0, round(-low / scale)))
