"""Training an adapter (LoRA) on a 4-bit base."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fbqat_hub.cache_dir import default_cache_dir
from fbqat_hub.components import read_index
from fbqat_hub.families import family_of
from fbqat_hub.files import whole
from fbqat_hub.hub.adapter import PEFT_FILE
from fbqat_hub.inputs import check_new, checked_device
from fbqat_hub.pipelines import downloaded, load_pipeline
from fbqat_hub.progress import Progress
from fbqat_hub.training.cache import CachedSplit, build_cache, cache_key
from fbqat_hub.training.captioned import load_pictures
from fbqat_hub.training.draws import Draws, Pair
from fbqat_hub.training.generate import generation_of
from fbqat_hub.training.lora_check import card_head, shown_name
from fbqat_hub.training.teachers import resolve_teacher

_ADAPTER = "default"
# what is trained: the attention of every family, in FLUX.2's single blocks one layer with the feed-forward's first
_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj")
# noises and timesteps of each held-out picture
_HELD_OUT_DRAWS = 8


@dataclass(frozen=True)
class Trained:
    """What ``train`` left.

    Attributes:
        output: folder of the adapter.
        loss_before, loss_after: mean squared error of the prediction on held-out pictures, without and with it.
        pictures, held_out: how many were trained on, and how many were kept for the two losses.
        parameters: numbers in the adapter.
    """

    output: Path
    loss_before: float
    loss_after: float
    pictures: int
    held_out: int
    parameters: int


def train(
    pictures: Path,
    base: str,
    output: Path,
    *,
    rank: int = 8,
    steps: int = 200,
    batch_size: int = 4,
    learning_rate: float = 1e-3,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> Trained:
    """Train an adapter of the denoiser's attention on captioned pictures; the base stays as it is.

    The loss is the mean squared error of the family's prediction (the velocity of flow matching, or the noise). Of the
    pictures one in forty, at least two, are held out. The adapter's first values and all draws depend on ``seed``
    only.

    Args:
        pictures: folder of pictures with a ``metadata.jsonl`` (``file_name``, ``caption``) or a text file beside each.
        base: folder or Hub id of a packed (or float) pipeline; its recipe says the size of the pictures.
        output: new or empty folder; gets the adapter in diffusers' layout, or peft's where the pipeline has no adapter
            methods in diffusers, and a README.md.
        rank: of the two factors; the scale is 1.

    Raises:
        FileExistsError: ``output`` has content.
        FileNotFoundError: ``pictures`` is no folder.
        ValueError: no captions, a base of no supported family, a number out of range.
        FloatingPointError: the loss is not finite.
    """
    import peft  # noqa: F401  # an extra: that it is missing is said before anything is loaded

    check_new(output)
    if not pictures.is_dir():
        raise FileNotFoundError(
            f"{pictures} is no folder; give one of pictures with captions, in a metadata.jsonl or in text files beside "
            "them."
        )
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"--learning-rate is {learning_rate}; it must be above 0, e.g. 1e-3.")
    place = checked_device(device)
    folder = downloaded(resolve_teacher(base))
    family = family_of(read_index(folder)[0])
    dataset = {"path": str(pictures), "cache_dir": str(default_cache_dir() / "datasets")}
    data = load_pictures(dataset, 0)
    pipeline = load_pipeline(folder, torch.float32).to(place)
    call = generation_of(folder, pipeline)
    size = (call["height"], call["width"])
    cache = default_cache_dir() / "encoded" / f"{family.name}-{cache_key(str(folder), dataset, size, call)}"
    splits = build_cache(pipeline, family, data, size, call, cache)
    held_out = [splits["validation"], splits["test"]]
    denoiser, kind = pipeline.transformer, type(pipeline)
    draws = Draws(family, pipeline.scheduler, call, seed, place)
    del pipeline  # its other models are not needed any more
    before = held_out_loss(draws, denoiser, held_out, batch_size)
    config = inject(denoiser, rank, seed)
    fit(
        denoiser,
        lambda number: draws.training_pair(splits["train"], number, batch_size),
        draws.predict,
        steps,
        learning_rate,
        progress=progress,
    )
    after = held_out_loss(draws, denoiser, held_out, batch_size)
    weights = [weight for weight in denoiser.parameters() if weight.requires_grad]
    counts = (len(splits["train"]), sum(len(split) for split in held_out), sum(weight.numel() for weight in weights))
    done = Trained(output, before, after, *counts)
    with whole(output) as partial:
        partial.mkdir()
        layout = _save(denoiser, kind, config, partial)
        facts = f"{steps} steps of {batch_size} pictures, rank {rank}, learning rate {learning_rate:g}, seed {seed}"
        (partial / "README.md").write_text(_card(done, base, layout, facts), encoding="utf-8")
    return done


def inject(denoiser: Any, rank: int, seed: int) -> Any:
    """Put an adapter on the attention of a denoiser, whose other weights are frozen; peft's config of it."""
    from peft import LoraConfig, inject_adapter_in_model

    denoiser.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(_TARGETS))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, denoiser, _ADAPTER)
    return config


def fit(
    denoiser: Any,
    pair_of: Callable[[int], Pair],
    predict: Callable[[Any, dict[str, Any]], Tensor],
    steps: int,
    learning_rate: float,
    *,
    progress: bool = True,
) -> None:
    """Train what of a denoiser has gradients, by Adam.

    Args:
        pair_of: number of a step -> its inputs and target.
        predict: of the family.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    weights = [weight for weight in denoiser.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(weights, learning_rate)
    with Progress("train the adapter", steps, "step", shown=progress) as shown:
        for number in range(steps):
            inputs, target = pair_of(number)
            loss = _loss(predict(denoiser, inputs), target)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss.item()} at step {number + 1}; nothing was saved. Try a lower --learning-rate "
                    f"than {learning_rate:g}."
                )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            shown.update(loss=f"{loss.item():.2e}")


def _loss(prediction: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.mse_loss(prediction.float(), target)


@torch.no_grad()
def held_out_loss(draws: Draws, denoiser: Any, splits: Sequence[CachedSplit], batch_size: int) -> float:
    """Mean squared error of the prediction over every picture, with the same noises and timesteps at every call."""
    total, count = 0.0, 0
    for split in splits:
        for inputs, target in draws.held_out_pairs(split, _HELD_OUT_DRAWS, batch_size):
            total += len(target) * _loss(draws.predict(denoiser, inputs), target).item()
            count += len(target)
    return total / count


def _save(denoiser: Any, kind: Any, config: Any, folder: Path) -> str:
    """Save the adapter in the layout that a pipeline of this class loads; the lines that load it."""
    from peft import get_peft_model_state_dict

    tensors = {
        name: value.detach().cpu().contiguous()
        for name, value in get_peft_model_state_dict(denoiser, adapter_name=_ADAPTER).items()
    }
    if hasattr(kind, "save_lora_weights"):
        kind.save_lora_weights(folder, transformer_lora_layers=tensors)
        return 'pipeline.load_lora_weights("ADAPTER")'
    config.save_pretrained(folder)
    save_file({f"base_model.model.{name}": value for name, value in tensors.items()}, folder / PEFT_FILE)
    return (
        "from peft import PeftModel\n\n"
        'pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, "ADAPTER")'
    )


def _card(done: Trained, base: str, load: str, facts: str) -> str:
    """README.md; a local base is named without its path."""
    name = shown_name(base)
    return f"""{card_head(base, f"LoRA for {name}")}
Trained by `fbqat lora train`, the base unchanged: {facts}; {done.parameters:,} parameters.

| | |
|---|---|
| pictures trained on | {done.pictures} |
| pictures held out | {done.held_out} |
| held-out loss before | {done.loss_before:.4g} |
| held-out loss after | {done.loss_after:.4g} |

The loss is the mean squared error of the denoiser's prediction.

```python
import fbqat_hub
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{name}")
{load}
```
"""
