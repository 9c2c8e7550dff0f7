"""Structural similarity, as a module of Hugging Face `evaluate`."""

import datasets
import evaluate

from fbqat_hub.evaluation.modules import base


class SSIM(base.PictureMetric):
    """Mean over the pairs, in [-1, 1]."""

    metric = "ssim"

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="Wang et al. 2004, 10.1109/TIP.2003.819861",
            inputs_description="predictions, references: PIL pictures or paths, in one order and of one size.",
            features=datasets.Features(base.TWO_SETS),
        )
