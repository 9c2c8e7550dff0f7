"""Every family: layer groups that mean something, batches that its denoiser takes, its pipeline's own conditioning."""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from torch import Tensor

from fbqat_hub.families import FAMILIES, Family, component_configs, family_of, family_of_denoiser, get_family, sd3
from fbqat_hub.families.base import logit_normal
from fbqat_hub.generation import changed_call
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.quantization.convert import quantizable
from fbqat_hub.training.teacher import RECIPES
from tests.conftest import MODELS, call_of, family_name, teacher_recipe


@pytest.fixture
def load(teacher_of: Callable[[str], Path]) -> Callable[[str], Any]:
    """``load(family)``: its tiny pipeline."""

    def loaded(family: str) -> Any:
        pipeline = load_pipeline(teacher_of(family))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return loaded


# these two have no line of a family file to themselves
ONLY_OTHER_SIZES = ("sana-1.5", "sd3.5-large")


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.slow) if name in ONLY_OTHER_SIZES else name for name in MODELS]
)
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def family_and_pipeline(model: str, load) -> tuple[Family, Any]:
    """A model's family with its tiny pipeline."""
    return FAMILIES[family_name(model)], load(model)


# pipelines that pack the latents of a call themselves
PACKS = {"flux2-klein", "z-image"}
# autoencoders of video
VIDEO = {"qwen-image"}
# arguments that the tiny pipelines need: the call's default is for the true size
OWN = {"max_area", "text_encoder_out_layers", "guidance_scale"}


def ramp(*shape: int) -> Tensor:
    """Distinct numbers from -1 to 1."""
    count = torch.Size(shape).numel()
    return torch.linspace(-1, 1, count).view(shape)


def random_pixels(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


# the list


def test_looked_up_by_name_and_by_pipeline() -> None:
    for name, family in FAMILIES.items():
        assert get_family(name) is family
        assert family_of(family.pipeline_class) is family
        assert family_of_denoiser(family.denoiser_class).denoiser_class == family.denoiser_class
    assert family_of_denoiser("SanaTransformer2DModel") is get_family("sana")
    assert family_of_denoiser("FluxTransformer2DModel") is get_family("flux")


@pytest.mark.parametrize(
    ("look_up", "name"), [(get_family, "dalle"), (family_of, "DallePipeline"), (family_of_denoiser, "Dalle2DModel")]
)
def test_unknown_family_names_the_known(look_up, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*; supported.*(sana|SanaPipeline|SanaTransformer2DModel)"):
        look_up(name)


@pytest.mark.parametrize("family", FAMILIES)
def test_has_a_teacher_of_its_own_class(family: str, load) -> None:
    """Of every class that it names, as diffusers has them."""
    pipeline, rules = load(family), FAMILIES[family]
    assert type(pipeline) is getattr(diffusers, rules.pipeline_class)
    assert type(pipeline.transformer) is getattr(diffusers, rules.denoiser_class)
    assert type(pipeline.vae) is getattr(diffusers, rules.autoencoder_class)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_teacher_is_of_a_family(recipe: Path) -> None:
    assert yaml.safe_load(recipe.read_text())["family"] in FAMILIES


def test_family_without_teacher_says_what_to_add() -> None:
    with pytest.raises(AssertionError, match=r"dalle has no teacher; add training/recipes/teachers/.*family: dalle"):
        teacher_recipe("dalle")


# what the loop asks of a family


def test_layer_groups(model: str, family_and_pipeline) -> None:
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
    rest = groups["blocks"] - groups["attention"] - groups["feed_forward"]
    modulation = ("*.norm*.linear", "*.adaLN_modulation.*", "*_mod.*")
    assert all(any(fnmatchcase(name, pattern) for pattern in modulation) for name in rest), rest
    needed = (*family.layer_groups.values(), family.activation_overrides, family.a16_layers)
    for patterns in needed[0 if model in FAMILIES else -2 :]:  # SD3.5-Large has no dual attention, say
        for pattern in patterns:
            assert any(fnmatchcase(name, pattern) for name in names), pattern


@torch.no_grad()
def test_shapes_are_known_before_anything_is_encoded(model: str, family_and_pipeline, monkeypatch) -> None:
    """What a plan counts on, from configs alone."""
    family, pipeline = family_and_pipeline
    monkeypatch.setattr(sd3, "_CLIP_TOKENS", 16)  # of the tiny tokenizer
    call, configs = call_of(model, pipeline), component_configs(pipeline)
    encoded = family.encode_prompts(pipeline, ["red", "dark blue"], call)
    shapes = family.conditioning_shapes(pipeline.transformer.config, call)
    assert {name: (2, *shape) for name, shape in shapes.items()} == {
        name: value.shape for name, value in encoded.items()
    }
    latents = family.encode_images(pipeline, random_pixels())
    assert (2, *family.latent_shape(configs, (32, 32))) == latents.shape


@torch.no_grad()
def test_batch_goes_through_the_denoiser(model: str, family_and_pipeline) -> None:
    """Through a train step's own calls: what comes out has the target's shape, and depends on the prompt."""
    family, pipeline = family_and_pipeline
    latents = family.encode_images(pipeline, random_pixels())
    conditioning = family.encode_prompts(pipeline, ["red", "dark blue"], call_of(model, pipeline))
    conditioning |= family.picture_conditioning(latents)
    assert {len(value) for value in conditioning.values()} == {2}
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    noisy, timestep = family.noisy(pipeline.scheduler, latents, noise, torch.tensor([0.1, 0.9]))
    assert timestep[0] < timestep[1]

    def predicted(conditioning: dict[str, Tensor]) -> Tensor:
        return family.predict(pipeline.transformer, family.denoiser_inputs(noisy, timestep, conditioning))

    first, swapped = predicted(conditioning), predicted({name: value.flip(0) for name, value in conditioning.items()})
    assert first.shape == family.target(latents, noise).shape
    assert first.isfinite().all()
    assert not torch.allclose(first, swapped, atol=1e-6)


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_the_sample_follows_from_the_noisy_one_and_the_target(steps: int, family_and_pipeline) -> None:
    """x_0 comes back from the noisy latents, the scheduler's own noise level and a perfect prediction."""
    family, pipeline = family_and_pipeline
    x0, noise = ramp(3, 4, 4, 4), ramp(3, 4, 4, 4).flip(0).roll(5)
    noisy, timestep = family.noisy(pipeline.scheduler, x0, noise, torch.tensor([0.2, 0.5, 0.7]), steps)
    target, expected = family.target(x0, noise), family.pack_latents(x0)
    inputs = family.denoiser_inputs(noisy, timestep, no_text())
    noisy = stacked(inputs[family.latents_input])
    level = timestep.view(-1, *[1] * (target.ndim - 1))
    if hasattr(pipeline.scheduler, "alphas_cumprod"):
        share = pipeline.scheduler.alphas_cumprod[level]
        recovered = (noisy - (1 - share).sqrt() * target) / share.sqrt()
    elif isinstance(pipeline.scheduler, diffusers.SCMScheduler):  # the denoiser itself is one of flow matching
        recovered = noisy - inputs["timestep"].view_as(level) * target
    else:
        recovered = noisy - level / 1000 * target
    assert torch.allclose(recovered, expected, atol=1e-4)


def no_text(count: int = 3) -> dict[str, Tensor]:
    return {"encoder_hidden_states": torch.zeros(count, 1, 1)}


def stacked(value: Any) -> Tensor:
    """A denoiser's argument, of one that takes a list of videos of one frame as if it took a tensor of pictures."""
    return torch.stack(value).squeeze(2) if isinstance(value, list) else value


@torch.no_grad()
def test_latents_are_those_that_the_pipeline_decodes(model: str, family_and_pipeline) -> None:
    """A sampler that returns the encoded pictures makes the call return what the autoencoder alone makes of them."""
    family, pipeline = family_and_pipeline
    pixels = random_pixels(1)
    encoded = pipeline.vae.encode(pixels.unsqueeze(2) if model in VIDEO else pixels)
    alone = pipeline.vae.decode(encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()).sample
    alone = alone[:, :, 0] if model in VIDEO else alone
    latents = family.pack_latents(family.encode_images(pipeline, pixels))
    if isinstance(pipeline.scheduler, diffusers.SCMScheduler):
        latents = latents * pipeline.scheduler.config.sigma_data
    pipeline.scheduler.step = lambda *_, **__: (latents, latents)[: 1 + ("sprint" in model)]
    drawn = pipeline(prompt="red", output_type="pt", **call_of(model, pipeline)).images
    assert alone.std() > 0.01
    assert torch.allclose(drawn, (alone / 2 + 0.5).clamp(0, 1), atol=1e-5)


def test_native_size_is_what_the_denoiser_was_made_for(model: str, family_and_pipeline, monkeypatch) -> None:
    """From the files of its components alone."""
    family, pipeline = family_and_pipeline
    if "sample_size" not in pipeline.transformer.config:  # FLUX: the pipeline's own, 128, takes a while
        assert family.latent_side({}) == getattr(pipeline, "default_sample_size", 128)  # Z-Image's call has 1024 pixels
        monkeypatch.setattr(type(family), "latent_side", lambda *_: 8)
    configs = {
        name: json.loads(config.to_json_string())
        for name, config in (("transformer", pipeline.transformer), ("vae", pipeline.vae))
    }
    size = family.native_size(configs)
    assert size == family.native_size(component_configs(pipeline))
    side = configs["transformer"].get("sample_size", 8)
    image = pipeline(prompt="red", **{**call_of(model, pipeline), **size}).images[0]
    assert image.size == (size["width"], size["height"]) == (side * pipeline.vae_scale_factor,) * 2


@pytest.mark.parametrize(
    ("name", "configs", "says"),
    [
        ("sana", {"transformer": {}, "vae": {"encoder_block_out_channels": [8]}}, "sample_size None; a Sana needs"),
        ("flux", {"transformer": {}, "vae": {}}, "vae's config.json has neither block_out_channels"),
    ],
)
def test_a_config_without_a_size_is_named(name: str, configs: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        get_family(name).native_size(configs)


@torch.no_grad()
def test_denoiser_inputs_are_those_of_the_pipeline_call(model: str, family_and_pipeline) -> None:
    """Student and sampler are given the same: text, masks, positions, timestep; with the call's defaults too."""
    family, pipeline = family_and_pipeline
    full = {"guidance_scale": 1.0, **call_of(model, pipeline)}
    if model in ("sana", "sana-1.5", "pixart-sigma", "sd3", "sd3.5-large"):
        full["guidance_scale"] = 1.0  # one text, not also the empty one
    latents = ramp(*family.encode_images(pipeline, random_pixels(1)).shape)
    seen: list[dict[str, Any]] = []
    forward = inspect.signature(pipeline.transformer.forward)

    def keep(_: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(forward.bind(*positional, **named).arguments)

    pipeline.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    for left_out in (None, *teacher_recipe(model)["generation"].keys() - OWN):
        call = {name: value for name, value in full.items() if name != left_out}
        seen.clear()
        pipeline(prompt="dark red", latents=latents if model in PACKS else family.pack_latents(latents), **call)
        conditioning = family.encode_prompts(pipeline, ["dark red"], call)
        inputs = family.denoiser_inputs(latents, pipeline.scheduler.timesteps[:1], conditioning)
        plain = (bool, type(None), dict)
        given = {key: value for key, value in seen[0].items() if not isinstance(value, plain)}
        assert {key for key, value in inputs.items() if value is not None} == set(given), left_out
        for key, value in given.items():
            torch.testing.assert_close(inputs[key], value, rtol=0, atol=0, msg=f"{left_out} {key}")


@torch.no_grad()
def test_kontext_gives_the_reference_picture_as_the_pipeline_does(load) -> None:
    family, pipeline = get_family("flux-kontext"), load("flux-kontext")
    noisy, reference = ramp(1, 4, 8, 8), ramp(1, 4, 8, 8).flip(2)
    seen: dict[str, Any] = {}
    pipeline.transformer.register_forward_pre_hook(lambda *given: seen.update(given[2]), with_kwargs=True)
    call = call_of("flux-kontext", pipeline) | {"num_inference_steps": 1}
    pipeline(prompt="dark red", image=reference, latents=family.pack_latents(noisy), **call)
    conditioning = family.encode_prompts(pipeline, ["dark red"], call) | family.picture_conditioning(reference)
    inputs = family.denoiser_inputs(noisy, torch.full((1,), 1000.0), conditioning)
    assert inputs["hidden_states"].shape == (1, 2 * 16, 16)
    for name in ("hidden_states", "img_ids", "txt_ids", "guidance", "timestep"):
        assert torch.equal(seen[name], inputs[name]), name
    output = pipeline.transformer(**inputs, return_dict=False)[0]
    assert torch.equal(family.predict(pipeline.transformer, inputs), output[:, :16])


# noise schedules, in numbers


@pytest.mark.parametrize("name", ["sana", "sd3"])
@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_flow_matching(name: str, scheduler: Any) -> None:
    """x_t = (1 - sigma) x_0 + sigma noise, sigma = 3 t / (1 + 2 t) at shift 3, timestep 1000 sigma."""
    latents, noise = torch.full((1, 1, 2, 2), 2.0), torch.full((1, 1, 2, 2), -2.0)
    noisy, timestep = get_family(name).noisy(scheduler, latents, noise, torch.tensor([0.5]))
    assert timestep.item() == pytest.approx(750)  # t = 0.5, sigma = 1.5 / 2
    assert noisy.unique().item() == pytest.approx(2 - 4 * 0.75)
    assert get_family(name).target(latents, noise).unique().item() == -4


def test_logit_normal_is_the_normal_through_a_sigmoid() -> None:
    # Phi(1) = 0.8413447, sigmoid(1) = 0.7310586
    assert logit_normal(torch.tensor([0.5, 0.8413447])).tolist() == pytest.approx([0.5, 0.7310586], abs=1e-5)


def test_pixart_sigma_adds_noise_as_ddpm_does() -> None:
    """Timesteps uniform over all 1000; mean and deviation from the products of 1 - beta."""
    betas = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
    latents, noise = ramp(4, 4, 2, 2), ramp(4, 4, 2, 2).flip(0)
    progress = torch.tensor([1e-4, 0.0015, 0.5, 0.9999])
    family = get_family("pixart-sigma")
    noisy, timestep = family.noisy(diffusers.DPMSolverMultistepScheduler(**betas), latents, noise, progress)
    assert timestep.tolist() == [0, 1, 500, 999]
    expected = diffusers.DDPMScheduler(**betas).add_noise(latents, noise, timestep)
    assert torch.allclose(noisy, expected, atol=1e-6)
    # at t = 1: a = 0.9999 (1 - (0.0001 + 0.0199 / 999)) = 0.99978008
    share = 0.9999 * (1 - 0.0001 - 0.0199 / 999)
    first = latents[1, 0, 0, 0].item(), noise[1, 0, 0, 0].item()
    assert noisy[1, 0, 0, 0].item() == pytest.approx(share**0.5 * first[0] + (1 - share) ** 0.5 * first[1], abs=1e-6)
    assert torch.equal(family.target(latents, noise), noise)


def test_pixart_sigma_weights_an_error_by_what_a_step_of_the_sampler_makes_of_it() -> None:
    """Of an error of 1 in the noise, DDIM steps from timestep to timestep, squared, up to a factor."""
    scheduler = diffusers.DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    scheduler.set_timesteps(1000)
    timesteps, nothing = torch.tensor([50, 300, 700, 950]), torch.zeros(1, 1, 1, 1)
    made = [scheduler.step(nothing + 1, int(each), nothing).prev_sample.item() ** 2 for each in timesteps]
    weight = get_family("pixart-sigma").error_weight(scheduler, timesteps)
    assert weight is not None
    assert (weight / weight[0]).tolist() == pytest.approx([each / made[0] for each in made], rel=0.02)
    every = get_family("pixart-sigma").error_weight(scheduler, torch.arange(1000))
    assert every is not None
    assert every.mean().item() == pytest.approx(1)


def test_pixart_sigma_drops_the_learned_variance() -> None:
    output = ramp(2, 8, 2, 2)
    assert torch.equal(get_family("pixart-sigma").prediction(output), output[:, :4])


def test_flux_is_trained_where_it_is_sampled(load) -> None:
    """At the noise levels of the four-step sampler, each for a quarter of the draws."""
    family, pipeline = get_family("flux"), load("flux")
    progress = torch.tensor([1e-4, 0.25, 0.26, 0.5, 0.51, 0.75, 0.76, 0.9999])
    latents, noise = torch.full((8, 1, 2, 2), 1.0), torch.full((8, 1, 2, 2), 3.0)
    noisy, timestep = family.noisy(pipeline.scheduler, latents, noise, progress, 4)
    assert timestep.tolist() == [250, 250, 500, 500, 750, 750, 1000, 1000]
    assert noisy[:, 0, 0, 0].tolist() == [1.5, 1.5, 2, 2, 2.5, 2.5, 3, 3]
    pipeline(prompt="red", **{**call_of("flux", pipeline), "num_inference_steps": 4})
    assert pipeline.scheduler.timesteps.tolist() == [1000, 750, 500, 250]
    inputs = family.denoiser_inputs(noisy, timestep, {"encoder_hidden_states": torch.zeros(8, 5, 16)})
    assert inputs["timestep"].tolist() == [0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1, 1]


def test_flux_dev_is_trained_at_all_levels_shifted_as_the_sampler_shifts_them(load) -> None:
    """mu from 0.5 at 256 tokens to 1.15 at 4096; 64 x 64 latents are 1024 tokens: mu = 0.63, e^mu = 1.8776."""
    latents, noise = torch.zeros(1, 4, 64, 64), torch.ones(1, 4, 64, 64)
    noisy, timestep = get_family("flux").noisy(load("flux-dev").scheduler, latents, noise, torch.tensor([0.5]))
    assert timestep.item() == pytest.approx(1000 * 1.87761 / 2.87761, abs=0.01)
    assert noisy.mean().item() == pytest.approx(1.87761 / 2.87761, abs=1e-5)


def test_guidance_is_the_calls(load) -> None:
    """FLUX.1-dev is given the scale, Sana-Sprint a tenth of it (guidance_embeds_scale)."""
    for name, given, told in (("flux-dev", 3.5, 3.5), ("sana-sprint", 4.5, 0.45), ("flux-kontext", 2.0, 2.0)):
        family, pipeline = FAMILIES[family_name(name)], load(name)
        call = call_of(name, pipeline) | {"guidance_scale": given}
        guidance = family.encode_prompts(pipeline, ["red", "dark blue"], call)["guidance"]
        assert guidance.tolist() == pytest.approx([told, told])
    assert "guidance" not in get_family("flux").encode_prompts(load("flux"), ["red"], call_of("flux", load("flux")))


def test_sana_sprint_is_trained_where_it_is_sampled(load) -> None:
    """At its sampler's two angles, each for half of the draws: x_t = cos(t) x_0 + sin(t) noise."""
    family, pipeline = get_family("sana-sprint"), load("sana-sprint")
    latents, noise = torch.full((2, 1, 2, 2), 1.0), torch.full((2, 1, 2, 2), 3.0)
    noisy, angle = family.noisy(pipeline.scheduler, latents, noise, torch.tensor([0.4, 0.6]), 2)
    pipeline(prompt="red", **call_of("sana-sprint", pipeline))
    assert angle.flip(0).tolist() == pipeline.scheduler.timesteps[:-1].tolist()
    assert noisy[0].unique().item() == pytest.approx(math.cos(1.3) + 3 * math.sin(1.3), abs=1e-5)
    _, angles = family.noisy(pipeline.scheduler, latents, noise, torch.tensor([0.01, 0.99]))
    assert 0 < angles[0] < 0.2
    assert 1.4 < angles[1] < 1.5708


_SCHNELL, _TURBO = {"num_inference_steps": 4, "guidance_scale": 0.0}, {"num_inference_steps": 8, "guidance_scale": 0.0}
_OWN_CALLS: dict[str, dict[str, Any]] = {
    "flux": _SCHNELL,
    "z-image": _TURBO,
    "flux2-klein": {"num_inference_steps": 4, "guidance_scale": 1.0},
    "qwen-image": {"negative_prompt": " "},
}


def test_a_model_without_a_recipe_is_called_as_it_is_meant(model: str, family_and_pipeline) -> None:
    """Distilled ones in their few steps; Qwen-Image with the negative prompt without which it does not guide."""
    family, pipeline = family_and_pipeline
    size = family.native_size(component_configs(pipeline))
    assert family.own_call(pipeline) == {**size, **_OWN_CALLS.get(model, {})}


def test_a_model_that_was_not_distilled_has_the_calls_own_steps(load) -> None:
    klein, z_image = load("flux2-klein"), load("z-image")
    klein.register_to_config(is_distilled=False)
    z_image.scheduler.register_to_config(shift=6.0)
    for name, pipeline in (("flux2-klein", klein), ("z-image", z_image)):
        assert get_family(name).own_call(pipeline).keys() == {"height", "width"}


@pytest.mark.parametrize("steps", [0, 9, 28])
def test_a_sampler_of_many_steps_trains_all_levels(steps: int, load) -> None:
    latents, noise = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    progress = torch.tensor([0.5, 0.8413447])
    _, timestep = get_family("flux").noisy(load("flux").scheduler, latents, noise, progress, steps)
    assert timestep.tolist() == pytest.approx([500, 731.0586], abs=0.01)


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_few_steps_are_trained_at_their_own_times(model: str, steps: int, family_and_pipeline, monkeypatch) -> None:
    """Whatever the recipe's number of them, shifted as the sampler shifts them for this size."""
    family, pipeline = family_and_pipeline
    call = changed_call(type(pipeline).__name__, call_of(model, pipeline), {"num_inference_steps": steps})
    times: list[Tensor] = []
    own = type(pipeline.scheduler).set_timesteps

    @functools.wraps(own)  # calls look at its arguments
    def kept(scheduler: Any, *given: Any, **named: Any) -> None:
        own(scheduler, *given, **named)
        times.append(scheduler.timesteps[:steps])

    monkeypatch.setattr(type(pipeline.scheduler), "set_timesteps", kept)
    pipeline(prompt="red", output_type="latent", **call)
    latents = torch.zeros(steps, *family.latent_shape(component_configs(pipeline), (call["height"], call["width"])))
    progress = (torch.arange(steps, 0, -1) - 0.5) / steps
    _, trained = family.noisy(pipeline.scheduler, latents, latents, progress, family.sampler_steps(call))
    assert trained.tolist() == pytest.approx(times[0].tolist(), rel=1e-4)


def test_flux_packs_and_places_tokens_as_diffusers_does() -> None:
    """The first token is the first square of 2 x 2, channel by channel."""
    family, latents = get_family("flux"), ramp(2, 4, 6, 8)
    tokens = family.pack_latents(latents)
    assert torch.equal(tokens[:, 0], latents[:, :, :2, :2].flatten(1))
    assert torch.equal(family.unpack_latents(tokens, 6, 8), latents)
    assert torch.equal(family.target(latents, 2 * latents), tokens)
    inputs = family.denoiser_inputs(latents, torch.ones(2), {"encoder_hidden_states": ramp(2, 5, 16)})
    expected = diffusers.FluxPipeline._prepare_latent_image_ids(2, 3, 4, "cpu", torch.float32)
    assert torch.equal(inputs["img_ids"], expected)
    assert torch.equal(inputs["txt_ids"], torch.zeros(5, 3))


def test_sd3_trains_dual_attention_as_attention(load) -> None:
    names = [name for name in quantizable(load("sd3").transformer) if ".attn2." in name]
    assert names
    assert all(any(fnmatchcase(name, p) for p in get_family("sd3").layer_groups["attention"]) for name in names)
