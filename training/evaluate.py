"""Evaluation of a run against its teacher: held-out distillation loss, and pictures from the same seeds."""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from fbqat_hub.evaluation.features import EXTRACTOR, OpenMojiFeatures, extract
from fbqat_hub.evaluation.metrics import frechet_distance, psnr, ssim
from fbqat_hub.evaluation.pictures import comparison_sheet, training_curve
from fbqat_hub.evaluation.results import Record, write_records
from fbqat_hub.families import get_family
from fbqat_hub.integrations.diffusers import load_pipeline
from fbqat_hub.quantization import stored_bits_per_weight
from fbqat_hub.training.cache import CachedSplit
from fbqat_hub.training.distill import Draws, cache_folder, cached_splits, held_out_loss
from fbqat_hub.training.pictures import pixels
from fbqat_hub.training.recipe import Recipe, load_recipe
from fbqat_hub.training.teachers import resolve_teacher

# Rows of the picture sheet.
_SHOWN = 10


def evaluate(run: Path, *, progress: bool = True) -> list[Record]:
    """Measure a run and write ``results.json`` and ``images/`` into it.

    The held-out loss is over the test split, every sample with ``draws`` noises and timesteps that are the same for
    every method. Pictures are drawn from the same seeds by teacher and student (``evaluation_prompts``). Fréchet
    distance is on the extractor that ships.

    Args:
        run: folder of a finished run, or of a converted pipeline.

    Returns:
        The records, as merged into ``results.json``.
    """
    recipe = load_recipe(run / "recipe.yaml")
    settings = recipe.evaluation_settings()
    student = load_pipeline(run)
    teacher = load_pipeline(resolve_teacher(recipe.teacher))
    splits = cached_splits(recipe, teacher)
    draws = Draws(get_family(recipe.family), teacher.scheduler, recipe.seed)
    losses = held_out_loss(
        student.transformer,
        teacher.transformer,
        splits["test"],
        draws,
        repeats=settings["draws"],
        batch_size=settings["batch_size"],
    )
    prompts = evaluation_prompts(recipe, splits)
    original = teacher_pictures(recipe, prompts, teacher, progress=progress)
    drawn = draw(student, prompts, recipe, progress=progress)
    records = _records(recipe, losses, original, drawn, stored_bits_per_weight(student.transformer))
    (run / "images").mkdir(exist_ok=True)
    save_file({"pictures": drawn}, run / "images" / "samples.safetensors")
    picture_sheet(run, {"teacher": original, "W4A8": drawn}, prompts)
    log = run / "training_log.jsonl"
    if log.exists() and log.stat().st_size:
        training_curve([json.loads(line) for line in log.read_text().splitlines()], run / "images" / "curve.png")
    write_records(run / "results.json", records)
    return records


def evaluation_prompts(recipe: Recipe, splits: dict[str, CachedSplit]) -> list[str]:
    """What is drawn: the recipe's own prompts, a quarter from the test split, training captions at even distances."""
    count = recipe.evaluation_settings()["images"]
    held_out = splits["test"].captions[: count // 4]
    seen, rest = splits["train"].captions, max(0, count - len(held_out) - len(recipe.prompts))
    return [*recipe.prompts, *(seen[index * len(seen) // rest] for index in range(rest)), *held_out]


@torch.no_grad()
def draw(pipeline: Any, prompts: Sequence[str], recipe: Recipe, *, progress: bool = True) -> Tensor:
    """Pictures of the prompts, uint8 [N, 3, H, W]; picture i always starts from seed i."""
    settings = recipe.evaluation_settings()
    call = {**recipe.generation, "num_inference_steps": settings["inference_steps"]}
    pipeline.set_progress_bar_config(disable=True)
    drawn = []
    starts = range(0, len(prompts), settings["batch_size"])
    for first in tqdm(starts, desc="draw", unit="batch", disable=not progress):
        batch = list(prompts[first : first + settings["batch_size"]])
        seeds = [torch.Generator().manual_seed(first + index) for index in range(len(batch))]
        drawn.append(pixels(pipeline(batch, generator=seeds, **call).images))
    return torch.cat(drawn)


def picture_sheet(run: Path, columns: dict[str, Tensor], prompts: Sequence[str]) -> None:
    """Write ``images/comparison.png``: the first prompts, one labelled column for each set of pictures."""
    rows = range(min(_SHOWN, len(prompts)))
    images = {
        label: [Image.fromarray(np.asarray(pictures[row].permute(1, 2, 0))) for row in rows]
        for label, pictures in columns.items()
    }
    comparison_sheet(images, [prompts[row] for row in rows]).save(run / "images" / "comparison.png")


def teacher_pictures(recipe: Recipe, prompts: Sequence[str], teacher: Any = None, *, progress: bool = True) -> Tensor:
    """The teacher's pictures of the prompts, drawn once and kept with the cache of its latents.

    Args:
        teacher: its pipeline; loaded if it is None and the pictures are not there.

    Returns:
        uint8 [N, 3, H, W].
    """
    what = json.dumps([list(prompts), recipe.evaluation_settings()])
    path = cache_folder(recipe) / f"teacher-{hashlib.sha256(what.encode()).hexdigest()[:12]}.safetensors"
    if not path.exists():
        teacher = teacher or load_pipeline(resolve_teacher(recipe.teacher))
        partial = path.with_suffix(f".partial-{os.getpid()}")
        save_file({"pictures": draw(teacher, prompts, recipe, progress=progress)}, partial)
        os.replace(partial, path)
    return load_file(path)["pictures"]


def _records(recipe: Recipe, losses: list[float], original: Tensor, drawn: Tensor, bits: float) -> list[Record]:
    budget = {"steps": recipe.steps, "batch_size": recipe.batch_size, "learning_rate": recipe.learning_rate}

    def record(metric: str, value: float, n: int, spread: float | None = None, **extra: str) -> Record:
        return Record(
            suite="method",
            family=recipe.family,
            method=recipe.method,
            metric=metric,
            value=value,
            n=n,
            seed=recipe.seed,
            spread=spread,
            extra={**budget, **extra},
        )

    a, b = original.float() / 255, drawn.float() / 255
    # a pair of equal pictures has no PSNR, so n counts the others
    ratios = [value for value in psnr(a, b).tolist() if math.isfinite(value)]
    samples = {"kd_loss": losses, "psnr": ratios, "ssim": ssim(a, b).tolist()}
    records = [
        record(name, statistics.fmean(values), len(values), statistics.stdev(values))
        for name, values in samples.items()
        if len(values) > 1
    ]
    features = OpenMojiFeatures.load()
    distance = frechet_distance(extract(features, a), extract(features, b))
    return [
        *records,
        record("fd_teacher", distance, len(a), extractor=EXTRACTOR),
        record("bits_per_weight", bits, 1),
    ]
