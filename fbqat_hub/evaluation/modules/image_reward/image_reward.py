"""ImageReward, as a module of Hugging Face `evaluate`."""

import datasets
import evaluate

from fbqat_hub.evaluation.modules import base


class ImageReward(base.PictureMetric):
    """ImageReward-v1.0, mean over the pictures."""

    metric = "image_reward"

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="Xu et al. 2023, arXiv 2304.05977",
            inputs_description="predictions: PIL pictures or paths; references: the prompt of each.",
            features=datasets.Features(base.WITH_PROMPTS),
        )
