"""Fréchet distance on the extractor that ships, as a module of Hugging Face `evaluate`."""

import datasets
import evaluate

from fbqat_hub.evaluation.modules import base


class FD(base.PictureMetric):
    """On openmoji-cnn-1, which is not Inception: this is no FID."""

    metric = "fd"

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="Dowson & Landau 1982",
            inputs_description="predictions, references: two sets of PIL pictures or paths, as many of each.",
            features=datasets.Features(base.TWO_SETS),
        )
