"""The zoo's cards: made from their files, honest about what was not run, valid on the Hub, with links that hold."""

from __future__ import annotations

import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from markdown_it import MarkdownIt

from fbqat_hub.hub.card import write_card
from fbqat_hub.training.recipe import load_recipe
from model_cards import __main__ as zoo
from tests.conftest import TRAINED

NAMES = zoo.models()
CARDS = {name: zoo.ROOT / name / "README.md" for name in NAMES}
# https://huggingface.co/docs/hub/repositories-licenses, those that our bases have
LICENSES = {"apache-2.0", "cc-by-sa-4.0", "openrail++", "other"}


class Page(HTMLParser):
    """Links, pictures, tables and the first code block of a rendered card."""

    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.pictures: list[tuple[str, str]] = []
        self.columns: list[list[int]] = []  # cells of each row of each table
        self.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "a":
            self.links.append(given["href"] or "")
        elif tag == "img":
            self.pictures.append((given["src"] or "", given["alt"] or ""))
        elif tag == "table":
            self.columns.append([])
        elif tag == "tr":
            self.columns[-1].append(0)
        elif tag in ("td", "th"):
            self.columns[-1][-1] += 1


def test_the_zoo_has_every_family_with_a_tiny_teacher_tiny_and_real() -> None:
    kinds = {(load_recipe(name).family, name.endswith("-tiny")) for name in NAMES}
    assert kinds >= {(family, tiny) for family in TRAINED for tiny in (True, False)}


@pytest.mark.parametrize("name", NAMES)
def test_the_tracked_card_is_what_its_files_say(name: str) -> None:
    assert CARDS[name].read_text() == zoo.zoo_card(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_front_matter_is_valid_on_the_hub(name: str) -> None:
    card, recipe = ModelCard.load(CARDS[name]), load_recipe(name)
    data = card.data.to_dict()
    validate_repo_id(data["base_model"])
    assert data["base_model"] == recipe.teacher
    assert (data["base_model_relation"], data["library_name"], data["pipeline_tag"]) == (
        "quantized",
        "diffusers",
        "text-to-image",
    )
    assert {"fbqat", "4-bit", recipe.family} <= set(data["tags"])
    assert data["license"] in LICENSES
    assert (data["license"] == "other") == ("license_name" in data)
    assert data["license_link"].startswith("https://")
    assert all(isinstance(each, str) for each in data["datasets"])


@pytest.mark.parametrize("name", NAMES)
def test_a_number_is_there_only_if_it_was_measured(name: str) -> None:
    text = CARDS[name].read_text()
    measured = (zoo.ROOT / name / "results.json").is_file()
    assert ("**Not yet run.**" in text) != measured
    assert ("## Results" in text) == measured
    assert ("model-index:" in text.split("\n---\n")[0]) == measured
    assert f"fbqat train {name} --output runs/{name}" in text
    assert "| HTP context binary on a phone | any Snapdragon | never run |" in text
    if not measured:
        assert "| Training and evaluation | anywhere | never run |" in text
        assert " MiB" not in text
        assert "±" not in text


@pytest.mark.parametrize("name", NAMES)
def test_links_pictures_and_tables_of_the_rendered_card(name: str) -> None:
    page = Page(ModelCard.load(CARDS[name]).content.split("\n---\n", 1)[1])
    for link in (*page.links, *(source for source, _ in page.pictures)):
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.scheme == "https", link
            assert "." in parts.netloc, link
        else:
            assert (CARDS[name].parent / unquote(parts.path)).is_file(), link
    assert all(alternative for _, alternative in page.pictures)
    assert page.columns
    assert all(len(set(rows)) == 1 and len(rows) > 1 for rows in page.columns)


def test_a_run_of_another_recipe_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for file in ("recipe.yaml", "results.json"):
        shutil.copy(zoo.ROOT / "sana-tiny" / file, tmp_path / "run")
    with pytest.raises(ValueError, match="is a run of Sana-tiny-OpenMoji-FBQAT-W4A8, not of the recipe sd3-tiny"):
        zoo.collect("sd3-tiny", tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"model_cards/sdxl\.yaml is missing; models: flux-dev, "):
        zoo.collect("sdxl", tmp_path / "run")


def test_what_is_taken_over_is_the_runs_card_but_for_the_weights(tmp_path: Path, monkeypatch) -> None:
    run = shutil.copytree(zoo.ROOT / "sana-tiny", tmp_path / "run")
    (run / "model_index.json").write_text("{}")
    (run / "vae").mkdir()
    (run / "vae" / "config.json").write_text("{}")
    (run / "vae" / "vae.safetensors").write_bytes(bytes(2**20))
    shutil.copy(zoo.ROOT / "sana-tiny.yaml", tmp_path)
    monkeypatch.setattr(zoo, "ROOT", tmp_path)
    zoo.collect("sana-tiny", run)
    assert not list((tmp_path / "sana-tiny").rglob("*.safetensors"))
    text = zoo.zoo_card("sana-tiny")
    assert "| `vae/` | 1.00 MiB | diffusers, CPU or GPU |" in text
    results = text[text.index("## Results") : text.index("## Files")]
    assert results in write_card(run).read_text()


def test_an_unnamed_other_licence_is_refused(tmp_path: Path) -> None:
    for file in ("recipe.yaml", "results.json"):
        shutil.copy(zoo.ROOT / "sana-tiny" / file, tmp_path)
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "license": "other"}))
    with pytest.raises(ValueError, match="the Hub then asks for license_name and license_link"):
        write_card(tmp_path)
