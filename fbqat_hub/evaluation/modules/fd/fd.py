"""Fréchet distance on the extractor that ships, as a module of Hugging Face `evaluate`."""

from typing import Any

import datasets
import evaluate

from fbqat_hub.evaluation.modules import answer, saved
from fbqat_hub.evaluation.suite import features_of, measure_distance


class FD(evaluate.Metric):
    """On openmoji-cnn-1, which is not Inception: this is no FID."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="On openmoji-cnn-1, which is not Inception: this is no FID.",
            citation="Dowson & Landau 1982",
            inputs_description="predictions, references: two sets of PIL pictures or paths, as many of each.",
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()}),
        )

    def _compute(
        self, predictions: list[Any], references: list[Any], device: str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        with saved(predictions, references) as (files, others):
            features = [features_of("fd", each, device=device) for each in (files, others)]
        return answer("fd", measure_distance("fd", *features))
