"""The GPU benchmark, end to end on a CPU: rows, what is skipped and why, the table; and what it says without a card."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import speed_gpu
from tests.conftest import ROOT, subprocess_environment


def _fails(model: Any, recipe: Any) -> Any:
    raise RuntimeError("no such\n  kernel")


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """Both parts of a tiny model by four ways, two of which cannot be measured."""
    arguments = [
        "--device",
        "cpu",
        "--small",
        "--sizes",
        "64",
        "--batches",
        "1",
        "--rounds",
        "1",
        "--output",
        "rows.json",
        "--models",
    ]
    ways = {way.name: way for way in speed_gpu.WAYS}
    with pytest.MonkeyPatch.context() as patch:
        missing = speed_gpu.Way("missing", "none", "no-such-package", _fails)
        broken = speed_gpu.Way("broken", "none", "", _fails)
        patch.setattr(speed_gpu, "WAYS", (ways["bf16"], ways["this project"], missing, broken))
        found = speed_gpu.measure(speed_gpu.parsed([*arguments, "tiny Sana"]))
    return json.loads(json.dumps(found))


def test_every_way_is_measured_or_says_why_not(record: dict[str, Any]) -> None:
    assert record.keys() == {"command", "date", "machine", "versions", "device", "rounds", "rows"}
    by_way: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        by_way.setdefault(row["way"], []).append(row)
    assert [row["skipped"] for row in by_way["missing"]] == ["no-such-package is not installed"]
    assert [row["skipped"] for row in by_way["broken"]] == ["RuntimeError: no such kernel"]
    for way in ("bf16", "this project"):
        steps = [row for row in by_way[way] if row["part"] == "step"]
        assert [(row["mode"], row["pixels"], row["batch"]) for row in steps] == [("eager", 64, 1), ("compiled", 64, 1)]
        assert all(row["ms_low"] <= row["ms"] <= row["ms_high"] for row in by_way[way])
        shapes = [(row["tokens"], row["in"], row["out"]) for row in by_way[way] if row["part"] == "gemm"]
        assert len(set(shapes)) == len(shapes) > 3


def test_the_table_is_made_of_the_rows(record: dict[str, Any], tmp_path: Path) -> None:
    assert "**Not measured.**" in speed_gpu.speed_gpu_table(tmp_path / "none.json")
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(record))
    table = speed_gpu.speed_gpu_table(path)
    (row,) = (row for row in record["rows"] if (row["way"], row.get("mode")) == ("this project", "eager"))
    assert f"{row['ms']:.1f} ms" in table
    assert "- missing: no-such-package is not installed (tiny Sana)" in table
    assert len([line for line in table.splitlines() if line.startswith("| tiny Sana | 64 px | 1 |")]) == 2


def test_our_way_packs_what_the_recipe_packs() -> None:
    from fbqat_hub.quantization import PackedLayer, named_layers

    harness = speed_gpu.Harness("cpu", 1, small=True)
    recipe, _, model = harness.model("tiny Sana")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    packed = speed_gpu._ours(model, recipe)
    assert len(dict(named_layers(packed, PackedLayer))) > 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so() -> None:
    command = [sys.executable, "-m", "benchmarks.speed_gpu"]
    done = subprocess.run(command, cwd=ROOT, env=subprocess_environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("no GPU: torch")


def test_the_tracked_results_are_of_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--device", "cpu"], ["--small"]):
        with pytest.raises(SystemExit):
            speed_gpu.parsed(options)
        assert "give --output FILE" in capsys.readouterr().err


def test_the_models_are_bases_of_recipes() -> None:
    """Built without numbers, at every size that is measured."""
    from fbqat_hub.training.bases import build_on_meta, configs_of
    from fbqat_hub.training.footprint import denoiser_arguments
    from fbqat_hub.training.recipe import load_recipe

    for name, changes, _ in speed_gpu.MODELS.values():
        recipe = load_recipe(name)
        configs = configs_of(recipe.teacher)
        model = build_on_meta({**configs["transformer"], **changes})
        assert all(model.config[key] == value for key, value in changes.items())
        assert denoiser_arguments(recipe, configs, 2)
