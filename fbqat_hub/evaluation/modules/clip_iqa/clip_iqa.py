"""CLIP-IQA, as a module of Hugging Face `evaluate`."""

from typing import Any

import datasets
import evaluate

from fbqat_hub.evaluation.modules import answer, saved
from fbqat_hub.evaluation.suite import measure_single


class CLIPIQA(evaluate.Metric):
    """Mean over the pictures, in [0, 1]: "Good photo." against "Bad photo"."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="'Good photo.' against 'Bad photo.', mean over the pictures.",
            citation="Wang et al. 2023, arXiv 2207.12396",
            inputs_description="predictions: PIL pictures or paths.",
            features=datasets.Features({"predictions": datasets.Image()}),
        )

    def _compute(self, predictions: list[Any], device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        with saved(predictions) as (files,):
            return answer("clip_iqa", measure_single("clip_iqa", files, device=device, seed=seed))
