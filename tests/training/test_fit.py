"""``--fit``: what is written fits, and hardly anything is left over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fbqat_hub.cli import main
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.quantization import PackedLayer, named_layers
from fbqat_hub.training.costs import costs
from fbqat_hub.training.distill import train
from fbqat_hub.training.fit import Fit, fitted, other_bytes, packed_size
from fbqat_hub.training.ptq import convert_pipeline
from fbqat_hub.training.recipe import Recipe, load_recipe


def stored(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def widths(folder: Path) -> set[int]:
    return {layer.weight_bits for _, layer in named_layers(load_pipeline(folder).transformer, PackedLayer)}


@pytest.mark.parametrize("name", ["sana", *(pytest.param(each, marks=pytest.mark.slow) for each in ("sd3", "flux"))])
@pytest.mark.parametrize("text_encoders", [None, "w8a8"])
def test_a_converted_pipeline_fits(name, text_encoders, teacher_of, tmp_path: Path) -> None:
    source = str(teacher_of(name))
    for number, bits in enumerate((4.0, 6.0)):
        recipe = Recipe(name="r", family=name, teacher=source, method="ptq-mse")
        size = other_bytes(source, text_encoders) + packed_size(recipe).at(bits) + 8000
        folder = convert_pipeline(source, tmp_path / str(number), text_encoders=text_encoders, fit=Fit(size))
        assert widths(folder) == ({4} if bits == 4 else {4, 8})
        assert stored(folder) <= size
        assert load_recipe(folder / "recipe.yaml").quantization.average_bits == pytest.approx(bits, abs=0.01)


@pytest.mark.parametrize("text_encoders", [None, "w8a8"])
def test_hardly_anything_is_left_over(text_encoders, tmp_path: Path) -> None:
    for size in (6_500_000, 7_000_000):
        folder = convert_pipeline(
            "fbqat-hub/sana-tiny-openmoji", tmp_path / str(size), text_encoders=text_encoders, fit=Fit(size)
        )
        assert 0.97 * size < stored(folder) <= size


def test_a_denoiser_alone(tiny_sana: Path, half_sana: Path, tmp_path: Path) -> None:
    for number, source in enumerate((tiny_sana, half_sana)):
        at_4 = stored(convert_pipeline(str(source), tmp_path / f"4-{number}") / "transformer")
        size = int(1.4 * at_4) + 8000
        folder = convert_pipeline(str(source), tmp_path / f"out-{number}", fit=Fit(size, denoiser_only=True))
        assert at_4 < stored(folder / "transformer") <= size


def test_room_for_8_bits_everywhere_is_not_filled(tiny_sana: Path, tmp_path: Path) -> None:
    folder = convert_pipeline(str(tiny_sana), tmp_path / "out", fit=Fit(10**9))
    assert widths(folder) == {8}
    assert load_recipe(folder / "recipe.yaml").quantization.average_bits == 8


def test_a_trained_pipeline_fits(recipe_fields: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe(**{**recipe_fields, "steps": 2, "text_encoders": "w8a8"})
    others = other_bytes(recipe.teacher, "w8a8")
    size = others + 8000 + packed_size(recipe).at(5.0)
    found = fitted(recipe, Fit(size))
    assert found.quantization.average_bits == pytest.approx(5.0, abs=0.01)
    run = train(found, tmp_path / "run", progress=False)
    assert widths(run) == {4, 8}
    parts = [path for path in run.rglob("*") if path.is_file() and path.name != "training_log.jsonl"]
    assert 0.85 * size < sum(path.stat().st_size for path in parts) <= size


def test_a_real_base_needs_its_configs_only() -> None:
    recipe = load_recipe("flux-schnell")
    found = fitted(recipe, Fit.parse("transformer=7.5GB"))
    assert 4.9 < found.quantization.average_bits < 5.1
    assert costs(found).packed <= 7.5e9
    whole = fitted(load_recipe("flux-schnell", text_encoders="w8a8"), Fit.parse("14GB"))
    assert 13.8e9 < costs(whole).output <= 14e9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fit", "6"], "'6' is no size; write e.g. 6GB"),
        (["--fit", "0GB"], "'0GB' is no size"),
        (["--fit", "9" * 400 + "GB"], "999 is no size"),
        (["--fit", "vae=1GB"], "transformer=3GB for its denoiser alone"),
        (["--fit", "0.1MB"], "do not hold the pipeline: its denoiser takes"),
        (["--fit", "0.1MB"], "or quantize the text encoders too (w8a8, say)"),
        (
            ["--fit", "transformer=0.03MB"],
            "0.03MB do not hold the denoiser, which takes 0.04MB at 4 bits. Give at least 0.05MB",
        ),
        (["--fit", "6GB", "--average-bits", "4.5"], "fit finds the average, so leave one of them out"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    arguments: list[str], words: str, tiny_sana: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(tiny_sana), "--output", str(tmp_path / "out"), *arguments]) != 0
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_recipe_with_widths_of_its_own_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    uniform = "quantization.average_bits=null"
    for change in ("quantization.weight_bits=3", "method=fbqat-paper"):
        assert main(["plan", "sana-tiny", "--fit", "6GB", "--set", uniform, change]) != 0
        assert "--fit chooses from widths of 4 and 8 bits" in capsys.readouterr().err


def test_the_plan_says_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "sana-tiny", "--fit", "6GB"]) == 0  # the recipe's own is 4.5
    assert "--fit: quantization.average_bits=8\n" in capsys.readouterr().out
