"""CLIP-FID, as a module of Hugging Face `evaluate`."""

from typing import Any

import datasets
import evaluate

from fbqat_hub.evaluation.modules import answer, saved
from fbqat_hub.evaluation.suite import features_of, measure_distance


class CLIPFID(evaluate.Metric):
    """Fréchet distance on CLIP ViT-B/32 image embeddings."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Fréchet distance on CLIP ViT-B/32 image embeddings.",
            citation="Kynkäänniemi et al. 2023, arXiv 2203.06026",
            inputs_description="predictions, references: two sets of PIL pictures or paths, as many of each.",
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()}),
        )

    def _compute(
        self, predictions: list[Any], references: list[Any], device: str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        with saved(predictions, references) as (files, others):
            features = [features_of("clip_fid", each, device=device) for each in (files, others)]
        return answer("clip_fid", measure_distance("clip_fid", *features))
