"""`export_run`: what is asked for is checked before any work, and an error says what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fbqat_hub import export_run as module
from fbqat_hub.export import ExportError
from fbqat_hub.export.bundle.export import export_bundle
from fbqat_hub.export.htp.targets import TARGETS
from fbqat_hub.export_run import export_run
from fbqat_hub.quantization.packed import PackedLayer

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"soc": "sm9999"}, f"unknown soc 'sm9999'; known: {', '.join(sorted(TARGETS))}"),
    ({"soc": ["sm8750", "sm8750"]}, f"soc is sm8750, sm8750; give one or more of: {', '.join(sorted(TARGETS))}"),
    ({"graphs": 0}, "graphs is 0; give 1 or more"),
    ({"graphs": 1.5}, "graphs is 1.5; give 1 or more"),
    ({"prompts": "a heart"}, "prompts is 'a heart'; give a list of texts"),
    ({"prompts": ["a", None]}, "prompts is ['a', None]; give a list of texts"),
    ({"prompts": ["a", "b"], "pictures": 3}, "pictures is 3; give 1 to 2, as many as there are prompts"),
    ({"pictures": -1}, "pictures is -1; give 1 or more"),
    ({"tune": -1}, "tune is -1; give a number of steps, e.g. 100, or 0 for none"),
    ({"tune": 9, "graphs": 2}, "tune is 9 and graphs is 2; only a model in one graph can be tuned"),
    ({"target_db": 30.0}, "target_db is 30, and precision is w4a8; a target is for precision auto only"),
    ({"precision": "auto", "target_db": 14.0}, "target_db is 14; allowed: 15 to 60"),
    ({"precision": "auto", "target_db": float("nan")}, "target_db is nan; allowed: 15 to 60"),
    (
        {"precision": "auto", "samples": 1},
        "samples is 1; precision auto chooses bits on inputs that set no ranges, so give 2 or more",
    ),
    ({"precision": "w3a8"}, "unknown precision 'w3a8'; known: w4a8, w4a16, w8a8, w8a16, auto"),
]


def never(*_: Any, **__: Any) -> Any:
    pytest.fail("work was begun before what was asked for was checked")


@pytest.mark.parametrize(("options", "says"), WRONG, ids=lambda value: str(value)[:25])
def test_before_a_pipeline_is_loaded(
    options: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("load_pipeline", "recipe_of_run", "export_data", "export_bundle"):
        monkeypatch.setattr(module, name, never)
    with pytest.raises(ExportError) as caught:
        export_run(tmp_path, tmp_path / "out", **options)
    assert str(caught.value) == says
    assert not list(tmp_path.iterdir())


def test_a_float_pipeline_is_to_be_quantized_first(
    tiny_sana: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_pipeline", never)
    with pytest.raises(ExportError, match=r"is in full precision; quantize it first: fbqat convert /.* --output"):
        export_run(tiny_sana, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_tuning_needs_data_and_a_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_pipeline", never)
    monkeypatch.setattr(module, "check_source", lambda _: None)
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(ExportError, match=r"tuning needs .* of a recipe, and prompts were given; .* leave out --tune"):
        export_run(run, tmp_path / "out", tune=5, prompts=["a", "b"])
    with pytest.raises(ExportError, match=r"there is no recipe\.yaml"):
        export_run(run, tmp_path / "out", tune=5)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_tuning_draws_of_the_training_split_towards_the_float_teacher(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime_qnn")
    given: dict[str, Any] = {}
    monkeypatch.setattr(module, "export_bundle", lambda _pipeline, _output, **options: given.update(options))
    export_run(run_folder, tmp_path / "out", pictures=1)
    assert given["tuning"] is None
    export_run(run_folder, tmp_path / "out", pictures=1, tune=7)
    tuning = given["tuning"]
    assert (tuning.steps, tuning.seed) == (7, module.recipe_of_run(run_folder / "recipe.yaml").seed)
    assert not any(isinstance(layer, PackedLayer) for layer in tuning.teacher.modules())
    first, again, other = (tuning.draw(number)["hidden_states"] for number in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    held_out = [item["hidden_states"] for item in given["held_out"]]
    assert not any(torch.equal(tuning.draw(number)["hidden_states"], item) for number in range(9) for item in held_out)
    assert tuning.predicted(tuning.draw(0)).shape == first.shape


def test_the_output_folder_comes_first_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "recipe_of_run", never)
    monkeypatch.setattr(module, "load_pipeline", never)
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ExportError, match="exists and is not empty"):
        export_run(tmp_path / "run", tmp_path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"a16": ["proj_out", "nosuch"]}, "'nosuch' matches no layer of the model; there are e.g. patch_embed.proj, "),
        ({"graphs": 3}, "3 graphs were asked for; the model has 2 blocks, so give 1 to 2"),
    ],
)
def test_what_needs_the_model_before_data_is_encoded_or_anything_is_traced(
    options: dict[str, Any], says: str, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime_qnn")
    monkeypatch.setattr(module, "export_data", never)
    with pytest.raises(ExportError, match=says):
        export_run(run_folder, tmp_path / "out", **options)
    pipeline = module.load_pipeline(run_folder)
    monkeypatch.setattr("fbqat_hub.export.bundle.export.generate", never)
    with pytest.raises(ExportError, match=says):
        export_bundle(pipeline, tmp_path / "out", prompts=["a", "b"], call={}, **options)
    assert not list(tmp_path.iterdir())


def test_a_tile_that_does_not_suit_the_picture_before_data_is_encoded(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime_qnn")
    monkeypatch.setattr(module, "export_data", never)
    with pytest.raises(ExportError, match="decoder_tile is 7; a latent of this decoder is 8 pixels"):
        export_run(run_folder, tmp_path / "out", decoder_tile=7)
    assert not list(tmp_path.iterdir())
