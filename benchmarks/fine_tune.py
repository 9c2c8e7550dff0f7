"""Three ways to ship a fine-tune at 4 bits, compared on one style; and memory while an adapter is trained.

    python -m benchmarks.fine_tune            # -> benchmarks/results/fine_tune.json, docs/images/fine-tune.png
    python -m benchmarks.fine_tune --families sd3 --seeds 0
    python -m benchmarks.fine_tune --memory   # peak memory at Sana-600M's width, of the same file

The style is OpenMoji in blue ink. The held-out pictures are of emojis that the float base was trained on, and that no
way has seen in the style. An adapter (LoRA) is trained on the style and shipped beside a 4-bit base; merged into the
float base and quantized again (GPTQ); or merged and trained by this project's default method. Loss is the mean squared
error against the held-out pictures, from the same noises for all; PSNR and SSIM are to pictures of the float base with
its adapter, from the same seeds. Seconds are those of the processor, one thread with OMP_NUM_THREADS=1. What was made
is kept in runs/fine-tune/, and taken from there.

Memory: each base in a fresh process, float32 against packed, random weights, the same steps; loading is part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from benchmarks.method.runs import RECIPES
from benchmarks.training_memory import GIVES_BACK, RandomDraws, Row
from fbqat_hub.config import FBQATConfig
from fbqat_hub.evaluation.metrics import psnr, ssim
from fbqat_hub.evaluation.pictures import comparison_sheet
from fbqat_hub.evaluation.results import machine, now, peak_rss_mib, versions
from fbqat_hub.families import get_family
from fbqat_hub.files import whole
from fbqat_hub.generation import generate_pictures
from fbqat_hub.pictures import as_image
from fbqat_hub.pipelines import load_pipeline, save_pipeline
from fbqat_hub.training.bases import build
from fbqat_hub.training.cache import cached_splits
from fbqat_hub.training.distill import train as train_packed
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.lora_check import adapter_file, load_adapter
from fbqat_hub.training.lora_train import fit, held_out_loss, inject
from fbqat_hub.training.lora_train import train as train_adapter
from fbqat_hub.training.openmoji import load_openmoji
from fbqat_hub.training.recipe import Recipe, load_recipe
from fbqat_hub.training.teachers import resolve_teacher

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "fine_tune.json"
SHEET = ROOT / "docs" / "images" / "fine-tune.png"
#: Families that diffusers can merge an adapter of.
FAMILIES = ("sana", "sd3", "flux")
# Lines, areas and paper of the style: colours that the tiny autoencoders, trained on emojis on white, can decode.
_INK = ("#1d3557", "#5fa8e0", "#ffffff")
_HELD_OUT = 10  # one emoji of so many
_ADAPTER = {"rank": 16, "steps": 200, "batch_size": 16, "learning_rate": 3e-3}
_TRAINING_STEPS = 200
_BATCH = 32
_MEMORY = Row("sana-600m", "2 of 28 blocks, 512 px", {"num_layers": 2})
_MEMORY_STEPS = 2


@dataclass(frozen=True)
class Shipped:
    """A way, with what makes it.

    Attributes:
        folder: of the pipeline.
        adapter: on it, or None.
        new_bytes: what is added to the disk of someone who has the base.
        seconds: of the processor, of all that is done once for this fine-tune.
    """

    folder: Path
    adapter: Path | None
    new_bytes: int
    seconds: float


def in_style(picture: Image.Image) -> Image.Image:
    """In blue ink."""
    lines, areas, paper = _INK
    return ImageOps.colorize(picture.convert("L"), lines, paper, mid=areas)


def write_pictures(recipe: Recipe, folder: Path) -> tuple[dict[str, Image.Image], list[str]]:
    """The teacher's emojis in the style, as a folder for ``fbqat lora train``; by caption, and which are held out."""
    pictures, held_out = {}, []
    for number, row in enumerate(load_openmoji(max(recipe.size), recipe.dataset["groups"])["train"]):
        split = {0: "validation", _HELD_OUT: "test"}.get(number % (2 * _HELD_OUT), "train")
        picture, path = in_style(row["image"]), folder / split / f"{row['hexcode']}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            picture.save(path)
            path.with_suffix(".txt").write_text(row["caption"], encoding="utf-8")
        pictures[row["caption"]] = picture
        if split != "train":
            held_out.append(row["caption"])
    return pictures, held_out


class Study:
    """The ways of one family, in a folder of its own."""

    def __init__(self, name: str, work: Path) -> None:
        self.work = work
        self.recipe = load_recipe(RECIPES[name])
        self.pictures, self.held_out = write_pictures(self.recipe, work / "pictures")
        self.base = work / "base"
        if not self.base.exists():
            shutil.copytree(resolve_teacher(self.recipe.teacher), self.base)
            self.recipe.save(self.base / "recipe.yaml")  # says the size of pictures and the texts' length
        self.packed = train_packed(self.recipe, work / "packed", progress=False, resume=True)
        pipeline = load_pipeline(self.base, torch.float32)
        self.splits = cached_splits(self.styled("ptq-gptq", self.base, 0), pipeline)
        self.scheduler = pipeline.scheduler

    def ways(self, seed: int) -> Iterator[tuple[str, Shipped]]:
        """Every row, by its name in the results; what a row needs is made when it comes."""
        yield "float", Shipped(self.base, None, 0, 0.0)
        yield "packed", Shipped(self.packed, None, 0, 0.0)
        of_float, seconds = self.adapter(self.base, seed)
        yield "float-adapter", Shipped(self.base, of_float, _bytes(of_float), seconds)
        yield "adapter-of-float", Shipped(self.packed, of_float, _bytes(of_float), seconds)
        of_packed, packed_seconds = self.adapter(self.packed, seed)
        yield "adapter", Shipped(self.packed, of_packed, _bytes(of_packed), packed_seconds)
        merged, merging = self.merged(of_float, seed)
        for way, method in (("merged-gptq", "ptq-gptq"), ("merged-trained", "fbqat")):
            recipe, folder = self.styled(method, merged, seed), self.work / f"{way}-{seed}"
            spent = _once(folder, lambda recipe=recipe, folder=folder: train_packed(recipe, folder, progress=False))
            yield way, Shipped(folder, None, _bytes(folder / "transformer"), seconds + merging + spent)
        other, _ = self.adapter(self.base, seed + 1)
        yield "float-other-seed", Shipped(self.base, other, _bytes(other), seconds)

    def adapter(self, base: Path, seed: int) -> tuple[Path, float]:
        """Trained on a base; with the processor's seconds."""
        output, pictures = self.work / f"adapter-{base.name}-{seed}", self.work / "pictures"
        return output, _once(
            output, lambda: train_adapter(pictures, str(base), output, seed=seed, progress=False, **_ADAPTER)
        )

    def merged(self, adapter: Path, seed: int) -> tuple[Path, float]:
        """The float base with an adapter merged, as diffusers does it; with the processor's seconds."""
        output = self.work / f"merged-{seed}"

        def merge() -> None:
            pipeline = load_pipeline(self.base, torch.float32)
            pipeline.load_lora_weights(str(adapter))
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
            save_pipeline(pipeline, output)

        return output, _once(output, merge)

    def styled(self, method: str, teacher: Path, seed: int) -> Recipe:
        """The family's recipe, for this teacher and the style's pictures."""
        changes: dict[str, Any] = {"dataset": {"path": str(self.work / "pictures")}, "teacher": str(teacher)}
        if method == "fbqat":
            changes["steps"] = _TRAINING_STEPS
        return load_recipe(RECIPES[self.recipe.family], method=method, seed=seed, **changes)

    def load(self, shipped: Shipped) -> Any:
        """Its pipeline, with the adapter."""
        pipeline = load_pipeline(shipped.folder, torch.float32)
        if shipped.adapter:
            load_adapter(pipeline, adapter_file(str(shipped.adapter)))
        return pipeline

    def loss(self, pipeline: Any, seed: int) -> float:
        """On the held-out pictures."""
        draws = Draws(get_family(self.recipe.family), self.scheduler, self.recipe.generation, seed)
        return held_out_loss(draws, pipeline.transformer, [self.splits["validation"], self.splits["test"]], _BATCH)

    def draw(self, pipeline: Any, seed: int, captions: Sequence[str]) -> Tensor:
        """A picture of each, uint8 [N, 3, H, W]."""
        call = {**self.recipe.generation, "num_inference_steps": self.recipe.evaluation.inference_steps}
        return generate_pictures(pipeline, captions, call, range(1000 * seed, 1000 * seed + len(captions)))


def measure(study: Study, seed: int) -> None:
    """Measure every way and keep its row."""
    drawn: dict[str, Tensor] = {}
    for way, shipped in study.ways(seed):
        pipeline = study.load(shipped)
        loss, drawn[way] = study.loss(pipeline, seed), study.draw(pipeline, seed, study.held_out)
        row = {"kind": "way", "family": study.recipe.family, "way": way, "seed": seed, "loss": loss}
        row |= {"new_bytes": shipped.new_bytes, "seconds": round(shipped.seconds, 1), "adapter": _ADAPTER}
        if way not in ("float", "packed", "float-adapter"):
            pair = [drawn[name].float() / 255 for name in (way, "float-adapter")]
            row |= {"psnr": float(psnr(*pair).mean()), "ssim": float(ssim(*pair).mean())}
        row |= {"n": len(drawn[way]), "pictures": len(study.splits["train"]), "training_steps": _TRAINING_STEPS}
        row["average_bits"] = study.recipe.quantization.average_bits
        _keep([{**row, **_origin(study.recipe.family)}])
        print(json.dumps(row), flush=True)


_COLUMNS = {
    "float": "float base",
    "float-adapter": "float, adapter",
    "adapter": "adapter on the 4-bit base",
    "merged-gptq": "merged, GPTQ",
    "merged-trained": "merged, trained",
}


def sheet(study: Study, seed: int) -> None:
    """Held-out faces, which the tiny teachers draw best: a picture of the style, and what each way draws."""
    faces = set(load_openmoji(max(study.recipe.size), ["Smileys & Emotion"])["train"]["caption"])
    captions = [caption for caption in study.held_out if caption in faces][:8]
    columns = {"held-out picture": [study.pictures[caption] for caption in captions]}
    for way, shipped in study.ways(seed):
        if way in _COLUMNS:
            columns[_COLUMNS[way]] = [as_image(each) for each in study.draw(study.load(shipped), seed, captions)]
        if len(columns) > len(_COLUMNS):
            break
    comparison_sheet(columns, captions).save(SHEET)


def measure_memory(base: Path) -> dict[str, float]:
    """Of this process, which must be a fresh one: load a denoiser and train an adapter for a few steps."""
    import diffusers

    import fbqat_hub  # noqa: F401  # makes diffusers know the format

    recipe, configs = _MEMORY.resolved(), _MEMORY.configs()
    draws = RandomDraws(recipe, configs)
    program = peak_rss_mib() or 0.0
    denoiser = getattr(diffusers, configs["transformer"]["class"]).from_pretrained(base, dtype=torch.float32)
    loaded = peak_rss_mib() or 0.0
    inject(denoiser, rank=8, seed=0)
    started = time.process_time()

    def pair(number: int) -> tuple[dict[str, Any], Tensor]:
        inputs = draws.training(None, number, 1)
        return inputs, torch.randn_like(inputs[draws.family.latents_input])

    fit(denoiser, pair, draws.predict, _MEMORY_STEPS, 1e-3, progress=False)
    seconds = (time.process_time() - started) / _MEMORY_STEPS
    return {
        "program_mib": program,
        "loaded_mib": loaded,
        "peak_rss_mib": peak_rss_mib() or 0.0,
        "step_seconds": seconds,
    }


def memory_rows(work: Path) -> list[dict[str, Any]]:
    """Float and packed, each measured in a process of its own."""
    _save_random(work)
    rows = []
    for base in ("float", "packed"):
        command = [sys.executable, "-m", "benchmarks.fine_tune", "--measure", str(work / base)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **GIVES_BACK})
        found = {key: round(value, 1) for key, value in json.loads(done.stdout.splitlines()[-1]).items()}
        row = {"kind": "memory", "recipe": _MEMORY.recipe, "what": _MEMORY.what, "base": base, "batch_size": 1, **found}
        rows.append({**row, "rank": 8, "steps": _MEMORY_STEPS, **_origin(None)})
        print(json.dumps(found), flush=True)
    return rows


def _save_random(work: Path) -> None:
    """A denoiser of random weights, float and packed."""
    model = build(_MEMORY.configs()["transformer"])
    model.save_pretrained(work / "float")
    config = FBQATConfig(
        weight_clip="max_abs", module_overrides=get_family(_MEMORY.resolved().family).activation_overrides
    )
    type(model).from_pretrained(work / "float", quantization_config=config).save_pretrained(work / "packed")


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _once(folder: Path, make: Callable[[], object]) -> float:
    """Make a folder if it is not there; the seconds of the processor that it took, which are kept beside it."""
    kept = folder.with_name(f"{folder.name}.seconds")
    if not kept.exists():
        shutil.rmtree(folder, ignore_errors=True)
        started = time.process_time()
        make()
        kept.write_text(str(time.process_time() - started))
    return float(kept.read_text())


def _origin(family: str | None) -> dict[str, Any]:
    option = f"--families {family}" if family else "--memory"
    origin = {"command": f"python -m benchmarks.fine_tune {option}", "threads": torch.get_num_threads()}
    return {**origin, "machine": machine(), "versions": versions("peft"), "date": now()}


def _keep(rows: list[dict[str, Any]]) -> None:
    """Into the results, in place of rows of the same measurement."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in ("kind", "family", "way", "seed", "base"))

    present = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    found = {key(row): row for row in [*present, *rows]}
    with whole(RESULTS) as partial:
        partial.write_text(json.dumps(list(found.values()), indent=1) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=["sana"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "fine-tune")
    parser.add_argument("--memory", action="store_true", help="only what an adapter's training takes")
    parser.add_argument("--sheet", action="store_true", help="only the picture sheet, of what was made")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure_memory(options.measure)))
        return
    if options.memory:
        with tempfile.TemporaryDirectory() as work:
            _keep(memory_rows(Path(work)))
        return
    for name in options.families:
        study = Study(name, options.runs / name)
        for seed in options.seeds if not options.sheet else ():
            measure(study, seed)
        if name == "sana":
            sheet(study, options.seeds[0])


if __name__ == "__main__":
    main()
