"""Peak signal-to-noise ratio, as a module of Hugging Face `evaluate`."""

from typing import Any

import datasets
import evaluate

from fbqat_hub.evaluation.modules import answer, saved
from fbqat_hub.evaluation.suite import measure_pairs


class PSNR(evaluate.Metric):
    """Mean over the pairs, in dB."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean over the pairs, in dB.",
            citation="",
            inputs_description="predictions, references: PIL pictures or paths, in one order and of one size.",
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()}),
        )

    def _compute(
        self, predictions: list[Any], references: list[Any], device: str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        with saved(predictions, references) as (files, others):
            return answer("psnr", measure_pairs("psnr", files, others, device=device, seed=seed))
