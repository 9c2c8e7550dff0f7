"""What a run costs before it is paid for."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.training_memory import RESULTS
from fbqat_hub.cli.settings import changes_of
from fbqat_hub.training.advice import advice, block_advice, on_device, on_one_device
from fbqat_hub.training.costs import Costs, costs
from fbqat_hub.training.costs_report import report
from fbqat_hub.training.gpus import RESERVE, Gpus
from fbqat_hub.training.method import Schedule
from fbqat_hub.training.recipe import Recipe, load_recipe
from tests.training.conftest import NO_ATTENTION


@pytest.fixture(scope="module")
def sana() -> Costs:
    return costs(load_recipe("sana-600m", gradient_checkpointing=False))


def test_disk_is_computed(sana: Costs) -> None:
    assert sana.embeddings == (300 * 2304 + 300) * 2  # bf16, and a mask
    assert sana.latents == 32 * 16 * 16 * 2
    assert sana.pictures == 48_000
    assert sana.download == pytest.approx(2 * (2.614e9 + 0.312e9 + 0.592e9), rel=1e-3)
    # 4 bits per weight, and what is not quantized or packed in float32
    assert sana.output == pytest.approx(0.59e9 * 0.5 + 2 * 2.927e9, rel=0.05)
    weights = sana.memory.student + sana.memory.frozen
    assert sana.checkpoints == 3 * (weights + sana.memory.optimizer)


def test_what_does_not_fit_is_said_with_what_to_change(recipe_fields: dict[str, Any]) -> None:
    """Settings that there are, one after the other; what it says fits, fits."""
    found = costs(Recipe(**recipe_fields | {"batch_size": 32, "mixed_precision": "bf16"}))
    gpus = Gpus(1, RESERVE + (found.memory_of_one.peak + found.memory.peak) // 3)
    tried = advice(found, gpus)
    assert tried[0][0] == "gradient_checkpointing=true"
    assert re.fullmatch(r"micro_batch_size=\d+", tried[-1][0])
    assert on_device(found, gpus) > gpus.budget >= on_device(tried[-1][1], gpus)
    text = report(found, gpus, None)
    assert "it does not fit. On each, it needs" in text
    assert "\n  --set gradient_checkpointing=true: " in text
    assert text.endswith("it fits.")
    assert "it fits. On each, it needs" in report(tried[-1][1], gpus, None)


def test_all_that_there_is_to_change_is_tried(recipe_fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Costs, "encoding", 0)  # nothing is advised where not even that fits
    tried = advice(costs(Recipe(**recipe_fields)), Gpus(1, RESERVE + 1))
    assert [change for change, _ in tried] == [
        "gradient_checkpointing=true",
        "mixed_precision=bf16",
        "optimizer.moment_bits=8",
        "train_layers=attention micro_batch_size=1",
    ]
    assert [found.recipe.optimizer.moment_bits for _, found in tried] == [32, 32, 8, 8]


def test_what_cannot_fit_says_so(recipe_fields: dict[str, Any]) -> None:
    found = costs(Recipe(**recipe_fields))
    text = report(found, Gpus(8, RESERVE + found.memory.teacher), None)
    assert "\nEnd to end no setting makes it fit" in text
    assert "\nWith --set training=blockwise mixed_precision=bf16 batch_size=4:\n" in text
    assert f"\n  fbqat convert {found.recipe.teacher} --output " in text


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"quantization": {"group_size": 2}}, "batch_size=4 blockwise.tuning_steps=0"),
        (
            {"method": "fbqat-paper", "steps": 30, "keep_stages": [8]},
            "batch_size=4 keep_stages=[]",
        ),
        ({"blockwise": {"tuning_steps": 0}, "quantization": {"group_size": 2}}, "batch_size=4"),
    ],
)
def test_block_by_block_is_advised_with_what_it_allows(
    changes: dict[str, Any], settings: str, recipe_fields: dict[str, Any], tmp_path: Path
) -> None:
    found = costs(Recipe(**recipe_fields | changes))
    text = report(found, Gpus(1, RESERVE + found.memory.teacher), None)
    assert f"\nWith --set training=blockwise mixed_precision=bf16 {settings}:\n" in text
    found.recipe.save(tmp_path / "recipe.yaml")
    load_recipe(tmp_path / "recipe.yaml", training="blockwise", mixed_precision="bf16", **changes_of(settings.split()))


def test_what_cannot_go_block_by_block_keeps_its_report(recipe_fields: dict[str, Any]) -> None:
    falling = {"method": "fbqat-paper", "steps": 30, "blockwise": {"steps": 1}}  # too few to come to 4 bits
    found = costs(Recipe(**recipe_fields | falling))
    text = report(found, Gpus(1, RESERVE + found.memory.teacher), None)
    assert "\nNor block by block: recipe: schedule.stages" in text
    assert f"\n  fbqat convert {found.recipe.teacher} --output " in text


def test_measured_steps_of_some_blocks_stand_for_all() -> None:
    (row,) = (row for row in json.loads(RESULTS.read_text()) if row["name"] == "flux-blockwise")
    recipe = load_recipe("flux-schnell", training="blockwise", batch_size=4)
    found = costs(recipe)
    assert found.blocks.count == row["share"] * 3 == 57
    hours = row["seconds_per_step"] * row["share"] * 4 * recipe.blockwise.steps / 3600
    assert f"all samples of all blocks at that pace are {hours:,.0f} hours" in report(found, None, None)


def test_devices_that_share_out_layers_keep_their_part_and_some_blocks(recipe_fields: dict[str, Any]) -> None:
    found = costs(Recipe(**recipe_fields | {"batch_size": 8, "micro_batch_size": 1}))
    memory = found.memory
    # in parts teacher and student share no tensor: each has what is not trained
    kept = memory.teacher + 2 * memory.student + 2 * memory.frozen + memory.optimizer
    assert memory.teacher + memory.frozen >= 4 * found.parameters["transformer"]
    one, four = (replace(found, devices=devices).shared_out for devices in (1, 4))
    assert one - four == kept - -(-kept // 4)
    assert memory.activations < one - kept < memory.activations + 5 * memory.teacher
    text = report(found, Gpus(4, RESERVE + found.encoding), None)
    assert "\nWith every layer shared out to the 4, by FSDP2, it " in text
    assert "--num_processes 4 -m fbqat_hub.cli train RECIPE \\\n" in text
    assert "  --output runs/RECIPE --set gradient_checkpointing=true mixed_precision=bf16" in text
    average = replace(found.recipe, quantization=replace(found.recipe.quantization, average_bits=4.5))
    mixed, uniform = costs(average), costs(found.recipe)
    assert report(mixed, Gpus(4, RESERVE + found.encoding), None).count("by FSDP2") == 1
    assert mixed.starting - uniform.starting == found.parameters["transformer"] // 2  # codes to choose widths with
    falling = Schedule(stages=[(8.0, 1.0), (4.0, 1.0)])
    several = replace(found.recipe, schedule=falling, initialization="nearest")
    assert "FSDP2" not in report(costs(several), Gpus(4, RESERVE + found.encoding), None)


def test_block_by_block_takes_the_memory_of_a_block(recipe_fields: dict[str, Any]) -> None:
    recipe = Recipe(**recipe_fields | {"training": "blockwise", "blockwise": {"samples": 64, "tuning_steps": 0}})
    found, more = costs(recipe), costs(replace(recipe, blockwise=replace(recipe.blockwise, samples=128)))
    block = found.blocks
    assert block.name == "transformer_blocks.0"
    # masters, gradients and two moments of one of two blocks; end to end it is those of both, and the teacher
    assert block.block < (found.memory.student + found.memory.optimizer + found.memory.peak) / 2
    assert block.block > 2 * found.memory.student
    assert more.blocks.kept == 2 * block.kept
    assert found.checkpoints == found.packed  # the finished blocks
    assert found.packed < found.memory.student
    text = report(found, Gpus.parse("1x24GB"), None)
    assert "a step of the largest block, transformer_blocks.0" in text
    assert "the tuning of scales" not in text
    assert text.endswith("1x24GB: block by block it fits one of them.")
    mixed = costs(replace(recipe, quantization=replace(recipe.quantization, average_bits=4.5)))
    assert "Time: 100 steps of 4 for each of 2 blocks; give --seconds-per-step, of one block, for the hours." in text
    assert "Time: 100 steps of 9 s for each of 2 blocks are 0:30:00, without encoding" in report(found, None, 9.0)
    line = "the student's codes, to choose widths (average_bits)"
    assert line in report(mixed, None, None)
    assert line not in report(found, None, None)


def test_the_tuning_takes_parts_of_a_batch(recipe_fields: dict[str, Any]) -> None:
    fields = {"training": "blockwise", "batch_size": 16, "blockwise": {"samples": 16, "tuning_steps": 5}}
    whole, parts, one = (
        costs(Recipe(**recipe_fields | fields | changes))
        for changes in ({}, {"micro_batch_size": 1}, {"batch_size": 1})
    )
    assert whole.tuning > parts.tuning == one.tuning
    assert whole.blocks.block == parts.blocks.block


def test_pictures_of_a_folder_are_counted_where_they_can_be(recipe_fields: dict[str, Any], tmp_path: Path) -> None:
    def counted() -> int | None:
        return costs(Recipe(**recipe_fields | {"dataset": {"path": str(tmp_path)}})).captions

    (tmp_path / "a.parquet").write_bytes(b"rows")
    assert counted() is None
    found = costs(Recipe(**recipe_fields | {"dataset": {"path": str(tmp_path)}}))
    assert "embeddings of a caption, at most" in report(found, None, None)
    (tmp_path / "0.png").write_bytes(b"")
    (tmp_path / "1.png").write_bytes(b"")
    assert counted() == 2
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "caption": "x"}\n\n')
    assert counted() == 1
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text('file_name,caption\n0.png,"a\nb"\n1.png,c\n0.png,d\n')
    assert counted() == 3


def test_nothing_to_train_is_said(recipe_fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="nothing is trained: of the 11 layers that are quantized none is of"):
        costs(Recipe(**recipe_fields | NO_ATTENTION))


def test_block_by_block_what_does_not_fit_is_said_with_what_to_change(recipe_fields: dict[str, Any]) -> None:
    fields = {"training": "blockwise", "batch_size": 64, "blockwise": {"samples": 64, "tuning_steps": 5}}
    found = costs(Recipe(**recipe_fields | fields))
    smaller = {"mixed_precision": "bf16", "batch_size": 8}
    half = costs(Recipe(**recipe_fields | fields | smaller))
    assert half.tuning > half.blocks.block
    tried = block_advice(found, Gpus(1, RESERVE + half.tuning))
    assert [change for change, _ in tried] == ["mixed_precision=bf16", "batch_size=8"]
    assert on_one_device(found) > on_one_device(tried[0][1]) > on_one_device(tried[1][1]) == half.tuning
    untuned = Gpus(1, RESERVE + max(half.blocks.block, half.largest_part))
    text = report(found, untuned, None)
    assert "GB: block by block it does not fit; it needs " in text
    assert "\n  --set mixed_precision=bf16: " in text
    assert "\n  --set gradient_checkpointing=true: " in text
    assert "\nWith all of these it fits.\nWithout training:\n" in text
    text = report(replace(found, recipe=replace(found.recipe, name="Two words")), Gpus(1, RESERVE + 1), None)
    assert text.endswith(" --output 'Two words'")
    assert "\n  --set blockwise.tuning_steps=0: " in text
    assert "\n  --set optimizer.moment_bits=8: " in text
    assert "\n  --set batch_size=1: " in text
    assert "\nBlock by block no setting makes it fit.\nWithout training:\n" in text


def test_several_gpus_need_buckets_each(sana: Costs) -> None:
    one, eight = (on_device(sana, Gpus.parse(text)) for text in ("1x80GB", "8x80GB"))
    assert eight - one == sana.memory.student


def test_hours_are_those_of_the_given_pace_or_of_a_measured_one(sana: Costs) -> None:
    assert "8900 steps of 2 s are 4:56:40" in report(sana, None, 2.0)
    text = report(sana, None, None)
    assert "give --seconds-per-step" in text
    assert "Measured: " in text
    other = replace(sana, recipe=replace(sana.recipe, generation={**sana.recipe.generation, "height": 1024}))
    assert "Measured: " not in report(other, None, None)  # another size was not


@pytest.mark.slow
def test_what_fits_at_a_time_is_a_power_of_two(recipe_fields: dict[str, Any]) -> None:
    found = costs(Recipe(**recipe_fields | {"batch_size": 128}))
    one, whole = replace(found, recipe=replace(found.recipe, micro_batch_size=1)).memory.peak, found.memory.peak
    assert found.largest_micro_batch(whole) == 128
    assert found.largest_micro_batch(one - 1) == 0
    assert found.largest_micro_batch((one + whole) // 2) in (32, 64)


@pytest.mark.slow
def test_devices_share_a_batch_and_parts_of_it_keep_the_gradients(recipe_fields: dict[str, Any]) -> None:
    whole, four = (costs(Recipe(**recipe_fields | {"batch_size": size})) for size in (16, 4))
    assert replace(whole, devices=4).memory == four.memory
    parts = costs(Recipe(**recipe_fields | {"batch_size": 16, "micro_batch_size": 4})).memory
    assert four.memory.gradients < parts.gradients == parts.student
    assert four.memory.peak < parts.peak < whole.memory.peak
    assert "Memory of each device, 4 of 16 samples of a step at a time, 32 x 32:" in report(whole, Gpus(4, 2**34), None)
    assert "But batch_size, 16, must go into 3 equal shares." in report(whole, Gpus(3, 2**34), None)


@pytest.mark.parametrize("text", ["nonsense", "24GB", "1x24", "0x24GB", "1x0GB", "1 x 24GB"])
def test_gpus_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"write e\.g\. 1x24GB or 8x80GB"):
        Gpus.parse(text)


def test_a_method_that_does_not_train_is_refused(recipe_fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="method ptq-mse does not train"):
        costs(Recipe(**recipe_fields | {"method": "ptq-mse", "steps": 0}))
