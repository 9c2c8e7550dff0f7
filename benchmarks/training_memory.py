"""Memory and time of training steps at true shapes with random weights, beside what `fbqat plan` estimates.

    python -m benchmarks.training_memory                      # every row -> benchmarks/results/training.json; 16 GB
    python -m benchmarks.training_memory --rows flux-blocks   # one of them

Each row is a fresh process: the recipe's teacher in float32 with random numbers, its student, and steps of the real
loop on random inputs. Clips are searched, GPTQ is left out. A block-wise row trains its blocks twice, with one step and
with more: what one more takes is a step of all of them. The estimate is of the tensors; the memory of the program
before the teacher is made is added to it. glibc keeps much of what a program frees, so a row is measured with a limit
on that, and where it does not take too long also with glibc's defaults. Seconds are those of the processor, of one
thread with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fbqat_hub.evaluation.results import machine, now, peak_rss_mib, versions
from fbqat_hub.families import get_family, moved
from fbqat_hub.files import whole
from fbqat_hub.training.bases import Configs, build, configs_of
from fbqat_hub.training.block_footprint import block_memory
from fbqat_hub.training.blockwise import train_blockwise
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.footprint import denoiser_arguments, step_memory
from fbqat_hub.training.loop import accelerator_of, distill
from fbqat_hub.training.recipe import Recipe, load_recipe
from fbqat_hub.training.student import prepare_student

RESULTS = Path(__file__).parent / "results" / "training.json"
_STEPS = 2
# glibc gives blocks of more bytes back when they are freed.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Row:
    """What is measured.

    Attributes:
        recipe: whose teacher and settings; its batch size is 1, its precision float32.
        what: of the teacher, in words.
        config: of its denoiser, where it is cut.
        changes: of the recipe.
        twice: also with glibc's defaults.
        share: how often all blocks of the row make those of the model; 0 where they do not.
    """

    recipe: str
    what: str
    config: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    twice: bool = True
    share: int = 0

    def resolved(self) -> Recipe:
        """The recipe of a few steps from nearest codes, every layer at 4 bits: widths are chosen by data."""
        same = {
            "steps": _STEPS, "batch_size": 1, "mixed_precision": "no", "save_every": 0, "validate_every": 0,
            "quantization": {"average_bits": None},
        }  # fmt: skip
        recipe = load_recipe(self.recipe, **same | self.changes)
        return replace(recipe, initialization="nearest", loss_weighting="none")

    def configs(self) -> Configs:
        """Of the teacher's models."""
        configs = configs_of(self.resolved().teacher)
        return {**configs, "transformer": {**configs["transformer"], **self.config}}


ROWS = {
    "sana-600m": Row("sana-600m", "all 28 blocks, 512 px", changes={"gradient_checkpointing": False}),
    "sana-600m-checkpointing": Row("sana-600m", "all 28 blocks, 512 px", twice=False),
    "pixart-sigma": Row(
        "pixart-sigma", "all 28 blocks, 512 px", changes={"generation": {"height": 512, "width": 512}}, twice=False
    ),
    "sd3-blocks": Row(
        "sd3.5-medium", "one block of dual attention and the last one, of 24, 512 px",
        {"num_layers": 2, "dual_attention_layers": [0]}, {"gradient_checkpointing": False},
    ),
    "flux-blocks": Row(
        "flux-schnell", "one of 19 double and one of 38 single blocks, 512 px",
        {"num_layers": 1, "num_single_layers": 1}, {"gradient_checkpointing": False},
    ),
    "flux-blockwise": Row(
        "flux-schnell", "block by block, one of 19 double and two of 38 single blocks, 512 px",
        {"num_layers": 1, "num_single_layers": 2},
        {
            "training": "blockwise",
            "blockwise": {"samples": 2, "steps": 5, "tuning_steps": 0},
        },
        twice=False, share=19,
    ),
}  # fmt: skip


class RandomDraws(Draws):
    """Random numbers in place of a data set."""

    def __init__(self, recipe: Recipe, configs: Configs) -> None:
        super().__init__(get_family(recipe.family), None, recipe.generation, recipe.seed)
        self._inputs = denoiser_arguments(recipe, configs, recipe.batch_size)

    def training(self, split: Any, step: int, batch_size: int, part: slice = slice(None)) -> dict[str, Any]:
        noisy = {
            name: torch.randn(value.shape) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in self._inputs.items()
        }
        return moved({**noisy, self.family.timestep_input: self._inputs[self.family.timestep_input]}, self.device)


def measure(row: Row) -> dict[str, float]:
    """Of this process, which must be a fresh one."""
    recipe, configs = row.resolved(), row.configs()
    draws, accelerator = RandomDraws(recipe, configs), accelerator_of(recipe)
    program = peak_rss_mib() or 0.0
    teacher = build(configs["transformer"])
    if recipe.training == "blockwise":
        return {"program_mib": program, **_blockwise(recipe, teacher, draws, accelerator)}
    student = prepare_student(recipe, teacher, None, draws)  # type: ignore[arg-type]
    times = [time.process_time()]
    with tempfile.TemporaryDirectory() as folder:
        distill(
            recipe, student, teacher, {"train": None}, draws, Path(folder), accelerator, False, False,  # type: ignore[dict-item]
            lambda _: times.append(time.process_time()),
        )  # fmt: skip
    seconds = [after - before for before, after in itertools.pairwise(times)]
    return {"program_mib": program, "measured_mib": peak_rss_mib() or 0.0, "seconds_per_step": seconds[-1]}


def _blockwise(recipe: Recipe, teacher: nn.Module, draws: Draws, accelerator: Accelerator) -> dict[str, float]:
    """A step of all blocks of the teacher, one after the other."""
    times = []
    for steps in (1, recipe.blockwise.steps):
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            train_blockwise(
                replace(recipe, blockwise=replace(recipe.blockwise, steps=steps)),
                teacher, {"train": None}, draws, Path(folder), accelerator, progress=False,  # type: ignore[dict-item]
            )  # fmt: skip
        times.append(time.process_time() - began)
    seconds = (times[1] - times[0]) / (recipe.blockwise.steps - 1)
    return {
        "measured_mib": peak_rss_mib() or 0.0,
        "seconds_per_step": seconds,
        "seconds_beside_steps": times[0] - seconds,
    }


def estimate(recipe: Recipe, configs: Configs) -> tuple[int, dict[str, Any]]:
    """Bytes at the peak of a step on one device that is the host, and what they are of."""
    if recipe.training == "blockwise":
        blocks = block_memory(recipe, configs)
        return blocks.teacher + blocks.kept + blocks.block, asdict(blocks)
    step = step_memory(recipe, configs)
    return step.peak, asdict(step)


def result(name: str) -> dict[str, Any]:
    """The row of the results file, measured in a process of its own."""
    row = ROWS[name]
    measured = _fresh(name, GIVES_BACK)
    if row.twice:
        measured["measured_with_glibc_defaults_mib"] = _fresh(name, {})["measured_mib"]
    recipe = row.resolved()
    peak, parts = estimate(recipe, row.configs())
    estimated = peak / 2**20 + measured["program_mib"]
    return {
        "name": name,
        "recipe": row.recipe,
        "what": row.what,
        "size": list(recipe.size),
        "batch_size": recipe.batch_size,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "mixed_precision": recipe.mixed_precision,
        "bytes": parts,
        "estimated_mib": round(estimated),
        **({"share": row.share} if row.share else {}),
        **{key: round(value, 1) for key, value in measured.items()},
        "estimated_over_measured": round(estimated / measured["measured_mib"], 3),
        "threads": torch.get_num_threads(),
        "command": f"python -m benchmarks.training_memory --rows {name}",
        "machine": machine(),
        "versions": versions(),
        "date": now(),
    }


def _fresh(name: str, environment: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.training_memory", "--measure", name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="which (default: all)")
    parser.add_argument("--measure", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(ROWS[options.measure])))
        return
    for name in options.rows:
        found = {row["name"]: row for row in (json.loads(RESULTS.read_text()) if RESULTS.exists() else [])}
        found[name] = result(name)
        print(json.dumps({key: value for key, value in found[name].items() if key not in ("machine", "versions")}))
        with whole(RESULTS) as partial:
            partial.write_text(json.dumps([found[key] for key in ROWS if key in found], indent=2) + "\n")


if __name__ == "__main__":
    main()
