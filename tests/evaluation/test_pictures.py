"""Layout of the pictures: what stands where, and that wrong input is named."""

from pathlib import Path

import pytest
from PIL import Image

from fbqat_hub.evaluation.pictures import comparison_sheet, grid, training_curve, widths_picture


def solid(*colours: str) -> list[Image.Image]:
    return [Image.new("RGB", (64, 64), colour) for colour in colours]


def test_a_grid_goes_row_by_row() -> None:
    sheet = grid(solid("red", "lime", "blue"), columns=2, tile=32, gap=4)
    assert sheet.size == (2 * 36 + 4, 2 * 36 + 4)
    centres = [sheet.getpixel(place) for place in ((20, 20), (56, 20), (20, 56), (56, 56))]
    assert centres == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]


@pytest.mark.parametrize(("count", "columns", "says"), [(0, 2, "empty"), (1, 0, "at least 1")])
def test_a_grid_refuses_nothing(count: int, columns: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        grid(solid(*["red"] * count), columns)


def test_a_sheet_has_a_column_a_model_a_row_a_prompt_and_labels() -> None:
    tile = 96
    sheet = comparison_sheet({"teacher": solid("red", "lime"), "W4A8": solid("blue", "black")}, ["one", "two"], tile)
    places = {}
    for x in range(0, sheet.width, 4):
        for y in range(0, sheet.height, 4):
            places.setdefault(sheet.getpixel((x, y)), (x, y))
    first = {name: places[colour] for name, colour in
             {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}.items()}  # fmt: skip
    assert first["red"][0] == first["lime"][0] < first["blue"][0] == first["black"][0]
    assert first["red"][1] == first["blue"][1] < first["lime"][1] == first["black"][1]
    left = sheet.crop((0, first["red"][1], first["red"][0] - 4, sheet.height)).convert("L")
    head = sheet.crop((first["red"][0], 0, sheet.width, first["red"][1] - 4)).convert("L")
    assert left.getextrema()[0] < 160
    assert head.getextrema()[0] < 100


def test_a_long_prompt_stays_inside_its_row() -> None:
    prompt = "flag of a country with an uncommonly long and winding official name " * 3
    short, long = (comparison_sheet({"teacher": solid("red")}, [text]) for text in ("x", prompt))
    assert short.size == long.size


@pytest.mark.parametrize(
    ("columns", "prompts", "says"),
    [
        ({}, ["a"], "at least one column"),
        ({"t": []}, [], "one prompt"),
        ({"t": solid("red")}, ["a", "b"], "'t' has 1 pictures for 2"),
    ],
)
def test_a_sheet_refuses_what_does_not_fit(columns: dict, prompts: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        comparison_sheet(columns, prompts)


@pytest.mark.parametrize("extra", [{}, {"bit_width": 4.25}, {"validation_loss": 0.2}])
def test_a_curve_is_drawn_from_whatever_was_logged(tmp_path: Path, extra: dict) -> None:
    pytest.importorskip("matplotlib")
    log = [
        {"step": step, "loss": 1 / (step + 1), **{k: v * (1 + step % 2) for k, v in extra.items()}}
        for step in range(20)
    ]
    path = training_curve(log, tmp_path / "curve.png")
    assert Image.open(path).width >= 1000
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("log", "says"), [([], "empty"), ([{"step": 1, "loss": 1.0}, {"step": 2}], "Entry 1")])
def test_a_curve_refuses_a_broken_log(tmp_path: Path, log: list, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        training_curve(log, tmp_path / "curve.png")
    assert not any(tmp_path.iterdir())


def test_a_layer_of_more_bits_has_another_colour_in_its_row_and_column(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    layers = {f"blocks.{block}.{name}": 4 for block in range(6) for name in ("to_q", "to_k")} | {"proj_out": 4}

    def orange(widths: dict[str, int]) -> set[tuple[int, int]]:
        picture = Image.open(widths_picture({"tiny": widths}, tmp_path / "widths.png")).convert("RGB")
        found = {
            (x, y)
            for x in range(picture.width)
            for y in range(picture.height - 60)  # without the legend
            if picture.getpixel((x, y)) == (209, 103, 31)
        }
        assert picture.width > picture.height
        return found

    assert not orange(layers)
    first, last = orange(layers | {"blocks.1.to_q": 8}), orange(layers | {"blocks.4.to_k": 8})
    assert max(x for x, _ in first) < min(x for x, _ in last)
    assert max(y for _, y in last) < min(y for _, y in first)


def test_no_widths_are_refused(tmp_path: Path) -> None:
    for models in ({}, {"tiny": {}}):
        with pytest.raises(ValueError, match="No widths to draw"):
            widths_picture(models, tmp_path / "widths.png")
