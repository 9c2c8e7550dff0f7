"""Talking to the Hub through huggingface_hub: its errors in words, and what a repository holds."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile

GIT_ATTRIBUTES = ".gitattributes"  # the Hub's own, in every repository


class HubError(RuntimeError):
    """Something that the Hub or the way to it refused; the text says at what step and what to do."""


AGAIN = "run the same command again: what was done is kept"
OTHERWISE = f"the Hub does not answer as it should; {AGAIN}"
ADVICE = {  # HTTP status -> what to do
    401: "log in with `hf auth login`, or set HF_TOKEN; without a valid token a missing repository looks the same",
    403: "the token may not do this; publishing needs write access (https://huggingface.co/settings/tokens)",
    404: "there is no such repository or file, or the token may not see it",
    408: "the Hub waited too long; run the same command again",
    409: "something else changes this repository now; run the same command again",
    412: "the repository was changed meanwhile; run the same command again and look at what it would upload",
    413: "it is too large for the Hub",
    429: "the Hub asks for a pause (rate limit); run the same command again in a few minutes",
}


@contextlib.contextmanager
def step(doing: str) -> Iterator[None]:
    """Turn what the client raises into a `HubError` of one line: the step, what happened, what to do.

    Errors of this machine's disk pass as they are. Addresses are left out of the text: signed ones are as good as a
    key.

    Args:
        doing: what is being done, e.g. "upload to me/model".
    """
    try:
        yield
    except HubError:
        raise
    except (HTTPError, EntryNotFoundError, OfflineModeIsEnabled, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise HubError(f"{doing}: {_what(error)}") from error


def _what(error: BaseException) -> str:
    """What the chain of causes says: an HTTP status, else a lost connection, else the client's own words."""
    chain: list[BaseException] = [error]
    while following := chain[-1].__cause__:
        chain.append(following)
    for cause in chain:
        if isinstance(cause, GatedRepoError):
            return "the repository is gated: ask for access on its page, log in with `hf auth login`, and run again."
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            said = f" ({' '.join(str(cause.server_message).split())[:200]})" if cause.server_message else ""
            advice = ADVICE.get(status, OTHERWISE)
            return f"HTTP {status}{said}: {advice}."
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in chain):
        return "offline mode is on (HF_HUB_OFFLINE); unset it and run again."
    if any(isinstance(cause, HTTPError) for cause in chain):
        return f"the connection was lost ({type(chain[-1]).__name__}); {AGAIN}."
    return f"{' '.join(str(error).split())[:300]} If this is no mistake of the input, {AGAIN}."


class RemoteFile(NamedTuple):
    """A file of a repository: ``size`` in bytes; ``sha256`` of one in large-file storage, else git's ``sha1``."""

    size: int
    sha256: str | None
    sha1: str


def remote_files(api: HfApi, repo: str, revision: str) -> dict[str, RemoteFile]:
    """Every file of a repository at a commit, with the hash that the Hub keeps of it."""
    return {
        item.path: RemoteFile(item.size, item.lfs.sha256 if item.lfs else None, item.blob_id)
        for item in api.list_repo_tree(repo, recursive=True, revision=revision)
        if isinstance(item, RepoFile)
    }


def git_sha1(content: bytes) -> str:
    """Git's name of a file's content: SHA-1 of ``blob <length>``, a zero byte and the content.

    >>> git_sha1(b"hello")
    'b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0'
    """
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def whoami(api: HfApi) -> Mapping[str, Any]:
    """Who the token belongs to, as the Hub says it; raises `HubError` for a token that is not valid."""
    with step("check the token"):
        return dict(api.whoami())


def card_value(card: Any, key: str) -> Any:
    """A key of a repository's card as the Hub parsed it (huggingface_hub's ModelCardData or nothing)."""
    return None if card is None else card.to_dict().get(key)
