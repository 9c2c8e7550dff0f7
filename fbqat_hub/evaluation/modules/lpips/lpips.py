"""LPIPS on AlexNet, as a module of Hugging Face `evaluate`."""

from typing import Any

import datasets
import evaluate

from fbqat_hub.evaluation.modules import answer, saved
from fbqat_hub.evaluation.suite import measure_pairs


class LPIPS(evaluate.Metric):
    """Mean over the pairs; lower is more alike."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean over the pairs; lower is more alike.",
            citation="Zhang et al. 2018, arXiv 1801.03924",
            inputs_description="predictions, references: PIL pictures or paths, in one order and of one size.",
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()}),
        )

    def _compute(
        self, predictions: list[Any], references: list[Any], device: str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        with saved(predictions, references) as (files, others):
            return answer("lpips", measure_pairs("lpips", files, others, device=device, seed=seed))
