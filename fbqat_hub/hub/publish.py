"""Publish a run: everything checked first, one commit, then the Hub's own list compared with what was sent.

A stage of the run can be a branch: it is made under another name, and gets its own when it is whole. Nothing is kept on
disk between attempts. A cut upload goes on when the command is run again, because the Hub keeps the large files that
arrived; a commit is all or nothing; where nothing changed, nothing is sent.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, hf_hub_download

from fbqat_hub.evaluation.results import read_records
from fbqat_hub.hub.card_data import UNKNOWN
from fbqat_hub.hub.client import HubError, RemoteFile, git_sha1, remote_files, step
from fbqat_hub.hub.contents import Item, collect, packed_config, private_things, recipe_of
from fbqat_hub.hub.manifest import CARD, MANIFEST, FileEntry, Manifest, hash_file, parse_manifest, read_manifest, serves
from fbqat_hub.hub.names import is_local, public_name, size_text
from fbqat_hub.hub.preflight import (
    Remote,
    branch_problems,
    branches_of,
    licence_of,
    local_problems,
    remote_problems,
    remote_state,
)
from fbqat_hub.hub.tables import htp_certificates
from fbqat_hub.progress import Progress
from fbqat_hub.stages import branch_name, stages_of
from fbqat_hub.text import names

MAIN = "main"
_UNFINISHED = "-unfinished"


@dataclass(frozen=True)
class Target:
    """A branch that is to hold something.

    Attributes:
        repo: Hub id.
        branch: "main", or the name of a bit width.
        folder: where the denoiser, its card and its results are: the run, or a stage of it.
        items: every file but the manifest.
    """

    repo: str
    branch: str
    folder: Path
    items: list[Item]

    def __str__(self) -> str:
        return self.repo if self.branch == MAIN else f"{self.repo}, branch {self.branch}"


@dataclass(frozen=True)
class Plan:
    """What one branch of a repository is to become.

    Attributes:
        target: the branch.
        items: every file, a run's manifest last.
        name: of what is published, for the commit's message.
        hashes: path -> size and hash of the files, but of the manifest.
        remote: the branch as it is; None if it is to be made.
        remove: files of the last publication, or of what it starts from, that this one does not have.
        changed: paths that are not on the Hub as they are here.
        leftover: True if an unfinished attempt at this branch is there.
    """

    target: Target
    items: list[Item]
    name: str
    hashes: Mapping[str, FileEntry]
    remote: Remote | None
    remove: list[str]
    changed: set[str]
    leftover: bool = False


def publish(
    run_dir: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    device_repo: bool = False,
    collection: str | None = None,
    branches: bool = False,
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
        branches: after main, a branch for each stage that the run kept (w8, w6), and for its own width (w4).
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
    problems += local_problems(run, items)
    targets = [Target(repo, MAIN, run, items)]
    if device_repo and not (soc := _soc_of(run)):
        problems.append(f"{run} has no HTP bundle for --device-repo. Run: fbqat export {quote(str(run))}")
    elif device_repo and not problems:
        targets = [Target(name, MAIN, run, files) for name, files in _divided(repo, soc, items).items()]
    if branches:
        of_stages, found = _of_stages(run, targets[0])
        targets += of_stages
        problems += found
    every = list(dict.fromkeys(item for target in targets for item in target.items))
    problems += private_things(every, repo.partition("/")[0])
    states, leftovers, found = _states(api, run, targets, private)
    problems += found
    refuse(run, problems)
    with Progress(f"hash {repo}", sum(item.size for item in every), "B") as bar:
        hashes = hashes_of(every, bar.update)
    plans: list[Plan] = []
    for target, state in zip(targets, states, strict=True):
        base = None if target.branch == MAIN else plans[0]
        plans.append(_plan(api, run, target, state, hashes, base, target.branch in leftovers))
    for plan in plans:
        say(table(plan, private))
    if stay:
        say(f"stays here: {names(stay, 3)}")
    if dry_run:
        say("dry run: nothing was uploaded.")
        return
    of_main = [upload(api, plan, private, say) for plan in plans if plan.target.branch == MAIN]
    for plan in plans:
        if plan.target.branch != MAIN:
            _upload_branch(api, plan, of_main[0], say)
    if collection:
        repos = [plan.target.repo for plan in plans if plan.target.branch == MAIN]
        slug = _collect(api, repos, collection, private)
        say(f"in the collection {api.endpoint}/collections/{slug}")


def refuse(folder: Path, problems: Iterable[str]) -> None:
    """Raise ValueError with each problem as a note, once: what is wrong with a recipe is so on every branch."""
    if problems := list(dict.fromkeys(problems)):
        error = ValueError(f"{folder} is not ready to be published; to mend:")
        for problem in problems:
            error.add_note(f"  - {problem}")
        raise error


def _of_stages(run: Path, main: Target) -> tuple[list[Target], list[str]]:
    """A branch for every stage and one, of main's content, for the run's own width; what is wrong with the stages."""
    stages, config = stages_of(run), packed_config(run)
    if not stages:
        return [], [f"{run} kept no stages for --branches; a recipe keeps them with keep_stages: [8, 6]."]
    targets, problems = [], []
    for bits, folder in stages.items():
        items, _, found = collect(run, main.repo, bits)
        problems += found + local_problems(run, items, bits)
        targets.append(Target(main.repo, branch_name(bits), folder, items))
    if config is not None:
        targets.append(Target(main.repo, branch_name(config.weight_bits), run, main.items))
    return targets, problems


def _states(
    api: HfApi, run: Path, targets: list[Target], private: bool
) -> tuple[list[Remote | None], set[str], list[str]]:
    """Every branch as it is, the branches with an unfinished attempt, and what the Hub would refuse."""
    states: list[Remote | None] = []
    problems: list[str] = []
    there: set[str] = set()
    for target in targets:
        state = None
        if target.branch == MAIN:
            found, state = remote_problems(api, target.repo, recipe_of(run), _licence(run), target.items, private)
            problems += found
        elif states[0] is not None:
            there = there or branches_of(api, target.repo)
            if target.branch in there and (state := remote_state(api, target.repo, target.branch)):
                problems += branch_problems(target.repo, target.branch, state)
        states.append(state)
    leftovers = {target.branch for target in targets if target.branch + _UNFINISHED in there}
    return states, leftovers, problems


def hashes_of(items: list[Item], progress: Callable[[int], object] = lambda _: None) -> dict[Item, FileEntry]:
    """Size and SHA-256 of files; ``progress`` is told the bytes that were hashed."""
    hashes = {}
    for item in items:
        with item.open() as file:
            hashes[item] = hash_file(file, progress)
    return hashes


def _licence(run: Path) -> str:
    """Of the base model; unknown where the card's data cannot be read, of which the preflight tells."""
    found = licence_of(run)
    return UNKNOWN if found is None else found


def manifest_of(run: Path, folder: Path, items: list[Item], hashes: Mapping[Item, FileEntry]) -> Manifest:
    """The manifest of what is published of a run, or of a stage of it.

    Args:
        folder: where the denoiser and its results are: the run, or the stage.
        items: the files, as they go up.
        hashes: of them at least.
    """
    recipe, results = recipe_of(run), folder / "results.json"
    records = read_records(results) if results.is_file() else []
    config = packed_config(folder)
    if config is None:
        raise ValueError(f"{folder / 'transformer'} is not quantized by fbqat; only packed pipelines have a manifest.")
    return Manifest(
        name=str(recipe["name"]),
        family=str(recipe["family"]),
        method=str(recipe["method"]),
        weight_bits=config.weight_bits,
        activation_bits=config.activation_bits,
        base_model=public_name(str(recipe["teacher"])),
        license=_licence(run),
        recipe=_public(recipe),
        versions=dict(records[-1].versions) if records else {"fbqat_hub": config.fbqat_version},
        provenance={
            "commands": list(dict.fromkeys(record.command for record in records)),
            "date": max((record.date for record in records), default=""),
        },
        files={item.path: hashes[item] for item in items},
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
    """The SoCs that the run's HTP bundles are for, joined by "-", as their certificates say; empty without a bundle."""
    asked = [each.get("asked") for each in htp_certificates(run)]
    return "-".join(str(each.get("soc", "")) for each in asked if isinstance(each, dict))


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


def _plan(
    api: HfApi,
    run: Path,
    target: Target,
    remote: Remote | None,
    hashes: Mapping[Item, FileEntry],
    base: Plan | None,
    leftover: bool,
) -> Plan:
    """``base`` is what a new branch starts from; None for a new repository."""
    manifest = manifest_of(run, target.folder, target.items, hashes)
    content = manifest.to_bytes()
    parse_manifest(content)  # what nobody could pull is not published
    items = [*target.items, Item(MANIFEST, content)]
    ours = {item.path for item in items}
    if remote is None:
        held = set(base.items) if base else set()
        changed = {item.path for item in items if item not in held}
        remove = sorted({item.path for item in held} - ours)
        return Plan(target, items, manifest.name, manifest.files, None, remove, changed, leftover)
    with step(f"list the files of {target}"):
        there = remote_files(api, target.repo, remote.commit)
    remove = [path for path in _published_before(target.repo, remote) if path in there and path not in ours]
    changed = set(differing(items, manifest.files, there))
    return Plan(target, items, manifest.name, manifest.files, remote, remove, changed, leftover)


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


def differing(items: list[Item], hashes: Mapping[str, FileEntry], there: dict[str, RemoteFile]) -> list[str]:
    """Paths of the items that a repository does not hold with this content.

    Args:
        hashes: path -> of files that need not be read again.
        there: the repository.
    """
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
                same = (hashes.get(item.path) or hash_file(file)).sha256 == remote.sha256
        if not same:
            differing.append(item.path)
    return differing


def table(plan: Plan, private: bool) -> str:
    """What will be uploaded, a line a file; of a branch what differs from what it starts from or holds."""
    if plan.remote is None:
        state = f"new{', private' if private else ''}"
    else:
        state = f"at {plan.remote.commit[:8]}{', private' if plan.remote.private else ''}"
    up = sum(item.size for item in plan.items if item.path in plan.changed)
    width = max(len(item.path) for item in plan.items)
    lines = [f"{plan.target} ({state}): {len(plan.items)} files, {len(plan.changed)} to upload, {size_text(up)}"]
    for item in sorted(plan.items, key=lambda item: item.path):
        what = "upload" if item.path in plan.changed else "there already"
        if item.path in plan.changed or plan.target.branch == MAIN:
            lines.append(f"  {item.path:{width}}  {size_text(item.size):>11}  {what}")
    return "\n".join([*lines, *(f"  {path:{width}}  {'':>11}  remove" for path in plan.remove)])


def upload(api: HfApi, plan: Plan, private: bool, say: Callable[[str], None]) -> str:
    """Make the repository if need be, commit what changed at once, and compare what is there then; the commit."""
    repo, commit = plan.target.repo, plan.remote.commit if plan.remote else None
    if commit is None:
        with step(f"make the repository {repo}"):
            api.create_repo(repo, private=private)
            commit = api.model_info(repo).sha
    return _commit(api, plan, MAIN, commit, say)


def _upload_branch(api: HfApi, plan: Plan, main: str, say: Callable[[str], None]) -> None:
    """The same for a branch. A new one starts from main under another name, and has its own when it is verified: a
    branch of 6 bits must never hold, however shortly, what main does."""
    repo, branch = plan.target.repo, plan.target.branch
    unfinished = branch + _UNFINISHED
    if plan.leftover:
        with step(f"remove the branch {unfinished} of {repo}"):
            api.delete_branch(repo, branch=unfinished)
    if plan.remote is not None:
        _commit(api, plan, branch, plan.remote.commit, say)
        return
    with step(f"make the branch {unfinished} of {repo}"):
        api.create_branch(repo, branch=unfinished, revision=main)
    commit = _commit(api, plan, unfinished, main, say)
    with step(f"make the branch {branch} of {repo}"):
        api.create_branch(repo, branch=branch, revision=commit)
    with step(f"remove the branch {unfinished} of {repo}"):
        api.delete_branch(repo, branch=unfinished)


def _commit(api: HfApi, plan: Plan, branch: str, parent: str, say: Callable[[str], None]) -> str:
    """One commit on a branch whose newest is ``parent``, if anything changed, verified; the branch's newest then."""
    target, commit = plan.target, parent
    operations: list[Any] = [
        CommitOperationAdd(item.path, item.source) for item in plan.items if item.path in plan.changed
    ]
    operations += [CommitOperationDelete(path) for path in plan.remove]
    if operations:
        with step(f"upload to {target}"):
            message = f"{plan.name} by fbqat_hub"
            commit = api.create_commit(
                target.repo, operations, commit_message=message, revision=branch, parent_commit=parent
            ).oid
    elif plan.remote is not None:
        say(f"{target}: nothing changed, nothing uploaded")
    with step(f"verify {target}"):
        there = remote_files(api, target.repo, commit)
    if wrong := differing(plan.items, plan.hashes, there):
        raise HubError(f"verify {target}: the Hub does not hold {names(wrong)} as sent; run the same command again.")
    say(f"verified: {len(plan.items)} files of {api.endpoint}/{target} at {commit[:8]} are as they are here")
    return commit


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
