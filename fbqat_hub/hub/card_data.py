"""What a card says beside what was measured: the base model's licence, whom to name, what to know before use.

A data file is YAML; those of the base models that this project has recipes for ship as ``model_cards/NAME.yaml``. A run
keeps its own as ``card.yaml``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from fbqat_hub.checked import Text, checked
from fbqat_hub.config import unknown_key_error
from fbqat_hub.files import shipped, whole
from fbqat_hub.hub.names import public_name
from fbqat_hub.untrusted import read_yaml

SHIPPED = shipped("model_cards")
FILE = "card.yaml"
UNKNOWN = "unknown"
_Line = Annotated[str, Field(strict=True, description="text")]


@checked("card data")
class CardData:
    """Data of a card; every field may be left out.

    Attributes:
        license: the base model's, as its page on the Hub has it: apache-2.0, other, ...
        license_name: where license is "other", which the Hub then asks for.
        license_link: address of its text.
        dataset_license: of the training data, where it is known.
        attribution: who must be named, of base model and data.
        notes: title -> what there is to say besides, e.g. of the access to the base model.
    """

    license: _Line = UNKNOWN
    license_name: _Line = ""
    license_link: _Line = ""
    dataset_license: _Line = ""
    attribution: _Line = ""
    notes: Annotated[dict[Text, Text], Field(description="a mapping of titles to texts")] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.license == "other" and not (self.license_name and self.license_link):
            raise ValueError("card data: license is other; the Hub then asks for license_name and license_link too.")

    def save(self, path: Path) -> None:
        """Write the fields that say something, as YAML."""
        said = {name: value for name, value in vars(self).items() if value}
        with whole(path) as partial:
            partial.write_text(yaml.safe_dump(said, sort_keys=False, allow_unicode=True), encoding="utf-8")


def read_card_data(path: Path) -> CardData:
    """The data in a file; what it says of a model of the zoo (base_model, recipe, repo) is another matter.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no mapping, has an unknown key (the nearest is named) or a value that is not allowed.
    """
    return _of(_mapping(path), path.name)


def shipped_data(base_model: str) -> CardData | None:
    """The data that ships for a base model; None if there is none.

    Args:
        base_model: Hub id, or the name by which a recipe calls a teacher that ships.
    """
    for path in sorted(SHIPPED.glob("*.yaml")):
        if (data := _mapping(path)).get("base_model") == base_model:
            return _of(data, path.name)
    return None


def data_of_run(run: Path, recipe: Mapping[str, Any], given: Path | None = None) -> CardData:
    """The data for a run's card: of the file ``given``, of the run's own, of its base model, or of an old recipe.

    Where nothing is found, the licence is unknown.

    Args:
        recipe: the run's.
        given: file that replaces what the run has.
    """
    if given is not None:
        return read_card_data(given)
    if (run / FILE).is_file():
        return read_card_data(run / FILE)
    of_recipe = {item.name: recipe[item.name] for item in fields(CardData) if recipe.get(item.name)}
    if of_recipe:  # saved by fbqat_hub 0.1, whose recipes had these fields
        return _of(of_recipe, "recipe.yaml")
    return shipped_data(public_name(str(recipe.get("teacher")))) or CardData()


def _of(data: Mapping[str, Any], name: str) -> CardData:
    known = [item.name for item in fields(CardData)]
    if unknown := set(map(str, data)) - {*known, "base_model", "recipe", "repo"}:
        raise unknown_key_error(name, unknown, known)
    return CardData(**{key: value for key, value in data.items() if key in known})


def _mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give a YAML file with license, license_link, attribution.")
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path} is not a mapping of keys to values, such as license: apache-2.0.")
    return data
