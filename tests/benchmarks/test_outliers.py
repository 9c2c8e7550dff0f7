"""Outlier channels: large in the weights and the activations, invisible in what the teacher predicts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.method.outliers import FACTOR, outlier_channels
from fbqat_hub.families import FAMILIES
from fbqat_hub.pipelines import load_pipeline
from tests.conftest import MOST_FAMILIES, call_of


@pytest.mark.parametrize("family", MOST_FAMILIES)
@torch.no_grad()
def test_predictions_keep_every_bit_and_the_weights_come_back(family: str, teacher_of: Callable[[str], Path]) -> None:
    rules, pipeline = FAMILIES[family], load_pipeline(teacher_of(family))
    model = pipeline.transformer.eval()
    latents = rules.encode_images(pipeline, torch.rand(2, 3, 32, 32) * 2 - 1)
    conditioning = rules.encode_prompts(pipeline, ["red", "dark blue"], call_of(family, pipeline))
    noisy, timestep = rules.noisy(pipeline.scheduler, latents, torch.randn_like(latents), torch.tensor([0.25, 0.75]))
    inputs = rules.denoiser_inputs(noisy, timestep, conditioning)
    before, expected = copy.deepcopy(model.state_dict()), rules.predict(model, inputs)
    with outlier_channels(model):
        inside = model.state_dict()
        assert torch.equal(rules.predict(model, inputs), expected)
        ratios = torch.cat(
            [
                (weight.norm(dim=0) / before[name].norm(dim=0))
                for name, weight in inside.items()
                if name.endswith(("to_out.0.weight", "to_add_out.weight"))
            ]
        )
    assert {round(ratio, 4) for ratio in ratios.tolist()} == {1 / FACTOR, 1.0, FACTOR}
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_model_without_such_channels_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="Sequential has no attention with to_v and to_out"),
        outlier_channels(nn.Sequential(nn.Linear(2, 2))),
    ):
        pass
