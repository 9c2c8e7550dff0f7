"""The parts of a pipeline's folder: which there are, what each must hold to be whole, loading and copying one.

Nothing is made up: a part without its weights, its vocabulary or its configuration is refused by name. Other libraries
fill in random numbers, or a vocabulary of five entries.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fbqat_hub.text import names
from fbqat_hub.untrusted import check_config, check_links, read_json
from fbqat_hub.weights import check_finite, copy_finite, read_header, stored_dtype

INDEX = "model_index.json"
# Libraries whose classes may be parts of a pipeline -> how they name weight files.
_WEIGHTS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
# What is copied beside the weights: configurations, vocabularies, chat templates.
TEXTS = (".json", ".txt", ".model", ".jinja")
_SCHEDULER = "scheduler_config.json"
_AGAIN = "Download or convert it again."


@dataclass(frozen=True)
class Weights:
    """The weight files of a model that are used.

    Attributes:
        variant: e.g. "fp16", as in ``model.fp16.safetensors``; None for files without one.
        files: one, or the shards.
        index: of the shards; None for one file.
    """

    variant: str | None
    files: tuple[Path, ...]
    index: Path | None


@dataclass(frozen=True)
class Component:
    """A part that ``model_index.json`` names: its folder, and the class that reads it."""

    folder: Path
    library: str
    class_name: str

    @cached_property
    def kind(self) -> Any:
        """The class.

        Raises:
            ValueError: the installed library has none of this name that can be loaded.
        """
        library = importlib.import_module(self.library)
        kind = getattr(library, self.class_name, None)
        if not isinstance(kind, type) or not hasattr(kind, "from_pretrained"):
            raise ValueError(
                f"{self.folder.parent / INDEX}: {self.folder.name} is a {self.class_name}, which {self.library} "
                f"{library.__version__} does not have; update it: pip install -U {self.library}"
            )
        return kind

    @property
    def is_model(self) -> bool:
        """True of a part with weights; a scheduler or a tokenizer has none."""
        return issubclass(self.kind, torch.nn.Module)

    def check(self, variant: str | None = None) -> None:
        """Refuse a part that is not whole, before any of it is loaded.

        A model has its ``config.json``, with numbers within bounds, and weights; a tokenizer its vocabulary; a
        scheduler and a processor their configuration. The headers of safetensors are compared with the files.

        Args:
            variant: as ``weights``.

        Raises:
            ValueError: names the folder and what is missing or wrong.
        """
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is missing, and {INDEX} names it, a {self.class_name}. {_AGAIN}")
        if self.is_model:
            tensors = sum(len(read_header(path)) for path in self.weights(variant).files)
            self._check_types(self.folder / "config.json", check_config(self.folder / "config.json", tensors))
        elif not any(all(_has(self.folder / name) for name in needed) for needed in self._needed()):
            choices = ", or ".join(" and ".join(needed) for needed in self._needed())
            raise ValueError(f"{self.folder} lacks {choices}, which a {self.class_name} is made from. {_AGAIN}")
        elif (settings := self.folder / _SCHEDULER).is_file():
            self._check_types(settings, check_config(settings))

    def _check_types(self, path: Path, config: dict[str, Any]) -> None:
        """Refuse text where a class of diffusers has a number; transformers' look at their own types."""
        for name, each in inspect.signature(self.kind.__init__).parameters.items():
            if type(each.default) in (int, float) and isinstance(config.get(name), str):
                given = config[name]
                raise ValueError(f"{path}: {name} is {given!r:.80}; it must be a number, such as {each.default}.")

    def _needed(self) -> list[list[str]]:
        """Lists of files of which one must be there, for a part without weights."""
        if getattr(self.kind, "config_name", None) == _SCHEDULER:
            return [[_SCHEDULER]]
        if vocabulary := dict(getattr(self.kind, "vocab_files_names", None) or {}):
            vocabulary.pop("tokenizer_file", None)
            files = [["tokenizer.json"], sorted(vocabulary.values())]
            return [["tokenizer_config.json", *each] for each in files if each]
        if self.library == "transformers" and re.search("Processor|FeatureExtractor", self.class_name):
            return [["preprocessor_config.json"], ["processor_config.json"]]
        raise ValueError(
            f"{self.folder.parent / INDEX}: {self.folder.name} is a {self.class_name}, which is neither a model, a "
            "scheduler, a tokenizer nor a processor."
        )

    def weights(self, variant: str | None = None) -> Weights:
        """The weight files to use.

        Args:
            variant: wanted; a part that does not have it gives its files without a variant. With None those are
                preferred, and if there are none the only variant that there is.

        Raises:
            ValueError: there are no safetensors, no such variant, or several to choose from; or an index and its shards
                do not fit.
        """
        found = self._found()
        chosen = variant if variant in found else None
        if chosen not in found and variant is None and len(found) == 1:
            (chosen,) = found
        if chosen not in found:
            there = names(sorted(map(str, found)))
            wanted = f"not {variant}" if variant else "no files without a variant"
            raise ValueError(f"{self.folder} has the variants {there}, and {wanted}; choose one of them (--variant).")
        path = found[chosen]
        if path.suffix != ".json":
            return Weights(chosen, (path,), None)
        return Weights(chosen, self._shards(path), path)

    @property
    def variants(self) -> set[str | None]:
        """Of a model's weights; None stands for files without a variant."""
        return set(self._found())

    def _found(self) -> dict[str | None, Path]:
        """Variant -> its file, or its index. Where there are both, the one that the library takes."""
        files = [path.name for path in self.folder.iterdir() if path.is_file()]
        found = variant_files(files, self.library)
        if not found:
            others = sorted(name for name in files if name.endswith((*_PICKLES, ".safetensors", ".gguf", ".msgpack")))
            stem = f"{_WEIGHTS[self.library]}." if any(name.endswith(".safetensors") for name in others) else ""
            pickles = any(name.endswith(_PICKLES) for name in others)
            raise ValueError(
                f"{self.folder} has no {stem}safetensors"
                + (f", but {names(others, 3)}" if others else "")
                + (", which could run code when read" if pickles else "")
                + f"; only safetensors{' of this name' if stem else ''} are loaded."
            )
        return {variant: self.folder / name for variant, name in found.items()}

    def _shards(self, index: Path) -> tuple[Path, ...]:
        content = read_json(index)
        places = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(places, dict) or not places or not all(isinstance(each, str) for each in places.values()):
            raise ValueError(f"{index} has no weight_map of tensors to files. {_AGAIN}")
        shards = sorted(set(places.values()))
        for name in shards:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{index} names {name!r}, which is no safetensors file beside it.")
            if not (self.folder / name).is_file():
                raise ValueError(f"{index} names {name}, which is missing. {_AGAIN}")
        stored = {(tensor, name) for name in shards for tensor in read_header(self.folder / name)}
        if wrong := {tensor for tensor, _ in stored ^ set(places.items())}:
            raise ValueError(f"{index} and the files that it names differ about {names(sorted(wrong))}. {_AGAIN}")
        return tuple(self.folder / name for name in shards)

    def load(
        self, dtype: torch.dtype | None = None, variant: str | None = None, *, meta: bool = False, **options: Any
    ) -> Any:
        """The part, after ``check``.

        Args:
            dtype: of a model; None is the one that it is stored in (``stored_dtype``).
            variant: as ``weights``.
            meta: a model without its numbers, on the meta device: as strict, in no time and memory.
            options: further arguments of its class's ``from_pretrained``.

        Raises:
            ValueError: the class cannot load it; a tensor is missing, too many, of whole numbers, or not finite.
        """
        with refusing(self.folder), quiet():
            if not self.is_model:
                return self.kind.from_pretrained(self.folder)
            weights = self.weights(variant)
            if not meta and "quantization_config" not in options:  # the quantizer looks at each tensor itself
                for path in weights.files:
                    check_finite(path)
            if meta:
                options["device_map"] = {"": "meta"}
            if self.library == "transformers":  # whose error would name no tensor
                options["ignore_mismatched_sizes"] = True
            model, found = self.kind.from_pretrained(
                self.folder,
                dtype=dtype or stored_dtype(weights.files),
                variant=weights.variant,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
        # of a quantized model the quantizer looks at each tensor
        whole_numbers = [] if getattr(model, "is_quantized", False) else _whole_numbers(model, weights)
        # transformers' checkpoints may hold more than one of its models takes, a decoder beside the encoder, say
        extra = found["unexpected_keys"] if self.library == "diffusers" else ()
        for tensors, what in (
            ([each[0] for each in found["mismatched_keys"]], "has tensors of other shapes than those of"),
            (found["missing_keys"], "lacks tensors of"),
            (extra, "has tensors that are none of"),
            (whole_numbers, "has whole numbers where there should be fractions, in tensors of"),
        ):
            if tensors:
                raise ValueError(f"{self.folder} {what} a {self.class_name}: {names(sorted(tensors))}. {_AGAIN}")
        return model

    def copy(self, target: Path, variant: str | None = None, done: Callable[[int], None] | None = None) -> None:
        """Copy the part into a new folder: weights byte for byte, under names without a variant.

        Only what is used is copied: one variant, configurations and vocabularies; no code, and no pickles.

        Args:
            done: is told of bytes of weights as they are written.

        Raises:
            ValueError: a tensor with a value that is not finite, named.
        """
        weights = self.weights(variant) if self.is_model else Weights(None, (), None)
        target.mkdir(parents=True)
        for path in sorted(self.folder.iterdir()):
            if path.is_file() and path.suffix in TEXTS and ".safetensors." not in path.name:
                shutil.copyfile(path, target / path.name)
        for path in weights.files:
            copy_finite(path, target / self._plain(path.name, weights.variant), done)
        if weights.index:
            index = read_json(weights.index)
            index["weight_map"] = {
                tensor: self._plain(name, weights.variant) for tensor, name in index["weight_map"].items()
            }
            plain = f"{_WEIGHTS[self.library]}.safetensors.index.json"
            (target / plain).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _plain(self, name: str, variant: str | None) -> str:
        stem = _WEIGHTS[self.library]
        return name.replace(f"{stem}.{variant}", stem, 1) if variant else name


def variant_files(files: list[str], library: str) -> dict[str | None, str]:
    """Variant -> the weight file, or the index, that a library takes among the files of a model's folder.

    >>> variant_files(["config.json", "model.safetensors", "model.fp16-00001-of-00002.safetensors",
    ...     "model.safetensors.index.fp16.json"], "transformers")
    {'fp16': 'model.safetensors.index.fp16.json', None: 'model.safetensors'}
    """
    stem = _WEIGHTS[library]
    single = re.compile(rf"{stem}(?:\.(\w+))?\.safetensors")
    index = re.compile(rf"{stem}\.safetensors\.index(?:\.(\w+))?\.json")
    found: dict[str | None, str] = {}
    # diffusers looks for an index first, transformers for a single file
    for pattern in (single, index) if library == "diffusers" else (index, single):
        found |= {match[1]: match[0] for match in map(pattern.fullmatch, sorted(files)) if match}
    return found


def read_index(folder: Path) -> tuple[str, dict[str, Component]]:
    """The class of a pipeline and its parts, by ``model_index.json``, without those that it goes without.

    Raises:
        ValueError: names no class, a class of another library, or a part that is no folder.
    """
    index = read_json(folder / INDEX)
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ValueError(f"{folder / INDEX} names no pipeline class; give a diffusers pipeline's folder.")
    components = {}
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list) or value == [None, None]:
            continue
        if len(value) != 2 or value[0] not in tuple(_WEIGHTS) or not isinstance(value[1], str):
            raise ValueError(
                f"{folder / INDEX}: {name} is {value!r}; it must be a class of {' or '.join(_WEIGHTS)}, since no other "
                "code is run."
            )
        if Path(name).name != name:
            raise ValueError(f"{folder / INDEX}: {name!r} is no name of a component.")
        components[name] = Component(folder / name, value[0], value[1])
    return index["_class_name"], components


def left_out(folder: Path) -> list[str]:
    """The names of the parts that a pipeline goes without and that diffusers' ``from_pretrained`` has to be told of."""
    index = read_json(folder / INDEX)
    return [name for name in _asked_for(str(index.get("_class_name"))) if index.get(name) == [None, None]]


def check_pipeline(folder: Path, variant: str | None = None) -> dict[str, Component]:
    """Refuse a folder that is not a whole pipeline, before any of it is loaded.

    Args:
        variant: of the weights, as ``Component.weights``.

    Returns:
        Its parts by name.

    Raises:
        ValueError: a link out of the folder, an index that is none or lacks a part of its class, no weights of the
            variant, or as ``Component.check``.
    """
    check_links(folder)
    class_name, components = read_index(folder)
    if lacking := sorted(_required(class_name) - set(components)):
        raise ValueError(f"{folder / INDEX} names no {names(lacking)}, which a {class_name} needs. {_AGAIN}")
    for component in components.values():
        component.check(variant)
    models = [component for component in components.values() if component.is_model]
    if variant and not any(variant in model.variants for model in models):
        there = sorted({each for model in models for each in model.variants if each})
        raise ValueError(f"{folder} has no weights of variant {variant}; it has {names(there) or 'no variants'}.")
    return components


def _required(class_name: str) -> set[str]:
    """The parts that a pipeline cannot do without. A third text encoder can be left out: SD3.5 goes without its T5."""
    return {name for name in _asked_for(class_name) if not re.fullmatch(r"(text_encoder|tokenizer)_3", name)}


def _asked_for(class_name: str) -> list[str]:
    """The parts that a pipeline's class is made from, but for those that are optional in diffusers."""
    import diffusers

    kind: Any = getattr(diffusers, class_name, None)
    if not (inspect.isclass(kind) and issubclass(kind, diffusers.DiffusionPipeline)):
        return []  # refused by name where it is loaded
    parameters = inspect.signature(kind.__init__).parameters
    optional = {"self", *getattr(kind, "_optional_components", ())}
    return [name for name, each in parameters.items() if each.default is each.empty and name not in optional]


def _whole_numbers(model: Any, weights: Weights) -> list[str]:
    """Tensors that are stored as whole numbers and are parameters of a float model, with or without a prefix."""
    stored = [
        name for path in weights.files for name, each in read_header(path).items() if not each.dtype.is_floating_point
    ]
    parameters = [f".{name}" for name, _ in model.named_parameters()] if stored else []
    return [name for name in stored if any(f".{name}".endswith(p) or p.endswith(f".{name}") for p in parameters)]


def _has(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


@contextmanager
def refusing(folder: Path) -> Iterator[None]:
    """Whatever a class of another library says of files that do not fit it, as one ValueError that names them."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        of_the_system = isinstance(error, OSError) and error.errno is not None  # the disk is full, say
        if of_the_system or (isinstance(error, ValueError) and str(folder) in str(error)):
            raise
        raise ValueError(f"{folder} cannot be loaded ({type(error).__name__}: {error}). {_AGAIN}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and messages of other libraries: what they would warn of is an error here, and so is what they raise."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    before = [(each, each.get_verbosity(), each.is_progress_bar_enabled()) for each in (of_diffusers, of_transformers)]
    for each, _, _ in before:
        each.set_verbosity(each.CRITICAL)
        each.disable_progress_bar()
    try:
        yield
    finally:
        for each, verbosity, bar in before:
            each.set_verbosity(verbosity)
            if bar:
                each.enable_progress_bar()
