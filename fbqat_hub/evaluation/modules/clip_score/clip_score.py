"""CLIP score, as a module of Hugging Face `evaluate`."""

from typing import Any

import datasets
import evaluate

from fbqat_hub.evaluation.modules import answer, saved
from fbqat_hub.evaluation.suite import measure_prompted


class CLIPScore(evaluate.Metric):
    """100 max(cos(picture, prompt), 0), mean over the pictures."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="100 max(cos(picture, prompt), 0), mean over the pictures.",
            citation="Hessel et al. 2021, arXiv 2104.08718",
            inputs_description="predictions: PIL pictures or paths; references: the prompt of each.",
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Value("string")}),
        )

    def _compute(
        self, predictions: list[Any], references: list[str], device: str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        with saved(predictions) as (files,):
            return answer("clip_score", measure_prompted("clip_score", files, references, device=device, seed=seed))
