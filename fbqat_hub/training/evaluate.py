"""Evaluation of a run against its teacher: held-out distillation loss, and pictures from the same seeds."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from fbqat_hub.components import Component
from fbqat_hub.evaluation.folders import METADATA, SAMPLES, as_image
from fbqat_hub.evaluation.pictures import comparison_sheet, training_curve
from fbqat_hub.evaluation.results import Record, write_records
from fbqat_hub.evaluation.suite import (
    DISTANCES,
    PAIRED,
    PROMPTED,
    SINGLE,
    Measurement,
    features_of,
    measure,
    measure_distance,
    of_samples,
    of_timesteps,
)
from fbqat_hub.families import get_family
from fbqat_hub.files import whole
from fbqat_hub.pipelines import downloaded, load_pipeline, load_stage
from fbqat_hub.quantization import stored_bits_per_weight
from fbqat_hub.stages import find_stage
from fbqat_hub.training.cache import CachedSplit, cache_key, load_pictures
from fbqat_hub.training.distill import Draws, cache_folder, cached_splits, held_out_loss, picture_size
from fbqat_hub.training.memory import peak_of_a_picture
from fbqat_hub.training.pictures import pixels
from fbqat_hub.training.prompts import load_prompts
from fbqat_hub.training.recipe import Recipe, load_recipe
from fbqat_hub.training.teachers import resolve_teacher

TO_TEACHER = tuple(f"{name}_teacher" for name in DISTANCES)
TO_REAL = tuple(f"{name}_real" for name in DISTANCES)
OF_PICTURES = (*PAIRED, *TO_TEACHER, *TO_REAL, *PROMPTED, *SINGLE)
# Of the teacher too, in the suite "loading".
OF_LOADING = ("denoiser_mib", "peak_rss_mib")
METRICS = ("kd_loss", *OF_PICTURES, "bits_per_weight", *OF_LOADING)
# What runs without a download; with prompts of their own only what needs neither the training data nor real pictures.
# Not the peak memory: it draws with the teacher in float32 on the CPU, which a large one may not fit.
DEFAULT = ("kd_loss", "psnr", "ssim", "fd_teacher", "fd_real", "bits_per_weight", "denoiser_mib")
DEFAULT_OF_PROMPTS = ("psnr", "ssim", "fd_teacher", "bits_per_weight")
# Rows of the picture sheet.
_SHOWN = 10


def evaluate(
    run: Path,
    *,
    stage: int | None = None,
    prompts: str | None = None,
    images: int | None = None,
    metrics: Sequence[str] | None = None,
    device: str | None = None,
    progress: bool = True,
) -> list[Record]:
    """Measure a run, or a stage of it, and write ``results.json`` and ``images/`` into its folder.

    The held-out loss is over the test split of the recipe's data, every sample with ``draws`` noises and timesteps that
    are the same for every method. Pictures are drawn from the same seeds by teacher and student; those of an earlier
    evaluation are used again where neither the model nor what is drawn has changed, and an interrupted evaluation goes
    on with the first picture missing.

    Args:
        run: folder of a finished run, or of a converted pipeline.
        stage: bit width of a kept stage, which is measured in place of the run's own denoiser.
        prompts: a prompt set (`fbqat_hub.training.prompts`); the recipe's own prompts and data if None.
        images: how many pictures; the recipe's ``evaluation.images`` if None.
        metrics: of `METRICS`; `DEFAULT`, or `DEFAULT_OF_PROMPTS` with prompts, if None.
        device: of the networks; a GPU if there is one and None is given.
        progress: show progress bars.

    Returns:
        The records, as merged into ``results.json``. Records of pictures of other prompts are taken out of it.

    Raises:
        FileNotFoundError: ``run`` has no recipe, or no such stage.
        ValueError: an unknown metric or prompt set, or one with fewer prompts than ``images``.
    """
    recipe = load_recipe(run / "recipe.yaml")
    if images is not None:
        recipe = replace(recipe, evaluation={**recipe.evaluation, "images": images})
    chosen = list(metrics if metrics is not None else DEFAULT if prompts is None else DEFAULT_OF_PROMPTS)
    if unknown := [metric for metric in chosen if metric not in METRICS]:
        raise ValueError(f"unknown metrics {', '.join(unknown)}; known: {', '.join(METRICS)}.")
    if not chosen:
        raise ValueError(f"no metrics to measure; name some of: {', '.join(METRICS)}.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    models = _Models(run, recipe, device, stage)
    folder, bits = models.folder, stage or recipe.config().weight_bits
    found: dict[str, Measurement] = {}
    if "kd_loss" in chosen:
        found["kd_loss"] = _held_out(models)
    source = prompts or str(recipe.dataset["path"])
    if wanted := [metric for metric in chosen if metric in OF_PICTURES]:
        drawn = _drawn(models, prompts, bool(set(wanted) & set(TO_REAL)), images is not None, progress)
        for metric in tqdm(wanted, desc="measure", unit="metric", disable=not progress):
            if measured := _of_pictures(metric, drawn, device, recipe.seed):
                found[metric] = measured
        own = f"W{bits}A{recipe.config().activation_bits}"
        picture_sheet(folder, {"teacher": drawn.original, own: drawn.student}, drawn.texts)
    if "bits_per_weight" in chosen:
        found["bits_per_weight"] = Measurement(stored_bits_per_weight(models.student.transformer), 1)
    log = run / "training_log.jsonl"
    if stage is None and log.exists() and log.stat().st_size:
        (run / "images").mkdir(exist_ok=True)
        training_curve([json.loads(line) for line in log.read_text().splitlines()], run / "images" / "curve.png")
    records = [_record(recipe, metric, measured, source, bits) for metric, measured in found.items()]
    records += [record for metric in chosen if metric in OF_LOADING for record in _of_loading(models, metric, bits)]

    def of_other_prompts(record: Record) -> bool:
        own = (record.family, record.method, record.seed) == (recipe.family, recipe.method, recipe.seed)
        return own and bool(wanted) and record.metric in OF_PICTURES and record.extra.get("prompts") != source

    write_records(folder / "results.json", records, drop=of_other_prompts)
    return records


def evaluation_prompts(recipe: Recipe, splits: Mapping[str, CachedSplit]) -> list[str]:
    """What is drawn: the recipe's own prompts, a quarter from the test split, training captions at even distances."""
    return _prompts_of(recipe, splits["train"].captions, splits["test"].captions)


@torch.no_grad()
def draw(
    pipeline: Any, prompts: Sequence[str], recipe: Recipe, *, first_seed: int = 0, progress: bool = True
) -> Tensor:
    """Pictures of the prompts, uint8 [N, 3, H, W]; picture i always starts from seed ``first_seed`` + i."""
    settings = recipe.evaluation_settings()
    call = {**recipe.generation, "num_inference_steps": settings["inference_steps"]}
    pipeline.set_progress_bar_config(disable=True)
    drawn = []
    starts = range(0, len(prompts), settings["batch_size"])
    for first in tqdm(starts, desc="draw", unit="batch", disable=not progress):
        batch = list(prompts[first : first + settings["batch_size"]])
        seeds = [torch.Generator().manual_seed(first_seed + first + index) for index in range(len(batch))]
        drawn.append(pixels(pipeline(batch, generator=seeds, **call).images))
    return torch.cat(drawn)


def draw_folder(
    pipeline: Callable[[], Any], prompts: Sequence[str], recipe: Recipe, folder: Path, *, progress: bool = True
) -> list[Path]:
    """Draw into ``folder``: a PNG a prompt, and ``metadata.jsonl`` with its prompt and seed.

    An interrupted call goes on with the first batch missing. ``folder`` has its name when it is whole, and is then
    taken as it is.

    Args:
        pipeline: gives the pipeline; called only if something is to draw.

    Returns:
        The files, in the order of the prompts.
    """
    names = [f"{index:05d}.png" for index in range(len(prompts))]
    if not folder.exists():
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        unfinished.mkdir(parents=True, exist_ok=True)
        size = recipe.evaluation_settings()["batch_size"]
        starts = [first for first in range(0, len(names), size) if not (unfinished / names[first]).exists()]
        for first in tqdm(starts, desc=f"draw {folder.name}", unit="batch", disable=not progress):
            pictures = draw(pipeline(), prompts[first : first + size], recipe, first_seed=first, progress=False)
            # The first of a batch last: that it is there says that all of them are.
            for name, picture in reversed(list(zip(names[first : first + size], pictures, strict=True))):
                with whole(unfinished / name) as partial:
                    as_image(picture).save(partial, format="PNG")
        rows = [{"file_name": n, "prompt": p, "seed": i} for i, (n, p) in enumerate(zip(names, prompts, strict=True))]
        (unfinished / METADATA).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        unfinished.rename(folder)
    return [folder / name for name in names]


def picture_sheet(run: Path, columns: Mapping[str, Sequence[Path]], prompts: Sequence[str]) -> None:
    """Write ``images/comparison.png``: the first prompts, one labelled column for each list of pictures."""
    rows = range(min(_SHOWN, len(prompts)))
    images = {label: [Image.open(files[row]) for row in rows] for label, files in columns.items()}
    comparison_sheet(images, [prompts[row] for row in rows]).save(run / "images" / "comparison.png")


def teacher_pictures(
    recipe: Recipe,
    prompts: Sequence[str],
    pipeline: Callable[[], Any] | None = None,
    *,
    progress: bool = True,
) -> list[Path]:
    """The teacher's pictures of the prompts, drawn once and kept with the cache of its latents.

    Args:
        pipeline: gives its pipeline; loaded here if it is None and the pictures are not there.
    """
    teacher = resolve_teacher(recipe.teacher)
    folder = cache_folder(recipe) / f"teacher-{_key(teacher, recipe, prompts)}"
    return draw_folder(
        pipeline or (lambda: load_pipeline(teacher, torch.float32)), prompts, recipe, folder, progress=progress
    )


@dataclass
class _Models:
    """Student and teacher, each loaded when it is first used."""

    run: Path
    recipe: Recipe
    device: str
    stage: int | None

    @property
    def folder(self) -> Path:
        """Of the denoiser that is measured."""
        return self.run if self.stage is None else find_stage(self.run, self.stage)

    @cached_property
    def student(self) -> Any:
        if self.stage is None:
            return load_pipeline(self.run, torch.float32).to(self.device)
        return load_stage(self.run, self.stage, torch.float32).to(self.device)

    @cached_property
    def teacher(self) -> Any:
        return load_pipeline(resolve_teacher(self.recipe.teacher), torch.float32).to(self.device)


@dataclass
class _Drawn:
    """Pictures to measure: files in the order of their prompts; real ones in no order."""

    texts: list[str]
    original: list[Path]
    student: list[Path]
    real: list[Path]


def _held_out(models: _Models) -> Measurement:
    recipe, settings = models.recipe, models.recipe.evaluation_settings()
    test = cached_splits(recipe, models.teacher)["test"]
    draws = Draws(get_family(recipe.family), models.teacher.scheduler, recipe.seed, models.device)
    repeats, batch_size = settings["draws"], settings["batch_size"]
    student, teacher = models.student.transformer, models.teacher.transformer
    losses = held_out_loss(student, teacher, test, draws, repeats=repeats, batch_size=batch_size)
    times = [time for inputs in draws.held_out(test, repeats, batch_size) for time in inputs["timestep"].tolist()]
    # The draws of one picture belong together: the interval is over pictures.
    by_picture = of_samples(torch.tensor(losses).view(repeats, len(test)).mean(dim=0).tolist(), seed=recipe.seed)
    return Measurement(
        statistics.fmean(losses),
        len(losses),
        statistics.stdev(losses) if len(losses) > 1 else None,
        by_picture.interval,
        {"by_timestep": of_timesteps(losses, times, seed=recipe.seed)},
    )


def _drawn(models: _Models, prompts: str | None, with_real: bool, exactly: bool, progress: bool) -> _Drawn:
    recipe = models.recipe
    count = recipe.evaluation_settings()["images"]
    if prompts is None:
        data = load_pictures(recipe.dataset, picture_size(recipe))
        texts = _prompts_of(recipe, data["train"]["caption"], data["test"]["caption"])
        source = str(recipe.dataset["path"])
    else:
        rows = load_prompts(prompts, count, images=with_real)
        texts, source = list(rows["prompt"]), prompts
        if exactly and len(texts) < count:
            raise ValueError(f"{prompts} has {len(texts)} prompts, and --images asks for {count}; ask for fewer.")
    if progress:
        print(f"{len(texts)} prompts of {source}; choose others with --prompts", file=sys.stderr)
    real: list[Path] = []
    if with_real:
        pictures = _real_of_recipe(data, texts) if prompts is None else (row["image"] for row in rows)
        key = cache_key(source, {"path": source, "prompts": texts}, picture_size(recipe), {})
        real = _real_folder(pictures, cache_folder(recipe) / f"real-{key}")
    original = teacher_pictures(recipe, texts, lambda: models.teacher, progress=progress)
    student = _student_pictures(models, texts, progress)
    return _Drawn(texts, original, student, real)


def _student_pictures(models: _Models, texts: Sequence[str], progress: bool) -> list[Path]:
    """In the run's folder; drawn anew when the model, the prompts or the settings are not those of ``key.txt``."""
    folder, recipe = models.folder / SAMPLES, models.recipe
    key = _key(str(models.folder / "transformer"), recipe, texts)
    fresh = folder.with_name(f"samples-{key}")
    if not (folder / "key.txt").exists() or (folder / "key.txt").read_text() != key:
        draw_folder(lambda: models.student, texts, recipe, fresh, progress=progress)
        (fresh / "key.txt").write_text(key)
        for stale in (folder, *folder.parent.glob(".samples-*.unfinished")):
            shutil.rmtree(stale, ignore_errors=True)
        fresh.rename(folder)
    return sorted(folder.glob("*.png"))


def _of_pictures(metric: str, drawn: _Drawn, device: str, seed: int) -> Measurement | None:
    """None for what the pictures do not give: psnr of equal pairs, and a distance to fewer than two."""
    name = metric.removesuffix("_teacher").removesuffix("_real")
    if name in DISTANCES and min(len(drawn.student), len(drawn.real if metric in TO_REAL else drawn.original)) < 2:
        return None
    if metric in TO_REAL:
        real, student, original = (
            features_of(name, files, device=device) for files in (drawn.real, drawn.student, drawn.original)
        )
        return _beside_teacher(measure_distance(name, student, real), measure_distance(name, original, real))

    def of(files: Sequence[Path]) -> Measurement | None:
        return measure(name, files, references=drawn.original, prompts=drawn.texts, device=device, seed=seed)

    found = of(drawn.student)
    return found if metric in PAIRED or metric in TO_TEACHER else _beside_teacher(found, of(drawn.original))


def _beside_teacher(student: Measurement | None, teacher: Measurement | None) -> Measurement | None:
    """The student's number, with the teacher's own in ``extra``: alone it says little."""
    if student is None or teacher is None:
        return None
    interval = list(teacher.interval) if teacher.interval else None
    return replace(student, extra={**student.extra, "teacher_value": teacher.value, "teacher_interval": interval})


def _record(recipe: Recipe, metric: str, measured: Measurement, source: str, bits: int) -> Record:
    budget = {"steps": recipe.steps, "batch_size": recipe.batch_size, "learning_rate": recipe.learning_rate}
    budget["weight_bits"] = bits
    shown = {"prompts": source} if metric in OF_PICTURES else {}
    return Record(
        suite="method",
        family=recipe.family,
        method=recipe.method,
        metric=metric,
        value=measured.value,
        n=measured.n,
        seed=recipe.seed,
        spread=measured.spread,
        interval=measured.interval,
        extra={**budget, **shown, **measured.extra},
    )


def _of_loading(models: _Models, metric: str, bits: int) -> list[Record]:
    """The metric of the teacher and of the student."""
    recipe, teacher = models.recipe, str(resolve_teacher(models.recipe.teacher))
    if metric == "denoiser_mib":
        values = {"teacher": _stored_mib(downloaded(teacher)), recipe.method: _stored_mib(models.folder)}
    else:
        prompt = recipe.prompts[0] if recipe.prompts else "red heart"
        own = peak_of_a_picture(str(models.run), recipe, prompt, models.stage)
        values = {"teacher": peak_of_a_picture(teacher, recipe, prompt), recipe.method: own}
    common: dict[str, Any] = {
        "suite": "loading",
        "family": recipe.family,
        "metric": metric,
        "n": 1,
        "seed": recipe.seed,
    }
    return [
        Record(**common, method=method, value=value, extra={} if method == "teacher" else {"weight_bits": bits})
        for method, value in values.items()
    ]


def _stored_mib(folder: Path) -> float:
    """Of the denoiser's weights in a pipeline's folder."""
    files = Component(folder / "transformer", "diffusers", "ModelMixin").weights().files
    return sum(file.stat().st_size for file in files) / 2**20


def _prompts_of(recipe: Recipe, seen: Sequence[str], held_out: Sequence[str]) -> list[str]:
    count = recipe.evaluation_settings()["images"]
    last = list(held_out[: count // 4])
    rest = max(0, count - len(last) - len(recipe.prompts))
    return [*recipe.prompts, *(seen[index * len(seen) // rest] for index in range(rest)), *last]


def _real_of_recipe(data: Any, texts: Sequence[str]) -> list[Image.Image]:
    """The data set's own pictures of the captions that are drawn, in both splits; own prompts may have none."""
    rows = {caption: (split, row) for split in ("train", "test") for row, caption in enumerate(data[split]["caption"])}
    return [data[split][row]["image"] for split, row in (rows[text] for text in dict.fromkeys(texts) if text in rows)]


def _real_folder(pictures: Any, folder: Path) -> list[Path]:
    """The middle squares of real pictures as PNG, not resized, kept for the next evaluation."""
    if not folder.exists():
        with whole(folder) as partial:
            partial.mkdir()
            for index, picture in enumerate(pictures):
                square = (min(picture.size),) * 2
                ImageOps.fit(picture.convert("RGB"), square).save(partial / f"{index:05d}.png")
    return sorted(folder.glob("*.png"))


def _key(model: str, recipe: Recipe, prompts: Sequence[str]) -> str:
    """Of the pictures that a model draws."""
    return cache_key(model, {"prompts": list(prompts), **recipe.evaluation_settings()}, 0, recipe.generation)
