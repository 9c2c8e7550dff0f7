"""Everything that can be known to be wrong before a byte is uploaded, found in one go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import yaml
from huggingface_hub import HfApi, ModelCard, get_token, metadata_load
from huggingface_hub.errors import RepositoryNotFoundError

from fbqat_hub.components import read_index
from fbqat_hub.evaluation.results import read_records
from fbqat_hub.hub.card_data import UNKNOWN, data_of_run
from fbqat_hub.hub.client import GIT_ATTRIBUTES, card_value, step, whoami
from fbqat_hub.hub.contents import Item, packed_config, recipe_of
from fbqat_hub.hub.manifest import CARD, MANIFEST
from fbqat_hub.hub.names import public_name, repo_problem
from fbqat_hub.stages import find_stage
from fbqat_hub.text import names

_MAX_FILE = 50 * 10**9  # what huggingface_hub downloads over plain HTTP; a larger file needs hf_xet at every reader
_CARD_KEYS = ("license", "base_model", "base_model_relation", "library_name", "pipeline_tag", "tags")
# under these a gated base model may be passed on without a copy of further terms
_OPEN = frozenset({"apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0", "bsd-3-clause"})


class Remote(NamedTuple):
    """A repository, or a branch of it, as it is now: newest commit, the files there, whether it is private."""

    commit: str
    files: frozenset[str]
    private: bool


def remote_state(api: HfApi, repo: str, revision: str | None = None) -> Remote | None:
    """The repository on the Hub, None if there is none that the token may see."""
    with step(f"look up {repo}" + (f", branch {revision}" if revision else "")):
        try:
            info = api.model_info(repo, revision=revision)
        except RepositoryNotFoundError:
            return None
        return Remote(info.sha, frozenset(file.rfilename for file in info.siblings or ()), bool(info.private))


def branches_of(api: HfApi, repo: str) -> set[str]:
    """The names of a repository's branches."""
    with step(f"list the branches of {repo}"):
        return {branch.name for branch in api.list_repo_refs(repo).branches}


def local_problems(run: Path, items: list[Item], stage: int | None = None) -> list[str]:
    """What is wrong with the files: layout, card, licence, sizes. One line each, with what to do.

    Args:
        items: what is to be published.
        stage: the bit width of the run's stage that they are of; None for the run's own.
    """
    paths = {item.path for item in items}
    folder = run if stage is None else find_stage(run, stage)
    named = quote(str(run))
    card = f"card {named}" if stage is None else f"evaluate {named} --stage {stage} ; fbqat card {named}"
    made = {"model_index.json": "train or convert", CARD: card, "recipe.yaml": "train or convert"}
    missing = [
        f"{(folder if name == CARD else run) / name} is missing. Run: fbqat {verb}"
        for name, verb in made.items()
        if name not in paths
    ]
    if missing:
        return missing
    return [
        *_component_problems(run, folder),
        *_card_problems(folder / CARD, run),
        *_recipe_problems(run, recipe_of(run), paths),
        *_results_problems(folder / "results.json"),
        *size_problems(items),
    ]


def branch_problems(repo: str, branch: str, state: Remote) -> Iterator[str]:
    """Why a branch that is there may not be changed."""
    if MANIFEST not in state.files:
        yield f"branch {branch} of {repo} exists and was not published by fbqat; rename or delete it."


def remote_problems(
    api: HfApi, repo: str, recipe: Mapping[str, Any], licence: str, items: list[Item], private: bool
) -> tuple[list[str], Remote | None]:
    """What the Hub would refuse, or should not be done there: token, name, card, base model.

    Args:
        repo: Hub id to publish as.
        recipe: the run's.
        licence: of the base model, as the card's data say.
        items: files that go up.
        private: whether a private repository is asked for.

    Returns:
        (one line a problem, the repository as it is).

    Raises:
        HubError: the Hub cannot be reached or fails.
    """
    problems, is_answered = account_problems(api, repo)
    if not is_answered:
        return problems, None
    mend = "It comes from recipe.yaml (teacher, lora, dataset) and card.yaml (license): mend these, run fbqat card."
    problems += hub_card_problems(repo, items, mend)
    problems += _base_problems(api, recipe, licence, {item.path for item in items})
    state = remote_state(api, repo)
    if state is not None:
        if state.files - {GIT_ATTRIBUTES, CARD} and MANIFEST not in state.files:
            held = names(sorted(state.files))
            problems.append(f"{repo} exists and was not published by fbqat ({held}); choose another name.")
        problems += privacy_problems(repo, state, private)
    return problems, state


def account_problems(api: HfApi, repo: str) -> tuple[list[str], bool]:
    """Why this token may not publish as ``repo``, and whether the Hub could be asked.

    Raises:
        HubError: the Hub cannot be reached or fails.
    """
    if problem := repo_problem(repo):
        return [problem], False
    if not get_token():
        return ["no token: log in with `hf auth login`, or set HF_TOKEN, with a token that may write."], False
    return list(_scope_problems(whoami(api), repo)), True


def privacy_problems(repo: str, state: Remote, private: bool) -> list[str]:
    """Why a repository that is there cannot become private."""
    if private and not state.private:
        return [f"{repo} is public already; make it private in its settings first, or leave --private out."]
    return []


def _component_problems(run: Path, folder: Path) -> Iterator[str]:
    """Args: ``folder`` is where the denoiser is, the run or a stage of it."""
    if packed_config(folder) is None:
        yield f"{folder / 'transformer'} is not quantized by fbqat; publish what fbqat train or fbqat convert made."
    try:
        components = read_index(run)[1]
    except ValueError as error:
        yield str(error)
        return
    for name, component in components.items():
        try:
            (replace(component, folder=folder / name) if name == "transformer" else component).check()
        except ValueError as error:
            yield str(error)


def _card_problems(card: Path, run: Path) -> Iterator[str]:
    remedy = f"Run: fbqat card {quote(str(run))}"
    try:
        front = metadata_load(card) or {}
    except (ValueError, yaml.YAMLError) as error:
        yield f"{card}: the front matter is no YAML ({' '.join(str(error).split())[:100]}). {remedy}"
        return
    if lacking := [key for key in _CARD_KEYS if not front.get(key)]:
        yield f"{card}: the front matter lacks {', '.join(lacking)}. {remedy}"
    if front.get("base_model_relation", "quantized") != "quantized":
        yield f"{card}: base_model_relation is {front['base_model_relation']!r}; it must be quantized. {remedy}"
    if "fbqat" not in (front.get("tags") or ["fbqat"]):
        yield f"{card}: tags lack fbqat, by which `fbqat list` finds the model. {remedy}"
    try:
        ModelCard.load(card)
    except ValueError as error:
        yield f"{card}: {' '.join(str(error).split())[:100]}. {remedy}"
    given = licence_of(run)
    if given and front.get("license") and front["license"] != given:
        yield f"{card}: license is {front['license']!r}, and the card's data say {given!r}. {remedy}"


def licence_of(run: Path) -> str | None:
    """Of the base model, as the card's data say; None where they cannot be read, which `_recipe_problems` tells."""
    try:
        return data_of_run(run, recipe_of(run)).license
    except ValueError:
        return None


def hub_card_problems(repo: str, items: Iterable[Item], mend: str) -> list[str]:
    """What the Hub says against the card's front matter; it would say so once the repository is made.

    Args:
        mend: what to do then.

    Raises:
        HubError: the Hub cannot be reached or fails.
    """
    text = next((item.open().read().decode(errors="replace") for item in items if item.path == CARD), "")
    try:
        card = ModelCard(text)
    except (ValueError, yaml.YAMLError):
        text = ""
    if not text:
        return []  # that the card is missing or broken is told of the file
    with step("validate the card"):
        try:
            card.validate()
        except ValueError as error:
            said = " ".join(str(error).split()).rstrip(".")[:300]
            return [f"the Hub does not take the front matter of {repo}'s {CARD}: {said}. {mend}"]
    return []


def _recipe_problems(run: Path, recipe: Mapping[str, Any], paths: set[str]) -> Iterator[str]:
    """What the recipe lacks, and what the base model's licence asks for."""
    if lacking := [key for key in ("name", "family", "teacher", "method") if not recipe.get(key)]:
        yield f"recipe.yaml lacks {', '.join(lacking)}; it must be the recipe that the run was made with."
    try:
        licence = data_of_run(run, recipe).license
    except ValueError as error:
        yield f"{error} {_card_remedy(run)}"
        return
    if licence == UNKNOWN:
        yield f"the base model's licence is unknown. {_card_remedy(run)}"
    elif "-nd" in licence:
        yield f"the base model's licence {licence} forbids passing on changed versions; a quantized model is one."
    if licence == "other" and not _has_licence_text(paths):
        yield "license is other: such licences ask for a copy of their text; put it beside recipe.yaml as LICENSE.md."


def _card_remedy(run: Path) -> str:
    return (
        "Write `license:` as the base model's page has it (apache-2.0, other, ...) into a YAML file, then: "
        f"fbqat card {quote(str(run))} --data FILE.yaml"
    )


def _results_problems(results: Path) -> Iterator[str]:
    try:
        if results.is_file():
            read_records(results)
    except ValueError as error:
        yield str(error)


def size_problems(items: list[Item]) -> Iterator[str]:
    """What is too large for the Hub or its readers, and what is empty."""
    for item in items:
        if item.size > _MAX_FILE:
            yield f"{item.path} has {item.size / 1e9:.1f} GB; the limit is 50: save it in shards (max_shard_size)."
        elif item.size == 0:
            yield f"{item.path} is empty; make it again, or remove it."


def _scope_problems(user: Mapping[str, Any], repo: str) -> Iterator[str]:
    """Whether the token may write to the owner's repositories, by what whoami says of it."""
    owner = repo.partition("/")[0]
    organisations = {each["name"]: each.get("roleInOrg") for each in user.get("orgs", ())}
    if owner != user["name"] and owner not in organisations:
        own = names([user["name"], *organisations])
        yield f"--repo {repo}: the token is of {user['name']}, who may publish under: {own}."
    elif organisations.get(owner) == "read":
        yield f"--repo {repo}: {user['name']} may only read in {owner}; ask an administrator for the write role."
    token = user.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        yield "the token may only read; make one that may write at https://huggingface.co/settings/tokens."
    elif token.get("role") == "fineGrained":
        scopes = token.get("fineGrained", {}).get("scoped", ())
        allowed = {each["entity"]["name"] for each in scopes if "repo.write" in each.get("permissions", ())}
        if not allowed & {owner, repo}:
            yield f"the fine-grained token has no write permission (repo.write) for {owner}; add it, or use another."


def _base_problems(api: HfApi, recipe: Mapping[str, Any], given: str, paths: set[str]) -> Iterator[str]:
    """What the base model's own page says against the licence that is given; nothing where it is not on the Hub."""
    base = public_name(str(recipe.get("teacher", "")))
    if base.count("/") != 1:
        return
    with step(f"look up the base model {base}"):
        try:
            info = api.model_info(base)
        except RepositoryNotFoundError:
            return
    licence = card_value(info.card_data, "license")
    if licence and licence != given:
        yield f"the card's data say license {given!r}; the base model's page says {licence!r}: write that."
    if info.gated and licence not in _OPEN and not _has_licence_text(paths):
        yield f"{base} is gated with licence {licence!r}: put the licence's text beside recipe.yaml as LICENSE.md."


def _has_licence_text(paths: set[str]) -> bool:
    return any(path.upper().startswith(("LICENSE", "LICENCE")) for path in paths)
