"""Every family: layer groups that mean something, batches that its denoiser takes, its pipeline's own conditioning."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import diffusers
import pytest
import torch

from fbqat_hub.families import FAMILIES, family_of, get_family
from fbqat_hub.families.base import logit_normal
from fbqat_hub.integrations.diffusers import load_pipeline
from fbqat_hub.quantization.convert import quantizable
from tests.conftest import CALL

PIPELINES = {"sana": "tiny_sana"}


@pytest.fixture(params=FAMILIES)
def family_and_pipeline(request: pytest.FixtureRequest):
    """A family with the tiny pipeline of its class."""
    folder: Path = request.getfixturevalue(PIPELINES[request.param])
    return FAMILIES[request.param], load_pipeline(folder)


def test_looked_up_by_name_and_by_pipeline() -> None:
    for name, family in FAMILIES.items():
        assert get_family(name) is family
        assert family_of(family.pipeline_class) is family
        assert hasattr(diffusers, family.pipeline_class)


@pytest.mark.parametrize(("look_up", "name"), [(get_family, "dalle"), (family_of, "DallePipeline")])
def test_unknown_family_names_the_known(look_up, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*; supported.*(sana|SanaPipeline)"):
        look_up(name)


def test_layer_groups(family_and_pipeline) -> None:
    """Groups are of real layers; "all" is all; attention and feed-forward share none and lie within the blocks."""
    family, pipeline = family_and_pipeline
    names = list(quantizable(pipeline.transformer))
    groups = {
        group: {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}
        for group, patterns in family.layer_groups.items()
    }
    assert all(groups.values())
    assert groups["all"] == set(names)
    assert not groups["attention"] & groups["feed_forward"]
    assert groups["attention"] | groups["feed_forward"] <= groups["blocks"] < groups["all"]
    for pattern in family.activation_overrides:
        assert any(fnmatchcase(name, pattern) for name in names)


@torch.no_grad()
def test_batch_goes_through_the_denoiser(family_and_pipeline) -> None:
    family, pipeline = family_and_pipeline
    random = torch.Generator().manual_seed(0)
    latents = family.encode_images(pipeline, torch.rand(2, 3, 32, 32, generator=random) * 2 - 1)
    conditioning = family.encode_prompts(pipeline, ["red", "dark blue"], CALL)
    assert {len(value) for value in conditioning.values()} == {2}
    noise = torch.randn(latents.shape, generator=random)
    noisy, timestep = family.noisy(pipeline.scheduler, latents, noise, torch.tensor([0.1, 0.9]))
    assert timestep[0] < timestep[1]
    predicted = pipeline.transformer(**family.denoiser_inputs(noisy, timestep, conditioning), return_dict=False)[0]
    assert predicted.shape == latents.shape
    assert torch.isfinite(predicted).all()


def test_native_size_is_what_the_denoiser_draws(family_and_pipeline) -> None:
    family, pipeline = family_and_pipeline
    pipeline.set_progress_bar_config(disable=True)
    call = {**CALL, **family.native_size(pipeline)}
    image = pipeline("red", **call).images[0]
    assert image.size == (call["width"], call["height"])
    assert call["height"] == pipeline.transformer.config.sample_size * pipeline.vae_scale_factor


@torch.no_grad()
@pytest.mark.parametrize("left_out", [(), ("complex_human_instruction",), ("max_sequence_length",)])
def test_sana_conditioning_is_that_of_the_pipeline_call(left_out: tuple[str, ...], tiny_sana: Path) -> None:
    """What the student is trained on is what the call computes, defaults (Sana's long instruction) included."""
    pipeline = load_pipeline(tiny_sana)
    pipeline.set_progress_bar_config(disable=True)
    call = {name: value for name, value in CALL.items() if name not in left_out} | {"guidance_scale": 1.0}
    seen = {}
    pipeline.transformer.register_forward_pre_hook(lambda _, __, kwargs: seen.update(kwargs), with_kwargs=True)
    pipeline("dark red", **call)
    conditioning = get_family("sana").encode_prompts(pipeline, ["dark red"], call)
    for name, value in conditioning.items():
        assert torch.equal(seen[name], value), name


def test_sana_noise_schedule() -> None:
    """Flow matching: x_t = (1 - sigma) x_0 + sigma noise, sigma = 3 t / (1 + 2 t) at shift 3, timestep 1000 sigma."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    latents, noise = torch.full((1, 1, 2, 2), 2.0), torch.full((1, 1, 2, 2), -2.0)
    noisy, timestep = get_family("sana").noisy(scheduler, latents, noise, torch.tensor([0.5]))
    assert timestep.item() == pytest.approx(750)  # t = 0.5, sigma = 1.5 / 2
    assert noisy.unique().item() == pytest.approx(2 - 4 * 0.75)


def test_logit_normal_is_the_normal_through_a_sigmoid() -> None:
    # Phi(1) = 0.8413447, sigmoid(1) = 0.7310586
    assert logit_normal(torch.tensor([0.5, 0.8413447])).tolist() == pytest.approx([0.5, 0.7310586], abs=1e-5)
