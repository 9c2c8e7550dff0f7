"""The loop: bit width from the schedule, student against the frozen teacher (arXiv 2510.14823, algorithm 1).

There is no ground truth. Student and teacher see the same noisy latents, timestep and conditioning, and the loss is
the squared distance of their predictions. Everything random in a step is drawn from (seed, step, device), so a
resumed run continues to the bit-identical result.
"""

from __future__ import annotations

import copy
import gc
import io
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from fbqat_hub.config import FBQATConfig
from fbqat_hub.families import Family, get_family
from fbqat_hub.integrations.diffusers import attach
from fbqat_hub.pipelines import downloaded, load_pipeline, save_quantized, save_stage
from fbqat_hub.quantization import (
    FakeQuantizedLinear,
    calibrate,
    convert,
    converted,
    gptq_initialize,
    named_layers,
    prepare,
    set_bit_width,
)
from fbqat_hub.stages import stage_folder
from fbqat_hub.training.cache import CachedSplit, build_cache, cache_key, load_pictures
from fbqat_hub.training.checkpoint import load_checkpoint, save_checkpoint
from fbqat_hub.training.openmoji import default_cache_dir
from fbqat_hub.training.recipe import Recipe, load_recipe
from fbqat_hub.training.seeding import generator
from fbqat_hub.training.teachers import resolve_teacher


def train(recipe: Recipe, output: Path, *, resume: bool = False, progress: bool = True) -> Path:
    """Quantize the recipe's teacher and save the packed pipeline in ``output``.

    Leaves ``output`` as a diffusers pipeline folder with ``recipe.yaml`` and ``training_log.jsonl`` (one line a step:
    step, loss, bit_width, softness, learning_rate), and with ``keep_stages`` the packed denoiser of each stage
    (``fbqat_hub.stages``). While it runs, checkpoints are in ``output/checkpoints``.

    Args:
        output: an empty or new folder, or with ``resume`` one of an interrupted run of the same recipe.
        resume: continue from the newest checkpoint (from the start if there is none).
        progress: show progress bars.

    Raises:
        FileExistsError: ``output`` has other content.
        ValueError: ``output`` was started with another recipe, or the teacher is not a float pipeline of the family.
    """
    if (output / "model_index.json").exists() and resume and _same_recipe(recipe, output):
        shutil.rmtree(output / "checkpoints", ignore_errors=True)  # killed just before it did so itself
        return output
    if output.exists() and any(output.iterdir()) and not (resume and _is_unfinished(output)):
        hint = "use --resume to continue it" if _is_unfinished(output) else "give another --output"
        raise FileExistsError(f"{output} exists and is not empty; {hint}.")
    if _is_unfinished(output) and not _same_recipe(recipe, output):
        raise ValueError(
            f"{output} was started with another recipe, so it cannot be continued with this one. Give another "
            "--output, or the recipe it was started with."
        )

    accelerator = Accelerator(mixed_precision=recipe.mixed_precision)
    torch.manual_seed(recipe.seed)
    pipeline = load_teacher(recipe)
    splits = cached_splits(recipe, pipeline.to(accelerator.device))
    pipeline.to("cpu")  # its encoders make room for the training
    draws = Draws(get_family(recipe.family), pipeline.scheduler, recipe.seed, accelerator.device)
    student = prepare_student(recipe, pipeline.transformer, splits["train"], draws)
    output.mkdir(parents=True, exist_ok=True)  # from here on the recipe and its teacher are known to be good
    recipe.save(output / "recipe.yaml")
    if recipe.steps:
        distill(recipe, student, pipeline.transformer, splits, draws, output, accelerator, resume, progress)

    if accelerator.is_main_process:
        set_bit_width(student, recipe.config().weight_bits)
        convert(student)
        attach(student, recipe.config())
        save_quantized(student.cpu(), downloaded(resolve_teacher(recipe.teacher)), output)
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
    accelerator.wait_for_everyone()
    return output


def load_teacher(recipe: Recipe) -> Any:
    """The recipe's full-precision pipeline; ValueError if it is of another family, or quantized."""
    family = get_family(recipe.family)
    pipeline = load_pipeline(resolve_teacher(recipe.teacher), torch.float32)
    if type(pipeline).__name__ != family.pipeline_class:
        raise ValueError(f"teacher {recipe.teacher} is a {type(pipeline).__name__}; {family.name} is not its family.")
    if getattr(pipeline.transformer, "is_quantized", False):
        raise ValueError(f"teacher {recipe.teacher} is quantized already; give the full-precision pipeline.")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def cache_folder(recipe: Recipe) -> Path:
    """Where what the teacher makes of the recipe's data is kept."""
    size = picture_size(recipe)
    key = cache_key(resolve_teacher(recipe.teacher), recipe.dataset, size, recipe.generation)
    return default_cache_dir() / "encoded" / f"{recipe.family}-{key}"


def cached_splits(recipe: Recipe, pipeline: Any) -> dict[str, CachedSplit]:
    """Latents and conditioning of the recipe's data under its teacher, from disk or encoded now."""
    size = picture_size(recipe)
    data = load_pictures(recipe.dataset, size)
    return build_cache(pipeline, get_family(recipe.family), data, size, recipe.generation, cache_folder(recipe))


def picture_size(recipe: Recipe) -> int:
    """Side of the training pictures in pixels: what the pipeline is asked to draw, 512 if it is not said."""
    return int(recipe.generation.get("height", 512))


class Draws:
    """Denoiser inputs drawn from a cached split, reproducibly."""

    def __init__(self, family: Family, scheduler: Any, seed: int, device: torch.device | str = "cpu") -> None:
        self.family, self.scheduler, self.seed, self.device = family, scheduler, seed, device

    def training(self, split: CachedSplit, step: int, batch_size: int, process: int = 0) -> dict[str, Tensor]:
        """The batch of an optimizer step."""
        random = generator(self.seed, "train", step, process)
        return self._inputs(split, torch.randint(len(split), (batch_size,), generator=random), random)

    def calibration(self, split: CachedSplit, samples: int) -> Iterator[dict[str, Tensor]]:
        """Random samples for static activation ranges, one at a time."""
        for index in range(samples):
            random = generator(self.seed, "calibration", index)
            yield self._inputs(split, torch.randint(len(split), (1,), generator=random), random)

    def held_out(self, split: CachedSplit, draws: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Every sample of a split with ``draws`` different noises and timesteps; the same ones for every method."""
        for draw in range(draws):
            for first in range(0, len(split), batch_size):
                random = generator("held-out", draw, first)
                yield self._inputs(split, torch.arange(first, min(first + batch_size, len(split))), random)

    def predict(self, denoiser: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """What the sampler would take from the denoiser."""
        return self.family.prediction(denoiser(**inputs, return_dict=False)[0])

    def error_weight(self, inputs: dict[str, Tensor]) -> Tensor | None:
        """``Family.error_weight`` of a batch, [N]."""
        return self.family.error_weight(self.scheduler, inputs["timestep"])

    def _inputs(self, split: CachedSplit, indices: Tensor, random: torch.Generator) -> dict[str, Tensor]:
        latents, conditioning = split.batch(indices)
        noise = torch.randn(latents.shape, generator=random)
        uniform = torch.rand(len(indices), generator=random).clamp(1e-4, 1 - 1e-4)
        noisy, timestep = self.family.noisy(self.scheduler, latents.float(), noise, uniform)
        inputs = self.family.denoiser_inputs(noisy, timestep, conditioning)
        return {name: value.to(self.device) for name, value in inputs.items()}


def prepare_student(recipe: Recipe, teacher: nn.Module, train_split: CachedSplit, draws: Draws) -> Any:
    """A copy of the teacher with fake-quantized layers, calibrated, with the recipe's layers trainable."""
    config = recipe.config()
    student = copy.deepcopy(teacher).to(draws.device).requires_grad_(False)
    prepare(
        student,
        config.weight_scheme(),
        config.activation_scheme(),
        not_convert=config.modules_to_not_convert,
        overrides=config.module_overrides,
    )
    if config.needs_calibration:
        options = dict(recipe.calibration)
        calibrate(student, draws.calibration(train_split, options.pop("samples", 100)), **options)
    if recipe.starts_compensated:
        options = recipe.compensation_settings()
        samples = options.pop("samples")
        softness = recipe.bit_schedule().softness_at(0.0)
        gptq_initialize(student, lambda: draws.calibration(train_split, samples), softness=softness, **options)
    patterns = get_family(recipe.family).layer_groups[recipe.train_layers]
    for name, layer in named_layers(student, FakeQuantizedLinear):
        layer.requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))
    return student


@torch.no_grad()
def held_out_loss(
    student: nn.Module, teacher: nn.Module, split: CachedSplit, draws: Draws, *, repeats: int = 1, batch_size: int = 32
) -> list[float]:
    """The distillation loss of every held-out draw, one mean over pixels a sample."""
    losses: list[float] = []
    for inputs in draws.held_out(split, repeats, batch_size):
        difference = (draws.predict(student, inputs) - draws.predict(teacher, inputs)).float()
        losses += difference.square().flatten(1).mean(1).tolist()
    return losses


@dataclass
class _LogLine:
    step: int
    loss: float
    bit_width: float
    softness: float
    learning_rate: float
    validation_loss: float | None = None


def distill(
    recipe: Recipe,
    student: Any,
    teacher: Any,
    splits: dict[str, CachedSplit],
    draws: Draws,
    output: Path,
    accelerator: Accelerator,
    resume: bool,
    progress: bool,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Run the recipe's steps on a prepared student; writes ``output/training_log.jsonl``, stages and checkpoints.

    Args:
        student: from ``prepare_student``; changed in place.
        teacher: the full-precision denoiser.
        splits, draws: what is learned from.
        resume: continue from the newest checkpoint in ``output``.
        after_step: called with the number of each step when its update is done.

    Raises:
        FileNotFoundError: a stage that the checkpoint is past was taken away.
        FloatingPointError: the loss is not finite.
    """
    teacher = teacher.to(accelerator.device).eval().requires_grad_(False)
    if recipe.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    optimizer = _optimizer(recipe, student)
    text = yaml.safe_dump(asdict(recipe), sort_keys=False)
    first = load_checkpoint(output / "checkpoints", student, optimizer, text) if resume else 0
    ends = recipe.stage_ends()
    stages = {ends[bits]: bits for bits in recipe.keep_stages}
    for end, bits in stages.items():
        if end <= first and not stage_folder(output, bits).exists():
            raise FileNotFoundError(
                f"{stage_folder(output, bits)} is missing, and the newest checkpoint is past it; put it back, or "
                f"delete {output / 'checkpoints'} to start again."
            )
    wrapped, prepared_optimizer = accelerator.prepare(student, optimizer)
    wrapped.train()
    schedule = recipe.bit_schedule()
    log = _open_log(output / "training_log.jsonl", first)
    bar = tqdm(total=recipe.steps, initial=first, desc=recipe.method, unit="step", disable=not progress)
    for step in range(first, recipe.steps):
        done = step / recipe.steps
        rounding = recipe.rounding_at(done)
        set_bit_width(student, schedule.bit_width(done), rounding)
        rate = recipe.learning_rate * learning_rate_factor(recipe, step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        inputs = draws.training(splits["train"], step, recipe.batch_size, accelerator.process_index)
        with torch.no_grad(), accelerator.autocast():
            target = draws.predict(teacher, inputs)
        weight = draws.error_weight(inputs) if recipe.weights_loss else None
        loss = _mean_squared(draws.predict(wrapped, inputs).float(), target.float(), weight)
        accelerator.backward(loss)
        if recipe.max_grad_norm:
            accelerator.clip_grad_norm_(wrapped.parameters(), recipe.max_grad_norm)
        prepared_optimizer.step()
        prepared_optimizer.zero_grad()
        if after_step:
            after_step(step)

        line = _LogLine(step + 1, loss.item(), schedule.bit_width(done), rounding.softness, rate)
        if not math.isfinite(line.loss):
            raise FloatingPointError(
                f"the loss is {line.loss} at step {step + 1}; lower learning_rate ({recipe.learning_rate:g}) or set "
                f"max_grad_norm. The last checkpoint is kept in {output / 'checkpoints'}."
            )
        if recipe.validate_every and (step + 1) % recipe.validate_every == 0:
            losses = held_out_loss(student, teacher, splits["validation"], draws)
            line.validation_loss = sum(losses) / len(losses)
        if accelerator.is_main_process:
            log.write(json.dumps({key: value for key, value in asdict(line).items() if value is not None}) + "\n")
            if step + 1 in stages:  # before the checkpoint of this step: a run that is resumed from it has the stage
                _keep_stage(recipe, student, stages[step + 1], output)
            if recipe.save_every and (step + 1) % recipe.save_every == 0 and step + 1 < recipe.steps:
                log.flush()
                save_checkpoint(output / "checkpoints", step + 1, student, optimizer, text)
        bar.update()
        bar.set_postfix(loss=f"{line.loss:.2e}", bits=f"{line.bit_width:g}", soft=f"{line.softness:.3f}", refresh=False)
    bar.close()
    log.close()
    accelerator.free_memory()
    gc.collect()


def _mean_squared(prediction: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """Mean squared error of [N, ...], each of the N samples by its weight [N], if there is one."""
    if weight is not None:
        root = weight.sqrt().view(-1, *[1] * (target.dim() - 1))
        prediction, target = root * prediction, root * target
    return F.mse_loss(prediction, target)


def _keep_stage(recipe: Recipe, student: Any, bits: int, output: Path) -> None:
    """Save a packed copy of the student at the width that its schedule leaves now."""
    set_bit_width(student, bits)
    packed = converted(student).cpu()
    attach(packed, FBQATConfig(**{**recipe.config().to_dict(), "weight_bits": bits}))
    save_stage(packed, stage_folder(output, bits))


def _optimizer(recipe: Recipe, student: nn.Module) -> torch.optim.Optimizer:
    clips: list[nn.Parameter] = []
    weights: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            (clips if name.endswith(".log_clip") else weights).append(parameter)
    groups: list[dict[str, Any]] = [{"params": weights, "factor": 1.0, "weight_decay": recipe.weight_decay}]
    if clips:
        groups.append({"params": clips, "factor": recipe.clip_learning_rate, "weight_decay": 0.0})
    return torch.optim.Adam(groups, lr=recipe.learning_rate, fused=True)


def learning_rate_factor(recipe: Recipe, step: int) -> float:
    """Learning rate at ``step`` as a share of the peak: linear warm-up, then constant or cosine to 0."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps) if recipe.warmup_steps else 1.0
    if recipe.learning_rate_schedule == "constant":
        return warm
    return warm * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


def _open_log(path: Path, steps_done: int) -> io.TextIOBase:
    """The log, cut back to the steps of the checkpoint that is continued."""
    lines = path.read_text().splitlines(keepends=True)[:steps_done] if path.exists() else []
    path.write_text("".join(lines))
    return path.open("a")


def _is_unfinished(output: Path) -> bool:
    return (output / "recipe.yaml").exists() and not (output / "model_index.json").exists()


def _same_recipe(recipe: Recipe, output: Path) -> bool:
    """Fields that a saved recipe lacks, for it is of an older version, count with their defaults."""
    try:
        saved = load_recipe(output / "recipe.yaml")
    except (FileNotFoundError, ValueError):
        return False
    return yaml.safe_load(yaml.safe_dump(asdict(saved))) == yaml.safe_load(yaml.safe_dump(asdict(recipe)))
