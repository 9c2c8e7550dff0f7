"""Evaluation of a run against its teacher: held-out distillation loss, and pictures from the same seeds."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fbqat_hub.components import Component
from fbqat_hub.config import FBQATConfig
from fbqat_hub.evaluation.pictures import training_curve, widths_picture
from fbqat_hub.evaluation.results import Record, read_records, write_records
from fbqat_hub.evaluation.suite import (
    DISTANCES,
    PAIRED,
    PROMPTED,
    SINGLE,
    Measurement,
    NotMeasurableError,
    check_libraries,
    features_of,
    measure,
    measure_distance,
    of_samples,
    of_timesteps,
)
from fbqat_hub.families import get_family
from fbqat_hub.hub.names import public_name
from fbqat_hub.inputs import checked_device, output_folder
from fbqat_hub.pipelines import check_source, downloaded, load_pipeline, load_stage
from fbqat_hub.progress import each
from fbqat_hub.quantization import stored_bits_per_weight
from fbqat_hub.stages import find_stage
from fbqat_hub.training.cache import cached_splits
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.lora_merge import float_pipeline
from fbqat_hub.training.loss import held_out_loss
from fbqat_hub.training.memory import peak_of_a_picture
from fbqat_hub.training.recipe import Recipe, recipe_of_run
from fbqat_hub.training.samples import (
    Asked,
    asked_prompts,
    check_alive,
    picture_sheet,
    real_pictures,
    student_pictures,
    teacher_pictures,
)
from fbqat_hub.training.teachers import resolve_teacher
from fbqat_hub.untrusted import read_json
from fbqat_hub.weights import read_header

TO_TEACHER = tuple(f"{name}_teacher" for name in DISTANCES)
TO_REAL = tuple(f"{name}_real" for name in DISTANCES)
OF_PICTURES = (*PAIRED, *TO_TEACHER, *TO_REAL, *PROMPTED, *SINGLE)
# Of the teacher too, in the suite "loading".
OF_LOADING = ("denoiser_mib", "peak_rss_mib")
METRICS = ("kd_loss", *OF_PICTURES, "bits_per_weight", *OF_LOADING)
# What runs without a download; with prompts of their own only what needs neither the training data nor real pictures.
# Not the peak memory: it generates with the teacher in float32 on the CPU, which a large one may not fit.
DEFAULT = ("kd_loss", "psnr", "ssim", "fd_teacher", "fd_real", "bits_per_weight", "denoiser_mib")
DEFAULT_OF_PROMPTS = ("psnr", "ssim", "fd_teacher", "bits_per_weight")


class Evaluated(NamedTuple):
    """What an evaluation found.

    Attributes:
        records: as merged into ``results.json``.
        not_measured: metric -> why it could not be.
    """

    records: list[Record]
    not_measured: dict[str, str]


def evaluate(
    run: Path,
    *,
    stage: int | None = None,
    prompts: str | None = None,
    images: int | None = None,
    metrics: Sequence[str] | None = None,
    device: str | None = None,
    progress: bool = True,
) -> Evaluated:
    """Measure a run, or a stage of it, and write ``results.json`` and ``images/`` into its folder.

    ``images/`` has the pictures side by side, the training's curve, and, where layers differ, their widths.

    The held-out loss is over the test split of the recipe's data, every sample with ``draws`` noises and timesteps that
    are the same for every method. Pictures are generated from the same seeds by teacher and student; those of an
    earlier evaluation are used again where neither the model nor what is asked for has changed, and an interrupted
    evaluation goes on with the first picture missing.

    Args:
        run: folder of a finished run, or of a converted pipeline.
        stage: bit width of a kept stage, which is measured in place of the run's own denoiser.
        prompts: a prompt set (`fbqat_hub.training.prompts`), or a text file with a prompt on each line; the recipe's
            own prompts and data if None.
        images: how many pictures; the recipe's ``evaluation.images`` if None.
        metrics: of `METRICS`; `DEFAULT`, or `DEFAULT_OF_PROMPTS` with prompts, if None.
        device: of the networks; a GPU if there is one and None is given.
        progress: show progress.

    Returns:
        Records and what could not be measured. Records in the file that are of other prompts, or of metrics that could
        not be measured this time, are taken out of it.

    Raises:
        FileNotFoundError: ``run`` is no folder, has no recipe, or no such stage.
        ImportError: a library that a metric needs is missing.
        ValueError: an unknown metric or prompt set, one with fewer prompts than ``images``, either without a metric of
            pictures, a device that is not there, a damaged ``results.json`` or ``training_log.jsonl``, a loss that is
            not finite, or pictures that only a broken model makes.
    """
    chosen = _chosen(metrics, prompts)
    wanted = [metric for metric in chosen if metric in OF_PICTURES]
    if not wanted and (given := [name for name, of in (("prompts", prompts), ("images", images)) if of is not None]):
        raise ValueError(
            f"{' and '.join(given)} are of pictures, and {', '.join(chosen)} is measured without; leave them out, or "
            "name a metric of pictures, such as psnr."
        )
    device = checked_device(device)
    models = _Models(run, _recipe_of(run, images), device, stage)
    recipe, folder, bits = models.recipe, models.folder, stage or models.recipe.config().weight_bits
    output_folder(folder)
    if (folder / "results.json").exists():  # what is damaged is told of before the work, not after it
        read_records(folder / "results.json")
    log = _training_log(run) if stage is None else []
    check_libraries([_name(metric) for metric in chosen])
    for source in (run, resolve_teacher(recipe.teacher)):
        check_source(source)
    asked = asked_prompts(recipe, prompts, images, bool(set(wanted) & set(TO_REAL))) if wanted else None
    found: dict[str, Measurement] = {}
    not_measured: dict[str, str] = {}
    if "kd_loss" in chosen:
        found["kd_loss"] = _held_out(models)
    if asked:
        samples = _samples(models, asked, bool(set(wanted) & set(TO_REAL)), progress)
        for metric in each(wanted, "measure", "metric", shown=progress):
            try:
                found[metric] = _of_pictures(metric, samples, device, recipe.seed)
            except NotMeasurableError as reason:
                not_measured[metric] = str(reason)
        own = f"W{bits}A{recipe.config().activation_bits}"
        picture_sheet(folder, {"teacher": samples.original, own: samples.student}, asked.texts)
    if "bits_per_weight" in chosen:
        found["bits_per_weight"] = Measurement(stored_bits_per_weight(models.student.transformer), 1)
    if log:
        (run / "images").mkdir(exist_ok=True)
        training_curve(log, run / "images" / "curve.png")
    widths = layer_widths(Component(folder / "transformer", "diffusers", "ModelMixin"))
    if len(set(widths.values())) > 1:
        (folder / "images").mkdir(exist_ok=True)
        widths_picture({recipe.name: widths}, folder / "images" / "widths.png")
    source = public_name(asked.source) if asked else ""  # records are published
    records = [_record(recipe, metric, measured, source, bits) for metric, measured in found.items()]
    records += [record for metric in chosen if metric in OF_LOADING for record in _of_loading(models, metric, bits)]

    def stale(record: Record) -> bool:
        own = (record.family, record.method, record.seed) == (recipe.family, recipe.method, recipe.seed)
        other = record.metric in OF_PICTURES and record.extra.get("prompts") != source
        return own and ((bool(asked) and other) or record.metric in not_measured)

    write_records(folder / "results.json", records, drop=stale)
    return Evaluated(records, not_measured)


def _chosen(metrics: Sequence[str] | None, prompts: str | None) -> list[str]:
    chosen = list(dict.fromkeys(metrics if metrics is not None else DEFAULT if prompts is None else DEFAULT_OF_PROMPTS))
    if unknown := [metric for metric in chosen if metric not in METRICS]:
        raise ValueError(f"unknown metrics {', '.join(unknown)}; known: {', '.join(METRICS)}.")
    if not chosen:
        raise ValueError(f"no metrics to measure; name some of: {', '.join(METRICS)}.")
    return chosen


def _recipe_of(run: Path, images: int | None) -> Recipe:
    if not (run / "recipe.yaml").is_file():
        what = "has no recipe.yaml" if run.is_dir() else "is no folder"
        raise FileNotFoundError(f"{run} {what}; give the folder of a run, as fbqat train or convert leaves it.")
    recipe = recipe_of_run(run / "recipe.yaml")
    return recipe if images is None else replace(recipe, evaluation=replace(recipe.evaluation, images=images))


def _training_log(run: Path) -> list[dict[str, Any]]:
    """What training logged, an entry a line; nothing of a converted pipeline."""
    file = run / "training_log.jsonl"
    if not file.exists():
        return []
    entries = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or not {"step", "loss"} <= entry.keys():
            raise ValueError(
                f"{file}, line {number} is {line!r:.80}; each line is an object with step and loss. Remove the line, "
                "or the file: then no curve is drawn."
            )
        entries.append(entry)
    return entries


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
        return float_pipeline(self.recipe).to(self.device)


@dataclass
class _Samples:
    """Pictures to measure: files in the order of their prompts; real ones in no order."""

    texts: list[str]
    original: list[Path]
    student: list[Path]
    real: list[Path]


def _held_out(models: _Models) -> Measurement:
    recipe, settings = models.recipe, models.recipe.evaluation
    test = cached_splits(recipe, models.teacher)["test"]
    draws = Draws(get_family(recipe.family), models.teacher.scheduler, recipe.generation, recipe.seed, models.device)
    repeats, batch_size = settings.draws, settings.batch_size
    student, teacher = models.student.transformer, models.teacher.transformer
    losses = held_out_loss(student, teacher, test, draws, repeats=repeats, batch_size=batch_size)
    broken = sum(not math.isfinite(loss) for loss in losses)
    if broken:
        raise ValueError(
            f"the held-out loss is not finite in {broken} of {len(losses)} draws: {models.folder} or its teacher "
            f"{recipe.teacher} is broken. Nothing was recorded."
        )
    times = [time for inputs in draws.held_out(test, repeats, batch_size) for time in draws.times(inputs).tolist()]
    # The draws of one picture belong together: the interval is over pictures.
    by_picture = of_samples(torch.tensor(losses).view(repeats, len(test)).mean(dim=0).tolist(), seed=recipe.seed)
    return Measurement(
        statistics.fmean(losses),
        len(losses),
        statistics.stdev(losses) if len(losses) > 1 else None,
        by_picture.interval,
        {"by_timestep": of_timesteps(losses, times, seed=recipe.seed)},
    )


def _samples(models: _Models, asked: Asked, with_real: bool, progress: bool) -> _Samples:
    recipe, texts = models.recipe, asked.texts
    if progress:
        print(f"{len(texts)} prompts of {asked.source}; choose others with --prompts", file=sys.stderr)
    real = real_pictures(recipe, asked) if with_real else []
    original = teacher_pictures(recipe, texts, lambda: models.teacher, progress=progress)
    student = student_pictures(lambda: models.student, models.folder, recipe, texts, progress=progress)
    check_alive(texts, student, original)
    return _Samples(texts, original, student, real)


def _name(metric: str) -> str:
    """Of a metric in `suite`."""
    return metric.removesuffix("_teacher").removesuffix("_real")


def _of_pictures(metric: str, samples: _Samples, device: str, seed: int) -> Measurement:
    name = _name(metric)
    if metric in TO_REAL:
        if len(samples.real) < 2:
            raise NotMeasurableError(f"{len(samples.real)} of the prompts have a real picture; 2 are needed")
        real, student, original = (
            features_of(name, files, device=device) for files in (samples.real, samples.student, samples.original)
        )
        return _beside_teacher(measure_distance(name, student, real), measure_distance(name, original, real))

    def of(files: Sequence[Path]) -> Measurement:
        return measure(name, files, references=samples.original, prompts=samples.texts, device=device, seed=seed)

    found = of(samples.student)
    return found if metric in PAIRED or metric in TO_TEACHER else _beside_teacher(found, of(samples.original))


def _beside_teacher(student: Measurement, teacher: Measurement) -> Measurement:
    """The student's number, with the teacher's own in ``extra``: alone it says little."""
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


def layer_widths(denoiser: Component) -> dict[str, int]:
    """Layer -> bits of its weight, of a packed denoiser's folder; nothing of a float one's."""
    config = FBQATConfig(**read_json(denoiser.folder / "config.json").get("quantization_config", {}))
    stored = [tensor for file in denoiser.weights().files for tensor in read_header(file)]
    layers = [name for name, _, tensor in (key.rpartition(".") for key in stored) if tensor == "weight_packed"]
    return {name: config.weight_bits_by_module.get(name, config.weight_bits) for name in layers}


def _stored_mib(folder: Path) -> float:
    """Of the denoiser's weights in a pipeline's folder."""
    files = Component(folder / "transformer", "diffusers", "ModelMixin").weights().files
    return sum(file.stat().st_size for file in files) / 2**20
