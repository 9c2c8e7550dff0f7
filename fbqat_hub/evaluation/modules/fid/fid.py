"""FID by the clean-fid protocol, as a module of Hugging Face `evaluate`."""

from typing import Any

import datasets
import evaluate

from fbqat_hub.evaluation.modules import answer, saved
from fbqat_hub.evaluation.suite import features_of, measure_distance


class FID(evaluate.Metric):
    """Fréchet distance on Inception features, resized as clean-fid does."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Fréchet distance on Inception features, resized as clean-fid does.",
            citation="Heusel et al. 2017, arXiv 1706.08500; Parmar et al. 2022, arXiv 2104.11222",
            inputs_description="predictions, references: two sets of PIL pictures or paths, as many of each.",
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()}),
        )

    def _compute(
        self, predictions: list[Any], references: list[Any], device: str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        with saved(predictions, references) as (files, others):
            features = [features_of("fid", each, device=device) for each in (files, others)]
        return answer("fid", measure_distance("fid", *features))
