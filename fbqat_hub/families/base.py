"""What training, evaluation and export need to know of a model architecture."""

from __future__ import annotations

import copy
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fbqat_hub.families.decoder import DecoderStage, decoder_graph, decoder_stages
from fbqat_hub.families.graph import GraphWrapper, Item

# A model that samples in at most so many steps was distilled for them.
FEW_STEPS = 8


class Original(NamedTuple):
    """Where a module of diffusers is in the checkpoint of the model's authors, which other programs read.

    Attributes:
        name: of the original module. Modules of the same name are one there: their outputs follow each other, in the
            order in which they are listed.
        halves_swapped: the two halves of its outputs (scale and shift) are in the other order.
        weight: what its tensor ``weight`` is called.
    """

    name: str
    halves_swapped: bool = False
    weight: str = "weight"


class Family(ABC):
    """One architecture. A new family is one subclass in one file, its name in ``FAMILIES``, and one recipe.

    Nobody else knows an architecture: training, evaluation, export, cards, benchmarks, tests and the doctor ask here.

    Attributes:
        name: as in recipes and results.
        title: as in tables.
        pipeline_class, denoiser_class, autoencoder_class: names of the diffusers classes; the denoiser is the
            pipeline's ``transformer``.
        size_multiple: sides of pictures are multiples of it: the autoencoder's factor times the patch's side.
        layer_groups: what can be trained alone -> fnmatch patterns of module names.
        activation_overrides: pattern -> activation settings that differ by default (the last layer runs W4A16 on the
            device, arXiv 2510.14823 section 4.3).
        a16_layers: fnmatch patterns of layers that an export computes at A16 though they were trained at A8: the last
            one, and those of one row per picture, which cost nothing (the timestep's path, modulations).
        may_be_none: arguments of the pipeline's call that take None though their annotation says nothing of it.
        most_text_tokens: the largest ``max_sequence_length`` of the pipeline's call; 0 where it has no limit.
        even_sigmas: the pipeline call gives its scheduler sigmas from 1 down in equal steps; else they are its own.
        patch_side: latents a side that the denoiser makes one token of.
        latents_input, timestep_input: what its forward calls them.
        takes_tensors: whether its forward is given nothing but tensors, with a batch or of ``constant_inputs``.
        stacks: names of the denoiser's lists of blocks, in the order in which they run.
        needs_pictures: why it cannot be trained on prompts alone; empty where it can.
        constant_inputs: arguments of the denoiser's forward without a batch, which are constants of its graph.
        options_without_graph: switches of the denoiser's config which, when on, keep it from being exported.
        without_graph: why no denoiser of the family can be exported; empty where it can.
        without_bundle: why its pipeline cannot be bundled for a phone, though its denoiser may be; empty where it can.
        tiny: what the tiny teacher that ships (``training/teachers/<tiny>``) and its recipe are called; None without.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    pipeline_class: ClassVar[str]
    denoiser_class: ClassVar[str]
    autoencoder_class: ClassVar[str] = "AutoencoderKL"
    size_multiple: ClassVar[int] = 16
    layer_groups: ClassVar[dict[str, tuple[str, ...]]]
    activation_overrides: ClassVar[dict[str, dict[str, Any]]] = {"proj_out": {"bits": 16}}
    a16_layers: ClassVar[tuple[str, ...]] = ("proj_out",)
    may_be_none: ClassVar[frozenset[str]] = frozenset()
    most_text_tokens: ClassVar[int] = 0
    even_sigmas: ClassVar[bool] = False
    patch_side: ClassVar[int] = 2
    latents_input: ClassVar[str] = "hidden_states"
    timestep_input: ClassVar[str] = "timestep"
    takes_tensors: ClassVar[bool] = True
    stacks: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    needs_pictures: ClassVar[str] = ""
    constant_inputs: ClassVar[tuple[str, ...]] = ()
    options_without_graph: ClassVar[tuple[str, ...]] = ()
    without_graph: ClassVar[str] = ""
    without_bundle: ClassVar[str] = ""
    tiny: ClassVar[str | None] = None

    # -- pictures and texts ----------------------------------------------------------------------------------------
    def encode_images(self, pipeline: Any, pixels: Tensor) -> Tensor:
        """Scaled latents [N, C, H/f, W/f] of pictures in [-1, 1], [N, 3, H, W]: the mean of an ``AutoencoderKL``."""
        config = pipeline.vae.config
        pixels = pixels.to(pipeline.vae.device, pipeline.vae.dtype)
        return (pipeline.vae.encode(pixels).latent_dist.mode() - (config.shift_factor or 0.0)) * config.scaling_factor

    @abstractmethod
    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], generation: Mapping[str, Any]) -> dict[str, Tensor]:
        """Conditioning of prompts, every tensor [N, ...], as the pipeline call computes it.

        If some tokens are not the text's, a tensor [N, tokens] whose name ends in ``_mask`` says so of
        ``encoder_hidden_states``, [N, tokens, D], and the denoiser does not look at the others.

        Args:
            generation: arguments of the pipeline call; what it leaves out has the call's own default.
        """

    def encode_no_prompt(self, pipeline: Any, generation: Mapping[str, Any]) -> dict[str, Tensor]:
        """As ``encode_prompts``, of the one text of the sampler's second call where it guides: by default the negative
        prompt, which is empty if none is given."""
        return self.encode_prompts(pipeline, [generation.get("negative_prompt") or ""], generation)

    def picture_conditioning(self, latents: Tensor) -> dict[str, Tensor]:
        """Conditioning that comes from a training picture beside its caption, of its latents; by default nothing."""
        return {}

    def instruction(self, pipeline: Any, generation: Mapping[str, Any]) -> str:
        """What the pipeline puts before every prompt; by default nothing."""
        return ""

    def latent_shape(self, configs: Mapping[str, Mapping[str, Any]], size: tuple[int, int]) -> tuple[int, int, int]:
        """[C, h, w] of the latents of a picture of (height, width), as ``encode_images`` makes them.

        Args:
            configs: whole configs of the components ``transformer`` and ``vae``.
        """
        factor = pixels_per_latent(configs["vae"])
        return configs["transformer"]["in_channels"], size[0] // factor, size[1] // factor

    @abstractmethod
    def conditioning_shapes(
        self, config: Mapping[str, Any], generation: Mapping[str, Any]
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of what ``encode_prompts`` makes of a prompt, without the batch.

        Args:
            config: the denoiser's, whole.
            generation: as for ``encode_prompts``.
        """

    def text_tokens(self, generation: Mapping[str, Any]) -> int:
        """``max_sequence_length`` of the pipeline call."""
        return self._of_call("max_sequence_length", generation)

    def sampler_steps(self, generation: Mapping[str, Any]) -> int:
        """``num_inference_steps`` of the pipeline call."""
        return self._of_call("num_inference_steps", generation)

    def _of_call(self, name: str, generation: Mapping[str, Any]) -> int:
        import diffusers

        default = inspect.signature(getattr(diffusers, self.pipeline_class).__call__).parameters[name].default
        return int(generation.get(name, default))

    def following(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the pipeline call that follow from the others, where it does not see to that; by default none.

        Args:
            call: its other arguments; what it leaves out has the call's own default.
        """
        return {}

    def native_size(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Arguments of the pipeline call that generate at the size the denoiser was trained for.

        Args:
            configs: ``config.json`` of the components ``transformer`` and ``vae``, by their names (`component_configs`
                of a loaded pipeline).

        Raises:
            ValueError: a config that does not say it.
        """
        side = self.latent_side(configs["transformer"]) * pixels_per_latent(configs["vae"])
        return {"height": side, "width": side}

    def own_call(self, pipeline: Any) -> dict[str, Any]:
        """Arguments of the call for a pipeline of which no recipe is known: its native size and, where the call's own
        defaults are not meant for this model, those that are.

        Args:
            pipeline: loaded, of this family; its weights may be on the meta device.
        """
        return self.native_size(component_configs(pipeline))

    def latent_side(self, config: Mapping[str, Any]) -> int:
        """Side of the latents that the denoiser of this config was trained for."""
        side = config.get("sample_size")
        if not isinstance(side, int):
            raise ValueError(f"the transformer's config.json has sample_size {side!r}; a {self.title} needs a number.")
        return side

    # -- training --------------------------------------------------------------------------------------------------
    def noisy(
        self, scheduler: Any, latents: Tensor, noise: Tensor, progress: Tensor, steps: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Noisy latents and the denoiser's timesteps; by default those of flow matching, the time logit-normal.

        Args:
            latents, noise: [N, C, H, W].
            progress: [N] uniform in (0, 1), turned into a timestep by the family's noise schedule.
            steps: of the sampler. A model that samples in at most `FEW_STEPS` was distilled for them and gets their
                times only, each as often; with more, or 0, it gets all times.
        """
        if 0 < steps <= FEW_STEPS:
            sigma = self.sampler_times(scheduler, latents, progress, steps) / 1000
        else:
            t, shift = logit_normal(progress), self.time_shift(scheduler, latents, steps)
            sigma = shift * t / (1 + (shift - 1) * t)
        return torch.lerp(latents, noise, sigma[:, None, None, None]), 1000 * sigma

    def sampler_times(self, scheduler: Any, latents: Tensor, progress: Tensor, steps: int) -> Tensor:
        """Timesteps that the pipeline call's sampler asks the denoiser at, for pictures of this size.

        Args:
            progress: [N] in (0, 1), in equal parts of which the last is of the noisiest timestep. A sampler of second
                order has more timesteps than steps.
        """
        own = copy.deepcopy(scheduler)
        shift = {}
        if own.config.get("use_dynamic_shifting"):
            shift = {"mu": self.dynamic_shift(own, self._tokens(latents), steps)}
        if self.even_sigmas and not own.config.get("use_flow_sigmas"):
            own.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), **shift)
        else:
            own.set_timesteps(steps, **shift)
        return self._at(own.timesteps, progress)

    def _at(self, times: Tensor, progress: Tensor) -> Tensor:
        """Of the times of a sampler, from the noisiest, those at ``progress``."""
        return times[len(times) - (progress * len(times)).ceil().long()].to(progress)

    def _tokens(self, latents: Tensor) -> int:
        return latents.shape[-2] * latents.shape[-1] // self.patch_side**2

    def time_shift(self, scheduler: Any, latents: Tensor, steps: int) -> float:
        """The factor that moves a sampler's times towards the noise: t -> f t / (1 + (f - 1) t).

        Where the scheduler shifts by the picture's size, the one for latents of this size.
        """
        config = scheduler.config
        if not config.get("use_dynamic_shifting"):
            return float(config.get("shift") or config.get("flow_shift") or 1.0)
        mu = self.dynamic_shift(scheduler, self._tokens(latents), steps)
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)

    def dynamic_shift(self, scheduler: Any, tokens: int, steps: int) -> float:
        """``mu`` of the scheduler's ``set_timesteps`` for a picture of so many tokens, as the pipeline call has it.

        Args:
            steps: of the sampler; 0 for the call's own default.
        """
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        return float(calculate_shift(tokens, *(scheduler.config[name] for name in names)))

    def noisy_of_sampler(self, scheduler: Any, latents: Tensor) -> Tensor:
        """What a sampler has between two steps as ``noisy`` gives it, packed or not; by default the same."""
        return latents

    def target(self, latents: Tensor, noise: Tensor) -> Tensor:
        """What the denoiser of a perfect model predicts; by default the velocity of flow matching, noise - latents."""
        return self.pack_latents(noise - latents)

    def error_weight(self, scheduler: Any, timestep: Tensor) -> Tensor | None:
        """How much the sampler makes of a squared error at these timesteps, mean 1 over all of training: fp32 [N].

        None, the default, where all count alike.
        """
        return None

    @abstractmethod
    def denoiser_inputs(self, noisy: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Any]:
        """Keyword arguments of the denoiser's forward, of noisy latents [N, C, H, W].

        Tensors; of a denoiser whose forward takes lists of them, lists.
        """

    def predict(self, denoiser: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """What the sampler takes of the denoiser for ``inputs``, keyword arguments of its forward."""
        return self.prediction(denoiser(**{**inputs, "return_dict": False})[0])

    def prediction(self, output: Any) -> Tensor:
        """The part of the denoiser's output that the sampler uses; by default all of it."""
        return output

    def pack_latents(self, latents: Tensor) -> Tensor:
        """Latents [N, C, H, W] as the denoiser and the sampler have them; by default the same."""
        return latents

    def unpack_latents(self, latents: Tensor, height: int, width: int) -> Tensor:
        """The reverse of ``pack_latents``: [N, C, height, width]."""
        return latents

    # -- export ----------------------------------------------------------------------------------------------------
    def original_modules(self, config: Mapping[str, Any]) -> dict[str, Original]:
        """Module of the denoiser -> where it is in the original checkpoint; every module that has tensors, in order.

        A tensor that is of no layer (a table of positions) is a module here, under its full name.

        Args:
            config: the denoiser's, whole.

        Raises:
            ValueError: the family, by default, or a denoiser with options that the original does not have.
        """
        raise ValueError(f"the original names of a {self.title} are not known here.")

    def blocks(self, denoiser: nn.Module) -> tuple[str, ...]:
        """Names of the denoiser's blocks, in order."""
        return tuple(f"{stack}.{index}" for stack in self.stacks for index in range(len(getattr(denoiser, stack))))

    def check_graph(self, denoiser: Any) -> None:
        """ValueError where no denoiser of the family has a graph, or this one has an option on that has none."""
        if self.without_graph:
            raise ValueError(f"a {self.title} cannot be exported: {self.without_graph}.")
        for option in self.options_without_graph:
            if denoiser.config.get(option):
                raise ValueError(f"{self.denoiser_class} with {option}=True cannot be exported; use one without it.")

    def graph(self, denoiser: Any, example: Item) -> GraphWrapper:
        """The graph of a (packed) denoiser, which is itself not changed.

        Inputs, float32, batch 1: `hidden_states` (latents as ``pack_latents`` makes them), `encoder_hidden_states`
        [1, tokens, D], and what `families.graph.host_inputs` says.

        Args:
            example: keyword arguments of the denoiser's forward; says the shapes, whether there is a text mask, and
                the values of ``constant_inputs``.

        Raises:
            ValueError: an option that has no graph, or a family that has none.
        """
        raise ValueError(f"a {self.title} cannot be exported: {self.without_graph}.")

    def decoder_graph(self, vae: Any) -> GraphWrapper:
        """The graph of the autoencoder's decoder, see `families.decoder.decoder_graph`.

        Raises:
            ValueError: an autoencoder of another class than the family's.
        """
        self._check_autoencoder(vae)
        return decoder_graph(vae)

    def decoder_stages(self, vae: Any) -> list[DecoderStage]:
        """The decoder cut at its group norms, see `families.decoder.decoder_stages`.

        Raises:
            ValueError: an autoencoder of another class than the family's.
        """
        self._check_autoencoder(vae)
        return decoder_stages(vae)

    def _check_autoencoder(self, vae: Any) -> None:
        if type(vae).__name__ != self.autoencoder_class:
            raise ValueError(
                f"the decoder of {type(vae).__name__} cannot be exported; a {self.title} has an "
                f"{self.autoencoder_class}."
            )


def moved(inputs: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """A denoiser's arguments with their tensors, and those of lists, on ``device``.

    >>> moved({"x": [torch.zeros(1)], "shapes": [(1, 2)]}, "cpu")
    {'x': [tensor([0.])], 'shapes': [(1, 2)]}
    """

    def of(value: Any) -> Any:
        if isinstance(value, list):
            return [of(each) for each in value]
        return value.to(device) if isinstance(value, Tensor) else value

    return {name: of(value) for name, value in inputs.items()}


def component_configs(pipeline: Any) -> dict[str, Mapping[str, Any]]:
    """Name -> config of every component of a loaded pipeline that has one."""
    configs = {name: getattr(part, "config", None) for name, part in pipeline.components.items()}
    return {name: config for name, config in configs.items() if isinstance(config, Mapping)}


def pixels_per_latent(config: Mapping[str, Any]) -> int:
    """How many pixels a side one latent stands for: a level of an autoencoder's encoder halves the picture, but the
    last.

    >>> pixels_per_latent({"block_out_channels": [128, 256, 512, 512]})
    8
    """
    levels = config.get("encoder_block_out_channels") or config.get("block_out_channels")
    if not isinstance(levels, Sequence) or not levels:
        raise ValueError("the vae's config.json has neither block_out_channels nor encoder_block_out_channels.")
    return int(2 ** (len(levels) - 1))


def call_arguments(pipeline: Any, generation: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """``names`` of ``generation``, with the pipeline call's own defaults where it leaves them out."""
    defaults = inspect.signature(type(pipeline).__call__).parameters
    return {name: generation.get(name, defaults[name].default) for name in names}


def logit_normal(progress: Tensor) -> Tensor:
    """Map uniform (0, 1) to a logit-normal sample, the timestep density of flow-matching models."""
    return torch.sigmoid(torch.special.ndtri(progress))
