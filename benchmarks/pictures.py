"""How near pictures of a tiny pipeline are to others of the same seeds, as a record of `integration.json`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fbqat_hub.evaluation.metrics import psnr
from fbqat_hub.evaluation.results import Record, versions
from fbqat_hub.training.recipe import Recipe

RESULTS = Path(__file__).parent / "results" / "integration.json"


def psnr_record(recipe: Recipe, pictures: Tensor, wanted: Tensor, *packages: str, command: str, **extra: Any) -> Record:
    """Mean PSNR of a model quantized without training; equal pictures have none and are counted.

    Args:
        pictures, wanted: [N, 3, H, W] in [0, 1].
        packages: whose versions are recorded beside the usual ones.
        extra: of the record.
    """
    values = psnr(pictures, wanted)
    finite = [float(value) for value in values if torch.isfinite(value)]
    return Record(
        suite="integration",
        family=recipe.family,
        method="ptq-mse",
        metric="psnr",
        value=statistics.fmean(finite),
        n=len(finite),
        seed=0,
        spread=statistics.stdev(finite),
        command=command,
        versions=versions(*packages),
        extra={**extra, "equal": len(values) - len(finite)},
    )
