"""CLIP score, as a module of Hugging Face `evaluate`."""

import datasets
import evaluate

from fbqat_hub.evaluation.modules import base


class CLIPScore(base.PictureMetric):
    """100 max(cos(picture, prompt), 0), mean over the pictures."""

    metric = "clip_score"

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="Hessel et al. 2021, arXiv 2104.08718",
            inputs_description="predictions: PIL pictures or paths; references: the prompt of each.",
            features=datasets.Features(base.WITH_PROMPTS),
        )
