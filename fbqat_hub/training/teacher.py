"""The tiny teachers that ship: whole diffusers pipelines of true classes, trained from nothing on OpenMoji.

    python -m fbqat_hub.training.teacher pixart-sigma-tiny --output teachers/pixart-sigma-tiny

Stages, each kept when it is finished: the autoencoder (teachers whose recipes have the same one share it); text
encoders and denoiser together; and, where the recipe has ``few_step``, distillation of the guided sampler into few
steps without guidance. The later stages save their state every 500 steps; the same command continues an interrupted
run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from fbqat_hub.cache_dir import default_cache_dir
from fbqat_hub.families import Family, component_configs, get_family
from fbqat_hub.files import shipped, whole
from fbqat_hub.pictures import pixels
from fbqat_hub.pipelines import save_pipeline
from fbqat_hub.progress import each
from fbqat_hub.training.checkpoint import load_checkpoint, save_checkpoint
from fbqat_hub.training.openmoji import group_of, load_openmoji
from fbqat_hub.training.seeding import generator
from fbqat_hub.training.tokenizers import train_tokenizer

RECIPES = shipped("training/recipes/teachers")
# Words a user puts before a noun and the captions never have.
_PREFIXES = ("a ", "an ", "the ", "emoji of ", "an emoji of a ")
_SAVE_EVERY = 500


def train_teacher(recipe: dict[str, Any], output: Path, autoencoder: nn.Module | None = None) -> None:
    """Train a whole tiny pipeline and save it in ``output`` as a diffusers folder, float16 weights.

    Args:
        autoencoder: a trained one of the recipe's kind; None to train it, or to take one that was trained before.
    """
    data = load_openmoji(recipe["size"])["train"]
    images, captions = pixels(data["image"]), list(data["caption"])
    groups = [group_of(code) for code in data["hexcode"]]
    work = output.with_name(output.name + ".work")
    work.mkdir(parents=True, exist_ok=True)

    pipeline = untrained_pipeline(recipe, captions, autoencoder or _autoencoder(recipe, images), work)
    family = get_family(recipe["family"])
    latents = _set_latent_scale(recipe, pipeline.vae, images)
    _train_denoiser(recipe, family, pipeline, latents, captions, groups, work)
    if "few_step" in recipe:
        _distil_few_steps(recipe, family, pipeline, _focused(recipe, captions, groups), work)

    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.half()
    shutil.rmtree(output, ignore_errors=True)
    save_pipeline(pipeline, output)
    shutil.rmtree(work)


def untrained_pipeline(
    recipe: dict[str, Any], captions: list[str], autoencoder: nn.Module | None = None, work: Path | None = None
) -> Any:
    """The pipeline of a teacher's recipe: tokenizers learned from the captions, all else random.

    Args:
        recipe: as in ``recipes/teachers``.
        autoencoder: a trained one; random as well if it is None.
        work: folder to keep the tokenizers in, or to take them from: learning breaks ties by chance, and a run that is
            continued needs those it was started with.
    """
    torch.manual_seed(recipe["seed"])
    texts = captions + [prefix + text for prefix in _PREFIXES for text in captions]
    parts: dict[str, Any] = {"vae": _made(recipe["autoencoder"]) if autoencoder is None else autoencoder}
    for name, settings in recipe["text_encoders"].items():
        settings = dict(settings)
        part = name.replace("text_encoder", "tokenizer")
        tokenizer = _tokenizer(settings.pop("tokenizer"), texts, recipe, work and work / part)
        special = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos")}
        encoder = getattr(transformers, settings.pop("class"))
        texts_own = settings.get("text_config", settings)  # of an encoder that sees too
        texts_own.update(special, vocab_size=len(tokenizer))
        config = encoder.config_class(**settings, attn_implementation="eager")
        parts[part] = tokenizer
        parts[name] = encoder(config)
    parts["transformer"] = _made(recipe["transformer"])
    parts["scheduler"] = _made(recipe["scheduler"])
    pipeline_class = getattr(diffusers, get_family(recipe["family"]).pipeline_class)
    return pipeline_class(**parts, **recipe.get("pipeline", {}))


def _tokenizer(kind: str, texts: list[str], recipe: dict[str, Any], folder: Path | None) -> Any:
    if folder and folder.exists():
        return getattr(transformers, kind).from_pretrained(folder)
    tokenizer = train_tokenizer(kind, texts, recipe["vocabulary"], recipe["max_tokens"])
    if folder:
        with whole(folder) as partial:
            tokenizer.save_pretrained(partial)
    return tokenizer


def _made(settings: dict[str, Any]) -> Any:
    """A diffusers object from its class's name and its configuration."""
    return getattr(diffusers, settings["class"])(**{key: value for key, value in settings.items() if key != "class"})


class _Average(nn.Module):
    """Exponential moving average of a module's parameters, warmed up; a module, so that it is saved with them."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self._live = list(module.parameters())
        for index, parameter in enumerate(self._live):
            self.register_buffer(str(index), parameter.detach().clone())

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (2 + step) / (11 + step))
        torch._foreach_lerp_(list(self.buffers()), [parameter.detach() for parameter in self._live], 1 - decay)

    @torch.no_grad()
    def apply_to_module(self) -> None:
        for parameter, average in zip(self._live, self.buffers(), strict=True):
            parameter.copy_(average)


def _fit(
    name: str,
    model: nn.Module,
    training: dict[str, Any],
    loss_at: Callable[[int], Tensor],
    kept: Path | None,
    text: str,
) -> None:
    """AdamW, warm-up and cosine, clipped gradients; leaves the moving average of the weights in ``model``.

    Args:
        loss_at: step -> loss; whatever is random in it comes from the step.
        kept: folder of the checkpoints; None keeps none.
        text: what a checkpoint must have been made for to be continued.
    """
    average = _Average(model, training["ema"])
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    state = nn.ModuleDict({"models": model, "average": average})
    first = load_checkpoint(kept, state, optimizer, text) if kept else 0
    steps, warmup = training["steps"], 200
    for step in each(range(first, steps), name, "step"):
        factor = min(1.0, (step + 1) / warmup) * (0.5 * (1 + math.cos(math.pi * step / steps)) + 0.005)
        for group in optimizer.param_groups:
            group["lr"] = training["learning_rate"] * factor
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(step)
        if kept and (step + 1) % _SAVE_EVERY == 0:
            save_checkpoint(kept, step + 1, state, optimizer, text)
    average.apply_to_module()
    model.eval().requires_grad_(False)


def _autoencoder(recipe: dict[str, Any], images: Tensor) -> Any:
    """Stage 1. L1, L2 and edge loss; noise on the latents makes the decoder forgive small errors."""
    training, seed = recipe["autoencoder_training"], recipe["seed"]
    what = json.dumps([recipe["autoencoder"], training, seed, recipe["size"]], sort_keys=True)
    folder = default_cache_dir() / "teachers" / f"autoencoder-{hashlib.sha256(what.encode()).hexdigest()[:12]}"
    kind = getattr(diffusers, recipe["autoencoder"]["class"])
    if folder.exists():
        return kind.from_pretrained(folder)
    torch.manual_seed(seed)
    model = _made(recipe["autoencoder"]).to(memory_format=torch.channels_last)
    shift = images.shape[-1] // 10

    def loss_at(step: int) -> Tensor:
        random = generator(seed, "autoencoder", step)
        chosen = torch.randint(len(images), (training["batch_size"],), generator=random)
        x = F.pad(images[chosen].float() / 127.5 - 1, (shift,) * 4, value=1.0)
        top, left = torch.randint(0, 2 * shift + 1, (2,), generator=random).tolist()
        x = x[..., top : top + images.shape[-2], left : left + images.shape[-1]]
        if torch.rand((), generator=random) < 0.5:
            x = x.flip(-1)
        latents = _latents(model, x.contiguous(memory_format=torch.channels_last))
        noise = torch.randn(latents.shape, generator=random) * latents.detach().std()
        difference = model.decode(latents + training["latent_noise"] * noise).sample - x
        edges = (difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()) / 2
        return difference.abs().mean() + difference.square().mean() + edges + 1e-3 * latents.square().mean()

    _fit("autoencoder", model, training, loss_at, None, "")
    model = model.to(memory_format=torch.contiguous_format)
    try:
        with whole(folder) as partial:
            model.save_pretrained(partial)
    except OSError:
        if not folder.exists():  # else another process was first, and its autoencoder is as good
            raise
    return kind.from_pretrained(folder)


def _latents(autoencoder: Any, x: Tensor) -> Tensor:
    encoded = autoencoder.encode(x)
    return encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()


@torch.no_grad()
def _set_latent_scale(recipe: dict[str, Any], autoencoder: Any, images: Tensor) -> Tensor:
    """Give the autoencoder the scale (and shift, if the recipe centres) of its latents; the scaled latents."""
    batches = images.split(64)
    latents = torch.cat([_latents(autoencoder, batch.float() / 127.5 - 1) for batch in batches])
    shift = latents.mean().item() if recipe.get("centre_latents") else 0.0
    scale = 1 / (latents - shift).square().mean().sqrt().item()
    autoencoder.register_to_config(scaling_factor=scale, **({"shift_factor": shift} if shift else {}))
    return (latents - shift) * scale


def _train_denoiser(
    recipe: dict[str, Any],
    family: Family,
    pipeline: Any,
    latents: Tensor,
    captions: list[str],
    groups: list[str | None],
    work: Path,
) -> None:
    """Stage 2. The family's own noise and target. Each phase of ``focus`` leaves only its groups to be drawn."""
    training = recipe["denoiser_training"]
    names = [*recipe["text_encoders"], "transformer"]
    models = nn.ModuleDict({name: getattr(pipeline, name) for name in names}).train()
    pools = [(0, torch.arange(len(latents)))]
    for phase in training["focus"]:
        chosen = [index for index, group in enumerate(groups) if group in phase["groups"]]
        pools.append((phase["after"], torch.tensor(chosen)))

    def loss_at(step: int) -> Tensor:
        random = generator(recipe["seed"], "denoiser", step)
        pool = [indices for after, indices in pools if step >= after][-1]
        chosen = pool[torch.randint(len(pool), (training["batch_size"],), generator=random)]
        texts = [_spoken(captions[index], training["caption_dropout"], random) for index in chosen.tolist()]
        conditioning = family.encode_prompts(pipeline, texts, recipe["generation"])
        x0 = latents[chosen]
        noise = torch.randn(x0.shape, generator=random)
        progress = torch.rand(len(x0), generator=random).clamp(1e-4, 1 - 1e-4)
        noisy, timestep = family.noisy(pipeline.scheduler, x0, noise, progress)
        inputs = family.denoiser_inputs(noisy, timestep, conditioning)
        predicted = family.predict(models["transformer"], inputs)
        errors = (predicted - family.target(x0, noise)).square().flatten(1).mean(1)
        return (errors * _sample_weights(pipeline.scheduler, timestep, training.get("max_weight", 1.0))).mean()

    _fit("denoiser", models, training, loss_at, work / "denoiser", yaml.safe_dump(recipe))


def _sample_weights(scheduler: Any, timestep: Tensor, largest: float) -> Tensor:
    """1 / a_t up to ``largest``, which gives noise prediction the weights of velocity prediction; 1 for flow matching.

    Noise prediction alone hardly weighs the noisiest times, where a picture gets its shape.
    """
    if largest == 1.0:
        return torch.ones(len(timestep))
    return (1 / scheduler.alphas_cumprod[timestep]).clamp(max=largest)


def _spoken(caption: str, dropout: float, random: torch.Generator) -> str:
    """The caption as someone may type it: as it is, with words before it, or (classifier-free guidance) nothing."""
    draw, which = torch.rand((), generator=random).item(), torch.randint(len(_PREFIXES), (), generator=random).item()
    if draw < dropout:
        return ""
    return _PREFIXES[int(which)] + caption if draw < dropout + 0.2 else caption


def _focused(recipe: dict[str, Any], captions: list[str], groups: list[str | None]) -> list[str]:
    """The captions of the last phase."""
    last = recipe["denoiser_training"]["focus"][-1]["groups"]
    return [caption for caption, group in zip(captions, groups, strict=True) if group in last]


def _distil_few_steps(recipe: dict[str, Any], family: Family, pipeline: Any, captions: list[str], work: Path) -> None:
    """Stage 3. One step of the result goes where ``substeps`` guided Euler steps of stage 2's denoiser went.

    The guided trajectories of ``noises`` noises a caption are drawn once; the denoiser then learns the mean velocity
    of each of their ``segments`` segments, without guidance: what makes FLUX.1-schnell's sampler, by regression instead
    of adversarially.
    """
    settings = recipe["few_step"]
    texts = captions * settings["noises"]
    path = _trajectories(recipe, family, pipeline, texts, settings)
    with torch.no_grad():
        encoded = family.encode_prompts(pipeline, captions, recipe["generation"])
    side, transformer = recipe["size"] // pipeline.vae_scale_factor, pipeline.transformer.requires_grad_(True)

    def loss_at(step: int) -> Tensor:
        random = generator(recipe["seed"], "few-step", step)
        chosen = torch.randint(len(texts), (settings["batch_size"],), generator=random)
        segment = torch.randint(settings["segments"], (len(chosen),), generator=random)
        start, end = path[chosen, segment], path[chosen, segment + 1]
        sigma = 1 - segment / settings["segments"]
        conditioning = {name: value[chosen % len(captions)] for name, value in encoded.items()}
        latents = family.unpack_latents(start, side, side)
        inputs = family.denoiser_inputs(latents, 1000 * sigma, conditioning)
        return F.mse_loss(family.predict(transformer, inputs), (start - end) * settings["segments"])

    _fit("few steps", transformer.train(), settings, loss_at, work / "few_step", yaml.safe_dump(recipe))


@torch.no_grad()
def _trajectories(
    recipe: dict[str, Any], family: Family, pipeline: Any, texts: list[str], settings: dict[str, Any]
) -> Tensor:
    """Latents [N, segments + 1, ...] as the sampler has them, at the segments' ends, from noise to picture."""
    pipeline.set_progress_bar_config(disable=True)
    shape = family.latent_shape(component_configs(pipeline), (recipe["size"],) * 2)
    parts = []
    for first in each(range(0, len(texts), 64), "guided trajectories", "batch"):
        batch = texts[first : first + 64]
        kept: list[Tensor] = []

        def keep(_: Any, step: int, __: Any, values: dict[str, Tensor], kept: list[Tensor] = kept) -> dict[str, Tensor]:
            if (step + 1) % settings["substeps"] == 0:
                kept.append(values["latents"].clone())
            return {}

        random = generator(recipe["seed"], "trajectories", first)
        noise = family.pack_latents(torch.randn(len(batch), *shape, generator=random))
        pipeline(
            batch,
            height=recipe["size"],
            width=recipe["size"],
            num_inference_steps=settings["segments"] * settings["substeps"],
            latents=noise,
            output_type="latent",
            callback_on_step_end=keep,
            **{**recipe["generation"], **settings["guided"]},
        )
        parts.append(torch.stack([noise, *kept], dim=1))
    return torch.cat(parts)


def main(arguments: list[str] | None = None) -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(
        prog="python -m fbqat_hub.training.teacher", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", help=f"one of {', '.join(sorted(path.stem for path in RECIPES.glob('*.yaml')))}")
    parser.add_argument("--output", type=Path, required=True, help="folder of the pipeline")
    options = parser.parse_args(arguments)
    recipe = yaml.safe_load((RECIPES / f"{options.recipe}.yaml").read_text())
    train_teacher(recipe, options.output)
    print(f"saved {options.output}")


if __name__ == "__main__":
    main()
