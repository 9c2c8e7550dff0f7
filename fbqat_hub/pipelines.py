"""Whole pipelines: where one is, whether it is whole, loading it, and saving one in place of nothing or of another."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, get_cached_repo_tree, hf_hub_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError

from fbqat_hub.components import (
    INDEX,
    Component,
    check_pipeline,
    left_out,
    quiet,
    read_index,
    refusing,
    variant_files,
)
from fbqat_hub.files import usual_modes, whole
from fbqat_hub.hub.client import HubError, step
from fbqat_hub.hub.manifest import check_component
from fbqat_hub.hub.names import repo_and_revision
from fbqat_hub.stages import find_stage
from fbqat_hub.text import names

# Writes a part of a pipeline into a new folder: the part, the folder, the variant of its weights, and what is told of
# bytes that are done; see ``Component.copy``.
Writer = Callable[[Component, Path, str | None, Callable[[int], None] | None], None]
# What is being saved in a folder; one that was killed leaves it, and the next takes its place.
PARTIAL = ".partial"
_SINGLE_FILES = (".safetensors", ".ckpt", ".gguf", ".pt", ".pth", ".bin")


def is_folder(source: str | Path) -> bool:
    """Whether a model's source is a folder here; else it is a Hub id, owner/name or owner/name@revision, of which only
    the form is checked.

    Raises:
        FileNotFoundError: it is neither.
    """
    if Path(source).is_dir():
        return True
    if Path(source).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", str(source)):
        raise FileNotFoundError(f"{source} is no folder, nor a Hub id such as owner/name or owner/name@revision.")
    return False


def check_source(source: str | Path, variant: str | None = None) -> None:
    """Refuse what cannot be a pipeline, and a local one that is damaged or hostile, before anything is loaded.

    Args:
        source: folder, or Hub id (owner/name or owner/name@revision; only its form is checked).
        variant: of the weights, e.g. "fp16"; see ``Component.weights``.

    Raises:
        FileNotFoundError: neither a folder nor in the form of a Hub id.
        ValueError: a single file; a folder without ``model_index.json``, one with a file of another size than published
            (``fbqat.json``), or as ``check_pipeline``.
    """
    folder = Path(source)
    if folder.is_file() and folder.suffix in _SINGLE_FILES:
        raise ValueError(
            f"{source} is a single file of weights; give a pipeline's folder or Hub id. To make a folder of it, load "
            "the file with from_single_file of its class in diffusers, and the rest from the model that it was made "
            "from, then save_pretrained: docs/real-models.md has the lines."
        )
    if not is_folder(source):
        return
    if not (folder / INDEX).is_file():
        raise ValueError(f"{source} is not a diffusers pipeline: it has no {INDEX}. Give a pipeline's folder.")
    for component in sorted({path.parent for path in folder.glob("*/*.json")}):
        check_component(component)
    check_pipeline(folder, variant)


def class_of(source: str | Path) -> str:
    """The name of a pipeline's class; of a repository only ``model_index.json`` is downloaded.

    Args:
        source: folder, or Hub id.

    Raises:
        HubError: the Hub refused or failed, or the repository has no such file.
        ValueError: the file names no class.
    """
    folder = Path(source)
    if not folder.is_dir():
        with step(f"look up {source}, which is no folder here"):
            repo, revision = repo_and_revision(str(source))
            folder = Path(hf_hub_download(repo, INDEX, revision=revision)).parent
    return read_index(folder)[0]


def downloaded(source: str | Path, variant: str | None = None) -> Path:
    """The folder of a whole pipeline: ``source`` itself, or where the Hub's cache has it, downloaded if need be.

    Args:
        source, variant: as ``check_source``. Of a repository only the files of that variant are downloaded.

    Raises:
        HubError: the Hub refused or failed; says what to do.
        FileNotFoundError, ValueError: as ``check_source``.
    """
    from diffusers import DiffusionPipeline  # takes seconds, and `import fbqat_hub` must not

    check_source(source, variant)
    folder = Path(source)
    if not folder.is_dir():
        variant = _variant_of(str(source), variant)
        with step(f"download {source}, which is no folder here"), quiet():
            repo, revision = repo_and_revision(str(source))
            options = {"revision": revision, "use_safetensors": True, "variant": variant}
            folder = Path(DiffusionPipeline.download(repo, **options))
        check_source(folder, variant)
    return folder


def pinned(source: str, folder: Path) -> str:
    """The source with the commit that ``downloaded`` took it at, where ``folder`` is in the Hub's cache.

    >>> pinned("org/model", Path("hub/models--org--model/snapshots/2f3c")), pinned("my/model", Path("my/model"))
    ('org/model@2f3c', 'my/model')
    """
    is_from_hub = folder != Path(source) and folder.parent.name == "snapshots"
    return f"{repo_and_revision(source)[0]}@{folder.name}" if is_from_hub else source


def _variant_of(source: str, asked: str | None) -> str | None:
    """The variant to download: the one that is asked for, or that parts of a repository have in place of plain files.

    Raises:
        ValueError: there is no such variant, or several to choose from.
    """
    paths: list[str] = []
    repo, revision = repo_and_revision(source)
    try:
        with step(f"look up {source}, which is no folder here"):
            paths = HfApi().list_repo_files(repo, revision=revision)
    except HubError:  # the Hub does not answer: as it was when it last did
        with contextlib.suppress(CachedRepoTreeNotFoundError):
            paths = [file.path for file in get_cached_repo_tree(repo, revision=revision)]
    files: dict[str, list[str]] = {}
    for folder, _, name in (path.rpartition("/") for path in paths):
        files.setdefault(folder, []).append(name)
    found = [variant_files(inside, library) for inside in files.values() for library in ("diffusers", "transformers")]
    there = {variant for each in found for variant in each if variant}
    if asked and files and asked not in there:
        raise ValueError(f"{repo} has no weights of variant {asked}; it has {names(sorted(there)) or 'no variants'}.")
    needed = {variant for each in found if None not in each for variant in each if variant}
    if not asked and len(needed) > 1:
        raise ValueError(f"{repo} has the variants {names(sorted(needed))}; choose one of them (--variant).")
    return asked or (needed.pop() if needed else None)


def load_pipeline(
    source: str | Path,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    *,
    meta: bool = False,
    **components: Any,
) -> Any:
    """A whole pipeline, from safetensors only, after ``check_source``.

    Unlike plain ``from_pretrained``, which fills in random numbers with a warning, it refuses a component that lacks
    tensors, and one with NaN or infinity in a tensor. For the latter every file is read once more: 0.2 s for 1 GiB that
    is in the system's cache, on one core.

    Args:
        source: folder, or Hub id, which is downloaded first.
        dtype: of the models; None keeps each as it is stored. A CPU computes well in float32 only.
        variant: of the weights, e.g. "fp16"; see ``Component.weights``.
        meta: models without numbers, on the meta device: as strict but for NaN, in no time and memory.
        components: parts that are at hand, by name; they are not loaded.

    Raises:
        FileNotFoundError, ValueError, HubError: as ``downloaded``.
        ValueError: a component that its class cannot load, named.
    """
    from diffusers import DiffusionPipeline

    folder = downloaded(source, variant)
    for name, part in read_index(folder)[1].items():
        if name not in components:
            components[name] = part.load(dtype, variant, meta=meta)
    components = {**dict.fromkeys(left_out(folder)), **components}  # from_pretrained has to be told
    with refusing(folder), quiet():
        return DiffusionPipeline.from_pretrained(folder, use_safetensors=True, **components)


def load_stage(run: Path, bits: int, dtype: torch.dtype | None = None) -> Any:
    """A run's pipeline with the denoiser of a kept stage in place of its own, as ``load_pipeline``.

    Raises:
        FileNotFoundError: the run kept no stage of this width.
        FileNotFoundError, ValueError: as ``load_pipeline``.
    """
    folder = find_stage(run, bits) / "transformer"
    check_source(run)
    own = read_index(run)[1]["transformer"]
    denoiser = Component(folder, own.library, own.class_name)
    denoiser.check()
    return load_pipeline(run, dtype, transformer=denoiser.load(dtype))


def save_stage(model: Any, folder: Path) -> None:
    """Save a packed denoiser alone as ``folder/transformer``, in place of what has the name."""
    with whole(folder) as partial:
        model.save_pretrained(partial / "transformer")
        _strip_paths(partial / "transformer" / "config.json")
        shutil.rmtree(folder, ignore_errors=True)


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """Save a whole pipeline, as ``replacing`` does, from memory: every model in the dtype that it has there."""
    with replacing(folder) as partial:
        pipeline.save_pretrained(partial)


def save_quantized(transformer: Any, source: Path, folder: Path, instead: Mapping[str, Writer] | None = None) -> None:
    """Save a packed denoiser as a whole pipeline, as ``replacing`` does, with the other parts of ``source``.

    Args:
        source: folder of the pipeline that the denoiser was made from.
        folder: to save in.
        instead: as ``copy_parts``.
    """
    with replacing(folder) as partial:
        copy_parts(source, partial, instead=instead)
        transformer.save_pretrained(partial / "transformer")


def copy_parts(
    source: Path,
    target: Path,
    variant: str | None = None,
    done: Callable[[int], None] | None = None,
    *,
    instead: Mapping[str, Writer] | None = None,
) -> None:
    """Copy a pipeline's folder but for its denoiser: the files as they are stored, see ``Component.copy``.

    Args:
        variant, done: as ``Component.copy``.
        instead: name -> what writes this part in place of a copy.

    Raises:
        ValueError: a tensor with a value that is not finite, named.
    """
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / INDEX, target / INDEX)
    for name, part in read_index(source)[1].items():
        if name == "transformer":
            continue
        if write := (instead or {}).get(name):
            write(part, target / name, variant, done)
        else:
            part.copy(target / name, variant, done)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Save a pipeline so that nothing looks whole when it is interrupted: ``model_index.json`` comes last.

    ``_name_or_path``, which leaks local paths, is left out of all configurations. Other files in ``folder`` stay; if
    the block fails, so do all, and a folder that was not there is not there.

    Yields:
        A folder to save it into.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        for path in [partial / INDEX, *partial.glob("*/*config.json")]:
            _strip_paths(path)
        usual_modes(partial)
        (folder / INDEX).unlink(missing_ok=True)
        for path in sorted(partial.iterdir(), key=lambda path: path.name == INDEX):
            target = folder / path.name
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if new and not any(folder.iterdir()):
            folder.rmdir()
        raise
    shutil.rmtree(partial)


def _strip_paths(path: Path) -> None:
    """Take ``_name_or_path``, a local path, out of a component's configuration."""
    config = json.loads(path.read_text())
    if {"_name_or_path", "name_or_path"} & set(config):
        kept = {key: value for key, value in config.items() if not key.endswith("name_or_path")}
        path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
