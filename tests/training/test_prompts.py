"""Prompt sets: OpenMoji in full, the Hub's on small files of their layouts."""

import io
import json
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from fbqat_hub.training import prompts
from fbqat_hub.training.captioned import load_pictures
from fbqat_hub.training.dataset import check_dataset
from fbqat_hub.training.pictures import picture_of
from fbqat_hub.training.prompts import PROMPT_SETS, load_prompts

COLOURS = {"aa": (255, 0, 0), "bb": (0, 255, 0), "cc": (0, 0, 255)}
TABLES = {
    "mjhq-30k": {key: {"category": "art", "prompt": f"prompt {key}"} for key in COLOURS},
    "pixart-eval-30k": [{"path": f"pixart-eval30K/{key}.png", "prompt": f"prompt {key} "} for key in COLOURS],
    "ye-pop": {
        f"row {key}": {"filename": f"{key}.jpg", "cogvlm_caption": f"prompt {key}", "url": "x"} for key in COLOURS
    },
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Tables and zips in place of downloads; which were asked for."""
    asked = []

    def download(repo: str, path: str, repo_type: str) -> str:
        assert repo_type == "dataset"
        asked.append((repo, path))
        name = next(name for name, source in PROMPT_SETS.items() if source and source.repo == repo)
        file = tmp_path / Path(path).name
        if path.endswith(".json"):
            file.write_text(json.dumps(TABLES[name]))
        else:
            with zipfile.ZipFile(file, "w") as archive:
                archive.mkdir("imgs/")
                for key, colour in COLOURS.items():
                    data = io.BytesIO()
                    Image.new("RGB", (8, 6), colour).save(data, "PNG")
                    archive.writestr(f"imgs/art/{key}.jpg", data.getvalue())
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return asked


@pytest.mark.parametrize("name", TABLES)
def test_prompts_come_without_their_pictures_unless_asked(name: str, hub) -> None:
    source = PROMPT_SETS[name]
    rows = load_prompts(name)
    assert rows.column_names == ["prompt"]
    assert sorted(rows["prompt"]) == ["prompt aa", "prompt bb", "prompt cc"]
    assert hub == [(source.repo, source.table)]

    pictures = load_prompts(name, 2, images=True)
    assert pictures.column_names == ["prompt", "image"]
    assert list(pictures["prompt"]) == list(rows["prompt"])[:2]
    assert [picture_of(row["image"], "row").getpixel((0, 0)) for row in pictures] == [
        COLOURS[prompt.split()[1]] for prompt in pictures["prompt"]
    ]
    assert hub[1:] == [(source.repo, source.table), (source.repo, source.archive)]


def test_openmoji_is_its_test_split_in_an_order_of_the_seed() -> None:
    rows = load_prompts("openmoji", images=True)
    assert rows.column_names == ["prompt", "image"]
    assert len(rows) == len(set(rows["prompt"])) > 80
    assert rows[0]["image"].size == (64, 64)
    few = load_prompts("openmoji", 5)
    assert few.column_names == ["prompt"]
    assert list(few["prompt"]) == list(rows["prompt"])[:5]
    assert list(load_prompts("openmoji", 5, seed=1)["prompt"]) != list(few["prompt"])
    assert len(load_prompts("openmoji", 10**6)) == len(rows)


def test_wrong_requests_are_named(hub) -> None:
    with pytest.raises(ValueError, match=r"unknown prompts 'mjhq'. Did you mean 'mjhq-30k'\? Known: openmoji, mjhq"):
        load_prompts("mjhq")
    with pytest.raises(ValueError, match="0 prompts of openmoji"):
        load_prompts("openmoji", 0)


def test_a_table_of_another_layout_is_named(hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLES, "mjhq-30k", {"aa": {"category": "art", "text": "x"}})
    with pytest.raises(ValueError, match=r"playgroundai/MJHQ-30K: .*meta_data.json has category, text, but not prompt"):
        load_prompts("mjhq-30k")


def test_offline_names_the_repository_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"prompts ye-pop are on the Hub .Ejafa/ye-pop: 87 MB.*--prompts openmoji"):
        load_prompts("ye-pop")


def test_shard_without_the_picture_is_named(hub, tmp_path: Path) -> None:
    load_prompts("mjhq-30k", images=True)
    with pytest.raises(ValueError, match=r"mjhq30k_imgs.zip has no picture 'dd'"):
        list(prompts._with_pictures(str(tmp_path / "mjhq30k_imgs.zip"), [[("p", "dd")]]))


def test_a_prompt_set_is_a_recipes_data(hub) -> None:
    data = load_pictures({"path": "ye-pop"}, 8)
    assert {split: data[split].num_rows for split in data} == {"train": 1, "validation": 1, "test": 1}
    rows = {row["caption"]: row["image"] for split in data.values() for row in split}
    assert {caption: picture_of(picture, "row").getpixel((0, 0)) for caption, picture in rows.items()} == {
        f"prompt {key}": colour for key, colour in COLOURS.items()
    }
    with pytest.raises(ValueError, match=r"unknown key in recipe.dataset \(ye-pop\): 'cuont' \(did you mean 'count'"):
        check_dataset({"path": "ye-pop", "cuont": 2})
