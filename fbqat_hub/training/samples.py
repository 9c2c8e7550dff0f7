"""The pictures that an evaluation measures: prompts, pictures of teacher and student from the same seeds, real ones."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import WeakFileLock
from PIL import Image, ImageOps
from torch import Tensor

from fbqat_hub.cache_dir import default_cache_dir
from fbqat_hub.evaluation.folders import METADATA, SAMPLES
from fbqat_hub.evaluation.pictures import comparison_sheet
from fbqat_hub.families import get_family
from fbqat_hub.files import whole
from fbqat_hub.generation import changed_call, generate_pictures
from fbqat_hub.inputs import read_prompts, seeds
from fbqat_hub.pictures import as_image, is_one_colour, read_picture
from fbqat_hub.progress import Progress, each
from fbqat_hub.training.cache import CachedSplit, adapter_key, cache_folder, cache_key
from fbqat_hub.training.captioned import load_pictures
from fbqat_hub.training.lora_merge import float_pipeline
from fbqat_hub.training.pictures import picture_of
from fbqat_hub.training.prompts import PROMPT_SETS, load_prompts, training_prompts
from fbqat_hub.training.recipe import Recipe
from fbqat_hub.training.teachers import resolve_teacher

# Rows of the picture sheet.
_SHOWN = 10


@dataclass(frozen=True)
class Asked:
    """What pictures are to be made of.

    Attributes:
        texts: the prompts.
        source: what they are called in records: a data set, a prompt set or a file.
        real: pictures of the data set with these prompts, of any size and order; empty if they are not asked for.
    """

    texts: list[str]
    source: str
    real: Callable[[], Iterator[Image.Image]]


def asked_prompts(recipe: Recipe, prompts: str | None, exactly: int | None, with_real: bool) -> Asked:
    """The prompts of an evaluation.

    Args:
        prompts: a prompt set, or a text file with a prompt on each line; the recipe's own prompts and data if None.
        exactly: how many there must be; as many as the recipe says, or fewer, if None.
        with_real: the real pictures are wanted too.

    Raises:
        OSError, ValueError: a file that cannot be read, an unknown set, fewer prompts than ``exactly``, or a file where
            real pictures are wanted.
    """
    count = exactly or recipe.evaluation.images
    if prompts is None:
        if "prompts" in recipe.dataset:
            own = training_prompts(recipe.dataset)
            texts = _prompts_of(recipe, count, own["train"], own["test"])
            return Asked(texts, Path(recipe.dataset["prompts"]).name, lambda: iter(()))
        data = load_pictures(recipe.dataset, max(recipe.size))
        texts = _prompts_of(recipe, count, data["train"]["caption"], data["test"]["caption"])
        return Asked(texts, str(recipe.dataset["path"]), lambda: _real_of_recipe(data, texts))
    if prompts not in PROMPT_SETS and Path(prompts).exists():
        texts, source = read_prompts(Path(prompts))[:count], Path(prompts).name
        if with_real:
            raise ValueError(f"{prompts} has prompts and no real pictures; leave out the metrics that end in _real.")
        rows: Any = ()
    else:
        rows = load_prompts(prompts, count, images=with_real)
        texts, source = list(rows["prompt"]), prompts
    if exactly and len(texts) < exactly:
        raise ValueError(f"{prompts} has {len(texts)} prompts, and --images asks for {exactly}; ask for fewer.")
    return Asked(texts, source, lambda: (picture_of(row["image"], f"{prompts}, {row['prompt']!r:.80}") for row in rows))


def evaluation_prompts(recipe: Recipe, splits: Mapping[str, CachedSplit]) -> list[str]:
    """The recipe's own prompts, a quarter from the test split, training captions at even distances."""
    count = recipe.evaluation.images
    return _prompts_of(recipe, count, splits["train"].captions, splits["test"].captions)


def generate_samples(
    pipeline: Any, prompts: Sequence[str], recipe: Recipe, *, first_seed: int = 0, progress: bool = True
) -> Tensor:
    """Pictures of the prompts, uint8 [N, 3, H, W]; picture i always starts from seed ``first_seed`` + i.

    Raises:
        ValueError: a picture that is not finite.
    """
    settings = recipe.evaluation
    steps = {"num_inference_steps": settings.inference_steps}
    call = changed_call(get_family(recipe.family).pipeline_class, recipe.generation, steps)
    numbers = seeds(first_seed, len(prompts))
    made = []
    for first in each(range(0, len(prompts), settings.batch_size), "generate", "batch", shown=progress):
        batch = slice(first, first + settings.batch_size)
        made.append(generate_pictures(pipeline, prompts[batch], call, numbers[batch]))
    return torch.cat(made)


def generate_folder(
    pipeline: Callable[[], Any],
    prompts: Sequence[str],
    recipe: Recipe,
    folder: Path,
    stage: str = "generate",
    *,
    progress: bool = True,
) -> list[Path]:
    """Generate into ``folder``: a PNG a prompt, and ``metadata.jsonl`` with its prompt and seed.

    An interrupted call goes on with the first batch missing. ``folder`` has its name when it is whole, and is then
    taken as it is.

    Args:
        pipeline: gives the pipeline; called only if something is to be generated.
        stage: what the progress is called.

    Returns:
        The files, in the order of the prompts.
    """
    names = [f"{index:05d}.png" for index in range(len(prompts))]
    if not folder.exists():
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        unfinished.mkdir(parents=True, exist_ok=True)
        size = recipe.evaluation.batch_size
        starts = [first for first in range(0, len(names), size) if not (unfinished / names[first]).exists()]
        done = len(names) - sum(len(names[first : first + size]) for first in starts)
        with Progress(stage, len(names), "picture", start=done, shown=progress) as shown:
            for first in starts:
                batch = names[first : first + size]
                pictures = generate_samples(
                    pipeline(), prompts[first : first + size], recipe, first_seed=first, progress=False
                )
                # The first of a batch last: that it is there says that all of them are.
                for name, picture in reversed(list(zip(batch, pictures, strict=True))):
                    with whole(unfinished / name) as partial:
                        as_image(picture).save(partial, format="PNG")
                shown.update(len(batch))
        rows = [{"file_name": n, "prompt": p, "seed": i} for i, (n, p) in enumerate(zip(names, prompts, strict=True))]
        (unfinished / METADATA).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        unfinished.rename(folder)
    return [folder / name for name in names]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While another process makes the same folder, wait: what it has made is then taken."""
    locks = default_cache_dir() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(locks / hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]):
        yield


def teacher_pictures(
    recipe: Recipe,
    prompts: Sequence[str],
    pipeline: Callable[[], Any] | None = None,
    *,
    progress: bool = True,
) -> list[Path]:
    """The teacher's pictures of the prompts, generated once and kept with the cache of its latents.

    Args:
        pipeline: gives its pipeline; loaded here if it is None and the pictures are not there.
    """
    adapter = {} if recipe.lora is None else {"lora": adapter_key(recipe)}
    key = _key(resolve_teacher(recipe.teacher), recipe, prompts, **adapter)
    folder = cache_folder(recipe) / f"teacher-{key}"
    load = pipeline or (lambda: float_pipeline(recipe))
    with _alone(folder):
        return generate_folder(load, prompts, recipe, folder, "generate with the teacher", progress=progress)


def student_pictures(
    pipeline: Callable[[], Any], run: Path, recipe: Recipe, prompts: Sequence[str], *, progress: bool = True
) -> list[Path]:
    """In the run's folder; generated anew when the model, prompts or settings are not those of ``key.txt``."""
    folder = run / SAMPLES
    key = _key(str(run / "transformer"), recipe, prompts)
    fresh = folder.with_name(f"samples-{key}")
    with _alone(folder):
        if not (folder / "key.txt").exists() or (folder / "key.txt").read_text() != key:
            generate_folder(pipeline, prompts, recipe, fresh, progress=progress)
            (fresh / "key.txt").write_text(key)
            for stale in (folder, *folder.parent.glob(".samples-*.unfinished")):
                shutil.rmtree(stale, ignore_errors=True)
            fresh.rename(folder)
    return sorted(folder.glob("*.png"))


def real_pictures(recipe: Recipe, asked: Asked) -> list[Path]:
    """The middles of the real pictures, in the proportions of the recipe's size, as PNG, not resized; kept."""
    key = cache_key(asked.source, {"path": asked.source, "prompts": asked.texts}, recipe.size, {})
    folder = cache_folder(recipe) / f"real-{key}"
    with _alone(folder):
        if not folder.exists():
            with whole(folder) as partial:
                partial.mkdir()
                for index, picture in enumerate(asked.real()):
                    ImageOps.fit(picture, _middle(picture, recipe.size)).save(partial / f"{index:05d}.png")
    return sorted(folder.glob("*.png"))


def _middle(picture: Image.Image, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the largest part of a picture with the proportions of ``size`` (height, width)."""
    scale = min(picture.height / size[0], picture.width / size[1])
    return max(1, round(scale * size[1])), max(1, round(scale * size[0]))


def check_alive(prompts: Sequence[str], student: Sequence[Path], teacher: Sequence[Path]) -> None:
    """Refuse pictures that a broken model makes: of one colour where the teacher's are not, or all of the teacher's.

    Raises:
        ValueError: says how many, and the first prompt.
    """
    flat = [is_one_colour(read_picture(file)) for file in teacher]
    if all(flat):
        raise ValueError(
            f"each of the teacher's {len(flat)} pictures is of one colour throughout, so there is nothing to compare "
            "with: the teacher is broken, or the prompts ask for nothing else (choose others with --prompts)."
        )
    dead = [
        prompt
        for prompt, file, of_teacher in zip(prompts, student, flat, strict=True)
        if not of_teacher and is_one_colour(read_picture(file))
    ]
    if dead:
        raise ValueError(
            f"{len(dead)} of {len(student)} pictures are of one colour throughout where the teacher's are not, first "
            f"that of {dead[0]!r:.80}: the model is broken. Nothing was recorded; train or convert it again."
        )


def picture_sheet(run: Path, columns: Mapping[str, Sequence[Path]], prompts: Sequence[str]) -> None:
    """Write ``images/comparison.png``: the first prompts, one labelled column for each list of pictures."""
    rows = range(min(_SHOWN, len(prompts)))
    images = {label: [Image.open(files[row]) for row in rows] for label, files in columns.items()}
    comparison_sheet(images, [prompts[row] for row in rows]).save(run / "images" / "comparison.png")


def _prompts_of(recipe: Recipe, count: int, seen: Sequence[str], held_out: Sequence[str]) -> list[str]:
    last = list(held_out[: count // 4])
    rest = max(0, count - len(last) - len(recipe.prompts))
    captions = list(seen)
    return [*recipe.prompts, *(captions[index * len(captions) // rest] for index in range(rest)), *last][:count]


def _real_of_recipe(data: Any, texts: Sequence[str]) -> Iterator[Image.Image]:
    """The data set's own pictures of the captions, in both splits; own prompts may have none."""
    rows = {caption: (split, row) for split in ("train", "test") for row, caption in enumerate(data[split]["caption"])}
    for text in dict.fromkeys(texts):
        if text in rows:
            split, row = rows[text]
            yield picture_of(data[split][row]["image"], f"{split}, row {row + 1}")


def _key(model: str, recipe: Recipe, prompts: Sequence[str], **beside: Any) -> str:
    """Of the pictures that a model generates."""
    return cache_key(model, {"prompts": list(prompts), **vars(recipe.evaluation), **beside}, 0, recipe.generation)
