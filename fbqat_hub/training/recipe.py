"""A recipe: everything about one run, one YAML file, validated, saved into the output and published with it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import yaml

from fbqat_hub.config import FBQATConfig, unknown_key_error
from fbqat_hub.families import get_family
from fbqat_hub.files import shipped, whole
from fbqat_hub.quantization import BitSchedule, SoftStaircase
from fbqat_hub.quantization.gptq import check_margin
from fbqat_hub.quantization.observer import RangeRule
from fbqat_hub.untrusted import read_yaml

RECIPES = shipped("training/recipes")

# What a method means: the parts of a recipe that it sets unless the recipe says otherwise.
METHODS: dict[str, dict[str, Any]] = {
    "ptq-maxabs": {"steps": 0, "quantization": {"weight_clip": "max_abs"}, "schedule": {"preset": "constant"}},
    "ptq-mse": {"steps": 0, "quantization": {"weight_clip": "mse"}, "schedule": {"preset": "constant"}},
    # rounding errors compensate each other: GPTQ
    "ptq-gptq": {
        "steps": 0,
        "quantization": {"weight_clip": "mse"},
        "schedule": {"preset": "constant"},
        "start": "compensated",
    },
    # 4 bits from the start, max-abs scale: the paper's vQAT
    "vqat": {"quantization": {"weight_clip": "max_abs"}, "schedule": {"preset": "constant"}},
    # vQAT with the scale learned (LSQ), started from the MSE-optimal clip: the strongest baseline
    "lsq-qat": {"quantization": {"weight_clip": "learned"}, "schedule": {"preset": "constant"}},
    "integer": {"quantization": {"weight_clip": "max_abs"}, "schedule": {"preset": "integer"}},
    "simple": {"quantization": {"weight_clip": "max_abs"}, "schedule": {"preset": "simple"}},
    # arXiv 2510.14823 as published
    "fbqat-paper": {"quantization": {"weight_clip": "max_abs"}, "schedule": {"preset": "paper"}},
    # this project's default: the 4-bit grid throughout, started from compensated codes; fractions by the annealed soft
    # staircase, no softer at first than twice compensation.margin, so that training starts on the grid; learned clip
    "fbqat": {
        "start": "compensated",
        "loss_weighting": "sampler",
        "quantization": {"weight_clip": "learned"},
        "schedule": {"preset": "constant", "softness": 0.1, "soft_until": 0.9},
    },
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run.

    Attributes:
        name: of the model that is published, e.g. "Sana-600M-FBQAT-W4A8".
        family: "sana", ...
        teacher: Hub id or folder of the full-precision pipeline.
        method: a key of ``METHODS``.
        dataset: {"path": "openmoji"}, {"path": "ye-pop"} or another set of ``training.prompts``, or arguments of
            ``datasets.load_dataset`` with image_column, caption_column.
        quantization: fields of ``FBQATConfig`` that differ from the method's.
        schedule: fields of ``BitSchedule``, or {"preset": ...}.
        rounding: {"ewgs": 0.2}, the gradient scaling of ``quantization.rounding``.
        start: "nearest" codes, or "compensated" ones (GPTQ); the method's own if left empty.
        loss_weighting: "none", or "sampler": an error at a timestep counts by what the sampler makes of it
            (``Family.error_weight``; no difference where a family has none). The method's own if left empty.
        compensation: {"samples": 100, "damping": 0.01, "margin": 0.05}, see ``quantization.gptq_initialize``.
        calibration: {"samples": 100, "rule": "mean_3sigma"} for static activation ranges.
        keep_stages: whole bit widths of the schedule before its last, e.g. [8, 6, 5]: at the end of each the packed
            denoiser is kept in ``stages/w8`` and so on.
        train_layers: a group of the family, or "all"; the others are quantized and frozen. Blocks alone do better than
            all (docs/benchmark.md).
        steps, batch_size: optimizer steps, and samples in each (on each device).
        learning_rate: peak. learning_rate_schedule: "cosine" (to 0) or "constant". warmup_steps: linear.
        clip_learning_rate: learning rate of learned clips as a multiple of learning_rate.
        weight_decay, max_grad_norm: of Adam; 0 leaves gradients unclipped.
        mixed_precision: "no", "bf16" or "fp16", as accelerate takes it.
        gradient_checkpointing: less memory, more time.
        save_every, validate_every: in steps; 0 is never.
        seed: of everything random.
        evaluation: {"images", "inference_steps", "draws", "batch_size"}.
        prompts: drawn in the evaluation before all others; the first ten are the rows of the picture sheet.
        generation: arguments of the pipeline call.
        license, license_link, attribution: of the base model and data, for the card. license_name: where license is
            "other", which the Hub then asks for. dataset_license: where the attribution does not say it.
    """

    name: str
    family: str
    teacher: str
    method: str = "fbqat"
    dataset: dict[str, Any] = field(default_factory=lambda: {"path": "openmoji"})
    quantization: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    rounding: dict[str, Any] = field(default_factory=dict)
    start: str = ""
    loss_weighting: str = ""
    compensation: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    keep_stages: list[int] = field(default_factory=list)
    train_layers: str = "blocks"
    steps: int = 1000
    batch_size: int = 8
    learning_rate: float = 2e-4
    learning_rate_schedule: str = "cosine"
    warmup_steps: int = 20
    clip_learning_rate: float = 3.0
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    save_every: int = 200
    validate_every: int = 0
    seed: int = 1234
    evaluation: dict[str, Any] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    generation: dict[str, Any] = field(default_factory=dict)
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    dataset_license: str = ""
    attribution: str = ""

    def __post_init__(self) -> None:
        for item in fields(self):
            _typed(item.name, getattr(self, item.name), str(item.type))
        family = get_family(self.family)
        _one_of("method", self.method, METHODS)
        _one_of("train_layers", self.train_layers, family.layer_groups)
        _one_of("start", self.start, ("", "nearest", "compensated"))
        _one_of("loss_weighting", self.loss_weighting, ("", "none", "sampler"))
        _one_of("learning_rate_schedule", self.learning_rate_schedule, ("cosine", "constant"))
        _one_of("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        for name in ("warmup_steps", "save_every", "validate_every"):
            _number(name, getattr(self, name), 0, whole=True)
        _number("seed", self.seed, 0, MAX_SEED, whole=True)
        trains = "steps" not in METHODS[self.method]
        _number(f"steps of method {self.method}", self.steps, int(trains), None if trains else 0, whole=True)
        _number("batch_size", self.batch_size, 1, whole=True)
        for name in ("learning_rate", "clip_learning_rate", "weight_decay", "max_grad_norm"):
            _number(name, getattr(self, name), 0)
        for name, value, allowed in (
            ("calibration", self.calibration, {"samples", "rule", "percentile"}),
            ("compensation", self.compensation, set(COMPENSATION)),
            ("evaluation", self.evaluation, set(EVALUATION)),
            ("rounding", self.rounding, {"ewgs"}),
        ):
            if extra := set(value) - allowed:
                raise unknown_key_error(name, extra, allowed)
        if not isinstance(self.dataset.get("path"), str):
            raise ValueError(f"recipe: dataset is {self.dataset}; it needs a path, e.g. {{path: openmoji}}.")
        if not all(isinstance(prompt, str) and prompt.strip() for prompt in self.prompts):
            raise ValueError(f"recipe: prompts are {self.prompts}; each must be a text that is not empty.")
        for name, value in self.evaluation.items():
            _number(f"evaluation.{name}", value, 1, whole=True)
        for name, most in GENERATION.items():
            if name in self.generation:
                _number(f"generation.{name}", self.generation[name], 1, most, whole=True)
        _check_calibration(self.calibration)
        settings = self.compensation_settings()
        _number("compensation.samples", settings["samples"], 1, whole=True)
        _number("compensation.damping", settings["damping"], 0)
        _number("compensation.margin", settings["margin"], 0, 0.5)
        # each of these checks its own values
        self.config()
        self.bit_schedule()
        softness = self.rounding_at(0.0).softness
        if self.starts_compensated:
            check_margin(settings["margin"], softness)
        self._check_stages()

    def config(self) -> FBQATConfig:
        """The quantization this recipe trains for."""
        given = {**METHODS[self.method].get("quantization", {}), **self.quantization}
        given.setdefault("module_overrides", get_family(self.family).activation_overrides)
        return FBQATConfig(**given)

    def bit_schedule(self) -> BitSchedule:
        """The bit schedule; it must end at the stored width."""
        given = {**METHODS[self.method]["schedule"], **self.schedule}
        if extra := set(given) - _SCHEDULE_KEYS:
            raise unknown_key_error("schedule", extra, _SCHEDULE_KEYS)
        for name in set(given) & {"bits", "softness", "soft_until"}:
            _number(f"schedule.{name}", given[name], 0)
        if "stages" in given and not _is_stages(given["stages"]):
            raise ValueError(
                f"recipe: schedule.stages is {given['stages']!r}; it must be a list of [bit width, share of training], "
                "e.g. [[8, 1], [4, 3]]."
            )
        stored = self.config().weight_bits
        if "preset" in given:
            given.setdefault("bits", stored)
        schedule = BitSchedule.from_dict(given)
        if schedule.final_bits != stored:
            raise ValueError(f"the bit schedule ends at {schedule.final_bits:g} bits; what is stored has {stored}.")
        if self.starts_compensated and len(schedule.stages) > 1:
            raise ValueError("start 'compensated' is for one width; codes of the first of several are left again.")
        return schedule

    def stage_ends(self) -> dict[int, int]:
        """Whole bit width that can be stored -> steps after which the schedule leaves it; not of its last width."""
        schedule, ends = self.bit_schedule(), {}
        for step in range(self.steps):
            width = schedule.bit_width(step / self.steps)
            if width in range(3, 9) and width != schedule.final_bits:
                ends[int(width)] = step + 1
        return ends

    def _check_stages(self) -> None:
        if not self.keep_stages:
            return
        for bits in self.keep_stages:
            _number("each of keep_stages", bits, 3, 8, whole=True)
        ends = self.stage_ends()
        if missing := sorted(set(self.keep_stages) - set(ends), reverse=True):
            there = ", ".join(map(str, ends))
            has = f"those it holds before its last, over {self.steps} steps, are {there}" if there else "it holds none"
            raise ValueError(
                f"recipe: keep_stages asks for {', '.join(map(str, missing))} bits, which the schedule of method "
                f"{self.method} does not leave; {has}. Methods with falling widths: fbqat-paper, integer, simple."
            )

    def rounding_at(self, progress: float) -> SoftStaircase:
        """Softness from the schedule, gradient compensation from the recipe."""
        if "ewgs" in self.rounding:
            _number("rounding.ewgs", self.rounding["ewgs"], 0)
        return SoftStaircase(self.bit_schedule().softness_at(progress), **self.rounding)

    @property
    def starts_compensated(self) -> bool:
        """True if training starts from compensated codes."""
        return (self.start or METHODS[self.method].get("start", "nearest")) == "compensated"

    @property
    def weights_loss(self) -> bool:
        """True if errors count by what the sampler makes of them."""
        return (self.loss_weighting or METHODS[self.method].get("loss_weighting", "none")) == "sampler"

    def compensation_settings(self) -> dict[str, Any]:
        """``compensation`` with its defaults filled in."""
        return {**COMPENSATION, **self.compensation}

    def evaluation_settings(self) -> dict[str, int]:
        """``evaluation`` with its defaults filled in."""
        return {**EVALUATION, **self.evaluation}

    def save(self, path: Path) -> None:
        """Write the recipe, every field, as YAML."""
        with whole(path) as partial:
            partial.write_text(yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True))


MAX_SEED = 2**32 - 1  # torch's CPU generator drops higher bits: two seeds would be the same
COMPENSATION = {"samples": 100, "damping": 0.01, "margin": 0.05}
EVALUATION = {"images": 128, "inference_steps": 20, "draws": 4, "batch_size": 32}
# A recipe that came with a model must not fill the memory of who draws with it.
GENERATION = {"height": 8192, "width": 8192, "num_inference_steps": 1000, "num_images_per_prompt": 64}
_SCHEDULE_KEYS = {"preset", "bits", "stages", "softness", "soft_until"}


def load_recipe(source: str | Path, **changes: Any) -> Recipe:
    """Read a recipe from a YAML file, or by the name of one that ships, with some fields changed.

    Args:
        source: path of a YAML file, or a name such as "sana-tiny".
        changes: fields that replace the file's; a changed ``method`` brings its own quantization and schedule.

    Raises:
        FileNotFoundError: neither a file nor a shipped name.
        ValueError: an unknown key (the error names the nearest) or a value out of range.
    """
    path = _find(source)
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ValueError(f"recipe {path.name} is not a mapping of keys to values.")
    data.update(changes)
    allowed = {item.name for item in fields(Recipe)}
    if unknown := set(map(str, data)) - allowed:
        raise unknown_key_error(f"recipe {path.name}", unknown, allowed)
    required = {"name", "family", "teacher"} - set(data)
    if required:
        raise ValueError(f"recipe {path.name} lacks {', '.join(sorted(required))}.")
    data.setdefault("method", "fbqat")
    _one_of("method", data["method"], METHODS)
    data.update({key: value for key, value in METHODS[data["method"]].items() if key == "steps"})
    return Recipe(**data)


def _find(source: str | Path) -> Path:
    if Path(source).is_file():
        return Path(source)
    # a bare name only: a path that is mistyped must not mean another recipe
    path = RECIPES / f"{str(source).removesuffix('.yaml')}.yaml"
    if path.parent != RECIPES or not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise FileNotFoundError(f"no recipe file {str(source)!r}, and none of that name ships; shipped: {shipped}.")
    return path


def _is_stages(stages: Any) -> bool:
    def is_stage(each: Any) -> bool:
        if not isinstance(each, list | tuple) or len(each) != 2:
            return False
        return all(isinstance(number, int | float) and not isinstance(number, bool) for number in each)

    return isinstance(stages, list | tuple) and all(is_stage(each) for each in stages)


def _check_calibration(calibration: dict[str, Any]) -> None:
    if "samples" in calibration:
        _number("calibration.samples", calibration["samples"], 1, whole=True)
    if "rule" in calibration:
        _one_of("calibration.rule", calibration["rule"], get_args(RangeRule))
    if "percentile" in calibration:
        _number("calibration.percentile", calibration["percentile"], 0, 100)


def _typed(name: str, value: Any, annotation: str) -> None:
    """Numbers are checked by ``_number``."""
    kinds: dict[str, tuple[type, str]] = {
        "str": (str, "text"),
        "bool": (bool, "true or false"),
        "dict[str, Any]": (dict, "a mapping of keys to values"),
        "list[str]": (list, "a list of texts"),
        "list[int]": (list, "a list of whole numbers"),
    }
    kind, words = kinds.get(annotation, (object, ""))
    text_keys = not isinstance(value, dict) or all(isinstance(key, str) for key in value)
    if not isinstance(value, kind) or not text_keys:
        raise ValueError(f"recipe: {name} is {value!r}; it must be {words}.")


def _one_of(name: str, value: Any, allowed: Any) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"recipe: {name} is {value!r}; allowed: {', '.join(map(str, allowed))}.")


def _number(name: str, value: Any, least: float, most: float | None = None, *, whole: bool = False) -> None:
    good = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or value < least or (most is not None and value > most):
        kind = "a whole number" if whole else "a number"
        allowed = f"of at least {least:g}" if most is None else f"from {least:g} to {most:g}"
        hint = " (write 1.0e-4, not 1e-4: YAML reads that as text)" if isinstance(value, str) else ""
        raise ValueError(f"recipe: {name} is {value!r}; it must be {kind} {allowed}{hint}.")
