"""What of a run's folder is published: which files, and nothing private in them."""

from __future__ import annotations

import getpass
import io
import json
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import get_token

from fbqat_hub import untrusted
from fbqat_hub.config import FBQATConfig
from fbqat_hub.hub.manifest import CARD, check_path
from fbqat_hub.hub.names import without_local_paths
from fbqat_hub.stages import branch_name, find_stage

# at the top of a run; LICENSE, NOTICE and ATTRIBUTION with any ending
_TOP = re.compile(
    r"model_index\.json|recipe\.yaml|results\.json|training_log\.jsonl|(LICEN[CS]E|NOTICE|ATTRIBUTION)(\.\w+)?"
)
# in a component: configurations, weights without pickle, vocabularies
_COMPONENT = re.compile(r".+\.(json|safetensors|txt|model|jinja)")
# of one bit width of a run, not of all
_OF_DENOISER = re.compile(r"README\.md|results\.json|(transformer|images|htp|stages)/.+")
_PICTURE = re.compile(r"images/[^/]+\.(png|jpg|webp)")
# Qualcomm's libraries may not be passed on; pickles and programs have no business in a bundle
_NEVER_IN_BUNDLE = re.compile(r".+\.(so(\.\d+)*|dll|dylib|exe|cat|pt|pth|ckpt|pkl|pickle|py[co]?|tmp)|.*partial.*")
_TEXT = re.compile(r".+\.(json|jsonl|yaml|yml|md|txt|csv|jinja|sh)|LICEN[CS]E|NOTICE|ATTRIBUTION")
# of the base model, and full of pieces of paths and names
_VOCABULARY = re.compile(r"tokenizer\.json|vocab\.(json|txt)|merges\.txt|.+\.model")

_TOKEN = re.compile(rb"\b(hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[A-Z0-9]{16})\b")
_ABSOLUTE = re.compile(
    r"""(?:^|(?<=[\s"'`(=\[,:]))(?:/([\w.@+-]+)(?:/[\w.@+-]+)+|~/[\w.@+-]+|[A-Za-z]:\\\\?\w[^\s"']*)"""
)
# the line of the card's code block that loads the model
_LOADING = re.compile(r'(pipe = DiffusionPipeline\.from_pretrained\()"[^"\n]*"(?:, revision="[^"\n]*")?')
_COMMON = {"root", "user", "admin", "ubuntu", "debian", "runner", "docker", "localhost"}  # tell nobody who it is
_HOMES = {"home", "Users", "root", "mnt", "media", "tmp", "private", "scratch", "workspace"}


@dataclass(frozen=True)
class Item:
    """One file to publish: its path in the repository, and where the content is."""

    path: str
    source: Path | bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    def open(self) -> BinaryIO:
        """The content, for reading."""
        return io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source.open("rb")


def collect(run: Path, repo: str, stage: int | None = None) -> tuple[list[Item], list[str], list[str]]:
    """The files of a run's folder that are published, and those that stay.

    Published are the pipeline, its card, recipe, results and log, the pictures of the card, licence texts and the HTP
    bundle. Checkpoints, caches, samples, hidden and partial files stay. The card's code block is made to load
    ``repo``, whatever it was written for; local paths in the recipe are cut to their last part.

    A stage is published as a whole pipeline too: the denoiser, card, results and pictures are the stage's, all else but
    the HTP bundle is the run's.

    Args:
        run: the folder.
        repo: Hub id it will have.
        stage: bit width of a stage that the run kept, for the branch of that width.

    Returns:
        (items sorted by path, paths that stay, files that cannot be published: one line each).
    """
    components = component_names(run)
    source = json.dumps(repo) if stage is None else f'{json.dumps(repo)}, revision="{branch_name(stage)}"'
    items, stay, problems = [], [], []
    for name, path in _named(run, stage).items():
        if problem := _problem_of(path, run):
            problems.append(problem)
        elif name == CARD:
            text = path.read_text(encoding="utf-8", errors="replace")
            items.append(Item(name, _LOADING.sub(lambda found: found[1] + source, text).encode()))
        elif name == "recipe.yaml":
            text = path.read_text(encoding="utf-8", errors="replace")
            items.append(Item(name, without_local_paths(text, recipe_of(run)).encode()))
        elif _belongs(name, components):
            items.append(Item(name, path))
        else:
            stay.append(name)
    return items, stay, problems


def component_names(run: Path) -> list[str]:
    """The components that ``model_index.json`` names with a class, sorted; none where there is no such file."""
    index = read_json(run / "model_index.json")
    named = index.items() if isinstance(index, dict) else ()
    return sorted(key for key, value in named if isinstance(value, list) and len(value) == 2 and all(value))


def recipe_of(run: Path) -> dict[str, Any]:
    """The run's recipe as it stands in recipe.yaml; empty where there is none that can be read."""
    try:
        recipe = untrusted.read_yaml(run / "recipe.yaml")
    except (OSError, ValueError):
        return {}
    return recipe if isinstance(recipe, dict) else {}


def packed_config(run: Path) -> FBQATConfig | None:
    """How the run's denoiser is quantized; None where it is not, or its config.json cannot be read."""
    config = read_json(run / "transformer" / "config.json")
    try:
        return FBQATConfig(**config["quantization_config"])
    except (KeyError, TypeError, ValueError):
        return None


def private_things(items: list[Item], owner: str) -> list[str]:
    """What must not be published of the files' contents, one line each; a secret itself is not repeated.

    Looked for in every file: tokens (of the Hub in use, of GitHub, of AWS). In every file but vocabularies: this user's
    home folder. In text files but vocabularies also: absolute paths of this machine and of homes, the user's name
    (unless it is the owner's) and the machine's name.

    Args:
        owner: the name before the slash of the repository.
    """
    words = [word for word in _own_words() if word.lower() != owner.lower()]
    token = (get_token() or "").encode()
    home = str(Path.home()).encode() + b"/"
    problems: list[str] = []
    for item in items:
        name = item.path.rpartition("/")[2]
        if _VOCABULARY.fullmatch(name):
            problems += _private_bytes(item, token, b"")
        elif _TEXT.fullmatch(name):
            with item.open() as file:
                problems += _private_text(item.path, file.read().decode(errors="replace"), words, token)
        else:
            problems += _private_bytes(item, token, home)
    return problems


def _private_text(path: str, text: str, words: list[str], token: bytes) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if _TOKEN.search(line.encode()) or (token and token in line.encode()):
            yield f"{path}, line {number}: holds a token; take it out, and revoke it if it is yours."
        for match in _ABSOLUTE.finditer(line):
            top = match[1]
            if top is None or top in _HOMES or os.path.isdir(f"/{top}"):
                yield f"{path}, line {number}: local path {match[0]!r:.80}; write a Hub id or a name instead."
        for word in words:
            if re.search(rf"\b{re.escape(word)}\b", line):
                yield f"{path}, line {number}: holds {word!r}, the name of this user or machine; take it out."


def _private_bytes(item: Item, token: bytes, home: bytes) -> Iterator[str]:
    tail = b""
    with item.open() as file:
        while chunk := file.read(2**20):
            window = tail + chunk
            if _TOKEN.search(window) or (token and token in window):
                yield f"{item.path}: holds a token; make the file again without it, and revoke it if it is yours."
                return
            if home and home in window:
                yield f"{item.path}: holds a path of this user's home folder; make the file again from another folder."
                return
            tail = window[-256:]


def _own_words() -> list[str]:
    """Names of this user and this machine that are long enough to be told from words of a text."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without an entry in the password database
        user = ""
    return [word for word in (user, socket.gethostname()) if len(word) > 3 and word not in _COMMON]


def _belongs(name: str, components: list[str]) -> bool:
    folder, slash, rest = name.partition("/")
    if not slash:
        return bool(_TOP.fullmatch(name))
    if folder == "htp":
        return not _NEVER_IN_BUNDLE.fullmatch(rest)
    return bool(_PICTURE.fullmatch(name) or (folder in components and _COMPONENT.fullmatch(rest)))


def _named(run: Path, stage: int | None) -> dict[str, Path]:
    """Path in the repository -> file, sorted, of a run or of a stage of it."""
    named = {path.relative_to(run).as_posix(): path for path in _files(run)}
    if stage is None:
        return named
    folder = find_stage(run, stage)
    shared = {name: path for name, path in named.items() if not _OF_DENOISER.fullmatch(name)}
    own = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    return dict(sorted({**shared, **own}.items()))


def _files(run: Path) -> Iterator[Path]:
    """Every file of the folder that is not hidden, sorted; folders that are links are not entered."""
    for folder, folders, files in os.walk(run):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder) / name for name in sorted(files) if not name.startswith("."))


def _problem_of(path: Path, run: Path) -> str:
    """Why a file cannot be published, whatever it holds; empty if it can."""
    if not path.resolve().is_relative_to(run.resolve()):
        return f"{path} is a link to a file outside the run; put the file itself there, or remove it."
    try:
        check_path(path.relative_to(run).as_posix())
    except ValueError:
        return f"{path} has a name that not every system can hold; rename it."
    return ""


def read_json(path: Path) -> Any:
    """What a JSON file holds; None where there is none that can be read."""
    try:
        return untrusted.read_json(path)
    except (OSError, ValueError):
        return None
