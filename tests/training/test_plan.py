"""A plan: what it prints can be pasted, what it saves is whole, and the test split stays unseen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fbqat_hub.training import plan as planning
from fbqat_hub.training.cache import cached_splits
from fbqat_hub.training.plan import Plan, plan
from fbqat_hub.training.recipe import Recipe, load_recipe
from tests.training.conftest import NO_ATTENTION


def without_test(recipe: Recipe, pipeline: Any) -> dict[str, Any]:
    """The splits, with training pictures for validation, and no test split to look at."""
    train = cached_splits(recipe, pipeline)["train"]
    return {"train": train, "validation": train}


@pytest.fixture(scope="module")
def made(recipe_fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    """The plan of the recipe of six steps, and its folder."""
    folder = tmp_path_factory.mktemp("plan") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "cached_splits", without_test)
        return plan(Recipe(**recipe_fields), folder, progress=False), folder


def test_what_is_saved(made: tuple[Plan, Path], recipe_fields: dict[str, Any]) -> None:
    result, folder = made
    assert sorted(path.name for path in folder.iterdir()) == ["curve.png", "plan.json"]
    data = json.loads((folder / "plan.json").read_text())
    assert Recipe(**data["recipe"]) == Recipe(**recipe_fields)
    assert {point["bit_width"]: point["mean"] for point in data["curve"]} == {
        width: loss.mean for width, loss in result.curve.items()
    }
    assert list(data["layers"]) == ["feed_forward", "attention", "blocks", "all"]
    everything = data["layers"]["all"]
    assert everything["against_all"] == 0
    assert everything["removed"] == pytest.approx(1 - everything["loss"] / data["curve"][-1]["mean"])
    assert data["seconds"] == pytest.approx(6 * data["layers"]["blocks"]["seconds_per_step"])
    assert data["probe_steps"] == 6
    assert data["train_layers"] in data["advice"]
    assert {"fbqat_hub", "torch"} <= set(data["versions"])
    picture = Image.open(folder / "curve.png")
    assert (picture.format, picture.size) == ("PNG", (1050, 600))


def test_text_has_every_width_and_group(made: tuple[Plan, Path]) -> None:
    rows = {line.split()[0]: line.split() for line in made[0].text().splitlines() if line}
    for width, loss in made[0].curve.items():
        assert rows[f"{width:g}"][1] == f"{loss.mean:.5f}"
    for group, probe in made[0].probes.items():
        assert rows[group][1] == f"{probe.trained_parameters:,}"
    assert rows["Time:"][1:3] == ["6", "steps"]


def test_a_picture_that_fails_leaves_the_old_one(made: tuple[Plan, Path], tmp_path: Path, monkeypatch) -> None:
    made[0].save(tmp_path)
    before = (tmp_path / "curve.png").read_bytes()

    def stop(*arguments: Any) -> None:
        arguments[-1].write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(planning, "draw_curve", stop)
    with pytest.raises(OSError, match="No space"):
        made[0].save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.png", "plan.json"]
    assert (tmp_path / "curve.png").read_bytes() == before


def test_refused_before_anything_is_written(recipe_fields: dict[str, Any], run_folder: Path, tmp_path: Path) -> None:
    """A method without training; a teacher that is quantized already."""
    for changes, message in (
        ({"method": "ptq-mse", "steps": 0}, "method ptq-mse does not train"),
        ({"teacher": str(run_folder)}, "is quantized already"),
        ({"training": "blockwise"}, "runs end-to-end steps, and the recipe's training is blockwise"),
        (NO_ATTENTION, "nothing is trained: of the 11 layers that are quantized none is of train_layers: attention"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(Recipe(**{**recipe_fields, **changes}), tmp_path / "plan", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_what_is_from_the_hub_is_pinned_before_it_is_encoded(recipe_fields: dict[str, Any], monkeypatch) -> None:
    """As training does, whose cache it then shares."""
    pinned: dict[str, Any] = {"seed": 7}
    monkeypatch.setattr(planning, "pinned_recipe", lambda recipe: (replace(recipe, **pinned), None))

    def encoded(recipe: Recipe, _: Any) -> Any:
        assert recipe.seed == 7
        raise KeyboardInterrupt

    monkeypatch.setattr(planning, "cached_splits", encoded)
    with pytest.raises(KeyboardInterrupt):
        plan(Recipe(**recipe_fields), progress=False)


@pytest.mark.slow
def test_the_tiny_sana_that_ships() -> None:
    """GPTQ codes: loss times 21 from 8 to 4 bits, more at each step down."""
    curve = plan(load_recipe("sana-tiny", steps=2), progress=False).curve
    assert curve[8].mean == pytest.approx(1.20e-3, rel=0.05)
    assert curve[4].mean == pytest.approx(25.6e-3, rel=0.05)
    assert [curve[bits].mean for bits in sorted(curve)] == sorted((each.mean for each in curve.values()), reverse=True)
