"""Block-wise training: the loss falls in every block and in the tuning, and it resumes to the bit."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from fbqat_hub.families import get_family
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.quantization import PackedLayer, named_layers
from fbqat_hub.training import blockwise
from fbqat_hub.training.blockwise import block_loss, train_blockwise
from fbqat_hub.training.cache import cache_folder, cached_splits
from fbqat_hub.training.costs import costs
from fbqat_hub.training.distill import load_teacher, train
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.loop import accelerator_of
from fbqat_hub.training.loss import held_out_loss
from fbqat_hub.training.recipe import Recipe, load_recipe
from fbqat_hub.training.student import prepare_student
from tests.training.test_distill import log_of, same_run


def small(**changes: Any) -> dict[str, Any]:
    """Fields of a recipe of six steps a block and four of the tuning, on eight samples."""
    settings = {"samples": 8, "steps": 6, "tuning_steps": 4, **changes.pop("blockwise", {})}
    return {"training": "blockwise", "save_every": 2, **changes, "blockwise": settings}


@pytest.fixture
def blockwise_recipe(recipe_of) -> Callable[..., Recipe]:
    return lambda **changes: recipe_of(**small(**changes))


def test_each_block_and_the_tuning_lower_their_loss(blockwise_recipe, tmp_path: Path) -> None:
    recipe = blockwise_recipe(
        method="vqat",
        blockwise={"steps": 40, "learning_rate": 3e-3, "tuning_steps": 40, "tuning_rate": 1e-2},
        optimizer={"warmup_steps": 2},
    )
    run = train(recipe, tmp_path / "run", progress=False)
    log = log_of(run)
    assert [line["step"] for line in log] == list(range(1, 121))
    parts: dict[str, list[float]] = {}
    for line in log:
        parts.setdefault(line.get("block", "tuning"), []).append(line["loss"])
    assert list(parts) == ["transformer_blocks.0", "transformer_blocks.1", "tuning"]
    for losses in parts.values():
        assert statistics.fmean(losses[-6:]) < 0.8 * statistics.fmean(losses[:6])
    assert not (run / "checkpoints").exists()


@pytest.mark.parametrize("average", [None, 5.0])
@pytest.mark.parametrize("activation_range", ["per_token", "static"])
def test_what_is_saved_is_a_packed_pipeline(average, activation_range: str, blockwise_recipe, tmp_path: Path) -> None:
    quantization = {"average_bits": average, "activation_range": activation_range}
    run = train(blockwise_recipe(quantization=quantization), tmp_path / "run", progress=False)
    layers = dict(named_layers(load_pipeline(run).transformer, PackedLayer))
    assert len(layers) == 27  # outside the blocks as well
    assert {layer.weight_bits for layer in layers.values()} == ({4} if average is None else {4, 8})
    assert all((layer.input_scale is not None) == (activation_range == "static") for layer in layers.values())
    assert load_recipe(run / "recipe.yaml").training == "blockwise"


def test_codes_before_training_are_those_of_the_whole_model(blockwise_recipe, scene_of, tmp_path: Path) -> None:
    """GPTQ block by block on the same samples finds the codes that GPTQ of the whole model finds."""
    scene = scene_of(**small(blockwise={"steps": 1, "learning_rate": 0.0, "tuning_steps": 0}))
    recipe = scene.recipe
    run = train(recipe, tmp_path / "run", progress=False)
    # the first four samples: recipe.gptq.samples
    batches = [scene.draws.training(scene.splits["train"], 0, recipe.batch_size)]
    scene.draws.calibration = lambda split, samples: iter(batches)  # type: ignore[method-assign]
    whole = prepare_student(recipe, scene.teacher, scene.splits["train"], scene.draws)
    packed = dict(named_layers(load_pipeline(run).transformer, PackedLayer))
    for name, layer in packed.items():
        assert torch.equal(layer.codes(), whole.get_submodule(name).codes_and_scales()[0]), name


@pytest.mark.parametrize(("stop", "quantization"), [(3, {}), (8, {"average_bits": 5.0}), (14, {})])
def test_an_interrupted_run_resumes_to_the_bit(
    stop: int, quantization: dict[str, Any], blockwise_recipe, tmp_path: Path, monkeypatch
) -> None:
    """Stopped in the first block, in the second, and in the tuning. Widths are chosen once."""
    recipe = blockwise_recipe(quantization=quantization)
    straight = train(recipe, tmp_path / "straight", progress=False)
    taken = 0
    plain = torch.optim.Adam.step

    def counted(self: Any, *args: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == stop:
            raise KeyboardInterrupt
        return plain(self, *args)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", counted)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, run, progress=False)
    assert (run / "checkpoints" / "blocks" / "0000.safetensors").exists() == (stop > 6)
    monkeypatch.setattr(blockwise, "chosen_widths_by_blocks", lambda *_: pytest.fail("chosen again"))
    trained: list[int] = []
    plain_train = blockwise._BlockTraining._train
    monkeypatch.setattr(
        blockwise._BlockTraining,
        "_train",
        lambda self, number, *rest: (trained.append(number), plain_train(self, number, *rest))[1],
    )
    same_run(train(recipe, run, resume=True, progress=False), straight)
    assert trained == {3: [0, 1], 8: [1], 14: []}[stop]


def test_blocks_of_another_recipe_are_refused(blockwise_recipe, scene_of, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "blocks"
    folder.mkdir(parents=True)
    blockwise_recipe(blockwise={"steps": 7}).save(folder / "recipe.yaml")
    scene = scene_of(**small())
    given = (scene.recipe, scene.teacher, scene.splits["train"], scene.draws, tmp_path, accelerator_of(scene.recipe))
    training = blockwise._BlockTraining(*given)
    with pytest.raises(ValueError, match=r"blockwise.steps: 7 -> 6"):
        training.finished()


@pytest.mark.parametrize("average", [None, 5.0])
def test_blocks_whose_recipe_is_damaged_are_trained_again(average, scene_of, tmp_path: Path, capsys) -> None:
    """The widths that were chosen are not used either."""
    scene = scene_of(**small(quantization={"average_bits": average}))
    given = (scene.recipe, scene.teacher, scene.splits["train"], scene.draws, tmp_path, accelerator_of(scene.recipe))
    folder = tmp_path / "checkpoints" / "blocks"
    folder.mkdir(parents=True)
    save_file({}, folder / "0000.safetensors")
    (folder / "widths.json").write_text("{}")
    (folder / "recipe.yaml").write_text("a: [1")
    assert blockwise._BlockTraining(*given).finished() == 0
    assert capsys.readouterr().err.count(f"{folder / 'recipe.yaml'} is damaged (") == 1


def test_a_damaged_block_is_named_and_trained_again(blockwise_recipe, tmp_path: Path, monkeypatch, capsys) -> None:
    straight = train(blockwise_recipe(), tmp_path / "straight", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(blockwise, "_tuning", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(blockwise_recipe(), tmp_path / "run", progress=False)
    file = tmp_path / "run" / "checkpoints" / "blocks" / "0001.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    same_run(train(blockwise_recipe(), tmp_path / "run", resume=True, progress=False), straight)
    assert f"{file} is damaged" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_names_its_block(blockwise_recipe, tmp_path: Path) -> None:
    with pytest.raises(
        FloatingPointError, match=r"transformer_blocks\.0, step \d+, 4 bits; .* that of \w.* \(4 bits\)\. Lower"
    ):
        train(blockwise_recipe(blockwise={"learning_rate": 1e30}), tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("left_out", "train_layers"),
    [("transformer_blocks.0.*", "blocks"), ("transformer_blocks.0.attn*", "attention")],
    ids=["no layer of it", "none of those that are trained"],
)
def test_a_block_of_which_nothing_is_trained_takes_no_steps(
    left_out: str, train_layers: str, blockwise_recipe, tmp_path: Path, monkeypatch
) -> None:
    recipe = blockwise_recipe(
        train_layers=train_layers, quantization={"modules_to_not_convert": [left_out]}, blockwise={"tuning_steps": 0}
    )
    assert costs(recipe).blocks.count == 1
    run = train(recipe, tmp_path / "run", progress=False)
    log = log_of(run)
    assert [(line["step"], line["block"]) for line in log] == [(n, "transformer_blocks.1") for n in range(1, 7)]
    packed = [name for name, _ in named_layers(load_pipeline(run).transformer, PackedLayer)]
    assert any(name.startswith("transformer_blocks.0") for name in packed) == (train_layers == "attention")
    plain = blockwise._BlockTraining._write

    def stopped(self: Any, number: int, block: nn.Module) -> None:
        plain(self, number, block)
        if not number:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(blockwise._BlockTraining, "_write", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "resumed", progress=False)
    same_run(train(recipe, tmp_path / "resumed", resume=True, progress=False), run)


@pytest.mark.parametrize(
    ("blockwise", "message"),
    [
        (
            {"steps": 1, "learning_rate": 1e38},
            r"^\S+ \(4 bits\) after the last update, transformer_blocks\.0, step 1: its .* not finite.* "
            r"Lower blockwise\.learning_rate \(1e\+38\)",
        ),
        (
            {"tuning_steps": 1, "tuning_rate": 1e38},
            r"\(4 bits\) after the last update, step 1: its weight_scale has .* Lower blockwise\.tuning_rate",
        ),
    ],
)
def test_a_last_update_that_diverges_saves_nothing(blockwise, message: str, blockwise_recipe, tmp_path: Path) -> None:
    recipe = blockwise_recipe(blockwise=blockwise, optimizer={"warmup_steps": 0})
    with pytest.raises(FloatingPointError, match=message):
        train(recipe, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "model_index.json").exists()


def test_no_more_than_one_block_is_in_float(blockwise_recipe, tmp_path: Path, monkeypatch) -> None:
    """While a block trains, the rest of the student is packed, or is the teacher's very tensors."""
    seen: list[tuple[int, int]] = []
    plain = blockwise._BlockTraining._train

    def spy(self: Any, number: int, block: nn.Module, *rest: Any) -> Any:
        own = {id(each) for each in self.teacher.parameters()}
        others = [each for each in self.student.parameters() if id(each) not in own and each.is_floating_point()]
        seen.append((number, sum(each.numel() for each in others)))
        return plain(self, number, block, *rest)

    monkeypatch.setattr(blockwise._BlockTraining, "_train", spy)
    train(blockwise_recipe(), tmp_path / "run", progress=False)
    assert [number for number, _ in seen] == [0, 1]
    assert max(floats for _, floats in seen) < 2000  # biases of the packed layers outside the blocks


@pytest.mark.parametrize("average", [None, 5.0])
def test_bfloat16_trains_blocks_in_bfloat16(
    average, blockwise_recipe, tmp_path: Path, monkeypatch, other_precision
) -> None:
    dtypes: set[torch.dtype] = set()
    plain = blockwise.block_loss
    monkeypatch.setattr(blockwise, "block_loss", lambda made, *rest: (dtypes.add(made.dtype), plain(made, *rest))[1])
    recipe = blockwise_recipe(mixed_precision="bf16", quantization={"average_bits": average})
    run = train(recipe, tmp_path / "run", progress=False)
    assert dtypes == {torch.bfloat16}
    assert all(0 < line["loss"] < float("inf") for line in log_of(run))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixed_precision": "fp16"}, "mixed_precision is fp16"),
        ({"method": "ptq-mse"}, "method ptq-mse does not train"),
        ({"method": "integer", "keep_stages": [8], "steps": 10}, "keep_stages needs training: end_to_end"),
        ({"quantization": {"group_size": 8}}, "tuning_steps is 4, and what is tuned is one scale per output channel"),
        ({"training": "layerwise"}, "it must be end_to_end or blockwise"),
        ({"blockwise": {"samples": 0}}, "a whole number of at least 1"),
    ],
)
def test_what_cannot_be_is_refused_by_the_recipe(changes: dict[str, Any], message: str, blockwise_recipe) -> None:
    with pytest.raises(ValueError, match=message):
        blockwise_recipe(**changes)


def test_several_processes_are_refused(recipe_of, tmp_path: Path) -> None:
    several: Any = SimpleNamespace(num_processes=2)
    nothing: Any = None
    with pytest.raises(ValueError, match="training is blockwise, and there are 2 processes"):
        train_blockwise(recipe_of(**small()), nothing, {}, nothing, tmp_path, several)


def test_recipes_that_were_saved_before_there_was_a_choice_are_read(recipe_of, tmp_path: Path) -> None:
    old = recipe_of().to_dict()
    del old["training"], old["blockwise"], old["micro_batch_size"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(old))
    then = replace(recipe_of().blockwise, learning_rate=2e-4)  # of all layers
    assert load_recipe(tmp_path / "recipe.yaml") == replace(recipe_of(), blockwise=then)


@pytest.mark.usefixtures("other_precision")
def test_data_is_kept_by_the_precision_that_it_was_encoded_in(blockwise_recipe, monkeypatch, tmp_path: Path) -> None:
    """Blocks are trained on what a teacher in bfloat16 encodes, models on what one in float32 does."""
    monkeypatch.setenv("FBQAT_CACHE", str(tmp_path))
    blocks = blockwise_recipe(mixed_precision="bf16")
    whole = replace(blocks, training="end_to_end")
    folders = [cache_folder(each) for each in (blocks, whole)]
    assert folders[0] != folders[1]
    exact = [cache_folder(replace(each, mixed_precision="no")) for each in (blocks, whole)]
    assert exact[0] == exact[1]
    pipeline = load_teacher(whole)
    cached_splits(blocks, pipeline)  # as an evaluation does
    assert [(folder / "train").exists() for folder in folders] == [False, True]
    encoded = [cached_splits(each, load_teacher(each))["train"].batch(torch.arange(4))[0] for each in (blocks, whole)]
    assert not torch.equal(*encoded)
    assert torch.equal(cached_splits(blocks, pipeline)["train"].batch(torch.arange(4))[0], encoded[0])


def test_block_loss_is_of_the_picture() -> None:
    a, b = torch.tensor([[1.0, 1.0], [2.0, 2.0]]), torch.zeros(2, 2)
    assert block_loss(a, b).item() == 2.5
    assert block_loss((b + 7, a), (b, b)).item() == 2.5  # the text's stream comes first
    assert block_loss((None, a), (None, b)).item() == 2.5
    assert block_loss(a, b, torch.tensor([4.0, 0.0])).item() == 2.0


@pytest.mark.slow
def test_between_gptq_and_end_to_end_on_a_trained_teacher(tmp_path: Path) -> None:
    """Held-out loss on the tiny Sana: below GPTQ's codes by 15% at least (25% to 33% were measured)."""
    recipe = load_recipe("sana-tiny", training="blockwise", seed=1)
    teacher = load_teacher(recipe)
    splits = cached_splits(recipe, teacher)
    draws = Draws(get_family("sana"), teacher.scheduler, recipe.generation, recipe.seed)

    def loss(student: nn.Module) -> float:
        return statistics.fmean(held_out_loss(student.eval(), teacher.transformer, splits["test"], draws, repeats=2))

    gptq = loss(prepare_student(recipe, teacher.transformer, splits["train"], draws))
    run = train(recipe, tmp_path / "run", progress=False)
    assert loss(load_pipeline(run).transformer) < 0.85 * gptq
