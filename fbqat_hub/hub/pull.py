"""Download a published model whole or not at all, and verify one that is on this machine."""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RemoteEntryNotFoundError

from fbqat_hub.hub.client import HubError, step
from fbqat_hub.hub.manifest import CARD, MANIFEST, Check, Manifest, Use, check_files, read_manifest
from fbqat_hub.hub.names import size_text
from fbqat_hub.progress import Progress


class Pulled(NamedTuple):
    """A model on this machine that is as it was published: its folder, and what its manifest says."""

    folder: Path
    manifest: Manifest


def pull(
    repo: str,
    output: Path | None = None,
    *,
    use: Use | None = None,
    revision: str = "main",
    offline: bool = False,
    say: Callable[[str], None] = print,
) -> Pulled:
    """Download a model and compare every file with its manifest; a damaged or missing file is fetched once more.

    Only what the manifest lists is fetched, so nothing that was slipped into the repository besides. Files that are
    there already are not sent again. A file that stays damaged is removed, so nothing is left that looks whole.

    Args:
        repo: Hub id.
        output: folder for the files; None is the Hub's cache, where ``from_pretrained(repo)`` finds them.
        use: "diffusers" or "htp" to fetch only what it needs; None is everything.
        revision: branch, tag or commit.
        offline: take what is on this machine, and verify it.
        say: is given the lines meant for the user.

    Raises:
        HubError: the Hub refused or failed, or a file is still not right; says what to do.
        ValueError: the repository has no manifest, or one that cannot be followed.
    """
    if offline or constants.HF_HUB_OFFLINE:
        return verify(str(output or repo), use=use, revision=revision, say=say)
    before = _manifest_before(output)
    with step(f"look up {repo}"):
        commit = HfApi().model_info(repo, revision=revision).sha
    manifest = _fetch_manifest(repo, revision, commit, output)
    paths = _wanted(repo, manifest, use)
    with step(f"download {repo}"):
        patterns = [MANIFEST, *map(glob.escape, paths)]
        folder = Path(snapshot_download(repo, revision=commit, local_dir=output, allow_patterns=patterns))
    check = _check(folder, manifest, paths)
    if check.bad:
        say(f"fetched again, for not being as published: {check}")
        for path in check.bad:
            with step(f"download {path} of {repo}"), contextlib.suppress(RemoteEntryNotFoundError):
                hf_hub_download(repo, path, revision=commit, local_dir=output, force_download=True)
        check = _check(folder, manifest, paths)
    if check.bad:
        for path in check.bad:
            (folder / path).resolve().unlink(missing_ok=True)
        raise HubError(
            f"{repo} is not as its {MANIFEST} says, after a second download too: {check}. It was published damaged or "
            "changed since; these files were removed here. Tell its owner, or pull another --revision."
        )
    for path in set(before) - set(manifest.files):
        (folder / path).unlink(missing_ok=True)
    return _done(folder, manifest, paths, check, say)


def verify(
    target: str, *, use: Use | None = None, revision: str = "main", say: Callable[[str], None] = print
) -> Pulled:
    """Compare a model on this machine with its manifest, without a network.

    Args:
        target: a folder, or the Hub id of a model in the Hub's cache.
        use: "diffusers" or "htp" for one that was pulled for this use only.
        revision: of a model in the cache: branch, tag or commit.
        say: is given the lines meant for the user.

    Raises:
        FileNotFoundError: neither a folder nor in the cache, or without a manifest.
        ValueError: files are missing or damaged, which are named; or the manifest cannot be followed.
    """
    folder = Path(target)
    if not folder.is_dir():
        try:
            folder = Path(hf_hub_download(target, MANIFEST, revision=revision, local_files_only=True)).parent
        except (LocalEntryNotFoundError, HFValidationError):
            raise FileNotFoundError(
                f"{target} ({revision}) is neither a folder with {MANIFEST} nor was it downloaded. With a network: "
                f"fbqat pull {quote(target)}"
            ) from None
    manifest = read_manifest(folder)
    paths = _wanted(target, manifest, use)
    check = _check(folder, manifest, paths)
    if check.bad:
        raise ValueError(
            f"{target} is not as it was published: {check}. Fetch it again with fbqat pull; if it was pulled for one "
            "use only, verify it with the same --for."
        )
    return _done(folder, manifest, paths, check, say)


def _manifest_before(output: Path | None) -> list[str]:
    """The paths that an earlier pull left in the folder; an error for a folder of something else."""
    if output is None or not output.exists():
        return []
    if (output / MANIFEST).is_file():
        return list(read_manifest(output).files)
    if any(output.iterdir()) and not (output / ".cache" / "huggingface").is_dir():
        raise FileExistsError(f"{output} exists and is no pulled model; give another --output.")
    return []


def _fetch_manifest(repo: str, revision: str, commit: str, output: Path | None) -> Manifest:
    """The manifest at a commit; into the cache by the branch's name, so that loading without a network finds it."""
    wanted = revision if output is None else commit
    with step(f"download {MANIFEST} of {repo}"):
        try:
            folder = Path(hf_hub_download(repo, MANIFEST, revision=wanted, local_dir=output)).parent
        except RemoteEntryNotFoundError:
            raise HubError(
                f"{repo} has no {MANIFEST}: it was not published by fbqat, or not wholly. Without one nobody can say "
                "whether a download is complete; `hf download` fetches it as it is."
            ) from None
    if output is None and folder.name != commit:  # the client took an older one, because the Hub did not answer
        raise HubError(f"{repo}: the Hub did not say what {revision} is now; run the same command again.")
    return read_manifest(folder)


def _wanted(repo: str, manifest: Manifest, use: Use | None) -> list[str]:
    paths = manifest.files_for(use)
    if use == "htp" and not any(path.startswith("htp/") for path in paths):
        raise ValueError(f"{repo} has no HTP bundle; look for e.g. {repo}-QNN-SM8750, or make one: fbqat export.")
    if use == "diffusers" and "model_index.json" not in paths:
        raise ValueError(f"{repo} has no diffusers pipeline; pull it with --for htp.")
    return paths


def _check(folder: Path, manifest: Manifest, paths: list[str]) -> Check:
    total = sum(manifest.files[path].size for path in paths)
    with Progress("verify", total, "B") as bar:
        return check_files(folder, manifest, paths, bar.update)


def _done(folder: Path, manifest: Manifest, paths: list[str], check: Check, say: Callable[[str], None]) -> Pulled:
    if check.edited:
        say(f"{CARD} was edited since the model was published")
    size = sum(manifest.files[path].size for path in paths)
    say(f"verified: {len(paths)} files, {size_text(size)}, in {folder}")
    return Pulled(folder, manifest)
