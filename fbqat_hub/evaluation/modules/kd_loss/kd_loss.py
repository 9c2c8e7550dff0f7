"""Held-out distillation loss, over all draws and over the noise level, as a module of Hugging Face `evaluate`."""

from typing import Any

import datasets
import evaluate

from fbqat_hub.evaluation.modules import answer
from fbqat_hub.evaluation.suite import of_samples, of_timesteps


class DistillationLoss(evaluate.Metric):
    """Mean squared difference of the denoisers' outputs, mean over the draws."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean squared difference of student and teacher outputs, mean over the draws.",
            citation="",
            inputs_description="predictions, references: the student's and the teacher's output of a draw as a flat "
            "list of numbers; timesteps: of the draws.",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Sequence(datasets.Value("float32")),
                    "timesteps": datasets.Value("float32"),
                }
            ),
        )

    def _compute(
        self,
        predictions: list[list[float]],
        references: list[list[float]],
        timesteps: list[float],
        bins: int = 10,
        seed: int = 0,
    ) -> dict[str, Any]:
        losses = [
            sum((a - b) ** 2 for a, b in zip(student, teacher, strict=True)) / len(student)
            for student, teacher in zip(predictions, references, strict=True)
        ]
        found = answer("kd_loss", lambda: of_samples(losses, seed=seed))
        return {**found, "by_timestep": of_timesteps(losses, timesteps, bins=bins, seed=seed)}
