"""``fbqat demo``: the whole of the project on the tiny Sana that ships, in minutes, without a network."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from shlex import quote

import torch

from fbqat_hub.evaluation.folders import PictureFolder
from fbqat_hub.evaluation.results import METHODS, Record, read_records, write_records
from fbqat_hub.export import ExportError
from fbqat_hub.export_run import export_run
from fbqat_hub.hub.card import write_card
from fbqat_hub.inputs import output_folder
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.progress import plain_lines
from fbqat_hub.training.cache import CachedSplit, cached_splits
from fbqat_hub.training.distill import is_finished, train
from fbqat_hub.training.evaluate import evaluate
from fbqat_hub.training.recipe import Recipe, load_recipe
from fbqat_hub.training.samples import evaluation_prompts, picture_sheet, teacher_pictures
from fbqat_hub.training.teachers import resolve_teacher

# The best way without training and the strongest one with it, at the recipe's learning rate; docs/method.md has each at
# its own best one.
BASELINES = ("ptq-gptq", "lsq-qat")
# No Fréchet distance: of so few pictures it is noise.
METRICS = ("kd_loss", "psnr", "ssim", "bits_per_weight", "denoiser_mib")
_SHEET = {"ptq-gptq": "GPTQ, not trained", "lsq-qat": "LSQ", "fbqat": "FB-QAT (ours)"}


def demo(output: Path, *, steps: int | None = None) -> Path:
    """Quantize the tiny Sana by three methods, compare them with the teacher, compile ours, write its card.

    A second call on the same folder goes on where the first one stopped.

    Args:
        output: folder to leave: the packed pipeline with ``README.md`` (the card), ``results.json``, ``images/`` and
            ``htp/``. The baselines' folders are beside it, in ``<output>.baselines/``.
        steps: of each trained method; the recipe's if None.

    Raises:
        FileExistsError: ``output`` has content that is not of such a run.
        ValueError: it has one of another recipe.
    """
    began = time.monotonic()
    runs = {output.parent / f"{output.name}.baselines" / method: method for method in BASELINES} | {output: "fbqat"}
    recipes = {folder: load_recipe("sana-tiny", method=method) for folder, method in runs.items()}
    if steps is not None:
        recipes = {folder: replace(each, steps=steps) if each.steps else each for folder, each in recipes.items()}
    for folder, recipe in recipes.items():
        is_finished(recipe, output_folder(folder), resume=True)
    print("== three methods, two at a time; then a QNN HTP context binary for the Snapdragon 8 Elite", flush=True)
    ours, (untrained, trained) = recipes.pop(output), recipes.items()
    _splits(ours)  # encoded here, once
    threads = max(1, torch.get_num_threads() // 2)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, spawn, initializer=_alone, initargs=(threads,)) as pool:
        training = pool.submit(train, ours, output, resume=True)
        first = pool.submit(_measure, *untrained)  # short, and it leaves the teacher's pictures for the others
        second = pool.submit(_measure, *trained)
        first.result()
        training.result()
        last = pool.submit(_compile, output), pool.submit(_measure, output, ours, ours=True)
        for each in (second, *last):
            each.result()
    _collect({**recipes, output: ours}, output)
    print(f"card: {write_card(output)}")
    print(f"done in {time.monotonic() - began:.0f} s. Look at {output}/README.md and {output}/images/comparison.png")
    print(f'next: fbqat generate {quote(str(output))} "red heart" "pouting cat" --output two.png')
    return output


def _alone(threads: int) -> None:
    """In a process of its own: so many threads, and lines instead of bars, which would overwrite each other."""
    torch.set_num_threads(threads)
    plain_lines()


def _measure(folder: Path, recipe: Recipe, *, ours: bool = False) -> None:
    """Train by one recipe, unless it is done, and measure; prints what was found."""
    train(recipe, folder, resume=True)
    metrics = (*METRICS, "peak_rss_mib") if ours else METRICS
    found = {record.metric: record.value for record in evaluate(folder, metrics=metrics).records}
    print(
        f"   {METHODS[recipe.method]}: held-out distillation loss {found['kd_loss']:.2e}, PSNR {found['psnr']:.1f} dB, "
        f"SSIM {found['ssim']:.3f}",
        flush=True,
    )


def _splits(recipe: Recipe) -> dict[str, CachedSplit]:
    return cached_splits(recipe, load_pipeline(resolve_teacher(recipe.teacher), torch.float32))


def _collect(recipes: Mapping[Path, Recipe], output: Path) -> None:
    """Put the baselines' records and pictures beside ours."""
    records: list[Record] = []
    for folder in recipes:
        records += read_records(folder / "results.json")
    write_records(output / "results.json", records)
    recipe = recipes[output]
    prompts = evaluation_prompts(recipe, _splits(recipe))
    columns = {"teacher": teacher_pictures(recipe, prompts)}
    for folder, each in recipes.items():
        if label := _SHEET.get(each.method):
            columns[label] = list(PictureFolder.open(folder).files.values())
    picture_sheet(output, columns, prompts)


def _compile(output: Path) -> None:
    if (output / "htp" / "certificate.json").exists():
        return
    shutil.rmtree(output / "htp", ignore_errors=True)
    try:
        export_run(output, output / "htp")
    except ExportError as error:  # no compiler here, or a gate not met: the rest of the demo stands without it
        print(f"   left out: {error}")
