"""The metrics as modules of Hugging Face `evaluate`, a folder each.

    psnr = evaluate.load(str(fbqat_hub.evaluation.modules.folder("psnr")))
    psnr.compute(predictions=["student/1.png", "student/2.png"], references=["teacher/1.png", "teacher/2.png"])

Pictures are PIL pictures or paths. Every module answers with its value under its own name, ``n``, and ``interval``: the
95% interval, or None where there are too few pictures for one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fbqat_hub.evaluation.suite import Measurement, NotMeasurableError

NAMES = ("clip_fid", "clip_iqa", "clip_score", "fd", "fid", "image_reward", "kd_loss", "lpips", "psnr", "ssim")


def folder(name: str) -> Path:
    """The folder that `evaluate.load` takes.

    Raises:
        ValueError: no module of that name.
    """
    if name not in NAMES:
        raise ValueError(f"There is no module {name!r}; there are: {', '.join(NAMES)}.")
    return Path(__file__).parent / name


@contextmanager
def saved(*sets: Sequence[Any]) -> Iterator[list[list[Path]]]:
    """Pictures as files, for as long as they are measured."""
    with tempfile.TemporaryDirectory() as root:
        kept = []
        for number, pictures in enumerate(sets):
            files = [Path(root) / f"{number}-{index}.png" for index in range(len(pictures))]
            for picture, file in zip(pictures, files, strict=True):
                picture.save(file)
            kept.append(files)
        yield kept


def answer(name: str, found: Callable[[], Measurement]) -> dict[str, Any]:
    """What a module's ``compute`` returns; where the pictures do not give the metric, None and ``why``."""
    try:
        measured = found()
    except NotMeasurableError as reason:
        return {name: None, "n": 0, "interval": None, "why": str(reason)}
    return {name: measured.value, "n": measured.n, "interval": measured.interval, **measured.extra}
