"""One measured number is one `Record`; a run's ``results.json`` is a list of them.

Cards, README tables and plots are made from these files and from nothing else. In JSON a record is one flat
object: the fields below, then whatever else its suite needs (``extra``)::

    {"suite": "method", "family": "sana", "method": "fbqat", "metric": "kd_loss", "value": 0.0021, "unit": "MSE",
     "n": 256, "seed": 0, "spread": 0.0004, "command": "fbqat evaluate runs/sana", "versions": {...},
     "machine": {...}, "date": "2026-11-23T01:00:00+00:00", ...}
"""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from fbqat_hub.files import whole
from fbqat_hub.processor import cpuinfo, instruction_sets
from fbqat_hub.untrusted import read_json
from fbqat_hub.version import __version__


class Metric(NamedTuple):
    """What a metric's values are: their unit, which direction is better ("lower" or "higher"), how to call it."""

    unit: str
    better: str
    title: str


METRICS: dict[str, Metric] = {
    "kd_loss": Metric("MSE", "lower", "held-out distillation loss"),
    "fd_teacher": Metric("1", "lower", "Fréchet distance to the teacher"),
    "fd_real": Metric("1", "lower", "Fréchet distance to real pictures"),
    "fid_teacher": Metric("1", "lower", "FID to the teacher"),
    "fid_real": Metric("1", "lower", "FID to real pictures"),
    "clip_fid_teacher": Metric("1", "lower", "CLIP-FID to the teacher"),
    "clip_fid_real": Metric("1", "lower", "CLIP-FID to real pictures"),
    "psnr": Metric("dB", "higher", "PSNR to the teacher"),
    "ssim": Metric("1", "higher", "SSIM to the teacher"),
    "lpips": Metric("1", "lower", "LPIPS to the teacher"),
    "image_reward": Metric("1", "higher", "ImageReward"),
    "clip_score": Metric("1", "higher", "CLIP score"),
    "clip_iqa": Metric("1", "higher", "CLIP-IQA"),
    "ms_forward": Metric("ms", "lower", "one forward"),
    "ms_step": Metric("ms", "lower", "one training step"),
    "peak_rss_mib": Metric("MiB", "lower", "peak memory"),
    "denoiser_mib": Metric("MiB", "lower", "denoiser's weights on disk"),
    "bits_per_weight": Metric("bits", "lower", "stored bits per weight"),
    "sqnr_db": Metric("dB", "higher", "SQNR"),
    "operations": Metric("1", "higher", "operations that work"),
}
METHODS: dict[str, str] = {
    "teacher": "teacher (full precision)",
    "ptq-maxabs": "PTQ, max-abs scale",
    "ptq-mse": "PTQ, MSE clip",
    "ptq-gptq": "PTQ, GPTQ",
    "svdquant": "PTQ, SVDQuant-style low-rank branch",
    "torchao-qat": "torchao's QAT, groups of 32",
    "vqat": "vanilla QAT",
    "lsq-qat": "QAT, learned step size (LSQ)",
    "svdqat": "vanilla QAT with a low-rank branch (SVDQAT)",
    "integer": "integer schedule 8-7-6-5-4",
    "simple": "simple schedule 16-8-4",
    "fbqat-paper": "FB-QAT as published",
    "fbqat": "FB-QAT, this project's default",
}
SUITES = ("method", "speed-cpu", "speed-gpu", "training", "loading", "htp", "integration")

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "numpy", "onnxruntime", "onnxruntime-qnn")
_INSTRUCTION_SETS = (
    "avx2",
    "fma",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
)


def versions(*more: str) -> dict[str, str]:
    """Python and those of our dependencies, and of ``more`` packages, that are installed: name -> version; nothing is
    imported."""
    found = {"python": platform.python_version(), "fbqat_hub": __version__}
    for package in (*_PACKAGES, *more):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What the numbers ran on: ``cpu`` (model), ``cores`` (usable here), ``instruction_sets``, ``system``, and
    ``gpu`` where torch was already imported and sees one. No host name, no user, no paths."""
    flags = instruction_sets()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    described: dict[str, Any] = {
        "cpu": cpuinfo().get("model name") or platform.processor() or platform.machine(),
        "cores": cores,
        "instruction_sets": [name for name in _INSTRUCTION_SETS if name in flags],
        "system": f"{platform.system()} {platform.machine()}",
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described


def peak_rss_mib(pid: int | None = None) -> float | None:
    """The most memory that was resident at once so far, in MiB, of this process or of another one.

    ``None`` where the system does not tell: anywhere but on Linux of another process, on Windows of this one too.
    """
    status = Path(f"/proc/{pid or 'self'}/status")
    if status.exists():  # `getrusage` would count in what the parent had, which is kept across exec
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
        return int(found[1]) / 1024 if found else None
    if pid is not None or sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def command_line(argv: Sequence[str] | None = None) -> str:
    """The running command as one pasteable line, absolute paths cut to their last part; a module as ``python -m``.

    >>> command_line(["/opt/bin/fbqat", "evaluate", "/data/runs/a b"])
    "fbqat evaluate 'a b'"
    """
    words = list(sys.argv if argv is None else argv)
    module = getattr(sys.modules["__main__"], "__spec__", None) if argv is None else None
    program = ["python", "-m", module.name.removesuffix(".__main__")] if module else [Path(words[0]).name]
    return shlex.join(program + [_without_folders(word) for word in words[1:]])


def _without_folders(word: str) -> str:
    """A word of a command, its absolute path cut to the last part, also that of --option=/path and KEY=/path."""
    key, equals, value = word.partition("=")
    if equals and not Path(key).is_absolute():
        return f"{key}={Path(value).name if Path(value).is_absolute() else value}"
    return Path(word).name if Path(word).is_absolute() else word


def now() -> str:
    """The date of a record: UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measured number with everything needed to judge it and to measure it again.

    Args:
        suite: one of `SUITES`.
        family: model family, lower case, e.g. ``sana``.
        method: one of `METHODS`.
        metric: one of `METRICS`.
        value: the number, finite, in ``unit``.
        unit: the metric's unit; filled in when left empty.
        n: how many samples (pictures, batches, repetitions) the value comes from, at least 1.
        seed: the run's seed.
        spread: standard deviation over the ``n`` samples; None where the value is not a mean.
        interval: (low, high) of the 95% interval (`fbqat_hub.evaluation.intervals`); None where there is none. Left
            out of the file then, so files from before it was measured stay as they are.
        command: the command that measured it.
        versions, machine, date: filled in from here and now when left empty.
        extra: what the suite needs besides; JSON values, no key of the above.

    Raises:
        ValueError: an unknown name (with the nearest known one), a wrong unit, or a value that is not finite.
    """

    suite: str
    family: str
    method: str
    metric: str
    value: float
    unit: str = ""
    n: int
    seed: int
    spread: float | None = None
    interval: tuple[float, float] | None = None
    command: str = field(default_factory=command_line)
    versions: Mapping[str, str] = field(default_factory=versions)
    machine: Mapping[str, Any] = field(default_factory=machine)
    date: str = field(default_factory=now)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_name("suite", self.suite, SUITES)
        _check_name("method", self.method, METHODS)
        _check_name("metric", self.metric, METRICS)
        for name, kind in (("family", str), ("command", str), ("versions", Mapping), ("machine", Mapping)):
            if not isinstance(given := getattr(self, name), kind):
                needed = "text" if kind is str else "an object of keys and values"
                raise ValueError(f"{name} of {self.metric} is {given!r:.80}; {needed} is needed.")
        if not all(isinstance(version, str) for version in self.versions.values()):
            raise ValueError(f"versions of {self.metric} is {self.versions!r:.80}; texts are needed, such as '2.13.0'.")
        if not self.family or self.family != self.family.lower():
            raise ValueError(f"family is {self.family!r}; a lower-case family name such as 'sana' is needed.")
        unit = METRICS[self.metric].unit
        if self.unit not in ("", unit):
            raise ValueError(f"{self.metric} is given in {self.unit!r}; it is recorded in {unit!r}: convert the value.")
        object.__setattr__(self, "unit", unit)
        if not _is_finite(self.value):
            raise ValueError(f"The value of {self.metric} is {self.value!r}; a record holds one finite number.")
        if self.spread is not None and not (_is_finite(self.spread) and self.spread >= 0):
            raise ValueError(f"The spread of {self.metric} is {self.spread!r}; a finite number >= 0 or None is needed.")
        if self.interval is not None:
            object.__setattr__(self, "interval", _checked_interval(self.metric, self.interval))
        for name, low in (("n", 1), ("seed", 0)):
            number = getattr(self, name)
            if type(number) is not int or number < low:
                raise ValueError(f"{name} of {self.metric} is {number!r}; a whole number >= {low} is needed.")
        try:
            datetime.fromisoformat(self.date)
        except (TypeError, ValueError):
            raise ValueError(f"date is {self.date!r}; ISO 8601 is needed, e.g. 2026-11-23T01:00:00+00:00.") from None
        clash = sorted(set(self.extra) & _FIELDS)
        if clash:
            raise ValueError(f"extra holds {', '.join(clash)}, which are fields of a record; give them as fields.")

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two records the same measurement: (suite, family, method, metric, seed), and of ``extra`` the
        activation precision that one model was exported at, the part of a pipeline and the chip, if it has them."""
        apart = (self.extra.get(name) for name in ("precision", "part", "soc"))
        return (self.suite, self.family, self.method, self.metric, self.seed, *apart)

    def to_dict(self) -> dict[str, Any]:
        """The record as one flat JSON object."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("extra", "interval")}
        if self.interval is not None:
            plain["interval"] = list(self.interval)
        return {**plain, "versions": dict(self.versions), "machine": dict(self.machine), **self.extra}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Record:
        """The record of a flat JSON object; unknown keys go to ``extra``.

        Raises:
            ValueError: a field is missing, or as the constructor.
        """
        missing = sorted(_FIELDS - {"interval"} - set(row))
        if missing:
            raise ValueError(f"A record lacks {', '.join(missing)}: {json.dumps(dict(row), default=str)[:200]}")
        known = {name: row[name] for name in _FIELDS if name in row}
        return cls(**known, extra={name: value for name, value in row.items() if name not in _FIELDS})


_FIELDS = frozenset(f.name for f in fields(Record)) - {"extra"}


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a results file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a JSON list of valid records; names the file and the position.
    """
    path = Path(path)
    rows = read_json(path, 2**28)
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a JSON {type(rows).__name__}; a list of records is needed.")
    records = []
    for position, row in enumerate(rows):
        try:
            records.append(Record.from_dict(row))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, record {position}: {error}") from error
    return records


def write_records(
    path: str | os.PathLike[str], records: Iterable[Record], *, drop: Callable[[Record], bool] = lambda _: False
) -> Path:
    """Add records to a results file, replacing those of the same `Record.key` in their place.

    The file is written beside and renamed, so a reader or an interruption never meets half of it.

    Args:
        drop: which of the file's own records to leave out, because the new ones make them wrong company.

    Returns:
        The file.
    """
    path = Path(path)
    present = read_records(path) if path.exists() else []
    merged = {record.key: record for record in present if not drop(record)}
    merged.update({record.key: record for record in records})
    text = json.dumps([record.to_dict() for record in merged.values()], indent=1, ensure_ascii=False, allow_nan=False)
    with whole(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")
    return path


def _check_name(what: str, given: str, allowed: Iterable[str]) -> None:
    allowed = list(allowed)
    if given not in allowed:
        near = difflib.get_close_matches(str(given), allowed, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown {what} {given!r}.{hint} Known: {', '.join(allowed)}.")


def _checked_interval(metric: str, interval: Any) -> tuple[float, float]:
    """Of a file it is a list of two."""
    if not isinstance(interval, (list, tuple)) or len(interval) != 2 or not all(map(_is_finite, interval)):
        raise ValueError(f"The interval of {metric} is {interval!r}; two finite numbers (low, high) are needed.")
    low, high = interval
    if low > high:
        raise ValueError(f"The interval of {metric} is {interval!r}; low is above high.")
    return (low, high)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
