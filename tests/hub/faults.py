"""Every fault at every step of publish and pull: what comes of it. The table of docs/publishing.md is made here.

python -m tests.hub.faults          # run all and rewrite the tables; takes minutes
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import pytest

from fbqat_hub.hub.client import ADVICE, OTHERWISE, HubError
from fbqat_hub.hub.manifest import parse_manifest
from fbqat_hub.hub.publish import publish
from fbqat_hub.hub.pull import pull, verify
from tests.hub.conftest import PUBLISHED, PUBLISHED_OF_STAGE, TOKENS, point_client_at, write_run, write_stages
from tests.hub.handler import Fault
from tests.hub.server import LoopbackHub, loopback_hub

PAGE = Path(__file__).parents[2] / "docs" / "publishing.md"
STEPS = {
    "publish": (
        "whoami", "info", "create", "validate", "preupload", "batch", "put", "lfs-verify", "commit", "tree",
    ),
    "branches": ("refs", "info", "branch", "put", "commit", "tree", "unbranch"),
    "pull": ("info", "resolve", "tree", "cdn"),
}  # fmt: skip
FAULTS: tuple[Fault, ...] = (401, 403, 404, 409, 412, 429, 500, 503, "cut", "reset", "lost", "slow")
NAMES = {
    "whoami": "check the token", "info": "look up the repository", "create": "make the repository",
    "validate": "validate the card", "preupload": "ask how to upload", "batch": "ask where to (LFS)",
    "put": "send a large file", "lfs-verify": "confirm a large file", "commit": "commit", "tree": "list the files",
    "refs": "list the branches", "branch": "make a branch", "unbranch": "remove an unfinished branch",
    "resolve": "ask for a file", "cdn": "receive a large file",
}  # fmt: skip
_OF_REPOSITORY = {"info", "preupload", "batch", "commit", "tree", "resolve", "refs", "branch", "unbranch"}
_OF_BRANCH = {"info", "branch", "commit", "unbranch"}  # what names the branch in its address


def outcome(hub: LoopbackHub, verb: str, step: str, fault: Fault, folder: Path) -> str:
    """Run a verb with one fault at one step, then, if it stopped, once more without.

    Asserts what must hold whatever the fault: an error names the step, nothing is there that looks whole and is not,
    and the second run completes.

    Returns:
        "goes on", or "stops".
    """
    repo = f"me/{verb}-{step}-{fault}"
    write_run(folder / "run", seed=100 * len(hub.repositories))
    if verb != "publish":
        publish(folder / "run", repo, say=_quiet)
    if verb == "branches":
        write_stages(folder / "run", seed=100 * len(hub.repositories))
    if verb == "branches" and step == "info":  # asked of a branch that is there
        publish(folder / "run", repo, branches=True, say=_quiet)
        write_stages(folder / "run", seed=100 * len(hub.repositories) + 50)
    hub.fail(step, fault, path=_part(verb, step, repo))
    stopped = None
    try:
        _run(verb, folder, repo)
    except HubError as error:
        stopped = str(error)
    hub.heal()
    if stopped is not None:
        assert re.match(
            r"(check the token|validate the card|look up|make|remove|list|upload|verify|download|read|me/)", stopped
        ), stopped
        _assert_not_half(hub, verb, folder, repo)
        _run(verb, folder, repo)
    assert sorted(hub.repositories[repo].files) == sorted([".gitattributes", *PUBLISHED])
    if verb == "branches":
        assert sorted(hub.repositories[repo].branches) == ["main", "w4", "w6", "w8"]
        assert_branches_are_whole(hub, folder / "run", repo)
    if verb == "pull":
        verify(str(folder / "pulled"), say=_quiet)
    return "goes on" if stopped is None else "stops"


def _part(verb: str, step: str, repo: str) -> str:
    """What the address of the request that fails holds."""
    if verb == "branches" and step in _OF_BRANCH:
        return f"{repo}/{'revision' if step == 'info' else step.removeprefix('un')}/w6"
    return repo if step in _OF_REPOSITORY else ""


def assert_branches_are_whole(hub: LoopbackHub, run: Path, repo: str) -> None:
    """A branch with the name of a width holds the denoiser of that width, whole or as it was; never another's."""
    repository = hub.repositories[repo]
    for branch in set(repository.branches) & {"w8", "w6", "w4"}:
        files = repository.files_of(branch)
        published = PUBLISHED if branch == "w4" else PUBLISHED_OF_STAGE
        assert sorted(files) == sorted([".gitattributes", *published]), branch
        config = json.loads(files["transformer/config.json"].content)["quantization_config"]
        assert config["weight_bits"] == int(branch[1:])
        manifest = parse_manifest(files["fbqat.json"].content)
        assert manifest.weight_bits == int(branch[1:])
        assert {path: each.sha256 for path, each in manifest.files.items()} == {
            path: files[path].sha256 for path in published if path != "fbqat.json"
        }


def _run(verb: str, folder: Path, repo: str) -> None:
    if verb != "pull":
        publish(folder / "run", repo, branches=verb == "branches", say=_quiet)
    else:
        pull(repo, folder / "pulled", say=_quiet)


def _assert_not_half(hub: LoopbackHub, verb: str, folder: Path, repo: str) -> None:
    if verb == "publish":
        held = set(hub.repositories[repo].files) if repo in hub.repositories else set()
        assert held <= {".gitattributes"} or held == {".gitattributes", *PUBLISHED}
    elif verb == "branches":
        assert_branches_are_whole(hub, folder / "run", repo)
    elif (folder / "pulled").exists():
        with pytest.raises((ValueError, FileNotFoundError)):
            verify(str(folder / "pulled"), say=_quiet)


def _quiet(_: str) -> None:
    """No lines for the user."""


def table(outcomes: dict[tuple[str, str, Fault], str]) -> str:
    """The outcomes as Markdown, a row per step."""
    rows = [["step", *map(str, FAULTS)], ["---"] * (len(FAULTS) + 1)]
    for verb, steps in STEPS.items():
        for step in steps:
            rows.append([f"{verb}: {NAMES[step]}", *(outcomes[verb, step, fault] for fault in FAULTS)])
    return _markdown(rows)


def advice_table() -> str:
    """What errors say to do, as Markdown, a row a status."""
    rows = [["HTTP status", "what the error says"], ["---", "---"]]
    return _markdown([*rows, *([str(status), advice] for status, advice in ADVICE.items()), ["others", OTHERWISE]])


def _markdown(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def block(name: str) -> str:
    """What stands on the page between the markers of a name."""
    found = re.search(f"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", PAGE.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def on_page() -> dict[tuple[str, str, Fault], str]:
    """The outcomes that the page's table states."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in block("faults").splitlines()[2:]]
    stated = {row[0]: row[1:] for row in cells}
    return {
        (verb, step, fault): stated[f"{verb}: {NAMES[step]}"][column]
        for verb, steps in STEPS.items()
        for step in steps
        for column, fault in enumerate(FAULTS)
    }


def main() -> None:
    """Run everything and rewrite the page's tables."""
    outcomes = {}
    with loopback_hub(TOKENS) as hub, pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as home:
        point_client_at(hub, Path(home), patch)
        for verb, steps in STEPS.items():
            for step in steps:
                for fault in FAULTS:
                    folder = Path(home, f"{verb}-{step}-{fault}")
                    outcomes[verb, step, fault] = outcome(hub, verb, step, fault, folder)
    text = PAGE.read_text()
    for name, made in {"faults": table(outcomes), "advice": advice_table()}.items():
        marked = f"<!-- {name} -->\n{made}\n<!-- /{name} -->"
        text = re.sub(f"<!-- {name} -->.*<!-- /{name} -->", lambda _, marked=marked: marked, text, flags=re.DOTALL)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
