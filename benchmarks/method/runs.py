"""One run of the benchmark: a method on a family's tiny teacher at one budget, learning rate and seed."""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from benchmarks.method.baselines import bits_per_weight, prepare_low_rank
from benchmarks.method.choices import CHOICES, prepare_by, prepare_falling
from benchmarks.method.dynamics import Dynamics
from benchmarks.method.outliers import outlier_channels
from fbqat_hub.cache_dir import default_cache_dir
from fbqat_hub.evaluation.features import OpenMojiFeatures, extract
from fbqat_hub.evaluation.metrics import frechet_distance, psnr
from fbqat_hub.evaluation.results import command_line, machine, now, versions
from fbqat_hub.families import FAMILIES, get_family
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.quantization import (
    ActivationScheme,
    FakeQuantizedLinear,
    named_layers,
    set_bit_width,
    stored_bits_per_weight,
)
from fbqat_hub.training.blockwise import train_blockwise
from fbqat_hub.training.cache import CachedSplit, cache_key, cached_splits
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.loop import distill
from fbqat_hub.training.loss import held_out_loss
from fbqat_hub.training.method import FBQAT
from fbqat_hub.training.migration import RATES_THEN
from fbqat_hub.training.openmoji import load_openmoji
from fbqat_hub.training.recipe import Recipe, load_recipe
from fbqat_hub.training.samples import generate_samples
from fbqat_hub.training.student import prepare_student
from fbqat_hub.training.teachers import resolve_teacher
from fbqat_hub.training.trajectories import VERSION, Trajectories, predictions, trajectories, trajectory_loss

# The judge keeps the inputs of a denoiser, which must be tensors for that.
RECIPES = {name: family.tiny for name, family in FAMILIES.items() if family.tiny and family.takes_tensors}
LOW_RANK = 4
# A bit width whose grid is finer than what fp32 activations show of a weight.
_FLOAT = 16
# For the Fréchet distance and PSNR; the distance's bias at N pictures is about 1/N.
PICTURES = 768
# Every held-out picture is seen with this many noises and timesteps.
REPEATS = 4
HELD_OUT = ("validation", "test")
# The judge: draws of the teacher's own sampler, at least this many, of captions that nothing was trained on.
JUDGED, STEPS_OF_A_PICTURE = 2000, 4
# Rates here are those of all layers, for most rows are from when recipes had no others, and annealed for every method.
ABSOLUTE = {**RATES_THEN["optimizer"], "learning_rate_schedule": "cosine", "warmup_steps": 20}
RELATIVE = {name: getattr(FBQAT.optimizer, name) for name in ABSOLUTE}
TORCHAO_NEEDED = "method 'torchao-qat' needs torchao: pip install 'fbqat-hub[torchao]'"

Prepare = Callable[[Recipe, nn.Module, CachedSplit, Draws], Any]


@dataclass(frozen=True)
class Method:
    """What is compared: a recipe's method, fields that differ from it, and what prepares the student."""

    preset: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    prepare: Prepare = prepare_student
    trained: bool = True  # at a rate of the grid
    halved: bool = False  # ``prepare`` takes half of the steps
    float_weights: bool = False  # with the method's activations


def _prepare_torchao(recipe: Recipe, teacher: nn.Module, train_split: CachedSplit, draws: Draws) -> nn.Module:
    """``torchao_qat.prepare_torchao``; torchao is imported here only."""
    try:
        from benchmarks.method.torchao_qat import prepare_torchao
    except ImportError as error:
        raise ImportError(TORCHAO_NEEDED) from error
    return prepare_torchao(recipe, teacher, train_split, draws)


def _in_bfloat16(recipe: Recipe, teacher: nn.Module, train_split: CachedSplit, draws: Draws) -> nn.Module:
    """A copy of the teacher in bfloat16, given its inputs in it as a pipeline of that dtype does."""
    del recipe, train_split

    def narrow(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
        own = draws.family.timestep_input
        return positional, {
            name: value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() and name != own else value
            for name, value in named.items()
        }

    student = copy.deepcopy(teacher).bfloat16()
    student.register_forward_pre_hook(narrow, with_kwargs=True)
    return student


METHODS: dict[str, Method] = {
    "ptq-maxabs": Method("ptq-maxabs", trained=False),
    "ptq-mse": Method("ptq-mse", trained=False),
    "ptq-gptq": Method("ptq-gptq", trained=False),
    "svdquant": Method("ptq-mse", prepare=partial(prepare_low_rank, rank=LOW_RANK, train=False), trained=False),
    "torchao-qat": Method("vqat", prepare=_prepare_torchao),
    "vqat": Method("vqat"),
    "lsq-qat": Method("lsq-qat"),
    "svdqat": Method("vqat", prepare=partial(prepare_low_rank, rank=LOW_RANK, train=True)),
    "integer": Method("integer"),
    "simple": Method("simple"),
    "fbqat-paper": Method("fbqat-paper"),
    "fbqat": Method("fbqat"),
}
# What no quantizer of weights can beat: the layers' activations alone, and the teacher itself in bfloat16.
FLOORS: dict[str, Method] = {
    "activations alone": Method("ptq-maxabs", trained=False, float_weights=True),
    "bfloat16": Method("ptq-maxabs", prepare=_in_bfloat16, trained=False),
}
# What stands beside the methods in some tables. The results have more: forms that lost and left the code.
VARIANTS: dict[str, Method] = {
    # the default as recipes have it
    "fbqat relative": Method("fbqat", {"optimizer": RELATIVE}),
    "fbqat blockwise": Method("fbqat", {"training": "blockwise", "optimizer": RELATIVE}, trained=False),
    "fbqat blockwise x4": Method(
        "fbqat",
        {"training": "blockwise", "blockwise": {"steps": 400, "tuning_steps": 300}, "optimizer": RELATIVE},
        trained=False,
    ),
}

# The default and GPTQ with layers of 8 bits that something else chose, for the tracks of an average.
for _name, _choice in CHOICES.items():
    VARIANTS[f"ptq-gptq {_name}"] = Method("ptq-gptq", prepare=prepare_by(_choice), trained=False)
    VARIANTS[f"fbqat {_name}"] = Method("fbqat", prepare=prepare_by(_choice))
VARIANTS["fbqat falling"] = Method("fbqat", prepare=prepare_falling, halved=True)

# Bits a weight on average, of the curve of size against loss; 8 is uniform 8 bits.
AVERAGES = (4.25, 4.5, 5.0, 6.0, 8.0)

_GROUPS = {"quantization": {"group_size": 32}}
_STATIC = {"quantization": {"activation_range": "static"}}
# The layers and the loss that the shipped recipes train with.
_IN_BLOCKS = {"train_layers": "blocks", "loss_weighting": "sampler"}
_TRACKS: dict[str, dict[str, Any]] = {
    "w4a8": {},
    "constant": {"optimizer": {"learning_rate_schedule": "constant"}},
    "static": {**_STATIC, "calibration": {"rule": "min_max"}},
    "w3a8": {"quantization": {"weight_bits": 3}},
    "groups": _GROUPS,
    "all-emoji": {"dataset": {"path": "openmoji", "groups": []}},  # to train on; what is held out stays
    "outliers": {},  # the student starts from a teacher with outlier channels
    **{f"train-{group}": {"train_layers": group} for group in ("blocks", "attention", "feed_forward")},
    "train-blocks-weighted": _IN_BLOCKS,
    # average widths: the same method, layers and loss weights at 4 bits throughout and at more on average
    "uniform-4": _IN_BLOCKS,
    **{f"mixed-{average:g}": {"quantization": {"average_bits": average}, **_IN_BLOCKS} for average in AVERAGES},
    # hard cases, in the form of uniform-4
    "hard-w3a8": {"quantization": {"weight_bits": 3}, **_IN_BLOCKS},
    "hard-static": {**_STATIC, "calibration": {"rule": "mean_3sigma"}, **_IN_BLOCKS},  # the paper's rule
    "hard-static-min-max": {**_STATIC, "calibration": {"rule": "min_max"}, **_IN_BLOCKS},
    "hard-outliers": _IN_BLOCKS,
    "hard-w4a4": _IN_BLOCKS,  # the inputs of all layers have 4 bits
    # the average of the recipes, trained on prompts alone: the captions of the pictures that the others have
    "prompts-4.5": {
        "quantization": {"average_bits": 4.5},
        **_IN_BLOCKS,
        "dataset": {
            "prompts": "openmoji",
            "groups": ["Smileys & Emotion", "Animals & Nature", "Food & Drink"],
            "seeds": 2,
        },
    },
    "train-blocks-groups": {**_GROUPS, "train_layers": "blocks"},
    "train-blocks-groups-weighted": {**_GROUPS, **_IN_BLOCKS},
}
# The recipes that ship have an average of 4.5 bits; a track has the one that it names, or none.
TRACKS = {
    name: {
        "train_layers": "all",
        "loss_weighting": "none",
        **changes,
        "quantization": {"average_bits": None, **changes.get("quantization", {})},
    }
    for name, changes in _TRACKS.items()
}


def method_of(name: str) -> Method:
    """The method or variant of that name."""
    known = {**METHODS, **VARIANTS, **FLOORS}
    if name not in known:
        raise ValueError(f"method is {name!r}; there are: {', '.join(known)}.")
    return known[name]


class FourBits(ActivationScheme):
    """Inputs of 4 bits: what W4A4 is compared by. Nothing that this project ships has them."""

    def __post_init__(self) -> None:
        """Allow what the base does not."""


def narrow_inputs(student: nn.Module) -> None:
    """Give every layer of a student whose inputs have 8 bits inputs of 4, of the same kind of range."""
    for _, layer in named_layers(student, FakeQuantizedLinear):
        if layer.activation_scheme.bits == 8:
            layer.activation_scheme = FourBits(bits=4, range=layer.activation_scheme.range)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What makes two runs the same."""

    family: str
    track: str
    method: str
    steps: int
    rate: float
    seed: int

    def recipe(self) -> Recipe:
        """The family's recipe with the method, the track and the budget."""
        method = method_of(self.method)
        fields: dict[str, Any] = {"method": method.preset, "seed": self.seed, "save_every": 0, "optimizer": ABSOLUTE}
        if method.trained:
            fields |= {"steps": self.steps // (2 if method.halved else 1), "learning_rate": self.rate}
        for changes in (TRACKS[self.track], method.fields):
            for name, value in changes.items():
                fields[name] = {**fields.get(name, {}), **value} if isinstance(value, dict) else value
        return load_recipe(RECIPES[self.family], **fields)


class Remembered(Draws):
    """Draws that keep batches and the teacher's predictions, which all methods share at a seed."""

    def __init__(self, teacher: nn.Module, *args: Any) -> None:
        super().__init__(*args)
        self._teacher = teacher
        self._batches: dict[Any, dict[str, Tensor]] = {}
        self._held_out: dict[Any, list[dict[str, Tensor]]] = {}
        self._targets: dict[int, Tensor] = {}
        self._kept: set[int] = set()  # ids of the inputs in the two above; others may be another's later

    def training(self, split: CachedSplit, step: int, batch_size: int, part: slice = slice(None)) -> dict[str, Tensor]:
        key = (id(split), step, batch_size, part.start, part.stop)
        if key not in self._batches:
            self._batches[key] = super().training(split, step, batch_size, part)
            self._kept.add(id(self._batches[key]))
        return self._batches[key]

    def held_out(self, split: CachedSplit, draws: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
        key = (id(split), draws, batch_size)
        if key not in self._held_out:
            self._held_out[key] = list(super().held_out(split, draws, batch_size))
            self._kept |= set(map(id, self._held_out[key]))
        return iter(self._held_out[key])

    def predict(self, denoiser: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        if denoiser is not self._teacher or id(inputs) not in self._kept:
            return super().predict(denoiser, inputs)
        if id(inputs) not in self._targets:
            self._targets[id(inputs)] = super().predict(denoiser, inputs)
        return self._targets[id(inputs)]


class Bench:
    """One family's teacher with everything that its runs share."""

    def __init__(self, family: str) -> None:
        self.family = family
        recipe = load_recipe(RECIPES[family])
        self.pipeline = load_pipeline(resolve_teacher(recipe.teacher), torch.float32)
        self.teacher = self.pipeline.transformer.eval().requires_grad_(False)
        self.splits = cached_splits(recipe, self.pipeline)
        self.judge = self._judge(recipe)
        self._wanted = predictions(self.teacher, self.judge, get_family(recipe.family))
        self.extractor = OpenMojiFeatures.load()
        self._draws: dict[int, Remembered] = {}
        self._original: tuple[Tensor, Tensor] | None = None
        self._others: dict[str, CachedSplit] = {}

    def measure(self, setting: Setting, *, pictures: bool = True) -> dict[str, Any]:
        """Train and measure one setting; a flat row of results.

        ``sampler`` is the judge: the mean over draws of the teacher's sampler, of captions that nothing was trained
        on, also caption by caption. The other losses are means over a split of the data (``train`` too, at noises it
        was not trained on), every sample with the same noises and timesteps for every method. The Fréchet distance
        and PSNR are to the teacher's own pictures from the same seeds.
        """
        recipe, splits, draws = self._given(setting)
        began = time.monotonic()
        if recipe.training == "blockwise":
            return self._measured_blocks(setting, recipe, splits, draws, pictures)
        student, dynamics = self.student(setting)
        row: dict[str, Any] = {**vars(setting), "batch_size": recipe.batch_size}
        trained = time.monotonic() - began
        if setting.method not in FLOORS:
            row["bits_per_weight"] = bits_per_weight(student)
        if recipe.quantization.average_bits is not None:
            layers = named_layers(student, FakeQuantizedLinear)
            row["widths"] = {name: round(layer.bit_width) for name, layer in layers}
        row |= {**dynamics, **self._losses(student, splits, draws)}
        if pictures:
            row |= self._pictures(recipe, student)
        row |= {"train_seconds": round(trained, 1), "seconds": round(time.monotonic() - began, 1)}
        return {**row, "command": command_line(), "versions": versions(), "machine": machine(), "date": now()}

    def student(self, setting: Setting) -> tuple[nn.Module, dict[str, Any]]:
        """What a setting that trains end to end makes of the teacher, and what a row says of its training."""
        recipe, splits, draws = self._given(setting)
        method, bits = method_of(setting.method), recipe.config().weight_bits
        torch.manual_seed(setting.seed)
        with outlier_channels(self.teacher) if setting.track in ("outliers", "hard-outliers") else nullcontext():
            student = method.prepare(recipe, self.teacher, splits["train"], draws)
        if setting.track == "hard-w4a4":
            narrow_inputs(student)
        dynamics = Dynamics(student, bits, recipe.steps)
        if recipe.steps:
            self._train(recipe, student, splits, draws, dynamics)
        set_bit_width(student, _FLOAT if method.float_weights else bits)
        return student.eval(), dynamics.summary() if recipe.steps else {}

    def draw(self, denoiser: nn.Module, prompts: list[str], recipe: Recipe) -> Tensor:
        """Pictures of the family's pipeline with that denoiser: uint8 [N, 3, height, width]."""
        self.pipeline.transformer = denoiser
        try:
            return generate_samples(self.pipeline, prompts, recipe, progress=False)
        finally:
            self.pipeline.transformer = self.teacher

    def _given(self, setting: Setting) -> tuple[Recipe, dict[str, CachedSplit], Remembered]:
        """A setting's recipe, data and draws; the draws of one seed at a time are kept, or memory would grow."""
        recipe = setting.recipe()
        if setting.seed not in self._draws:
            draws = Remembered(
                self.teacher, get_family(recipe.family), self.pipeline.scheduler, recipe.generation, setting.seed
            )
            self._draws = {setting.seed: draws}
        return recipe, self._splits_of(recipe), self._draws[setting.seed]

    def _measured_blocks(
        self, setting: Setting, recipe: Recipe, splits: dict[str, CachedSplit], draws: Remembered, pictures: bool
    ) -> dict[str, Any]:
        """``measure`` of block-wise training, whose steps and rates are its own: the recipe's ``blockwise``."""
        began = time.monotonic()
        torch.manual_seed(setting.seed)
        with tempfile.TemporaryDirectory() as folder:
            student = train_blockwise(
                recipe, self.teacher, splits, draws, Path(folder), Accelerator(), resume=False, progress=False
            )
        trained = time.monotonic() - began
        row = {**vars(setting), "batch_size": recipe.batch_size, "blockwise": asdict(recipe.blockwise)}
        row |= {"bits_per_weight": stored_bits_per_weight(student), **self._losses(student.eval(), splits, draws)}
        if pictures:
            row |= self._pictures(recipe, student)
        row |= {"train_seconds": round(trained, 1), "seconds": round(time.monotonic() - began, 1)}
        return {**row, "command": command_line(), "versions": versions(), "machine": machine(), "date": now()}

    def _judge(self, recipe: Recipe) -> Trajectories:
        """At least ``JUDGED`` draws of the sampler, of the captions of every group of OpenMoji's test split."""
        captions = load_openmoji(max(recipe.size))["test"]["caption"]
        halves = 2 if recipe.generation["guidance_scale"] > 1 else 1
        pictures = math.ceil(JUDGED / (len(captions) * halves * STEPS_OF_A_PICTURE))
        key = cache_key(resolve_teacher(recipe.teacher), {"captions": captions}, pictures, recipe.generation)
        path = default_cache_dir() / "judge" / f"{self.family}-{VERSION}-{key}.safetensors"
        return trajectories(
            self.pipeline,
            get_family(self.family),
            captions,
            recipe.generation,
            path,
            pictures=pictures,
            steps=STEPS_OF_A_PICTURE,
        )

    def _losses(self, student: nn.Module, splits: dict[str, CachedSplit], draws: Remembered) -> dict[str, Any]:
        losses = {name: held_out_loss(student, self.teacher, splits[name], draws, repeats=REPEATS) for name in HELD_OUT}
        losses["train"] = held_out_loss(student, self.teacher, splits["train"], draws)
        judged = trajectory_loss(predictions(student, self.judge, draws.family), self._wanted)
        by_caption = [float(f"{loss:.4g}") for loss in self.judge.by_caption(judged)]
        means = {name: statistics.fmean(values) for name, values in losses.items()}
        return {**means, "sampler": statistics.fmean(judged), "draws": len(judged), "sampler_by_caption": by_caption}

    def _splits_of(self, recipe: Recipe) -> dict[str, CachedSplit]:
        """The splits of the family's recipe, with other training data where ``recipe`` has other."""
        if recipe.dataset == load_recipe(RECIPES[self.family]).dataset:
            return self.splits
        key = str(recipe.dataset)
        if key not in self._others:
            self._others[key] = cached_splits(recipe, self.pipeline)["train"]
        return {**self.splits, "train": self._others[key]}

    def _train(
        self,
        recipe: Recipe,
        student: nn.Module,
        splits: dict[str, CachedSplit],
        draws: Remembered,
        dynamics: Dynamics,
    ) -> None:
        with tempfile.TemporaryDirectory() as folder:
            distill(
                recipe,
                student,
                self.teacher,
                splits,
                draws,
                Path(folder),
                Accelerator(),
                resume=False,
                progress=False,
                after_step=dynamics.update,
            )

    def _pictures(self, recipe: Recipe, student: nn.Module) -> dict[str, Any]:
        recipe = replace(recipe, evaluation=replace(recipe.evaluation, batch_size=64))
        prompts = self._prompts()
        if self._original is None:
            original = self.draw(self.teacher, prompts, recipe).float() / 255
            self._original = original, extract(self.extractor, original)
        original, features = self._original
        drawn = self.draw(student, prompts, recipe).float() / 255
        distance = frechet_distance(features, extract(self.extractor, drawn))
        ratios = psnr(original, drawn)
        return {
            "fd": distance,
            "psnr": ratios[ratios.isfinite()].mean().item(),
            "pictures": len(prompts),
            "inference_steps": recipe.evaluation.inference_steps,
        }

    def _prompts(self) -> list[str]:
        """Three quarters training captions at even distances, the rest held out; repeated where there are too few."""
        held_out = self.splits["validation"].captions + self.splits["test"].captions
        seen, count = self.splits["train"].captions, PICTURES
        known = count * 3 // 4
        prompts = [seen[index * len(seen) // known] for index in range(known)]
        return prompts + [held_out[index % len(held_out)] for index in range(count - known)]
