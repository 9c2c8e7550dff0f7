"""The tiny teachers that ship: a whole diffusers pipeline trained from nothing on OpenMoji.

    python -m fbqat_hub.training.teacher sana-tiny --output teachers/sana-tiny

Two stages, each kept when it is finished: the autoencoder, then text encoder and denoiser together by flow
matching. The denoiser stage saves its state every 500 steps; the same command continues an interrupted run.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from fbqat_hub.integrations.diffusers import save_pipeline
from fbqat_hub.training.checkpoint import load_checkpoint, save_checkpoint
from fbqat_hub.training.openmoji import group_of, load_openmoji
from fbqat_hub.training.pictures import pixels
from fbqat_hub.training.seeding import generator

RECIPES = Path(__file__).parent / "recipes" / "teachers"
# Words a user puts before a noun and the captions never have.
_PREFIXES = ("a ", "an ", "the ", "emoji of ", "an emoji of a ")
_SAVE_EVERY = 500


def train_teacher(recipe: dict[str, Any], output: Path) -> None:
    """Train a whole tiny Sana pipeline and save it in ``output`` as a diffusers folder, float16 weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline

    data = load_openmoji(recipe["size"])["train"]
    images, captions = pixels(data["image"]), list(data["caption"])
    groups = [group_of(code) for code in data["hexcode"]]
    work = output.with_name(output.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    autoencoder = _autoencoder(recipe, images, work)
    tokenizer = train_tokenizer(captions, recipe["vocabulary"], recipe["max_tokens"])
    text_encoder, transformer = _denoiser(recipe, encode_all(autoencoder, images), captions, groups, tokenizer, work)

    pipeline = SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.half(),
        vae=autoencoder.half(),
        transformer=transformer.half(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )
    shutil.rmtree(output, ignore_errors=True)
    save_pipeline(pipeline, output)
    shutil.rmtree(work)


def train_tokenizer(captions: list[str], vocabulary: int, max_tokens: int) -> Any:
    """A ``GemmaTokenizer`` whose byte-pair merges are learned from the captions and never cross a word."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.normalizer = normalizers.Replace(" ", "\u2581")
    learner.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False)
    learner.train_from_iterator(captions + [prefix + text for prefix in _PREFIXES for text in captions], trainer)
    model = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = GemmaTokenizer(vocab=model["vocab"], merges=merges, model_max_length=max_tokens)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", special.index("<bos>"))]
    )
    return tokenizer


@torch.no_grad()
def encode_all(autoencoder: Any, images: Tensor, batch_size: int = 64) -> Tensor:
    """Scaled latents [N, C, H/8, W/8] of uint8 pictures [N, 3, H, W]."""
    parts = [autoencoder.encode(batch.float() / 127.5 - 1).latent for batch in images.split(batch_size)]
    return torch.cat(parts) * autoencoder.config.scaling_factor


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


def _cosine(step: int, steps: int, warmup: int = 100) -> float:
    return min(1.0, (step + 1) / warmup) * (0.5 * (1 + math.cos(math.pi * step / steps)) + 0.005)


def _autoencoder(recipe: dict[str, Any], images: Tensor, work: Path) -> Any:
    """Stage 1. L1, L2 and edge loss; noise on the latents makes the decoder forgive small errors."""
    from diffusers import AutoencoderDC

    folder = work / "vae"
    if folder.exists():
        return AutoencoderDC.from_pretrained(folder)
    training = recipe["autoencoder_training"]
    random = torch.Generator().manual_seed(recipe["seed"])
    torch.manual_seed(recipe["seed"])
    model = AutoencoderDC(**recipe["autoencoder"]).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    average = _Average(model, 0.998)
    shift = images.shape[-1] // 10
    progress = tqdm(range(training["steps"]), desc="autoencoder", unit="step")
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = training["learning_rate"] * _cosine(step, training["steps"])
        chosen = torch.randint(len(images), (training["batch_size"],), generator=random)
        x = F.pad(images[chosen].float() / 127.5 - 1, (shift,) * 4, value=1.0)
        top, left = torch.randint(0, 2 * shift + 1, (2,), generator=random).tolist()
        x = x[..., top : top + images.shape[-2], left : left + images.shape[-1]]
        if torch.rand((), generator=random) < 0.5:
            x = x.flip(-1)
        x = x.contiguous(memory_format=torch.channels_last)
        latents = model.encode(x).latent
        noise = torch.randn(latents.shape, generator=random) * latents.detach().std()
        difference = model.decode(latents + training["latent_noise"] * noise).sample - x
        edges = (difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()) / 2
        loss = difference.abs().mean() + difference.square().mean() + edges + 1e-3 * latents.square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(step)
        progress.set_postfix(loss=f"{loss.item():.4f}")
    average.apply_to_module()
    model = model.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)
    model.register_to_config(scaling_factor=1.0)
    model.register_to_config(scaling_factor=1 / encode_all(model, images).square().mean().sqrt().item())
    partial = folder.with_name("vae.partial")
    model.save_pretrained(partial)
    partial.rename(folder)
    return model


def _denoiser(
    recipe: dict[str, Any],
    latents: Tensor,
    captions: list[str],
    groups: list[str | None],
    tokenizer: Any,
    work: Path,
) -> tuple[Any, Any]:
    """Stage 2. Flow matching: x_t = (1 - t) x_0 + t noise, target noise - x_0, t logit-normal.

    Each phase of ``focus`` leaves only the samples of its groups to be drawn, from its step on.
    """
    from diffusers import SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    training = recipe["denoiser_training"]
    torch.manual_seed(recipe["seed"])
    config = Gemma2Config(**recipe["text_encoder"], vocab_size=len(tokenizer), attn_implementation="eager")
    models = nn.ModuleDict(
        {"text_encoder": Gemma2Model(config), "transformer": SanaTransformer2DModel(**recipe["transformer"])}
    )
    average = _Average(models, training["ema"])
    optimizer = torch.optim.AdamW(models.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    state, text = nn.ModuleDict({"models": models, "average": average}), yaml.safe_dump(recipe)
    first = load_checkpoint(work / "denoiser", state, optimizer, text)
    progress = tqdm(range(first, training["steps"]), "denoiser", training["steps"], unit="step", initial=first)
    for step in progress:
        random = generator(recipe["seed"], "denoiser", step)
        for group in optimizer.param_groups:
            group["lr"] = training["learning_rate"] * _cosine(step, training["steps"], warmup=200)
        pool = torch.arange(len(latents))
        for phase in training["focus"]:
            if step >= phase["after"]:
                pool = torch.tensor([index for index, group in enumerate(groups) if group in phase["groups"]])
        chosen = pool[torch.randint(len(pool), (training["batch_size"],), generator=random)]
        texts = [_spoken(captions[index], training["caption_dropout"], random) for index in chosen.tolist()]
        loss = _flow_matching_loss(models, tokenizer, latents[chosen], texts, random)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        average.update(step)
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % _SAVE_EVERY == 0:
            save_checkpoint(work / "denoiser", step + 1, state, optimizer, text)
    average.apply_to_module()
    return models["text_encoder"].eval(), models["transformer"].eval()


def _spoken(caption: str, dropout: float, random: torch.Generator) -> str:
    """The caption as someone may type it: as it is, with words before it, or (classifier-free guidance) nothing."""
    draw, which = torch.rand((), generator=random).item(), torch.randint(len(_PREFIXES), (), generator=random).item()
    if draw < dropout:
        return ""
    return _PREFIXES[int(which)] + caption if draw < dropout + 0.2 else caption


def _flow_matching_loss(
    models: nn.ModuleDict, tokenizer: Any, x0: Tensor, texts: list[str], random: torch.Generator
) -> Tensor:
    tokens = tokenizer(texts, padding="max_length", padding_side="right", truncation=True, return_tensors="pt")
    embeddings = models["text_encoder"](tokens.input_ids, attention_mask=tokens.attention_mask)[0]
    t = torch.sigmoid(torch.randn(len(x0), generator=random))
    noise = torch.randn(x0.shape, generator=random)
    mixed = torch.lerp(x0, noise, t[:, None, None, None])
    predicted = models["transformer"](
        mixed, encoder_hidden_states=embeddings, encoder_attention_mask=tokens.attention_mask, timestep=1000 * t
    ).sample
    return F.mse_loss(predicted, noise - x0)


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
