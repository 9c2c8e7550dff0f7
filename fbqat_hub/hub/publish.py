"""Publish a run: everything checked first, one commit, then the Hub's own list compared with what was sent.

Nothing is kept on disk between attempts. A cut upload goes on when the command is run again, because the Hub keeps
the large files that arrived; a commit is all or nothing; where nothing changed, nothing is sent.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, hf_hub_download
from tqdm import tqdm

from fbqat_hub.evaluation.results import read_records
from fbqat_hub.hub.client import HubError, RemoteFile, git_sha1, names, remote_files, step
from fbqat_hub.hub.contents import Item, collect, packed_config, read_json, recipe_of
from fbqat_hub.hub.manifest import CARD, MANIFEST, FileEntry, Manifest, hash_file, parse_manifest, read_manifest, serves
from fbqat_hub.hub.names import is_local, public_name, size_text
from fbqat_hub.hub.preflight import Remote, local_problems, remote_problems


@dataclass(frozen=True)
class Plan:
    """What one repository is to become.

    Attributes:
        repo: Hub id.
        items: every file, the manifest last.
        manifest: sizes and hashes of all but itself.
        remote: the repository as it is; None if it is to be made.
        remove: files of the last publication that this one no longer has.
        changed: paths that are not on the Hub as they are here.
    """

    repo: str
    items: list[Item]
    manifest: Manifest
    remote: Remote | None
    remove: list[str]
    changed: set[str]


def publish(
    run_dir: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    device_repo: bool = False,
    collection: str | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Publish a run's folder as a model on the Hub, and verify what arrived.

    Args:
        run_dir: a finished run with its card.
        repo: Hub id, owner/name.
        private: make a private repository.
        device_repo: put ``htp/`` into a repository of its own, ``<repo>-QNN-<SOC>``.
        collection: title, or slug, of a collection to add it to; a title that is new makes one.
        dry_run: do everything but the upload.
        say: is given the lines meant for the user.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the preflight found problems; each is a note of the error.
        HubError: the Hub refused or failed; says at what step and what to do.
    """
    run, api = Path(run_dir), HfApi()
    if not run.is_dir():
        raise FileNotFoundError(f"{run} is no folder; give the folder of a run.")
    items, stay, problems = collect(run, repo)
    problems += local_problems(run, items, repo.partition("/")[0])
    targets = {repo: items}
    if device_repo and not (soc := _soc_of(run)):
        problems.append(f"{run} has no HTP bundle for --device-repo. Run: fbqat export {run}")
    elif device_repo and not problems:
        targets = _divided(repo, soc, items)
    states: dict[str, Remote | None] = {}
    for target, files in targets.items():
        found, states[target] = remote_problems(api, target, recipe_of(run), {item.path for item in files}, private)
        problems += [problem for problem in found if problem not in problems]
    if problems:
        error = ValueError(f"{run} is not ready to be published; to mend:")
        for problem in problems:
            error.add_note(f"  - {problem}")
        raise error
    plans = [_plan(api, run, target, files, states[target]) for target, files in targets.items()]
    for plan in plans:
        say(_table(plan, private))
    if stay:
        say(f"stays here: {names(stay, 3)}")
    if dry_run:
        say("dry run: nothing was uploaded.")
        return
    for plan in plans:
        _upload(api, plan, private, say)
    if collection:
        slug = _collect(api, [plan.repo for plan in plans], collection, private)
        say(f"in the collection {api.endpoint}/collections/{slug}")


def manifest_of(run: Path, items: list[Item], progress: Callable[[int], object] = lambda _: None) -> Manifest:
    """The manifest of what is published of a run.

    Args:
        items: the files, as they go up.
        progress: is told the bytes that were hashed.
    """
    recipe = recipe_of(run)
    records = read_records(run / "results.json") if (run / "results.json").is_file() else []
    config = packed_config(run)
    if config is None:
        raise ValueError(f"{run / 'transformer'} is not quantized by fbqat; only packed pipelines have a manifest.")
    entries: dict[str, FileEntry] = {}
    for item in items:
        with item.open() as file:
            entries[item.path] = hash_file(file, progress)
    return Manifest(
        name=str(recipe["name"]),
        family=str(recipe["family"]),
        method=str(recipe["method"]),
        weight_bits=config.weight_bits,
        activation_bits=config.activation_bits,
        base_model=public_name(str(recipe["teacher"])),
        license=str(recipe["license"]),
        recipe=_public(recipe),
        versions=dict(records[-1].versions) if records else {"fbqat_hub": config.fbqat_version},
        provenance={
            "commands": list(dict.fromkeys(record.command for record in records)),
            "date": max((record.date for record in records), default=""),
        },
        files=entries,
    )


def _public(tree: Any) -> Any:
    """A tree of YAML as one of JSON, local paths cut to their last part."""
    if isinstance(tree, dict):
        return {str(key): _public(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_public(value) for value in tree]
    if isinstance(tree, str):
        return public_name(tree) if is_local(tree) else tree
    if tree is None or isinstance(tree, int) or (isinstance(tree, float) and math.isfinite(tree)):
        return tree
    return str(tree)  # a date, an infinity


def _soc_of(run: Path) -> str:
    """The SoC that the run's HTP bundle is for, as the certificate says; empty where there is no bundle."""
    certificate = read_json(run / "htp" / "certificate.json")
    asked = certificate.get("asked") if isinstance(certificate, dict) else None
    return str(asked.get("soc", "")) if isinstance(asked, dict) else ""


def _divided(repo: str, soc: str, items: list[Item]) -> dict[str, list[Item]]:
    """The files by repository: the pipeline's, and the HTP bundle's with a card that points to the pipeline."""
    card = ModelCard(next(item for item in items if item.path == CARD).open().read().decode())
    card.data.base_model, card.data.library_name = repo, "onnxruntime"
    card.data.model_name = card.data.eval_results = None  # measured on the pipeline
    card.data.tags = [*card.data.tags, "qnn", soc]
    card.text = f"\nThe HTP bundle of [{repo}](https://huggingface.co/{repo}); the pipeline is there.\n{card.text}"
    of_pipeline = {CARD, "model_index.json", "results.json", "training_log.jsonl"}
    device = [item for item in items if serves(item.path, "htp") and item.path not in of_pipeline]
    device += [item for item in items if item.path.startswith("images/")] + [Item(CARD, str(card).encode())]
    return {
        repo: [item for item in items if not item.path.startswith("htp/")],
        f"{repo}-QNN-{soc.upper()}": sorted(device, key=lambda item: item.path),
    }


def _plan(api: HfApi, run: Path, repo: str, items: list[Item], remote: Remote | None) -> Plan:
    with tqdm(total=sum(item.size for item in items), desc=f"hash {repo}", unit="B", unit_scale=True) as bar:
        manifest = manifest_of(run, items, bar.update)
    content = manifest.to_bytes()
    parse_manifest(content)  # what nobody could pull is not published
    items = [*items, Item(MANIFEST, content)]
    if remote is None:
        return Plan(repo, items, manifest, None, [], {item.path for item in items})
    with step(f"list the files of {repo}"):
        there = remote_files(api, repo, remote.commit)
    ours = {item.path for item in items}
    remove = [path for path in _published_before(repo, remote) if path in there and path not in ours]
    return Plan(repo, items, manifest, remote, remove, set(_differing(items, manifest, there)))


def _published_before(repo: str, remote: Remote) -> list[str]:
    """The paths in the manifest that is on the Hub now; none where it cannot be read any more."""
    if MANIFEST not in remote.files:
        return []
    with tempfile.TemporaryDirectory() as folder:
        with step(f"read {MANIFEST} of {repo}"):
            hf_hub_download(repo, MANIFEST, revision=remote.commit, local_dir=folder)
        try:
            return sorted(read_manifest(Path(folder)).files)
        except ValueError:
            return []


def _differing(items: list[Item], manifest: Manifest, there: dict[str, RemoteFile]) -> list[str]:
    """Paths of the items that a repository does not hold with this content."""
    differing = []
    for item in items:
        remote = there.get(item.path)
        if remote is None or remote.size != item.size:
            differing.append(item.path)
            continue
        with item.open() as file:
            if remote.sha256 is None:  # a small file, kept by git
                same = git_sha1(file.read()) == remote.sha1
            else:
                same = (manifest.files.get(item.path) or hash_file(file)).sha256 == remote.sha256
        if not same:
            differing.append(item.path)
    return differing


def _table(plan: Plan, private: bool) -> str:
    """What will be uploaded, a line a file."""
    if plan.remote is None:
        state = f"new{', private' if private else ''}"
    else:
        state = f"at {plan.remote.commit[:8]}{', private' if plan.remote.private else ''}"
    up = sum(item.size for item in plan.items if item.path in plan.changed)
    width = max(len(item.path) for item in plan.items)
    lines = [f"{plan.repo} ({state}): {len(plan.items)} files, {len(plan.changed)} to upload, {size_text(up)}"]
    for item in sorted(plan.items, key=lambda item: item.path):
        what = "upload" if item.path in plan.changed else "there already"
        lines.append(f"  {item.path:{width}}  {size_text(item.size):>11}  {what}")
    return "\n".join([*lines, *(f"  {path:{width}}  {'':>11}  remove" for path in plan.remove)])


def _upload(api: HfApi, plan: Plan, private: bool, say: Callable[[str], None]) -> None:
    """Make the repository if need be, commit what changed at once, and compare what is there then."""
    commit = plan.remote.commit if plan.remote else None
    if commit is None:
        with step(f"make the repository {plan.repo}"):
            api.create_repo(plan.repo, private=private)
            commit = api.model_info(plan.repo).sha
    operations: list[Any] = [
        CommitOperationAdd(item.path, item.source) for item in plan.items if item.path in plan.changed
    ]
    operations += [CommitOperationDelete(path) for path in plan.remove]
    if operations:
        with step(f"upload to {plan.repo}"):
            message = f"{plan.manifest.name} by fbqat_hub"
            commit = api.create_commit(plan.repo, operations, commit_message=message, parent_commit=commit).oid
    else:
        say(f"{plan.repo}: nothing changed, nothing uploaded")
    with step(f"verify {plan.repo}"):
        there = remote_files(api, plan.repo, commit)
    if wrong := _differing(plan.items, plan.manifest, there):
        raise HubError(f"verify {plan.repo}: the Hub does not hold {names(wrong)} as sent; run the same command again.")
    say(f"verified: {len(plan.items)} files of {api.endpoint}/{plan.repo} at {commit[:8]} are as they are here")


def _collect(api: HfApi, repos: list[str], collection: str, private: bool) -> str:
    """Add the models to a collection; returns its slug."""
    slug = collection
    with step(f"add to the collection {collection!r} (the model itself is published)"):
        if "/" not in collection:
            owner = repos[0].partition("/")[0]
            slug = api.create_collection(collection, namespace=owner, private=private, exists_ok=True).slug
        for repo in repos:
            api.add_collection_item(slug, item_id=repo, item_type="model", exists_ok=True)
    return slug
