"""ImageReward, as a module of Hugging Face `evaluate`."""

from typing import Any

import datasets
import evaluate

from fbqat_hub.evaluation.modules import answer, saved
from fbqat_hub.evaluation.suite import measure_prompted


class ImageReward(evaluate.Metric):
    """ImageReward-v1.0, mean over the pictures."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="ImageReward-v1.0, mean over the pictures.",
            citation="Xu et al. 2023, arXiv 2304.05977",
            inputs_description="predictions: PIL pictures or paths; references: the prompt of each.",
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Value("string")}),
        )

    def _compute(
        self, predictions: list[Any], references: list[str], device: str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        with saved(predictions) as (files,):
            return answer("image_reward", measure_prompted("image_reward", files, references, device=device, seed=seed))
