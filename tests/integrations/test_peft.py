"""The whole life of a LoRA on a packed denoiser, every family: loaded, mixed, fused, trained, saved, refused by name.

Adapters are random and made on the float model. PixArt has no adapter methods in diffusers; there peft's own are used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from fbqat_hub import FBQATConfig
from fbqat_hub.families import get_family
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.quantization import PackedLayer, named_layers
from fbqat_hub.training.ptq import convert_pipeline
from tests.conftest import SANA_FIRST
from tests.integrations.tiny import denoiser_inputs, predict, refused

# of the attention, and of Sana's 1x1 convolutions
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point"]
# the family whose pipeline diffusers has no adapters for
WITHOUT_LORA = "pixart-sigma"


def config(seed: int = 0, rank: int = 4, **fields: Any) -> LoraConfig:
    """Of an adapter whose change is not zero."""
    torch.manual_seed(seed)
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=False, **fields)


def packed_state(model: Any) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in model.state_dict().items() if "weight_" in name}


@dataclass
class Case:
    """A family, its float and packed folders, and two adapters (files of diffusers' layout)."""

    family: str
    teacher: Path
    packed: Path
    adapters: dict[str, Path]

    def pipeline(self, **options: Any) -> Any:
        return DiffusionPipeline.from_pretrained(self.packed, **options)

    def float_pipeline(self) -> Any:
        return load_pipeline(self.teacher)

    def loaded(self, *names: str, **options: Any) -> Any:
        """The packed pipeline with adapters."""
        pipeline = self.pipeline(**options)
        for name in names:
            pipeline.load_lora_weights(self.adapters[name], adapter_name=name)
        return pipeline


# all families are a minute's work: those beside Sana are for `make test-all`
@pytest.fixture(scope="module", params=SANA_FIRST)
def case(request: pytest.FixtureRequest, teacher_of: Callable[[str], Path], tmp_path_factory) -> Case:
    family, folder = request.param, tmp_path_factory.mktemp("lora")
    teacher = teacher_of(family)
    adapters = {}
    for seed, name in enumerate(["a", "b"]):
        pipeline = load_pipeline(teacher)
        tensors = get_peft_model_state_dict(get_peft_model(pipeline.transformer, config(seed)))
        layers = {key.removeprefix("base_model.model."): 0.3 * value for key, value in tensors.items()}
        adapters[name] = folder / name
        if family != WITHOUT_LORA:
            pipeline.save_lora_weights(adapters[name], transformer_lora_layers=layers)
    return Case(family, teacher, convert_pipeline(str(teacher), folder / "packed"), adapters)


@pytest.fixture
def with_lora(case: Case) -> Case:
    if case.family == WITHOUT_LORA:
        pytest.skip("not in diffusers")
    return case


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))


@pytest.mark.cell("load_lora_weights, adapter of the float model")
def test_an_adapter_of_the_float_model_loads_unchanged(with_lora: Case, record_property) -> None:
    case = with_lora
    float_pipeline, packed = case.float_pipeline(), case.pipeline()
    before = [predict(each.transformer, case.family) for each in (float_pipeline, packed)]
    codes = packed_state(packed.transformer)
    for each in (float_pipeline, packed):
        each.load_lora_weights(case.adapters["a"], adapter_name="a")
    of_float, of_packed = (
        get_peft_model_state_dict(each.transformer, adapter_name="a") for each in (float_pipeline, packed)
    )
    assert of_float.keys() == of_packed.keys()
    assert all(torch.equal(of_float[name], of_packed[name]) for name in of_float)
    changes = [
        predict(each.transformer, case.family) - old for each, old in zip((float_pipeline, packed), before, strict=True)
    ]
    assert cosine(*changes) > 0.8
    record_property("cosine", cosine(*changes))
    packed.unload_lora_weights()
    assert torch.equal(predict(packed.transformer, case.family), before[1])
    assert all(torch.equal(value, codes[name]) for name, value in packed_state(packed.transformer).items())


@pytest.mark.cell("get_peft_model")
def test_peft_model_is_the_same_as_on_the_float_model(case: Case, record_property) -> None:
    changes = []
    tensors = None
    for pipeline in (case.float_pipeline(), case.pipeline()):
        model = pipeline.transformer
        before = predict(model, case.family)
        wrapped = get_peft_model(model, config())
        tensors = tensors or get_peft_model_state_dict(wrapped)
        set_peft_model_state_dict(wrapped, tensors)
        changes.append(predict(wrapped, case.family) - before)
        wrapped.merge_adapter()
        torch.testing.assert_close(predict(wrapped, case.family) - before, changes[-1], rtol=1e-3, atol=1e-3)
        wrapped.unmerge_adapter()
    assert cosine(*changes) > 0.8
    record_property("cosine", cosine(*changes))
    wrapped.merge_and_unload()
    torch.testing.assert_close(predict(model, case.family) - before, changes[-1], rtol=1e-3, atol=1e-3)


@pytest.mark.cell("several adapters, weights, enable, disable, delete")
def test_several_adapters(with_lora: Case) -> None:
    case = with_lora
    plain = case.pipeline()
    base = predict(plain.transformer, case.family)
    alone = predict(case.loaded("a").transformer, case.family)
    pipeline = case.loaded("a", "b")
    model = pipeline.transformer
    pipeline.set_adapters(["a", "b"], [1.0, 0.0])
    assert torch.equal(predict(model, case.family), alone)
    pipeline.set_adapters(["a", "b"], [0.5, 0.5])
    assert not torch.equal(predict(model, case.family), alone)
    pipeline.disable_lora()
    assert torch.equal(predict(model, case.family), base)
    pipeline.enable_lora()
    pipeline.set_adapters(["a"], [1.0])
    pipeline.delete_adapters("b")
    assert torch.equal(predict(model, case.family), alone)
    assert pipeline.get_list_adapters() == {"transformer": ["a"]}


@pytest.mark.cell("hot-swap")
def test_hotswap(with_lora: Case) -> None:
    case = with_lora
    wanted = predict(case.loaded("b").transformer, case.family)
    pipeline = case.loaded("a")
    pipeline.load_lora_weights(case.adapters["b"], adapter_name="a", hotswap=True)
    assert torch.equal(predict(pipeline.transformer, case.family), wanted)


@pytest.mark.cell("fuse_lora, unfuse_lora")
def test_fused_is_the_adapter_and_unfused_is_the_base_to_the_bit(with_lora: Case) -> None:
    case = with_lora
    pipeline = case.pipeline()
    model = pipeline.transformer
    base, codes = predict(model, case.family), packed_state(model)
    for name in ("a", "b"):
        pipeline.load_lora_weights(case.adapters[name], adapter_name=name)
    pipeline.set_adapters(["a", "b"], [1.0, 0.5])
    unfused = predict(model, case.family)
    pipeline.fuse_lora(adapter_names=["a", "b"])
    torch.testing.assert_close(predict(model, case.family), unfused, rtol=1e-3, atol=1e-3)
    assert not torch.equal(unfused, base)
    pipeline.unfuse_lora()
    torch.testing.assert_close(predict(model, case.family), unfused, rtol=1e-3, atol=1e-3)
    pipeline.disable_lora()
    assert torch.equal(predict(model, case.family), base)
    state = packed_state(model)
    assert all(
        torch.equal(state[name.replace(".weight_", ".base_layer.weight_")], codes[name])
        for name in codes
        if name.replace(".weight_", ".base_layer.weight_") in state
    )
    pipeline.enable_lora()
    pipeline.fuse_lora(adapter_names=["a"])
    one = predict(model, case.family)
    pipeline.unload_lora_weights()  # as on a float model, what was fused stays
    assert torch.equal(predict(model, case.family), one)
    with pytest.raises(ValueError, match=r"cannot be taken out any more\. Load the base again; .*convert --lora"):
        model.save_pretrained("never-written")


@pytest.mark.cell("save_lora_weights, save_lora_adapter")
def test_a_saved_adapter_is_the_loaded_one(with_lora: Case, tmp_path: Path) -> None:
    case = with_lora
    model = case.loaded("a").transformer
    model.save_lora_adapter(tmp_path, adapter_name="a")
    saved, first = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (tmp_path, case.adapters["a"]))
    assert all(torch.equal(saved[name.removeprefix("transformer.")], value) for name, value in first.items())
    assert len(saved) == len(first)
    again = case.pipeline()
    again.transformer.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert torch.equal(predict(again.transformer, case.family), predict(model, case.family))


@pytest.mark.cell("train a LoRA (add_adapter)")
def test_training_moves_the_adapter_and_not_the_base(case: Case) -> None:
    pipeline = case.pipeline()
    model = pipeline.transformer
    codes = packed_state(model)
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules=TARGETS)
    if case.family != WITHOUT_LORA:
        model.add_adapter(settings)
    else:
        model = get_peft_model(model, settings)
    inputs = denoiser_inputs(case.family, pipeline.transformer)
    latents = inputs[get_family(case.family).latents_input]
    latents = [latents] if isinstance(latents, Tensor) else latents
    for each in latents:
        each.requires_grad_(True)
    target = predict(model, case.family) + 0.1
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(get_family(case.family).predict(model, inputs), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.99 * losses[0]
    names = {name for name, each in model.named_parameters() if each.requires_grad and each.grad is not None}
    assert {"lora_A" in name for name in names} == {True, False}
    assert all("lora_" in name for name in names)
    assert all(each.grad.abs().sum() > 0 for each in latents)
    state = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): v for name, v in model.state_dict().items()
    }
    assert all(torch.equal(state[name], value) for name, value in codes.items())


@pytest.mark.cell("DoRA, computed; its fusing is refused")
def test_dora_is_computed_and_not_fused(case: Case) -> None:
    model = case.pipeline().transformer
    base = predict(model, case.family)
    wrapped = get_peft_model(model, config(use_dora=True))
    assert cosine(predict(wrapped, case.family), base) < 0.99999
    with refused(r"'default' \(Dora.*Variant\) changes more than a low-rank pair"):
        wrapped.merge_adapter()
    with wrapped.disable_adapter():
        assert torch.equal(predict(wrapped, case.family), base)


@pytest.mark.cell("bf16, PipelineQuantizationConfig")
def test_in_bf16_on_a_model_quantized_on_load(case: Case) -> None:
    quantization = FBQATConfig(module_overrides=get_family(case.family).activation_overrides)
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": quantization})
    pipeline = DiffusionPipeline.from_pretrained(case.teacher, quantization_config=mapping, dtype=torch.bfloat16)
    model = pipeline.transformer
    before = predict(model, case.family)
    if case.family != WITHOUT_LORA:
        pipeline.load_lora_weights(case.adapters["a"], adapter_name="a")
    else:
        model = get_peft_model(model, config(), autocast_adapter_dtype=False)
    assert {each.dtype for name, each in model.named_parameters() if "lora_" in name} == {torch.bfloat16}
    after = predict(model, case.family)
    assert after.dtype == torch.bfloat16
    assert after.isfinite().all()
    assert not torch.equal(after, before)


@pytest.mark.cell("compile(fullgraph=True) with an adapter")
def test_a_model_with_an_adapter_is_one_graph(case: Case) -> None:
    """Where the float model with it is."""

    def check(model: Any) -> None:
        torch._dynamo.reset()
        get_peft_model(model, config())
        expected = predict(model, case.family)
        model.compile(fullgraph=True, backend="eager")
        torch.testing.assert_close(predict(model, case.family), expected)

    try:
        check(case.pipeline().transformer)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            check(case.float_pipeline().transformer)
        pytest.skip("not in diffusers")
    finally:
        torch._dynamo.reset()


# what is refused


def broken(tensors: dict[str, Tensor], change: Callable[[str, Tensor], tuple[str, Tensor]]) -> dict[str, Tensor]:
    return dict(change(name, value) for name, value in tensors.items())


BROKEN = {
    "another prefix": (lambda n, t: (n.replace("transformer.", "unet.", 1), t), "no tensor of the adapter belongs to"),
    "another architecture": (
        lambda n, t: (n.replace("blocks.", "layers.").replace("to_", "proj_"), t),
        "no tensor of the adapter belongs to",
    ),
    "another size": (
        lambda n, t: (n, torch.cat([t, t], 1) if "lora_A" in n else t),
        "the adapter does not fit this",
    ),
    "two ranks": (
        lambda n, t: (n, t[:2] if "lora_A" in n else t),
        "the adapter has two ranks in .*2 of lora_A and 4 of lora_B",
    ),
}


@pytest.mark.cell("an adapter that does not fit")
@pytest.mark.parametrize("kind", BROKEN)
def test_an_adapter_that_does_not_fit_is_an_error_and_leaves_nothing(
    with_lora: Case, kind: str, record_property
) -> None:
    case = with_lora
    change, message = BROKEN[kind]
    tensors = broken(load_file(case.adapters["a"] / "pytorch_lora_weights.safetensors"), change)
    pipeline = case.pipeline()
    before = predict(pipeline.transformer, case.family)
    with refused(message, record_property):
        pipeline.load_lora_weights(tensors, adapter_name="broken")
    assert torch.equal(predict(pipeline.transformer, case.family), before)
    pipeline.load_lora_weights(case.adapters["a"], adapter_name="broken")
    assert not torch.equal(predict(pipeline.transformer, case.family), before)


def test_an_adapter_that_is_not_finite_is_an_error_and_leaves_nothing(with_lora: Case, tmp_path: Path) -> None:
    case = with_lora
    tensors = broken(
        load_file(case.adapters["a"] / "pytorch_lora_weights.safetensors"), lambda n, t: (n, t * torch.nan)
    )
    pipeline = case.pipeline()
    before = predict(pipeline.transformer, case.family)
    with pytest.raises(ValueError, match=r"the adapter's transformer\..* has values that are not finite"):
        pipeline.load_lora_weights(tensors)
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match=r"the adapter's .*lora_A.* has values that are not finite"):
        pipeline.transformer.load_lora_adapter(str(tmp_path), use_safetensors=True)
    assert torch.equal(predict(pipeline.transformer, case.family), before)


def test_a_name_that_is_taken_is_not_called_another_architecture(with_lora: Case) -> None:
    pipeline = with_lora.pipeline()
    pipeline.load_lora_weights(with_lora.adapters["a"], adapter_name="a")
    with pytest.raises(ValueError, match=r"^Adapter name a already in use"):
        pipeline.load_lora_weights(with_lora.adapters["a"], adapter_name="a")


@pytest.mark.cell("save_pretrained with an adapter loaded")
def test_a_model_with_an_adapter_is_not_saved(case: Case, tmp_path: Path, record_property) -> None:
    pipeline = case.pipeline()
    if case.family != WITHOUT_LORA:
        pipeline.load_lora_weights(case.adapters["a"], adapter_name="a")
    else:
        get_peft_model(pipeline.transformer, config())
    for save in (pipeline.save_pretrained, pipeline.transformer.save_pretrained):
        with refused(r"not possible with an adapter loaded or fused \(.*unload_lora", record_property):
            save(tmp_path / "saved")
    with refused("dequantize is not possible with an adapter"):
        pipeline.transformer.dequantize()
    assert not (tmp_path / "saved").exists()


def test_an_adapter_that_has_a_bias_is_not_fused(tiny_sana: Path, packed_folder: Path) -> None:
    model = load_pipeline(packed_folder).transformer
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["to_out.0"], lora_bias=True))
    with pytest.raises(ValueError, match=r"\(lora_bias\) changes more than a low-rank pair"):
        wrapped.merge_adapter()


def test_an_adapter_that_is_not_finite_is_not_fused(packed_folder: Path) -> None:
    model = load_pipeline(packed_folder).transformer
    wrapped = get_peft_model(model, config())
    layer = next(module for module in wrapped.modules() if hasattr(module, "lora_A"))
    torch.nn.init.constant_(layer.lora_A["default"].weight, torch.nan)
    with pytest.raises(ValueError, match="'default' has values that are not finite"):
        wrapped.merge_adapter(safe_merge=True)
    assert all(each.delta_down is None for _, each in named_layers(model, PackedLayer))


def test_other_methods_compute_and_their_merge_is_refused(packed_folder: Path) -> None:
    """peft's own layers write into the weight when they merge."""
    from peft import LoKrConfig

    model = load_pipeline(packed_folder).transformer
    before = predict(model, "sana")
    wrapped = get_peft_model(model, LoKrConfig(r=2, target_modules=["to_q"], init_weights=False))
    assert not torch.equal(predict(wrapped, "sana"), before)
    with pytest.raises(ValueError, match="cannot be written"):
        wrapped.merge_adapter()


# other names of the same adapter


def test_kohya_names_of_flux(teacher_of: Callable[[str], Path], tmp_path: Path) -> None:
    """What diffusers converts reaches the packed model as it reaches the float one."""
    torch.manual_seed(0)
    tensors = {}
    for layer, out in {"img_attn_proj": 32, "img_attn_qkv": 96, "txt_attn_proj": 32}.items():
        name = f"lora_unet_double_blocks_0_{layer}"
        tensors |= {
            f"{name}.lora_down.weight": torch.randn(2, 32),
            f"{name}.lora_up.weight": torch.randn(out, 2),
            f"{name}.alpha": torch.tensor(2.0),
        }
    packed = convert_pipeline(str(teacher_of("flux")), tmp_path / "packed")
    states = []
    for pipeline in (load_pipeline(teacher_of("flux")), load_pipeline(packed)):
        before = predict(pipeline.transformer, "flux")
        pipeline.load_lora_weights(dict(tensors), adapter_name="a")
        states.append(get_peft_model_state_dict(pipeline.transformer, adapter_name="a"))
        assert not torch.equal(predict(pipeline.transformer, "flux"), before)
    assert states[0].keys() == states[1].keys()
    assert len(states[0]) == 10  # q, k, v and two outputs
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_control_lora_of_flux_widens_the_input(teacher_of: Callable[[str], Path], tmp_path: Path) -> None:
    """diffusers replaces the packed input layer by a wider float one; the adapter does the rest."""
    pipeline = load_pipeline(convert_pipeline(str(teacher_of("flux")), tmp_path / "packed"))
    width = pipeline.transformer.config.in_channels
    weight = pipeline.transformer.x_embedder.dequantize()
    tensors = {
        "transformer.x_embedder.lora_A.weight": torch.randn(2, 2 * width),
        "transformer.x_embedder.lora_B.weight": torch.randn(len(weight), 2),
    }
    pipeline.load_lora_weights(tensors, adapter_name="control")
    wide = pipeline.transformer.x_embedder.get_base_layer().weight
    assert wide.shape == (len(weight), 2 * width)
    assert torch.equal(wide[:, :width], weight)
    assert not wide[:, width:].any()
