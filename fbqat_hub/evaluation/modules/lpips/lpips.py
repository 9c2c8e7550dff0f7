"""LPIPS on AlexNet, as a module of Hugging Face `evaluate`."""

import datasets
import evaluate

from fbqat_hub.evaluation.modules import base


class LPIPS(base.PictureMetric):
    """Mean over the pairs; lower is more alike."""

    metric = "lpips"

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="Zhang et al. 2018, arXiv 1801.03924",
            inputs_description="predictions, references: PIL pictures or paths, in one order and of one size.",
            features=datasets.Features(base.TWO_SETS),
        )
