"""CLIP-FID, as a module of Hugging Face `evaluate`."""

import datasets
import evaluate

from fbqat_hub.evaluation.modules import base


class CLIPFID(base.PictureMetric):
    """Fréchet distance on CLIP ViT-B/32 image embeddings."""

    metric = "clip_fid"

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="Kynkäänniemi et al. 2023, arXiv 2203.06026",
            inputs_description="predictions, references: two sets of PIL pictures or paths, as many of each.",
            features=datasets.Features(base.TWO_SETS),
        )
