"""Peak signal-to-noise ratio, as a module of Hugging Face `evaluate`."""

import datasets
import evaluate

from fbqat_hub.evaluation.modules import base


class PSNR(base.PictureMetric):
    """Mean over the pairs, in dB."""

    metric = "psnr"

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            inputs_description="predictions, references: PIL pictures or paths, in one order and of one size.",
            features=datasets.Features(base.TWO_SETS),
        )
