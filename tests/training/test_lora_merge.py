"""`fbqat convert --lora`: an adapter merged as tensors are read is one that peft merges in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file

from fbqat_hub.cli import main
from fbqat_hub.families import FAMILIES
from fbqat_hub.hub.card import card, facts_of_run
from fbqat_hub.pipelines import load_pipeline, save_pipeline
from fbqat_hub.training import samples
from fbqat_hub.training.distill import as_started
from fbqat_hub.training.lora_check import DIFFUSERS_FILE, PEFT_FILE, adapter_file, load_adapter
from fbqat_hub.training.lora_merge import Lora, float_pipeline, pinned_recipe
from fbqat_hub.training.ptq import Calibrated, convert_pipeline
from fbqat_hub.training.recipe import load_recipe
from tests.conftest import CALL, TRAINED

WEIGHTS = Path("transformer/diffusion_pytorch_model.safetensors")
# a 1x1 convolution, a layer of each block, and the last one
MODULES = ["to_q", "conv_point", "proj_mlp", "proj_out"]


def made_adapters(pipeline: Any, folder: Path) -> list[Path]:
    """A random adapter of rank 4 and alpha 6, in diffusers' layout (if it has one for this pipeline) and in peft's."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=MODULES, init_lora_weights=False)
    model = get_peft_model(pipeline.transformer, config)
    model.save_pretrained(folder / "peft")
    if not hasattr(pipeline, "save_lora_weights"):
        return [folder / "peft"]
    tensors = get_peft_model_state_dict(model)
    layers = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    pipeline.save_lora_weights(
        folder / "diffusers", transformer_lora_layers=layers, transformer_lora_adapter_metadata=config.to_dict()
    )
    return [folder / "diffusers", folder / "peft"]


@pytest.fixture(scope="module")
def adapters(tiny_sana: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of the tiny Sana, in two layouts; not to be written to."""
    return made_adapters(load_pipeline(tiny_sana), tmp_path_factory.mktemp("adapters"))


def merged_by_peft(folder: Path, adapter: Path, scale: float, output: Path) -> Path:
    """The pipeline with the adapter merged in memory, saved."""
    pipeline = load_pipeline(folder, torch.float32)
    load_adapter(pipeline, adapter_file(str(adapter)), "style")
    layers = {name: layer for name, layer in pipeline.transformer.named_modules() if isinstance(layer, LoraLayer)}
    for name, layer in layers.items():
        layer.scale_layer(scale)
        layer.merge()
        pipeline.transformer.set_submodule(name, layer.get_base_layer())
    if hasattr(pipeline.transformer, "peft_config"):
        del pipeline.transformer.peft_config
        pipeline.transformer._hf_peft_config_loaded = False
    save_pipeline(pipeline, output)
    return output


def assert_same(left: Path, right: Path) -> None:
    ours, theirs = load_file(left / WEIGHTS), load_file(right / WEIGHTS)
    assert set(ours) == set(theirs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize(
    "family", [name if name == "sana" else pytest.param(name, marks=pytest.mark.slow) for name in TRAINED]
)
def test_equals_a_merge_in_memory(family: str, teacher_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = teacher_of(family)
    plain = convert_pipeline(str(folder), tmp_path / "plain", progress=False)
    settings = {"modules_to_not_convert": list(FAMILIES[family].activation_overrides)}  # the adapter changes it as well
    for adapter in made_adapters(load_pipeline(folder), tmp_path):
        merged = merged_by_peft(folder, adapter, 0.5, tmp_path / f"merged-{adapter.name}")
        for number, each in enumerate((settings, {"average_bits": 4.5})):
            ours, theirs = (tmp_path / f"{name}-{adapter.name}-{number}" for name in ("ours", "theirs"))
            convert_pipeline(str(folder), ours, each, lora=Lora(str(adapter), 0.5), progress=False)
            convert_pipeline(str(merged), theirs, each, progress=False)
            assert_same(ours, theirs)
        changed = load_file(ours / WEIGHTS)
        assert any(not torch.equal(changed[name], value) for name, value in load_file(plain / WEIGHTS).items())


def test_with_gptq(adapters: list[Path], tiny_sana: Path, tmp_path: Path) -> None:
    merged = merged_by_peft(tiny_sana, adapters[0], 1.0, tmp_path / "merged")
    gptq = Calibrated(prompts=["red", "blue"], samples=2, device="cpu")
    ours = convert_pipeline(str(tiny_sana), tmp_path / "ours", gptq=gptq, call=CALL, lora=Lora(str(adapters[0])))
    assert_same(ours, convert_pipeline(str(merged), tmp_path / "theirs", gptq=gptq, call=CALL))


def test_half_precision_is_merged_in_float32(adapters: list[Path], half_sana: Path, tmp_path: Path) -> None:
    merged = merged_by_peft(half_sana, adapters[1], 1.0, tmp_path / "merged")  # loaded in float32
    ours = convert_pipeline(str(half_sana), tmp_path / "ours", lora=Lora(str(adapters[1])), progress=False)
    theirs = convert_pipeline(str(merged), tmp_path / "theirs", progress=False)
    left, right = load_file(ours / WEIGHTS), load_file(theirs / WEIGHTS)
    packed = [name for name in left if name.endswith(("weight_packed", "weight_scale"))]
    assert [name for name in packed if not torch.equal(left[name], right[name])] == []
    assert left["scale_shift_table"].dtype == torch.float16


def test_what_was_merged_is_written_down(adapters: list[Path], tiny_sana: Path, tmp_path: Path) -> None:
    output, adapter = tmp_path / "out", str(adapters[0])
    assert main(["convert", str(tiny_sana), "--output", str(output), "--lora", adapter, "--lora-scale", "0.5"]) == 0
    recipe = load_recipe(output / "recipe.yaml")
    assert (recipe.teacher, recipe.lora, recipe.lora_scale) == (str(tiny_sana), adapter, 0.5)
    (output / "results.json").write_text("[]")
    page = card(facts_of_run(output))
    assert f"The adapter (LoRA) {adapters[0].name} was merged into the denoiser of {tiny_sana.name}" in page
    assert "at a scale of 0.5" in page
    assert str(tmp_path.parent) not in page
    teacher, plain = float_pipeline(recipe), load_pipeline(tiny_sana, torch.float32)
    merged = load_pipeline(merged_by_peft(tiny_sana, adapters[0], 0.5, tmp_path / "merged"))
    for name, value in teacher.transformer.state_dict().items():
        assert torch.equal(value, merged.transformer.state_dict()[name]), name
    assert not torch.equal(teacher.transformer.proj_out.weight, plain.transformer.proj_out.weight)


def _without(part: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {name: value for name, value in tensors.items() if part not in name}


NAME = "transformer.proj_out.lora_B.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: t | {f"transformer.nowhere.lora_{side}.weight": torch.ones(4, 4) for side in "AB"},
            r"transformer\.nowhere\.lora_A.*layer",
        ),
        (
            lambda t: {f"transformer.x.{name[12:]}": value for name, value in t.items()},
            "does not fit this SanaTransformer2DModel: Target mod",
        ),
        (
            lambda t: t | {NAME: torch.ones(3, 4)},
            r"does not fit this SanaTransformer2DModel: .*size mismatch.*proj_out",
        ),
        (lambda t: t | {NAME: torch.ones(t[NAME].shape[0], 5)}, r"has two ranks in transformer\.proj_out: 4 of"),
        (lambda t: t | {NAME: torch.full_like(t[NAME], torch.nan)}, "proj_out has values that are not finite"),
        (lambda t: {name: value * ("lora_A" in name) for name, value in t.items()}, "all its lora_B are zero"),
        (
            lambda t: t | {f"text_encoder.layers.0.lora_{side}.weight": torch.ones(4, 4) for side in "AB"},
            "a text encoder's part, which is not",
        ),
        (lambda t: t | {"transformer.proj_out.lora_magnitude_vector": torch.ones(4)}, "DoRA, which is not merged"),
        (_without("proj_out.lora_B"), r"has half of a low-rank pair of transformer\.proj_out; it is damaged"),
    ],
    ids=["unmatched", "other-names", "shape", "rank", "nan", "zero", "text-encoder", "dora", "half-a-pair"],
)
def test_what_does_not_fit_is_refused_by_name(
    edit: Any, message: str, adapters: list[Path], tiny_sana: Path, tmp_path: Path
) -> None:
    tensors = {name: value.clone() for name, value in load_file(adapters[0] / DIFFUSERS_FILE).items()}
    assert NAME in tensors
    save_file(edit(tensors), tmp_path / DIFFUSERS_FILE)
    with pytest.raises(ValueError, match=message):
        convert_pipeline(str(tiny_sana), tmp_path / "out", lora=Lora(str(tmp_path)), progress=False)
    assert not (tmp_path / "out").exists()


def test_of_peft_too(adapters: list[Path], tiny_sana: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes((adapters[1] / "adapter_config.json").read_bytes())
    tensors = load_file(adapters[1] / PEFT_FILE)
    name = next(name for name in tensors if "proj_out.lora_B" in name)
    save_file(tensors | {name: torch.ones(3, 4)}, tmp_path / PEFT_FILE)
    with pytest.raises(ValueError, match="does not fit this SanaTransformer2DModel"):
        convert_pipeline(str(tiny_sana), tmp_path / "out", lora=Lora(str(tmp_path)), progress=False)
    save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / PEFT_FILE)
    with pytest.raises(ValueError, match=r"has half of a low-rank pair of base_model\.model\.proj_out"):
        convert_pipeline(str(tiny_sana), tmp_path / "out", lora=Lora(str(tmp_path)), progress=False)


def test_scales(tiny_sana: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for scale in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="it must be a number other than 0"):
            Lora("adapter", scale)
    assert main(["convert", str(tiny_sana), "--output", str(tmp_path / "out"), "--lora-scale", "0.5"]) == 1
    assert "--lora-scale is of an adapter; give --lora ADAPTER too" in capsys.readouterr().err


def test_an_adapter_of_the_hub_is_pinned(recipe_of: Any, tmp_path: Path, monkeypatch) -> None:
    asked: list[tuple[str, Any]] = []
    folder = tmp_path / "models--owner--style" / "snapshots" / "2f3c"
    folder.mkdir(parents=True)
    save_file({"to_q.lora_A.weight": torch.ones(1, 4), "to_q.lora_B.weight": torch.ones(4, 1)}, folder / DIFFUSERS_FILE)
    download = lambda repo, revision=None, **_: asked.append((repo, revision)) or str(folder)  # noqa: E731
    monkeypatch.setattr("fbqat_hub.training.lora_check.snapshot_download", download)
    recipe, _ = pinned_recipe(recipe_of(lora="owner/style"))
    assert recipe.lora == "owner/style@2f3c"
    assert pinned_recipe(recipe)[0] == recipe
    assert asked == [("owner/style", None), ("owner/style", "2f3c")]
    local = recipe_of(lora=str(folder))
    assert pinned_recipe(local)[0] == local
    local.save(tmp_path / "recipe.yaml")
    assert as_started(local, tmp_path) == local
    recipe.save(tmp_path / "recipe.yaml")
    assert as_started(recipe_of(lora="owner/style"), tmp_path) == recipe


def test_pictures_of_a_teacher_are_those_of_the_adapter_as_it_is(recipe_of: Any, tmp_path: Path, monkeypatch) -> None:
    """A folder, and a file, which holds another adapter by now."""
    made: list[Path] = []
    monkeypatch.setattr(samples, "generate_folder", lambda load, prompts, recipe, folder, *_, **__: made.append(folder))
    file = tmp_path / "adapter.safetensors"
    for lora in (str(tmp_path), str(file)):
        for text in ("old", "newer", "newer"):
            if not file.exists() or file.read_text() != text:
                file.write_text(text)
            samples.teacher_pictures(recipe_of(lora=lora), ["a cat"])
    assert len({*made[:2]}) == len({*made[3:5]}) == 2
    assert made[1] == made[2]
    assert made[4] == made[5]
