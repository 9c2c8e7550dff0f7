"""The sampler's own draws: of every family, the same whatever is beside them, and what a loss over them means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fbqat_hub.families import FAMILIES, Family
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training import trajectories as module
from fbqat_hub.training.trajectories import Trajectories, predictions, trajectories, trajectory_loss
from tests.conftest import CAPTIONS, call_of, most_families


@pytest.fixture(scope="module")
def load(teacher_of: Callable[[str], Path]) -> Callable[[str], tuple[Family, Any, dict[str, Any]]]:
    """``load(family)``: the family, its tiny pipeline, and a call of five steps."""

    def loaded(name: str) -> tuple[Family, Any, dict[str, Any]]:
        pipeline = load_pipeline(teacher_of(name))
        guidance = 1.0 if name.startswith("flux") else 3.0
        call = {**call_of(name, pipeline), "num_inference_steps": 5, "guidance_scale": guidance}
        return FAMILIES[name], pipeline, call | ({"intermediate_timesteps": None} if "sprint" in name else {})

    return loaded


def made(
    pipeline: Any, family: Family, call: dict[str, Any], path: Path, captions: list[str], **options: int
) -> Trajectories:
    return trajectories(pipeline, family, captions, call, path, progress=False, **options)


def test_a_denoiser_of_lists_is_refused(load, tmp_path):
    for name in ("z-image", "qwen-image"):
        with pytest.raises(ValueError, match="sampler cannot be kept: its denoiser takes lists and sizes"):
            made(None, FAMILIES[name], {}, tmp_path / "held", CAPTIONS[:1])


@pytest.mark.parametrize("name", most_families(lambda family: family.takes_tensors))
def test_draws_are_what_the_sampler_gives_the_denoiser(name, load, tmp_path):
    family, pipeline, call = load(name)
    held = made(pipeline, family, call, tmp_path / "held.safetensors", CAPTIONS[:3], pictures=2, steps=5)
    halves = 2 if name in ("sana", "pixart-sigma", "sd3") else 1  # the others are told the scale, or have none
    assert len(held) == 3 * 2 * 5 * halves
    assert held.captions.bincount().tolist() == [10 * halves] * 3
    assert held.steps.bincount().tolist() == [6 * halves] * 5

    seen = []
    hook = pipeline.transformer.register_forward_hook(
        lambda _, args, kwargs, output: seen.append(
            ({**dict(zip(["hidden_states"], args, strict=False)), **kwargs}, output)
        ),
        with_kwargs=True,
    )
    noise = module.generator("trajectory noise", module.VERSION, CAPTIONS[1], 1)
    pipeline(prompt=[CAPTIONS[1]], generator=[noise], output_type="latent", **call)
    hook.remove()
    own = (held.captions == 1).nonzero().flatten()[5 * halves :]  # of the second picture, step by step
    inputs = list(held.batches(1))
    for at, batch in enumerate(inputs[index] for index in own):
        given, output = seen[at // halves]
        half = slice(at % halves, at % halves + 1)
        torch.testing.assert_close(batch["hidden_states"], given["hidden_states"][half], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(batch["timestep"], given["timestep"][half], check_dtype=False)
        with torch.no_grad():
            again = pipeline.transformer(**batch, return_dict=False)[0]
        torch.testing.assert_close(again, output[0][half], atol=1e-3, rtol=1e-3)


def test_a_draw_depends_on_its_caption_and_number_only(load, tmp_path, monkeypatch):
    family, pipeline, call = load("sana")
    all_of_them = made(pipeline, family, call, tmp_path / "all", CAPTIONS[:5], pictures=3, steps=2)
    monkeypatch.setattr(module, "_BATCH", 4)
    part = made(pipeline, family, call, tmp_path / "part", [CAPTIONS[4], CAPTIONS[2]], pictures=2, steps=2)
    for caption, other in ((0, 4), (1, 2)):
        mine, theirs = part.captions == caption, (all_of_them.captions == other).nonzero().flatten()[: 2 * 2 * 2]
        assert torch.equal(part.steps[mine], all_of_them.steps[theirs])
        for name, value in part.latents.items():
            torch.testing.assert_close(value[mine], all_of_them.latents[name][theirs], atol=1e-3, rtol=1e-4)
        for name, value in part.conditioning.items():
            torch.testing.assert_close(value[part.rows[mine]], all_of_them.conditioning[name][all_of_them.rows[theirs]])
    first = all_of_them.latents["hidden_states"][:: 2 * 2]
    assert len(first.flatten(1).unique(dim=0)) == 15  # every picture has a noise of its own


def test_made_once(load, tmp_path):
    family, pipeline, call = load("sana")
    path = tmp_path / "new folder" / "held.safetensors"
    first = made(pipeline, family, call, path, CAPTIONS[:2], pictures=1, steps=2)
    again = made(None, family, call, path, CAPTIONS[:2], pictures=1, steps=2)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    for mine, theirs in zip(first.batches(3), again.batches(3), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_losses_do_not_depend_on_the_batch_size_and_mean_what_they_say(load, tmp_path):
    family, pipeline, call = load("sana")
    held = made(pipeline, family, call, tmp_path / "held", CAPTIONS[:3], pictures=2, steps=2)
    teacher = pipeline.transformer
    wanted = predictions(teacher, held, family)
    assert trajectory_loss(wanted, wanted) == [0.0] * len(held)
    student = load("sana")[1].transformer
    with torch.no_grad():
        student.proj_out.bias += 0.5
    losses = trajectory_loss(predictions(student, held, family, batch_size=5), wanted)
    assert losses == pytest.approx([0.25] * len(held), rel=1e-3)
    values = [float(caption) for caption in held.captions]
    assert held.by_caption(values) == [0.0, 1.0, 2.0]


def test_steps_that_are_kept_cover_the_sampler():
    for number in range(20):
        kept = module.kept_steps(20, 4, module.generator(number))
        assert [step // 5 for step in kept] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("captions", "options", "words"),
    [
        (["red", "red"], {}, "2 captions of which 1 are different"),
        ([], {}, "0 captions"),
        (["red"], {"pictures": 0}, "pictures is 0"),
        (["red"], {"steps": 0}, "steps 0"),
    ],
)
def test_what_is_refused(captions, options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        made(None, FAMILIES["sana"], {}, tmp_path / "held", captions, **options)
