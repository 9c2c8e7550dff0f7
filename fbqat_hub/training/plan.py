"""Plan a run before it is paid for: what a bit width costs, which layers to train, how long, how much memory."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fbqat_hub.evaluation.results import command_line, machine, versions
from fbqat_hub.families import get_family
from fbqat_hub.files import whole
from fbqat_hub.text import columns
from fbqat_hub.training.adam import check_optimizer
from fbqat_hub.training.cache import cached_splits
from fbqat_hub.training.costs import check_trains
from fbqat_hub.training.dataset import check_local_data
from fbqat_hub.training.distill import load_teacher
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.loop import accelerator_of
from fbqat_hub.training.lora_merge import pinned_recipe
from fbqat_hub.training.probe import (
    DRAWS,
    Estimate,
    Probe,
    advise,
    loss_against_width,
    probe_layers,
    relative_difference,
    widths_to,
)
from fbqat_hub.training.recipe import Recipe
from fbqat_hub.training.sharding import is_sharded
from fbqat_hub.training.student import check_layers, prepare_student

PROBE_STEPS = 40
_INK = "#3355c8"


@dataclass(frozen=True)
class Plan:
    """What was measured for a recipe, and what it advises.

    Attributes:
        recipe: that was planned.
        curve: bit width -> held-out loss of the untrained student, from 8 bits to the stored width.
        probes: one a group of layers, "all" among them.
        probe_steps: of each.
    """

    recipe: Recipe
    curve: dict[float, Estimate]
    probes: dict[str, Probe]
    probe_steps: int

    @property
    def seconds(self) -> float:
        """Time of the recipe's training on this machine, without validation and checkpoints."""
        return self.probes[self.recipe.train_layers].seconds_per_step * self.recipe.steps

    def text(self) -> str:
        """The plan to read."""
        own = self.probes[self.recipe.train_layers]
        pictures = len(own.losses)
        curve = [(f"{width:g}", f"{loss.mean:.5f}", _text(loss.error, ".5f")) for width, loss in self.curve.items()]
        titles = ("layers", "parameters", "share", "loss", "removed", "per million", "against all", "± error")
        layers = [
            (
                group,
                f"{row['trained_parameters']:,}",
                f"{row['share']:.1%}",
                f"{row['loss']:.5f}",
                f"{row['removed']:.1%}",
                f"{row['removed_per_million']:.3g}",
                f"{row['against_all']:+.1%}",
                _text(row["against_all_error"], ".1%"),
                f"{row['seconds_per_step']:.3g}",
                _text(row["peak_mib"], ".0f"),
            )
            for group, row in self._layers().items()
        ]
        return "\n".join(
            [
                f"Loss against bit width before training ({pictures} validation pictures, {DRAWS} draws of each):",
                columns([("bit width", "loss", "± error"), *curve], numbers_from=1),
                "",
                f"Groups of layers, {self.probe_steps} steps of each at the recipe's method and rate:",
                columns([(*titles, "s/step", "peak MiB"), *layers], numbers_from=1),
                "",
                f"Advice: {advise(self.probes)[1]} One seed, {self.probe_steps} steps: a lead, not a verdict.",
                f"Time: {self.recipe.steps} steps of {own.seconds_per_step:.3g} s are "
                f"{datetime.timedelta(seconds=round(self.seconds))}. Peak memory: {_text(own.peak_mib, '.0f')} MiB. "
                f"(The recipe as it is, train_layers: {self.recipe.train_layers}.)",
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain data."""
        group, advice = advise(self.probes)
        own = self.probes[self.recipe.train_layers]
        return {
            "recipe": self.recipe.to_dict(),
            "pictures": len(own.losses),
            "draws": DRAWS,
            "curve": [{"bit_width": width, **loss._asdict()} for width, loss in self.curve.items()],
            "probe_steps": self.probe_steps,
            "layers": self._layers(),
            "train_layers": group,
            "advice": advice,
            "seconds": self.seconds,
            "peak_mib": own.peak_mib,
            "command": command_line(),
            "versions": versions(),
            "machine": machine(),
        }

    def save(self, folder: Path) -> None:
        """Write ``plan.json`` and ``curve.png`` into ``folder``, which may exist."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        with whole(folder / "plan.json") as partial:
            partial.write_text(text)
        with whole(folder / "curve.png") as partial:
            draw_curve(self.curve, partial)

    def _layers(self) -> dict[str, dict[str, Any]]:
        """group -> its row of the table. ``removed`` is the share of the untrained student's loss that is gone."""
        untrained = self.curve[self.recipe.quantization.weight_bits].mean
        rows = {}
        for group, probe in self.probes.items():
            loss, difference = Estimate.of(probe.losses), relative_difference(probe.losses, self.probes["all"].losses)
            rows[group] = {
                "trained_parameters": probe.trained_parameters,
                "share": probe.share,
                "loss": loss.mean,
                "error": loss.error,
                "removed": 1 - loss.mean / untrained,
                "removed_per_million": (1 - loss.mean / untrained) / (probe.trained_parameters / 1e6),
                "against_all": difference.mean,
                "against_all_error": difference.error,
                "seconds_per_step": probe.seconds_per_step,
                "peak_mib": probe.peak_mib,
            }
        return rows


def plan(recipe: Recipe, output: Path | None = None, *, progress: bool = True) -> Plan:
    """Measure what a run of ``recipe`` has to choose from, at the price of a few short ones.

    Args:
        output: folder for ``plan.json`` and ``curve.png``.
        progress: show progress bars.

    Raises:
        ValueError: a method that does not train, block-wise training, a teacher that is not a float pipeline of the
            recipe's family, or one of whose layers none is trained.
        ImportError: 8-bit moments of Adam without torchao.
    """
    check_trains(recipe)
    if recipe.training == "blockwise":
        raise ValueError(
            "fbqat plan --measure runs end-to-end steps, and the recipe's training is blockwise; leave out --measure, "
            "or set training=end_to_end."
        )
    check_optimizer(recipe.optimizer)
    accelerator = accelerator_of(recipe)
    if is_sharded(accelerator):
        raise ValueError("fbqat plan --measure does not share out layers (FSDP2); start it in one process.")
    check_local_data(recipe.dataset)
    torch.manual_seed(recipe.seed)
    recipe, _ = pinned_recipe(recipe)
    pipeline = load_teacher(recipe)
    check_layers(recipe, pipeline.transformer)
    if output:
        output.mkdir(parents=True, exist_ok=True)  # before the minutes of measuring
    splits = cached_splits(recipe, pipeline.to(accelerator.device))
    pipeline.to("cpu")
    draws = Draws(get_family(recipe.family), pipeline.scheduler, recipe.generation, recipe.seed, accelerator.device)
    teacher = pipeline.transformer.to(accelerator.device)

    # weights where they are: GPTQ's codes are for one width
    student = prepare_student(replace(recipe, initialization="nearest"), teacher, splits["train"], draws)
    widths = widths_to(recipe.quantization.weight_bits)
    curve = loss_against_width(student, teacher, splits["validation"], draws, widths, progress=progress)
    del student
    steps = min(max(PROBE_STEPS, recipe.bit_schedule().least_steps), recipe.steps)
    probes = probe_layers(recipe, teacher, splits, draws, accelerator, steps, progress=progress)
    made = Plan(recipe, curve, probes, steps)
    if output:
        made.save(output)
    return made


def draw_curve(curve: Mapping[float, Estimate], path: Path) -> None:
    """Write a PNG: loss against bit width with standard errors."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    losses = [loss.mean for loss in curve.values()]
    errors = [loss.error or 0.0 for loss in curve.values()]
    axis.errorbar(list(curve), losses, errors, color=_INK, linewidth=1.6, capsize=2, label="measured, ± standard error")
    axis.set_yscale("log")
    axis.invert_xaxis()
    axis.set_xlabel("bit width")
    axis.set_ylabel("distillation loss before training")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper left")
    with path.open("wb") as file:
        canvas.print_png(file, metadata={"Software": None})


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
