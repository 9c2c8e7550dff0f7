"""FID by the clean-fid protocol, as a module of Hugging Face `evaluate`."""

import datasets
import evaluate

from fbqat_hub.evaluation.modules import base


class FID(base.PictureMetric):
    """Fréchet distance on Inception features, resized as clean-fid does."""

    metric = "fid"

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="Heusel et al. 2017, arXiv 1706.08500; Parmar et al. 2022, arXiv 2104.11222",
            inputs_description="predictions, references: two sets of PIL pictures or paths, as many of each.",
            features=datasets.Features(base.TWO_SETS),
        )
