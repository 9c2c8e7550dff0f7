"""What may be published of a name: a Hub id as it is, of a local path the last part only."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id


def public_name(name: str) -> str:
    """A Hub id as it is, without a revision; of a local path the last part only.

    >>> public_name("org/model@main"), public_name("/home/me/teachers/tiny")
    ('org/model', 'tiny')
    """
    if not is_local(name):
        try:
            repo, _ = repo_and_revision(name)
            validate_repo_id(repo)
            return repo
        except HFValidationError:
            pass
    return Path(name).name or name


def repo_and_revision(source: str) -> tuple[str, str | None]:
    """A model's repository on the Hub, and the branch, tag or commit that is asked for, None for its main branch.

    >>> repo_and_revision("org/model@v1.0"), repo_and_revision("org/model")
    (('org/model', 'v1.0'), ('org/model', None))
    """
    repo, _, revision = source.partition("@")
    return repo, revision or None


def is_local(value: str) -> bool:
    """Whether a string is a path of this machine: written as one, or with a slash and found on disk."""
    return value.startswith(("/", "~/", "./", "../")) or ("/" in value and os.path.exists(value))


def repo_problem(repo: str) -> str:
    """What is wrong with a Hub id to publish as; empty if nothing is.

    >>> repo_problem("me/tiny"), repo_problem("tiny")
    ('', '--repo tiny: give owner/name, e.g. me/tiny.')
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        return f"--repo {repo}: {error}"
    return "" if repo.count("/") == 1 else f"--repo {repo}: give owner/name, e.g. me/{repo}."


def strings_of(tree: Any) -> Iterable[str]:
    """Every string value in a tree of mappings and lists."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from strings_of(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from strings_of(value)


def without_local_paths(text: str, tree: Any) -> str:
    """A text of YAML in which every local path that is a value of ``tree`` is cut to its last part.

    YAML breaks a line at a space of a long path, and doubles an apostrophe.

    >>> without_local_paths("teacher: /home/me/a\\n  b/tiny", {"teacher": "/home/me/a b/tiny"})
    'teacher: tiny'
    """
    for value in sorted(filter(is_local, strings_of(tree)), key=len, reverse=True):
        written = re.escape(value).replace(r"\ ", r"\s+").replace("'", "''?")
        for found in set(re.findall(written, text)):
            text = text.replace(found, public_name(value).replace("'", "''" if "''" in found else "'"))
    return text


def size_text(size: int) -> str:
    """Bytes for people.

    >>> size_text(512), size_text(4_200_000), size_text(7_500_000_000)
    ('0.5 KiB', '4.0 MiB', '6.98 GiB')
    """
    if size >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
