"""CLIP-IQA, as a module of Hugging Face `evaluate`."""

import datasets
import evaluate

from fbqat_hub.evaluation.modules import base


class CLIPIQA(base.PictureMetric):
    """Mean over the pictures, in [0, 1]: "Good photo." against "Bad photo"."""

    metric = "clip_iqa"

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="Wang et al. 2023, arXiv 2207.12396",
            inputs_description="predictions: PIL pictures or paths.",
            features=datasets.Features(base.ALONE),
        )
