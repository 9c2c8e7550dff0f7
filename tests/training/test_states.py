"""Training on prompts alone: what is learned from is what the sampler asks, of prompts that nothing is tested on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from fbqat_hub.families import FAMILIES, Family
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training import cache, loop
from fbqat_hub.training.cache import SampledSplit, cache_folder, cached_splits
from fbqat_hub.training.costs import costs
from fbqat_hub.training.costs_report import report
from fbqat_hub.training.dataset import check_local_data
from fbqat_hub.training.distill import train
from fbqat_hub.training.draws import Draws
from fbqat_hub.training.evaluate import evaluate
from fbqat_hub.training.prompts import training_prompts
from fbqat_hub.training.recipe import Recipe
from fbqat_hub.training.seeding import generator
from fbqat_hub.training.states import STEPS
from fbqat_hub.training.trajectories import kept_steps
from tests.conftest import CAPTIONS, call_of, most_families, weights_of


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Twelve prompts, some of them twice."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([*CAPTIONS, "", CAPTIONS[3]]), encoding="utf-8")
    return file


@pytest.fixture
def prompted(recipe_fields: dict[str, Any], prompts: Path) -> Callable[..., Recipe]:
    def make(**changes: Any) -> Recipe:
        """The recipe of six steps on prompts alone."""
        data = {"prompts": str(prompts), "seeds": 2, **changes.pop("dataset", {})}
        return Recipe(**{**recipe_fields, **changes, "dataset": data})

    return make


def guided_call(name: str, pipeline: Any) -> dict[str, Any]:
    """Of five steps, guided where the family can be, with negative prompts that differ where there are several."""
    guidance = 1.0 if name.startswith("flux") else 3.0
    call = {**call_of(name, pipeline), "num_inference_steps": 5, "guidance_scale": guidance}
    if "sprint" in name:
        call["intermediate_timesteps"] = None
    if name in ("flux", "qwen-image"):
        call["true_cfg_scale"] = 3.0
    others = {"sd3": ("_2", "_3"), "flux": ("_2",)}.get(name, ())
    texts = {f"negative_prompt{other}": text for other, text in zip(("", *others), CAPTIONS, strict=False)}
    return call | ({} if name in ("sana-sprint", "flux2-klein") else texts)


def outputs_of(pipeline: Any, family: Family, prompt: str, number: int, call: dict[str, Any]) -> list[torch.Tensor]:
    """What the denoiser says to the sampler of one picture, a row per step and half: with the prompt first."""
    made: list[torch.Tensor] = []
    step = pipeline.scheduler.step
    ends: list[int] = []
    hook = pipeline.transformer.register_forward_hook(lambda _, args, output: made.append(family.prediction(output[0])))
    pipeline.scheduler.step = lambda *args, **named: [ends.append(len(made)), step(*args, **named)][1]
    # pipelines look at the names of its arguments
    pipeline.scheduler.step.__wrapped__ = step
    pipeline(prompt=[prompt], generator=[generator("sampled picture", prompt, number)], output_type="latent", **call)
    hook.remove()
    del pipeline.scheduler.step
    of_steps = [made[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    with_prompt_first = len(of_steps[0]) > 1 or family.name == "z-image"
    return [torch.cat(calls) if with_prompt_first else calls[0].flip(0) for calls in of_steps]


@pytest.mark.parametrize("name", most_families(lambda family: not family.needs_pictures))
def test_a_state_is_what_the_sampler_asks_of_the_denoiser(name, prompted, teacher_of) -> None:
    family, pipeline = FAMILIES[name], load_pipeline(teacher_of(name))
    call = guided_call(name, pipeline)
    recipe = prompted(family=name, teacher=str(teacher_of(name)), generation=call)
    split = cached_splits(recipe, pipeline)["train"]
    assert isinstance(split, SampledSplit)
    index = 3
    prompt = split.captions[index]
    assert split.captions[index - 1] == prompt  # the second picture of its prompt
    expected = outputs_of(pipeline, family, prompt, 1, call)
    guided = name not in ("sana-sprint", "flux2-klein")
    states = STEPS * (1 + guided)
    kept = kept_steps(5, STEPS, generator("sampled steps", prompt, 1))
    for state in range(states):
        found = split.states(torch.tensor([index]), torch.tensor([(state + 0.5) / states]))
        with torch.no_grad():
            made = family.predict(pipeline.transformer, family.denoiser_inputs(*found))
        step, without = divmod(state, 1 + guided)
        torch.testing.assert_close(made[0], expected[kept[step]][without], atol=2e-3, rtol=2e-3)
    assert len(expected[0]) == 1 + guided


def test_an_interrupted_sampling_goes_on(prompted, tiny_sana: Path, monkeypatch) -> None:
    """Pictures are kept a few at a time, whatever their size, and none is made again."""
    recipe, pipeline = prompted(), load_pipeline(tiny_sana)
    monkeypatch.setattr(cache, "_SAMPLED", 8)
    monkeypatch.setattr(cache, "_PIXELS", 4 * 32 * 32)
    made: list[int] = []
    sample = cache.sampled_states

    def counted(pipeline: Any, family: Family, pictures: Any, *rest: Any) -> Any:
        made.append(len(pictures))
        if sum(made) > 12:
            raise KeyboardInterrupt
        return sample(pipeline, family, pictures, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "sampled_states", counted)
        with pytest.raises(KeyboardInterrupt):
            cached_splits(recipe, pipeline)
    assert made == [4, 4, 4, 4]
    made.clear()
    monkeypatch.setattr(cache, "sampled_states", lambda *args: [made.append(len(args[2])), sample(*args)][1])
    resumed = cached_splits(recipe, pipeline)
    assert made == [4, 4, 4, 2, 2]  # 20 - 8 of train, 2 of each other split: 10, 1 and 1 prompts
    folder = cache_folder(recipe)
    assert [path.name for path in sorted((folder / "train").glob("states-*"))] == [
        f"states-{first:09d}.safetensors" for first in (0, 8, 16)
    ]
    uniform = torch.linspace(0.01, 0.99, 20)
    first = resumed["train"].states(torch.arange(20), uniform)
    made.clear()
    again = cached_splits(recipe, None)["train"].states(torch.arange(20), uniform)
    assert not made
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(first[:2], again[:2], strict=True))
    assert len(first[0].flatten(1).unique(dim=0)) == 20


def test_a_teacher_that_overflows_is_refused(prompted, tiny_sana: Path) -> None:
    recipe, pipeline = prompted(seed=3, dataset={"seeds": 1}), load_pipeline(tiny_sana)
    with torch.no_grad():
        pipeline.transformer.proj_out.bias.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"the teacher's latents for '.*' are not finite"):
        cached_splits(recipe, pipeline)
    assert not list(cache_folder(recipe).rglob("*.safetensors"))


@pytest.mark.parametrize("half", ["no", "bf16", "fp16"])
def test_draws_depend_on_their_key_alone(half: str, prompted, tiny_sana: Path) -> None:
    recipe, pipeline = prompted(mixed_precision=half), load_pipeline(tiny_sana)
    split = cached_splits(recipe, pipeline)["train"]
    draws = Draws(FAMILIES["sana"], pipeline.scheduler, {}, 1)
    whole, part = draws.training(split, 3, 8), draws.training(split, 3, 8, slice(2, 5))
    assert all(torch.equal(whole[name][2:5], part[name]) for name in whole)
    assert whole["encoder_hidden_states"].dtype == torch.float32  # of states with the prompt and without it
    held = [torch.cat([inputs["hidden_states"] for inputs in draws.held_out(split, 2, size)]) for size in (3, 20)]
    assert torch.equal(*held)
    assert len(held[0]) == 40
    assert len(list(draws.calibration(split, 3))) == 3


@pytest.mark.parametrize("half", ["no", "bf16"])
def test_the_plan_counts_what_is_on_disk(half: str, prompted, tiny_sana: Path) -> None:
    recipe = prompted(mixed_precision=half, generation={**call_of("sana", load_pipeline(tiny_sana))})
    found, folder = costs(recipe), cache_folder(recipe)
    cached_splits(recipe, load_pipeline(tiny_sana))
    stored = 0
    for path in folder.rglob("states-*.safetensors"):
        with safe_open(path, "pt") as file:
            stored += file.get_tensor("latents").nbytes
    assert (found.captions, found.pictures) == (12, 24)
    assert found.pictures * found.latents == stored
    parts = {**found.parameters, "text_encoder": 0, "vae": 0}
    assert replace(found, parameters=parts).largest_part == (2 if half == "bf16" else 4) * parts["transformer"]
    text = report(found, None, None)
    assert "latents that the sampler passes through, 24 pictures" in text
    assert "makes 2 pictures of each prompt in 2 steps, 48 calls of the denoiser" in text


def test_splits_share_no_prompt_and_do_not_depend_on_the_order(prompts: Path, tmp_path: Path) -> None:
    splits = training_prompts({"prompts": str(prompts)})
    assert {split: len(found) for split, found in splits.items()} == {"test": 1, "validation": 1, "train": 10}
    assert sorted(prompt for found in splits.values() for prompt in found) == sorted(CAPTIONS)
    other = tmp_path / "other.txt"
    other.write_text("\n".join(reversed(CAPTIONS)))
    again = training_prompts({"prompts": str(other)})
    assert {split: set(found) for split, found in again.items()} == {
        split: set(found) for split, found in splits.items()
    }


def test_a_split_without_prompts_is_refused(monkeypatch) -> None:
    captions = {"train": ["red", "blue"], "validation": ["grey"], "test": []}
    data = {split: {"caption": found} for split, found in captions.items()}
    monkeypatch.setattr("fbqat_hub.training.prompts.load_openmoji", lambda groups: data)
    with pytest.raises(ValueError, match="openmoji, leaves no prompt for the split test; give more"):
        training_prompts({"prompts": "openmoji"})
    captions["test"].append("blue")  # which is then not trained on
    assert training_prompts({"prompts": "openmoji"})["train"] == ["red"]


def test_the_cache_depends_on_the_prompts_and_on_what_makes_the_pictures(prompted, prompts: Path) -> None:
    recipe = prompted()
    names = {
        cache_folder(each).name
        for each in (
            recipe,
            prompted(dataset={"seeds": 3}),
            prompted(lora="some/adapter"),
            prompted(lora="some/adapter", lora_scale=0.5),
            prompted(mixed_precision="bf16"),
        )
    }
    assert len(names) == 5
    copy = prompts.with_name("copy.txt")
    copy.write_text(prompts.read_text())
    assert cache_folder(prompted(dataset={"prompts": str(copy)})).name in names
    prompts.write_text("one\ntwo\nthree")
    assert cache_folder(recipe).name not in names


@pytest.mark.slow
def test_a_run_without_pictures_resumes_to_the_bit_and_is_measured(prompted, tmp_path: Path, monkeypatch) -> None:
    recipe, save = prompted(quantization={"average_bits": 4.5}), loop.save_checkpoint
    whole = train(recipe, tmp_path / "whole", progress=False)

    def saving(folder: Path, done: int, *rest: Any, **options: Any) -> None:
        if done == 4:
            raise KeyboardInterrupt
        save(folder, done, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", saving)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "cut", progress=False)
    run = train(recipe, tmp_path / "cut", resume=True, progress=False)
    files = [weights_of(folder / "transformer").read_bytes() for folder in (whole, run)]
    assert files[0] == files[1]
    found = evaluate(run, metrics=["kd_loss", "psnr", "fd_real"], progress=False)
    assert {record.metric for record in found.records} == {"kd_loss", "psnr"}
    assert "0 of the prompts have a real picture" in found.not_measured["fd_real"]


def test_blocks_are_trained_without_pictures(prompted, tmp_path: Path) -> None:
    blockwise = {"samples": 8, "steps": 2, "tuning_steps": 1}
    run = train(prompted(training="blockwise", blockwise=blockwise), tmp_path / "run", progress=False)
    assert weights_of(run / "transformer").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "openmoji"}, "has both path, of pictures, and prompts"),
        ({"seeds": 0}, "dataset.seeds is 0; it must be a whole number from 1 to 10000"),
        ({"skip": 0.1}, "unknown .*skip"),
        ({"prompts": " "}, "it needs a path, .* or prompts"),
        ({"prompts": ["red"]}, "it needs a path, .* or prompts"),
    ],
)
def test_a_recipe_that_means_nothing_is_refused(changes: dict[str, Any], message: str, prompted) -> None:
    with pytest.raises(ValueError, match=message):
        prompted(dataset=changes)


def test_a_model_that_edits_pictures_needs_them(prompted) -> None:
    with pytest.raises(ValueError, match=r"needs pictures: it edits a reference picture. Give dataset\.path"):
        prompted(family="flux-kontext", generation={})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"red\nred\nblue\n", "has 2 different prompts; give at least 3"),
        (b"\xff\xd8\xff\xe0", "is not text in UTF-8"),
        (None, "there is no file"),
    ],
)
def test_bad_prompts_are_named_before_anything_is_loaded(
    content: bytes | None, message: str, prompted, prompts: Path, tmp_path: Path
) -> None:
    prompts.unlink()
    if content is not None:
        prompts.write_bytes(content)
    recipe = prompted(teacher=str(tmp_path / "nothing"))
    with pytest.raises((ValueError, OSError), match=message):
        check_local_data(recipe.dataset)
    with pytest.raises((ValueError, OSError), match=message):
        train(recipe, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
