"""``fbqat demo``: the whole of the project on the tiny Sana that ships, in minutes, without a network."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fbqat_hub.evaluation.folders import PictureFolder
from fbqat_hub.evaluation.results import METHODS, Record, read_records, write_records
from fbqat_hub.export import ExportError
from fbqat_hub.hub.card import write_card
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training.device import export_run
from fbqat_hub.training.distill import cached_splits, train
from fbqat_hub.training.evaluate import DEFAULT, evaluate, evaluation_prompts, picture_sheet, teacher_pictures
from fbqat_hub.training.recipe import Recipe, load_recipe
from fbqat_hub.training.teachers import resolve_teacher

# All at the recipe's learning rate; docs/method.md has each at its own best one.
BASELINES = ("ptq-maxabs", "ptq-mse", "ptq-gptq", "vqat", "lsq-qat", "fbqat-paper")
_SHEET = {"ptq-maxabs": "PTQ W4A8", "vqat": "vanilla QAT W4A8", "fbqat": "FB-QAT W4A8 (ours)"}


def demo(output: Path, *, steps: int | None = None) -> Path:
    """Quantize the tiny Sana by seven methods, compare them with the teacher, compile ours, write its card.

    A second call on the same folder goes on where the first one stopped.

    Args:
        output: folder to leave: the packed pipeline with ``README.md`` (the card), ``results.json``, ``images/`` and
            ``htp/``. The baselines' folders are beside it, in ``<output>.baselines/``.
        steps: of each trained method; the recipe's if None.
    """
    began = time.monotonic()
    changes = {} if steps is None else {"steps": steps}
    recipe = load_recipe("sana-tiny", **changes)
    runs = {method: load_recipe("sana-tiny", **{**changes, "method": method}) for method in BASELINES}
    for method, baseline in runs.items():
        _run(baseline, output.parent / f"{output.name}.baselines" / method, DEFAULT)
    _run(recipe, output, (*DEFAULT, "peak_rss_mib"))
    _collect(recipe, output, {method: output.parent / f"{output.name}.baselines" / method for method in runs})
    _compile(output)
    print(f"card: {write_card(output)}")
    print(f"done in {time.monotonic() - began:.0f} s. Look at {output}/README.md and {output}/images/comparison.png")
    return output


def _run(recipe: Recipe, folder: Path, metrics: Sequence[str]) -> None:
    print(f"== {METHODS[recipe.method]}")
    train(recipe, folder, resume=True)
    measured = {record.metric: record.value for record in evaluate(folder, metrics=metrics)}
    print(
        f"   held-out distillation loss {measured['kd_loss']:.2e}, Fréchet distance {measured['fd_teacher']:.3f}, "
        f"PSNR {measured['psnr']:.1f} dB"
    )


def _collect(recipe: Recipe, output: Path, baselines: dict[str, Path]) -> None:
    """Put the baselines' records and pictures beside ours."""
    records: list[Record] = []
    for folder in baselines.values():
        records += read_records(folder / "results.json")
    write_records(output / "results.json", records + read_records(output / "results.json"))
    splits = cached_splits(recipe, load_pipeline(resolve_teacher(recipe.teacher), torch.float32))
    prompts = evaluation_prompts(recipe, splits)
    columns = {"teacher": teacher_pictures(recipe, prompts)}
    for method, label in _SHEET.items():
        folder = output if method == recipe.method else baselines[method]
        columns[label] = list(PictureFolder.open(folder).files.values())
    picture_sheet(output, columns, prompts)


def _compile(output: Path) -> None:
    print("== QNN HTP context binary for the Snapdragon 8 Elite")
    if (output / "htp" / "certificate.json").exists():
        return
    shutil.rmtree(output / "htp", ignore_errors=True)
    try:
        export_run(output, output / "htp")
    except ExportError as error:  # no compiler here, or a gate not met: the rest of the demo stands without it
        print(f"   left out: {error}")
