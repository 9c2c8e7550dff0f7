"""What the modules of pictures share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from fbqat_hub.evaluation.modules import answer, saved
from fbqat_hub.evaluation.suite import PROMPTED, SINGLE, measure
from fbqat_hub.inputs import checked_device

ALONE = {"predictions": datasets.Image()}
TWO_SETS = {"predictions": datasets.Image(), "references": datasets.Image()}
WITH_PROMPTS = {"predictions": datasets.Image(), "references": datasets.Value("string")}


class PictureMetric(evaluate.Metric):
    """A metric of `suite`; a module says its name, its source and what it takes.

    Attributes:
        metric: its name in `fbqat_hub.evaluation.suite`.
    """

    metric: str

    def _compute(
        self, predictions: Sequence[Any], references: Sequence[Any] = (), device: str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        how: dict[str, Any] = {"device": checked_device(device), "seed": seed}
        if self.metric in PROMPTED or self.metric in SINGLE:
            with saved(predictions) as (files,):
                return answer(self.metric, lambda: measure(self.metric, files, prompts=references, **how))
        with saved(predictions, references) as (files, others):
            return answer(self.metric, lambda: measure(self.metric, files, references=others, **how))
