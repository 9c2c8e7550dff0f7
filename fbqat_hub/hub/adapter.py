"""Publish an adapter (LoRA) for a base that is on the Hub: checked first, one commit, verified after.

What `fbqat lora train` leaves and `fbqat lora check --card` adds to: the weights, peft's configuration where it has
one, the card, the check's figures and its pictures. The card names the base by its Hub id, and its code loads both from
the Hub.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from shlex import quote

import yaml
from huggingface_hub import HfApi, ModelCard

from fbqat_hub.hub.client import GIT_ATTRIBUTES, remote_files, step
from fbqat_hub.hub.contents import Item, private_things
from fbqat_hub.hub.manifest import CARD
from fbqat_hub.hub.names import is_local, repo_problem
from fbqat_hub.hub.preflight import account_problems, hub_card_problems, privacy_problems, remote_state, size_problems
from fbqat_hub.hub.publish import MAIN, Plan, Target, differing, hashes_of, refuse, table, upload
from fbqat_hub.text import names
from fbqat_hub.weights import check_finite, read_header

# the names that diffusers and peft give an adapter's file
DIFFUSERS_FILE, PEFT_FILE, PEFT_CONFIG = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
)
_BESIDE = re.compile(r"(?i)(README\.md|adapter_config\.json|lora-check\.json|LICENSE[^/]*|[^/]*\.(png|jpe?g))")


def publish_adapter(
    adapter: str | Path,
    repo: str,
    *,
    base: str | None = None,
    private: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Publish the folder of an adapter as a model on the Hub, and verify what arrived.

    Args:
        adapter: folder with ``pytorch_lora_weights.safetensors``, or peft's two files, and its card, README.md.
        repo: Hub id, owner/name.
        base: Hub id of the 4-bit pipeline that it is for; None for the one that the card names.
        private: make a private repository.
        dry_run: do everything but the upload.
        say: is given the lines meant for the user.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it is not ready; each problem is a note of the error.
        HubError: the Hub refused or failed; says at what step and what to do.
    """
    folder, api = Path(adapter), HfApi()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give that of an adapter.")
    items, stay, problems = _collect(folder, repo, base)
    problems += [*size_problems(items), *private_things(items, repo.partition("/")[0])]
    found, is_answered = account_problems(api, repo)
    problems += found
    state = None
    if is_answered:
        problems += hub_card_problems(repo, items, f"Mend {folder / CARD}.")
        problems += _base_problems(api, items)
        state = remote_state(api, repo)
        if state is not None:
            others = state.files - {GIT_ATTRIBUTES, CARD} - {item.path for item in items}
            if others:
                problems.append(f"{repo} exists and holds other files ({names(sorted(others))}); choose another name.")
            problems += privacy_problems(repo, state, private)
    refuse(folder, problems)
    hashes = {item.path: entry for item, entry in hashes_of(items).items()}
    changed = set(hashes)
    if state is not None:
        with step(f"list the files of {repo}"):
            changed = set(differing(items, hashes, remote_files(api, repo, state.commit)))
    plan = Plan(Target(repo, MAIN, folder, items), items, "Adapter", hashes, state, [], changed)
    for line in table(plan, private).splitlines():
        say(line)
    if stay:
        say(f"stays here: {names(stay, 3)}")
    if dry_run:
        say("dry run: nothing was uploaded.")
        return
    upload(api, plan, private, say)


def _collect(folder: Path, repo: str, base: str | None) -> tuple[list[Item], list[str], list[str]]:
    """What is published, what stays, and what is wrong with it."""
    problems: list[str] = []
    here = sorted(path for path in folder.iterdir() if path.is_file() and not path.is_symlink())
    weights = next((folder / name for name in (DIFFUSERS_FILE, PEFT_FILE) if (folder / name).is_file()), None)
    if weights is None:
        problems.append(f"{folder} has no {DIFFUSERS_FILE}, nor {PEFT_FILE}: it is the folder of no adapter.")
    else:
        problems += _weight_problems(weights)
    items, stay = [], []
    for path in here:
        if path.name == CARD:
            continue
        if path == weights or _BESIDE.fullmatch(path.name):
            items.append(Item(path.name, path))
        else:
            stay.append(path.name)
    if (folder / CARD).is_file():
        found, card = _card(folder / CARD, repo, base)
        problems += found
        items.append(Item(CARD, card.encode()))
    else:
        check = f"fbqat lora check {quote(str(folder))} --base BASE --card"
        problems.append(f"{folder / CARD} is missing. Run: {check}")
    return items, stay, problems


def _weight_problems(weights: Path) -> list[str]:
    try:
        if not any(".lora" in name.lower() or "lora_" in name.lower() for name in read_header(weights)):
            return [f"{weights} has no tensor of an adapter (LoRA)."]
        check_finite(weights)
    except ValueError as error:
        return [str(error)]
    if weights.name == PEFT_FILE and not (weights.parent / PEFT_CONFIG).is_file():
        return [f"{weights.parent} has {PEFT_FILE} without {PEFT_CONFIG}, which peft needs to load it."]
    return []


def _card(path: Path, repo: str, base: str | None) -> tuple[list[str], str]:
    """The card as it goes up, and what is wrong with it."""
    try:
        card = ModelCard(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        return [f"{path}: {' '.join(str(error).split())[:200]}"], ""
    named = base or card.data.base_model
    if not isinstance(named, str) or is_local(named) or named.count("/") != 1:
        return [f"{path} names no base on the Hub; publish the base first, and give --base owner/name."], ""
    if problem := repo_problem(named):
        return [problem.replace("--repo", "--base", 1)], ""
    card.data.base_model, card.data.base_model_relation = named, "adapter"
    text = re.sub(r'(DiffusionPipeline\.from_pretrained\()"[^"]*"', rf'\1"{named}"', card.text)
    card.text = text.replace('"ADAPTER"', f'"{repo}"')
    return [], str(card)


def _base_problems(api: HfApi, items: list[Item]) -> list[str]:
    """The base must be where the card says it is."""
    text = next((item.source for item in items if item.path == CARD), b"")
    base = ModelCard(text.decode()).data.base_model if isinstance(text, bytes) and text else None
    if base and remote_state(api, base) is None:
        return [f"the base {base} is not on the Hub, or the token may not see it; publish it first: fbqat publish"]
    return []
