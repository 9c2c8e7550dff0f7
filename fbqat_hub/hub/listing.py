"""What models there are: published ones by tag, downloaded ones, and runs in a folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, scan_cache_dir
from huggingface_hub.hf_api import ModelInfo

from fbqat_hub.evaluation.results import METRICS, read_records
from fbqat_hub.hub.client import card_value, step
from fbqat_hub.hub.contents import packed_config, recipe_of
from fbqat_hub.hub.manifest import MANIFEST, read_manifest
from fbqat_hub.hub.names import size_text
from fbqat_hub.text import columns

TAG = "fbqat"
# of every card; the tag that is left is the family
_EVERY_CARD = re.compile(rf"{TAG}|\d-bit|w\da\d+|quantization-aware-training")
_SHOWN = ("kd_loss", "fd_teacher", "psnr", "bits_per_weight")  # the first that was measured


@dataclass(frozen=True)
class Model:
    """A line of the list; what is not known is empty.

    Attributes:
        name: Hub id, or folder.
        where: "Hub", "private", "cache" or "run".
        family: e.g. "sana".
        bits: e.g. "W4A8".
        size: bytes; 0 if not known.
        metric: one measured number with its name.
    """

    name: str
    where: str
    family: str
    bits: str
    size: int
    metric: str


def published(author: str | None = None) -> list[Model]:
    """Models on the Hub with the tag ``fbqat``, newest first; those that the token may see.

    Args:
        author: only of this user or organization.

    Raises:
        HubError: the Hub cannot be reached or fails.
    """
    wanted = ["cardData", "tags", "private", "usedStorage"]
    with step("list the Hub's models"):
        found = HfApi().list_models(filter=TAG, author=author, sort="lastModified", expand=wanted)
        return [_of_hub(info) for info in found]


def downloaded() -> list[Model]:
    """Models in the Hub's cache that were pulled, a line a revision."""
    if not Path(constants.HF_HUB_CACHE).is_dir():
        return []
    models = []
    for repo in sorted(scan_cache_dir(constants.HF_HUB_CACHE).repos, key=lambda repo: repo.repo_id):
        for revision in repo.revisions:
            if (revision.snapshot_path / MANIFEST).is_file():
                try:
                    manifest = read_manifest(revision.snapshot_path)
                except ValueError:  # damaged, of a newer version, or a stranger's; the others are listed all the same
                    models.append(Model(repo.repo_id, "cache", "", "", revision.size_on_disk, ""))
                    continue
                bits = f"W{manifest.weight_bits}A{manifest.activation_bits}"
                metric = _measured(revision.snapshot_path)
                models.append(Model(repo.repo_id, "cache", manifest.family, bits, revision.size_on_disk, metric))
    return models


def runs(folder: Path) -> list[Model]:
    """Finished runs in the subfolders of a folder."""
    models = []
    for index in sorted(folder.glob("*/model_index.json")):
        run = index.parent
        config = packed_config(run)
        if config is not None and (run / "recipe.yaml").is_file():
            bits = f"W{config.weight_bits}A{config.activation_bits}"
            size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
            models.append(Model(str(run), "run", str(recipe_of(run).get("family", "")), bits, size, _measured(run)))
    return models


def table(models: Iterable[Model]) -> str:
    """The list as text, a line per model under a heading."""
    rows = [("model", "where", "family", "bits", "size", "measured")]
    rows += [(m.name, m.where, m.family, m.bits, size_text(m.size) if m.size else "", m.metric) for m in models]
    return columns(rows)


def _of_hub(info: ModelInfo) -> Model:
    """Of a card that anybody may have written: what is not as in ours counts for nothing."""
    given = card_value(info.card_data, "tags")
    tags = [tag for tag in given if isinstance(tag, str) and tag.isprintable()] if isinstance(given, list) else []
    bits = [tag.upper() for tag in tags if re.fullmatch(r"w\da\d+", tag)]
    family = [tag for tag in tags if not _EVERY_CARD.fullmatch(tag)]
    return Model(
        info.id,
        "private" if info.private else "Hub",
        family[0] if family else "",
        bits[0] if bits else "",
        info.used_storage or 0,
        _metric(dict(_values(card_value(info.card_data, "model-index")))),
    )


def _values(tree: Any) -> Iterator[tuple[str, float]]:
    """(type, value) of every metric in a card's model-index whose value is a number."""
    if isinstance(tree, Mapping):
        kind, value = tree.get("type"), tree.get("value")
        if isinstance(kind, str) and isinstance(value, int | float):
            yield kind, value
    for each in tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list) else ():
        yield from _values(each)


def _measured(run: Path) -> str:
    """The number shown of a folder's results; empty where nothing was measured or the file is broken."""
    try:
        records = read_records(run / "results.json")
    except (OSError, ValueError):
        return ""
    method = recipe_of(run).get("method")
    return _metric({record.metric: record.value for record in records if record.method == method})


def _metric(values: Mapping[str, Any]) -> str:
    return next((f"{METRICS[name].title} {values[name]:.4g}" for name in _SHOWN if name in values), "")
