"""A recipe: everything about one run, one YAML file, resolved when it is loaded, saved into the output, published.

Resolved means that every value that runs is written out: what the file leaves out is taken from its method
(`fbqat_hub.training.method`) and its family, once. A run saves the resolved recipe with its ``recipe_version``, and
such a file loads to exactly itself, whatever the methods of the version that reads it are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import Field, model_validator
from pydantic_core import ArgsKwargs

from fbqat_hub.checked import MOST, Amount, Count, Flag, Options, Seed, Text, Texts, Whole, checked, one_of
from fbqat_hub.config import FBQATConfig, unknown_key_error
from fbqat_hub.families import get_family
from fbqat_hub.files import shipped, whole
from fbqat_hub.generation import changed_call
from fbqat_hub.quantization import BitSchedule
from fbqat_hub.training.call import call_types, check_call, check_following
from fbqat_hub.training.dataset import check_dataset
from fbqat_hub.training.method import (
    GPTQ,
    METHODS,
    PRESETS,
    Initialization,
    Optimizer,
    Quantization,
    Schedule,
    Weighting,
)
from fbqat_hub.training.migration import RATES_THEN, migrated, without_removed
from fbqat_hub.untrusted import read_yaml
from fbqat_hub.version import __version__

RECIPES = shipped("training/recipes")
RECIPE_VERSION = 1
DEFAULT_METHOD = "fbqat"
_DEFAULT_SIDE = 512
_STEPS = 1000
_LEAST_RATE = 1e-5


@checked("recipe.calibration")
class Calibration:
    """Static activation ranges.

    Attributes:
        samples: of the training split.
        rule: "min_max", "mean_3sigma" (arXiv 2510.14823; it cuts off outliers that some layers live by, docs/method.md)
            or "percentile".
        percentile: for rule "percentile".
    """

    samples: Count = 100
    rule: Annotated[
        Literal["mean_3sigma", "min_max", "percentile"], Field(description="mean_3sigma, min_max or percentile")
    ] = "min_max"
    percentile: Annotated[Amount, Field(gt=0, le=100, description="a number above 0, at most 100")] = 99.9


@checked("recipe.evaluation")
class Evaluation:
    """What ``fbqat evaluate`` measures on.

    Attributes:
        images: how many pictures.
        inference_steps: of the sampler, for each.
        draws: held-out noises and timesteps of each sample.
        batch_size: of pictures and of held-out samples.
    """

    images: Count = 128
    inference_steps: Annotated[Count, Field(le=1000, description="a whole number from 1 to 1000")] = 20
    draws: Count = 4
    batch_size: Count = 32


@checked("recipe.blockwise")
class Blockwise:
    """Block-wise training (`fbqat_hub.training.blockwise`).

    Attributes:
        samples: of the training split, with one noise and timestep each, that all blocks are trained on. What goes into
            a block is kept of all of them, of the student and of the teacher.
        steps, learning_rate: optimizer steps of each block, and their peak rate, in the unit of `Optimizer`.
        tuning_steps, tuning_rate: of the last stage, which trains only the scales and biases of the packed model, end
            to end; 0 steps leave it out.
    """

    samples: Count = 512
    steps: Count = 100
    learning_rate: Amount = 3e-3
    tuning_steps: Whole = 100
    tuning_rate: Amount = 3e-3


@checked("recipe")
class Recipe:
    """One run, resolved: what is left out when one is made is filled in from its method and its family.

    What you decide:

    Attributes:
        recipe_version: of this format; in a saved file it says that the file is complete.
        name: of the model that is published, e.g. "Sana-600M-FBQAT-W4A8".
        family: "sana", ...
        teacher: folder of the full-precision pipeline, or Hub id: owner/name, or owner/name@revision for a branch, tag
            or commit. The recipe that a run saves has the commit.
        lora, lora_scale: an adapter that is merged into the teacher's denoiser (`fbqat_hub.training.lora_merge`), and
            the factor of its change; None for no adapter.
        method: a key of ``METHODS``.
        dataset: {"path": "openmoji"}, {"path": "ye-pop"} or another set of ``training.prompts``, or arguments of
            ``datasets.load_dataset`` with image_column, caption_column. ``skip``: the share of its pictures that may be
            left out (default 0.01). Without pictures {"prompts": a text file with a prompt on each line, or one of
            these sets}: training is where the teacher's own sampler asks its denoiser; ``seeds``: how many pictures it
            makes of each prompt (default 4).
        generation: arguments of the pipeline call. Its height and width (512 if neither is said) are also those of the
            training pictures.
        prompts: drawn in the evaluation before all others; the first ten are the rows of the picture sheet.
        training: "end_to_end", the default, or "blockwise": one block after the other, in the memory of one.
        blockwise: of the latter, which has steps and rates of its own. See `Blockwise`.
        steps, batch_size: optimizer steps, and samples in each, on all devices together.
        micro_batch_size: samples that a device takes at a time, at most; the gradients of a step are added up. Less
            memory, and the same step. None for all at once. Of end-to-end training.
        learning_rate: peak, relative to each layer's weights (`Optimizer`: ``learning_rate_unit``).
        seed: of everything random.
        mixed_precision: "no", "bf16" or "fp16", as accelerate takes it.
        gradient_checkpointing: less memory, more time.
        save_every, validate_every: in steps; 0 is never.
        keep_stages: whole bit widths of the schedule before its last, e.g. [8, 6, 5]: at the end of each the packed
            denoiser is kept in ``stages/w8`` and so on.
        evaluation: see `Evaluation`.
        calibration: see `Calibration`.
        text_encoders: "w8a8", "w8", "w4a8" or "w4": bits of weights and activations (float without "a8") that the
            pipeline's text encoders are saved with; None copies the teacher's, which training uses in any case.
        calibration_prompts: of `fbqat convert --method gptq`, how many prompts its codes were calibrated on; 0 of a run
            that is calibrated on its data. Training refuses others.
        quantization: what is stored; only its clip is the method's. See `Quantization`.

    What the method decides, unless the recipe says otherwise (see `fbqat_hub.training.method`):

    Attributes:
        initialization, gptq: the codes that training starts from.
        schedule: bit widths over training.
        train_layers: a group of the family, or "all"; the others are quantized and frozen.
        loss_weighting: "none", or "sampler": an error at a timestep counts by what the sampler makes of it
            (``Family.error_weight``; no difference where a family has none).
        optimizer: Adam and the rule of its rates.

    Raises:
        ValueError: an unknown field, or a value that is not allowed, in one line.
    """

    recipe_version: Count = RECIPE_VERSION
    name: Text
    family: Text
    teacher: Text
    method: Text
    dataset: Options
    generation: Options
    prompts: Texts = field(default_factory=list)
    training: Annotated[Literal["end_to_end", "blockwise"], Field(description="end_to_end or blockwise")] = "end_to_end"
    blockwise: Blockwise = Blockwise()
    steps: Whole
    batch_size: Count = 8
    micro_batch_size: Annotated[
        Annotated[int, Field(strict=True, ge=1, le=MOST)] | None,
        Field(description="a whole number of at least 1, or null"),
    ] = None
    learning_rate: Amount = 1.3e-3
    seed: Seed = 1234
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], Field(description="'no', bf16 or fp16")] = "no"
    gradient_checkpointing: Flag = False
    save_every: Whole = 200
    validate_every: Whole = 0
    keep_stages: Annotated[
        list[Annotated[int, Field(strict=True, ge=3, le=8)]],
        Field(description="a list of whole numbers from 3 to 8"),
    ] = field(default_factory=list)
    evaluation: Evaluation = Evaluation()
    calibration: Calibration = Calibration()
    text_encoders: Annotated[
        Literal["w8a8", "w8", "w4a8", "w4"] | None, Field(description="w8a8, w8, w4a8, w4 or null")
    ] = None
    calibration_prompts: Whole = 0
    lora: Annotated[Text | None, Field(description="text or null")] = None
    lora_scale: Annotated[float, Field(strict=True, allow_inf_nan=False, description="a number")] = 1.0
    quantization: Quantization
    initialization: Initialization
    gptq: GPTQ
    schedule: Schedule
    train_layers: Text
    loss_weighting: Weighting
    optimizer: Optimizer

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: ArgsKwargs) -> dict[str, Any]:
        """Sections may be given in part; the rest of them is the method's."""
        filled = {"method": DEFAULT_METHOD, "dataset": {"path": "openmoji"}, "generation": {}, **(given.kwargs or {})}
        one_of("recipe: method", filled["method"], METHODS)
        method = METHODS[filled["method"]]
        family = get_family(filled["family"]) if isinstance(filled.get("family"), str) else None
        filled.setdefault("steps", _STEPS if method.trains else 0)
        for name, value in method.fields().items():
            filled[name] = _whole_section(value, filled.get(name, {})) if name in _SECTIONS else filled.get(name, value)
        quantization, schedule = filled["quantization"], filled["schedule"]
        if isinstance(quantization, dict) and quantization["module_overrides"] is None and family:
            quantization["module_overrides"] = family.activation_overrides
        if isinstance(quantization, dict) and isinstance(schedule, dict) and schedule["stages"] in list(PRESETS):
            bits = quantization["weight_bits"]
            if isinstance(bits, int) and bits in range(3, 9):
                schedule["stages"] = list(BitSchedule.preset(schedule["stages"], bits).stages)
        if isinstance(filled["generation"], Mapping) and family:
            filled["generation"] = _sized(filled["generation"], family.pipeline_class)
        return filled

    def __post_init__(self) -> None:
        family, method = get_family(self.family), METHODS[self.method]
        one_of("recipe: train_layers", self.train_layers, family.layer_groups)
        if method.trains != bool(self.steps):
            must = "at least 1" if method.trains else "0, for it does not train"
            raise ValueError(f"recipe: steps of method {self.method} is {self.steps}; it must be {must}.")
        check_dataset(self.dataset)
        if "prompts" in self.dataset and family.needs_pictures:
            raise ValueError(
                f"recipe: dataset has prompts alone, and a {family.title} needs pictures: {family.needs_pictures}. "
                "Give dataset.path."
            )
        if self.lora is None and self.lora_scale != 1.0:
            raise ValueError(
                f"recipe: lora_scale is {self.lora_scale:g}, and there is no lora; give the adapter too, or leave it "
                "out."
            )
        if self.quantization.activation_bits == 32 and self.quantization.activation_range == "static":
            raise ValueError(
                "recipe: quantization.activation_range is static, and activation_bits 32 leaves activations in float; "
                "leave the range out, or set activation_bits to 8 or 16."
            )
        self.config()  # these two check their own values
        schedule = self.bit_schedule()
        self._check_last_stage(schedule)
        self._check_average(schedule)
        self._check_start(schedule)
        self._check_stages()
        self._check_blockwise()
        self._check_rates()
        check_call(family.pipeline_class, self.generation, "recipe: generation.")
        check_following(family.pipeline_class, self.generation, "recipe: generation.", "with the other arguments ")
        steps = self.evaluation.inference_steps
        check_following(
            family.pipeline_class,
            {**self.generation, "num_inference_steps": steps},
            "recipe: generation.",
            f"with evaluation.inference_steps {steps} ",
        )
        if self.generation.get("num_images_per_prompt") not in (None, 1):
            raise ValueError("recipe: generation.num_images_per_prompt must be 1; pictures are compared by prompt.")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the pictures, in pixels, in training and evaluation."""
        return self.generation["height"], self.generation["width"]

    @property
    def half(self) -> torch.dtype | None:
        """The half precision that the run computes in; None where it computes in float32."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.mixed_precision)

    @property
    def teacher_dtype(self) -> torch.dtype:
        """Of the teacher's parts, in which data is encoded too: half precision only where blocks are trained in it."""
        return (self.half if self.training == "blockwise" else None) or torch.float32

    def config(self) -> FBQATConfig:
        """The quantization this recipe trains for."""
        return config_of(self.quantization)

    def bit_schedule(self) -> BitSchedule:
        """The bit schedule; it ends at the stored width."""
        given = self.schedule
        assert not isinstance(given.stages, str)  # a recipe has the list
        schedule = BitSchedule(given.stages)
        if schedule.final_bits != self.quantization.weight_bits:
            raise ValueError(
                f"recipe: schedule.stages ends at {schedule.final_bits:g} bits; what is stored has "
                f"{self.quantization.weight_bits}."
            )
        return schedule

    def stage_ends(self) -> dict[int, int]:
        """Whole bit width that can be stored -> steps after which the schedule leaves it; not of its last width."""
        schedule, ends = self.bit_schedule(), {}
        for step in range(self.steps):
            width = schedule.bit_width(step / self.steps)
            if width in range(3, 9) and width != schedule.final_bits:
                ends[int(width)] = step + 1
        return ends

    def _check_last_stage(self, schedule: BitSchedule) -> None:
        if not self.steps:
            return
        blockwise = self.training == "blockwise"
        steps, name = (self.blockwise.steps, "blockwise.steps") if blockwise else (self.steps, "steps")
        try:
            schedule.check_steps(steps, name)
        except ValueError as error:
            raise ValueError(f"recipe: {error}") from None

    def _check_average(self, schedule: BitSchedule) -> None:
        average = self.quantization.average_bits
        if average is not None and (len(schedule.stages) > 1 or self.quantization.weight_bits != 4):
            raise ValueError(
                f"recipe: quantization.average_bits is {average:g}; it chooses from 4 and 8 bits, so weight_bits "
                "must be 4 and schedule.stages constant. For other widths set quantization.average_bits to null."
            )

    def _check_start(self, schedule: BitSchedule) -> None:
        if self.initialization != "gptq":
            return
        if len(schedule.stages) > 1:
            raise ValueError(
                "recipe: initialization gptq is for one bit width; codes of the first of several are left again. Use "
                "initialization: nearest, or schedule: {stages: constant}."
            )

    def _check_blockwise(self) -> None:
        if self.training != "blockwise":
            return
        if not self.steps:
            raise ValueError(f"recipe: method {self.method} does not train, so training cannot be blockwise.")
        if self.mixed_precision == "fp16":
            raise ValueError("recipe: mixed_precision is fp16, which training: blockwise has not; use bf16 or 'no'.")
        if self.keep_stages:
            raise ValueError("recipe: keep_stages needs training: end_to_end; blocks are packed one by one.")
        if self.blockwise.tuning_steps and self.quantization.group_size:
            raise ValueError(
                f"recipe: blockwise.tuning_steps is {self.blockwise.tuning_steps}, and what is tuned is one scale per "
                "output channel; set it to 0, or leave out quantization.group_size."
            )

    def _check_rates(self) -> None:
        """Refuse rates of all layers, as recipes had them before, where relative ones are meant."""
        if self.optimizer.learning_rate_unit == "absolute":
            return
        for name, rate in (("", self.learning_rate), ("blockwise.", self.blockwise.learning_rate)):
            if 0 < rate < _LEAST_RATE:
                raise ValueError(
                    f"recipe: {name}learning_rate is {rate:g}, and it is relative to each layer's weights; one below "
                    f"{_LEAST_RATE:g} changes next to nothing. 5e-4 to 2e-3 were good (docs/method.md, learning "
                    "rates). For one rate of all layers set optimizer.learning_rate_unit=absolute and "
                    "optimizer.clip_learning_rate=3."
                )

    def _check_stages(self) -> None:
        if not self.keep_stages:
            return
        ends = self.stage_ends()
        if missing := sorted(set(self.keep_stages) - set(ends), reverse=True):
            there = ", ".join(map(str, ends))
            has = f"those it holds before its last, over {self.steps} steps, are {there}" if there else "it holds none"
            raise ValueError(
                f"recipe: keep_stages asks for {', '.join(map(str, missing))} bits, which the schedule of method "
                f"{self.method} does not leave; {has}. Methods with falling widths: fbqat-paper, integer, simple."
            )

    def save(self, path: Path) -> None:
        """Write the recipe, every value, as YAML."""
        with whole(path) as partial:
            partial.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")

    def as_yaml(self) -> str:
        """Every value, as a checkpoint keeps it."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def to_dict(self) -> dict[str, Any]:
        """Every value as plain data, as it is saved."""
        plain: dict[str, Any] = asdict(self)
        plain["schedule"]["stages"] = [list(stage) for stage in plain["schedule"]["stages"]]
        return plain


def config_of(quantization: Quantization, left_out: Sequence[str] = ()) -> FBQATConfig:
    """What is written of a method's quantization.

    Args:
        left_out: names of further modules that stay in float.
    """
    granularity: Any = "per_channel" if quantization.group_size is None else "per_group"
    given = {name: value for name, value in asdict(quantization).items() if name != "average_bits"}
    given["modules_to_not_convert"] = [*given["modules_to_not_convert"], *left_out]
    return FBQATConfig(weight_granularity=granularity, **given)


def load_recipe(source: str | Path, **changes: Any) -> Recipe:
    """Read a recipe from a YAML file, or by the name of one that ships, with some fields changed.

    Args:
        source: path of a YAML file, or a name such as "sana-tiny".
        changes: fields that replace the file's. Of a section (``schedule``, say) what is given replaces, and the rest
            stays; of ``dataset`` too, unless it is given a path or prompts. A changed ``method`` takes the method's own
            values with it where the file was saved by a run.

    Raises:
        FileNotFoundError: neither a file nor a shipped name.
        ValueError: an unknown key (the error names the nearest), a value that is not allowed, a saved recipe that is
            not complete, one of a newer version, or one with what was removed.
    """
    return _loaded(_find(source), changes)


def recipe_of_run(path: Path) -> Recipe:
    """The recipe that a finished run saved, to measure or use what it made; not to be trained.

    Settings of its training that were removed since are left out.

    Raises:
        FileNotFoundError, ValueError: as ``load_recipe``.
    """
    return _loaded(path, {}, finished=True)


def _loaded(path: Path, changes: Mapping[str, Any], *, finished: bool = False) -> Recipe:
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ValueError(f"recipe {path.name} is not a mapping of keys to values.")
    if "recipe_version" in data:
        data = _checked_version(path, without_removed(data, finished=finished))
    else:
        data = migrated(data, finished=finished)
    if unknown := set(map(str, [*data, *changes])) - set(_FIELDS):
        raise unknown_key_error(f"recipe {path.name}", unknown, _FIELDS)
    if required := {"name", "family", "teacher"} - {*data, *changes}:
        raise ValueError(f"recipe {path.name} lacks {', '.join(sorted(required))}.")
    return Recipe(**_changed(data, changes))


def _find(source: str | Path) -> Path:
    if Path(source).is_file():
        return Path(source)
    # a bare name only: a path that is mistyped must not mean another recipe
    path = RECIPES / f"{str(source).removesuffix('.yaml')}.yaml"
    if path.parent != RECIPES or not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise FileNotFoundError(f"no recipe file {str(source)!r}, and none of that name ships; shipped: {shipped}.")
    return path


def _checked_version(path: Path, data: dict[str, Any]) -> dict[str, Any]:
    """A recipe that says its version; it must be one that is read here, and complete."""
    version = data["recipe_version"]
    if type(version) is not int or version < 1:
        raise ValueError(f"recipe {path.name}: recipe_version is {version!r:.80}; it must be a whole number from 1.")
    if version > RECIPE_VERSION:
        raise ValueError(
            f"recipe {path.name} has recipe_version {version}; this is fbqat_hub {__version__}, which reads up to "
            f"{RECIPE_VERSION}. Update with: pip install -U fbqat-hub"
        )
    data = {**_LATER, **data}
    if isinstance(data.get("optimizer"), Mapping):
        data["optimizer"] = {**_LATER_OF_OPTIMIZER, **data["optimizer"]}
    missing = [name for name in _FIELDS if name not in data]
    for section, kind in _SECTIONS.items():
        if isinstance(data.get(section), Mapping):
            missing += [f"{section}.{key.name}" for key in fields(kind) if key.name not in data[section]]
    if missing:
        raise ValueError(
            f"recipe {path.name} lacks {', '.join(missing[:5])}, and with a recipe_version it must be complete, since "
            "it records a run. To have the method's values filled in, take recipe_version out."
        )
    return data


def _changed(data: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with ``changes``; of a section, ``generation`` and the same data set only what they name changes."""
    new = dict(data)
    method = changes.get("method", data.get("method"))
    if method != data.get("method"):
        if "recipe_version" in data:  # what it says is the other method's
            for name in METHODS[DEFAULT_METHOD].fields():
                if name == "quantization" and isinstance(data[name], Mapping):
                    new[name] = {key: value for key, value in data[name].items() if key != "weight_clip"}
                else:
                    del new[name]
        if isinstance(method, str) and method in METHODS and not METHODS[method].trains:
            new["steps"] = 0
    for name, value in changes.items():
        old = new.get(name)
        if _is_part(name, value) and isinstance(old, Mapping):
            value = {**old, **value}
        new[name] = value
    return new


def _is_part(name: str, value: Any) -> bool:
    """Whether a change is of what it names alone; one of ``dataset`` that names another one's source is not."""
    if name == "dataset":
        return isinstance(value, Mapping) and not {"path", "prompts"} & set(value)
    return (name in _SECTIONS or name == "generation") and isinstance(value, Mapping)


def _whole_section(default: Any, given: Any) -> Any:
    """A section of which a part may be given, as a mapping; what is no section stays, to be refused."""
    given = asdict(given) if is_dataclass(given) and not isinstance(given, type) else given
    return {**asdict(default), **given} if isinstance(given, Mapping) else given


def _sized(generation: Mapping[str, Any], pipeline_class: str) -> dict[str, Any]:
    """Arguments of the call that say the size of the pictures; it is not to be changed to one of the model's own."""
    sized = dict(generation)
    sized.setdefault("height", sized.get("width", _DEFAULT_SIDE))
    sized.setdefault("width", sized["height"])
    if "use_resolution_binning" in call_types(pipeline_class):
        sized.setdefault("use_resolution_binning", False)
    return changed_call(pipeline_class, {}, sized)


# Came after recipes of version 1 had been saved; these are what was done before.
_LATER: dict[str, Any] = {
    "micro_batch_size": None,
    "text_encoders": None,
    "training": "end_to_end",
    "blockwise": {**asdict(Blockwise()), **RATES_THEN["blockwise"]},
    "calibration_prompts": 0,
    "lora": None,
    "lora_scale": 1.0,
}
_LATER_OF_OPTIMIZER: dict[str, Any] = {"learning_rate_unit": "absolute", "moment_bits": 32}
_FIELDS: tuple[str, ...] = tuple(item.name for item in fields(Recipe))
_SECTIONS: dict[str, Any] = {
    "evaluation": Evaluation,
    "calibration": Calibration,
    "quantization": Quantization,
    "gptq": GPTQ,
    "blockwise": Blockwise,
    "schedule": Schedule,
    "optimizer": Optimizer,
}
