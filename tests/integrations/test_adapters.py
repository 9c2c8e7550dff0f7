"""An adapter that is refused leaves a packed pipeline exactly as it was, and so does one that is unloaded."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from fbqat_hub import FBQATConfig
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.quantization import PackedLayer, PackedLinear, named_layers
from fbqat_hub.training.ptq import convert_pipeline
from tests.integrations.tiny import predict, refused

FILE = "pytorch_lora_weights.safetensors"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def packed_of(teacher_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @functools.cache
    def make(family: str) -> Path:
        return convert_pipeline(str(teacher_of(family)), tmp_path_factory.mktemp("packed") / family)

    return make


def made(model: Any, seed: int = 0, prefix: str = "transformer", rank: int = 4, ends: Any = "to_q") -> Tensors:
    """An adapter of the layers of a model whose names end so."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in model.named_modules():
        if name.endswith(ends) and hasattr(layer, "out_features"):
            tensors[f"{prefix}.{name}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=random)
            tensors[f"{prefix}.{name}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=random)
    assert tensors
    return tensors


def tuner_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "merged_adapters")]


def state_of(pipeline: Any, family: str = "sana") -> dict[str, Any]:
    """All that a refusal must leave."""
    layers = tuner_layers(pipeline.transformer)
    return {
        "output": predict(pipeline.transformer, family).tolist(),
        "adapters": pipeline.get_list_adapters(),
        "active": pipeline.get_active_adapters(),
        "fused": [layer.merged_adapters[:] for layer in layers],
        "disabled": [layer.disable_adapters for layer in layers],
        "trained": [name for name, each in pipeline.transformer.named_parameters() if each.requires_grad],
        "modules": {name: type(each) for name, each in pipeline.transformer.named_modules()},
        "width": pipeline.transformer.config.get("in_channels"),
    }


def last(tensors: Tensors, end: str = "lora_A.weight") -> str:
    return [name for name in tensors if name.endswith(end)][-1]


# what is wrong with an adapter -> (tensors of a sound one -> those of this one, what is said of it)
WRONG: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "other names": (
        lambda t: {n.replace("to_q", "nowhere"): v for n, v in t.items()},
        "no tensor of the adapter belong",
    ),
    "other size": (
        lambda t: t | {last(t): torch.cat([t[last(t)]] * 2, 1)},
        r"it has transformer\.transformer_blocks\.1.* of 32 inputs and 16 outputs, the model of 16 and 16",
    ),
    "two ranks": (
        lambda t: t | {last(t): t[last(t)][:2]},
        "has two ranks in transformer_blocks.1.*: 2 of lora_A and 4",
    ),
    "NaN": (lambda t: t | {last(t): t[last(t)] * torch.nan}, "lora_A.weight has values that are not finite"),
    "no lora_A": (lambda t: {n: v for n, v in t.items() if n != last(t)}, "half of a low-rank pair of transformer_blo"),
    "no lora_B": (lambda t: {n: v for n, v in t.items() if "lora_A" in n}, "half of a low-rank pair of transformer_bl"),
    "kohya's names": (
        lambda t: {f"lora_unet_x.{end}": torch.ones(4, 4) for end in ("lora_down.weight", "lora_up.weight")},
        "does not translate kohya's names for this pipeline",
    ),
    "a text encoder's only": (
        lambda t: {n.replace("transformer.", "text_encoder.", 1): v for n, v in t.items()},
        r"it has text_encoder\.transformer_blocks",
    ),
}
SWAPPED = {
    **{name: each for name, each in WRONG.items() if name != "other names"},
    "other layers": (lambda t: {n.replace("to_q", "to_k"): v for n, v in t.items()}, "for 'a', which has no .*to_k"),
    "another method": (
        lambda t: t | {f"{last(t).partition('.lora')[0]}.lora_magnitude_vector": torch.ones(16)},
        "cannot be swapped in for 'a', which has no .*lora_magnitude_vector",
    ),
}


@pytest.mark.parametrize("source", ["tensors", "file"])
@pytest.mark.parametrize(("kind", "hotswap"), [*((kind, False) for kind in WRONG), *((kind, True) for kind in SWAPPED)])
def test_a_refused_adapter_changes_nothing(
    kind: str, hotswap: bool, source: str, packed_of: Callable[[str], Path], tmp_path: Path
) -> None:
    pipeline = load_pipeline(packed_of("sana"))
    sound = made(pipeline.transformer)
    for name in ("a", "b"):
        pipeline.load_lora_weights(made(pipeline.transformer, ord(name)), adapter_name=name)
    pipeline.set_adapters(["a", "b"], [0.5, 0.25])
    before = state_of(pipeline)
    edit, message = (SWAPPED if hotswap else WRONG)[kind]
    given: Any = edit(sound)
    if source == "file":
        save_file({name: values.contiguous() for name, values in given.items()}, tmp_path / FILE)
        given = str(tmp_path)
    for load in (pipeline, pipeline.transformer):
        options = {"use_safetensors": True} if source == "file" else {}
        method = load.load_lora_weights if load is pipeline else load.load_lora_adapter
        with refused(message):
            method(given, adapter_name="a" if hotswap else "c", hotswap=hotswap, **options)
        assert state_of(pipeline) == before
    pipeline.unload_lora_weights()
    assert torch.equal(
        predict(pipeline.transformer, "sana"), predict(load_pipeline(packed_of("sana")).transformer, "sana")
    )


@pytest.mark.parametrize("change", ["fused", "disabled"])
def test_a_refused_adapter_leaves_the_others_fused_or_disabled(change: str, packed_of: Callable[[str], Path]) -> None:
    pipeline = load_pipeline(packed_of("sana"))
    sound = made(pipeline.transformer)
    pipeline.load_lora_weights(dict(sound), adapter_name="a")
    pipeline.fuse_lora() if change == "fused" else pipeline.disable_lora()
    before = state_of(pipeline)
    for edit, message in WRONG.values():
        with refused(message):
            pipeline.load_lora_weights(edit(sound), adapter_name="b")
        assert state_of(pipeline) == before


def test_what_cannot_be_swapped(packed_of: Callable[[str], Path]) -> None:
    pipeline = load_pipeline(packed_of("sana"))
    base, sound = predict(pipeline.transformer, "sana"), made(pipeline.transformer)
    with refused(r"no adapter 'a' to swap \(loaded: none\); load it without hotswap"):
        pipeline.load_lora_weights(dict(sound), adapter_name="a", hotswap=True)
    assert pipeline.get_list_adapters() == {}
    pipeline.load_lora_weights(dict(sound), adapter_name="a")
    pipeline.fuse_lora()
    before = state_of(pipeline)
    with refused(r"adapter 'a' is fused: call unfuse_lora\(\), then swap it"):
        pipeline.load_lora_weights(made(pipeline.transformer, 1), adapter_name="a", hotswap=True)
    assert state_of(pipeline) == before
    pipeline.unfuse_lora()
    pipeline.load_lora_weights(made(pipeline.transformer, 1), adapter_name="a", hotswap=True)
    pipeline.unload_lora_weights()
    assert torch.equal(predict(pipeline.transformer, "sana"), base)


def test_what_a_library_refuses_changes_nothing(packed_of: Callable[[str], Path], monkeypatch) -> None:
    """What is not foreseen: the call fails when it has put its layers in."""
    import peft

    pipeline = load_pipeline(packed_of("sana"))
    sound = made(pipeline.transformer)
    pipeline.load_lora_weights(dict(sound), adapter_name="a")
    pipeline.fuse_lora()
    before = state_of(pipeline)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("of a new kind")

    monkeypatch.setattr(peft, "set_peft_model_state_dict", fail)
    with refused("diffusers could not load the adapter into this SanaTransformer2DModel: of a new kind. Nothing of it"):
        pipeline.load_lora_weights(made(pipeline.transformer, ends="to_k"), adapter_name="b")
    assert state_of(pipeline) == before


# fusing


def test_a_refused_fuse_fuses_nothing(packed_of: Callable[[str], Path]) -> None:
    pipeline = load_pipeline(packed_of("sana"))
    pipeline.load_lora_weights(made(pipeline.transformer), adapter_name="a")
    layers = tuner_layers(pipeline.transformer)
    torch.nn.init.constant_(layers[-1].lora_A["a"].weight, torch.nan)
    scaling = [layer.scaling["a"] for layer in layers]
    for part in (pipeline, pipeline.transformer):
        with refused("'a' has values that are not finite"):
            part.fuse_lora(lora_scale=0.5, safe_fusing=True)
    assert all(layer.delta_down is None for _, layer in named_layers(pipeline.transformer, PackedLayer))
    assert [layer.scaling["a"] for layer in layers] == scaling


def test_a_refused_fuse_of_two_adapters_fuses_neither(packed_of: Callable[[str], Path]) -> None:
    model = load_pipeline(packed_of("sana")).transformer
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="a")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_k"], use_dora=True), adapter_name="b")
    model.set_adapters(["a", "b"])
    with refused("'b' .* changes more than a low-rank pair"):
        model.fuse_lora(adapter_names=["a", "b"])
    assert all(layer.delta_down is None for _, layer in named_layers(model, PackedLayer))


def test_a_refused_merge_of_peft_merges_nothing(packed_of: Callable[[str], Path]) -> None:
    """Also where a layer in float is what is broken."""
    pipeline = load_pipeline(packed_of("sana"))
    wrapped = get_peft_model(pipeline.transformer, LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    layers = tuner_layers(wrapped)
    layers[-1].base_layer = torch.nn.Linear(16, 16)
    torch.nn.init.constant_(layers[-1].lora_B["default"].weight, torch.nan)
    for merge in (wrapped.merge_adapter, wrapped.merge_and_unload):
        with refused("'default' has values that are not finite"):
            merge(safe_merge=True)
        assert tuner_layers(wrapped) == layers
        assert not any(layer.merged for layer in layers)


# text encoders


def with_packed_encoder(folder: Path) -> Any:
    mapping = {"transformer": FBQATConfig(), "text_encoder": FBQATConfig(weight_bits=8)}
    return DiffusionPipeline.from_pretrained(
        folder, quantization_config=PipelineQuantizationConfig(quant_mapping=mapping)
    )


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_a_text_encoders_part_is_checked_before_anything_is_loaded(family: str, teacher_of) -> None:
    pipeline = with_packed_encoder(teacher_of(family))
    ours = made(pipeline.transformer, ends="attn.to_q")
    theirs = made(pipeline.text_encoder, 1, "text_encoder", ends=("q_proj", "k_proj"))
    before = state_of(pipeline, family)
    modules = {name: type(each) for name, each in pipeline.text_encoder.named_modules()}
    for edit, message in (
        (WRONG["NaN"][0], "text_encoder.* has values that are not finite"),
        (WRONG["no lora_A"][0], "half of a low-rank pair"),
        (
            lambda t: {n: torch.cat([v, v], 1) if "lora_A" in n else v for n, v in t.items()},
            "of 16 inputs and 8 outputs",
        ),
        (lambda t: {n.replace("self_attn", "nowhere"): v for n, v in t.items()}, "no tensor of the adapter belongs to"),
    ):
        with refused(message):
            pipeline.load_lora_weights({**ours, **edit(theirs)}, adapter_name="a")
        assert state_of(pipeline, family) == before
        assert {name: type(each) for name, each in pipeline.text_encoder.named_modules()} == modules
    pipeline.load_lora_weights({**ours, **theirs}, adapter_name="a")
    assert pipeline.get_list_adapters() == {"transformer": ["a"], "text_encoder": ["a"]}
    before = state_of(pipeline, family)
    with refused("a part for text_encoder, which cannot be swapped"):
        pipeline.load_lora_weights({**ours, **theirs}, adapter_name="a", hotswap=True)
    assert state_of(pipeline, family) == before


@pytest.mark.parametrize(("family", "part"), [("flux", "text_encoder_2"), ("sd3", "text_encoder_3"), ("sana", "vae")])
def test_what_diffusers_passes_over_is_said(family: str, part: str, packed_of: Callable[[str], Path]) -> None:
    pipeline = load_pipeline(packed_of(family))
    ours = made(pipeline.transformer)
    with pytest.warns(
        UserWarning, match=rf"^{part}\.x\.lora_A\.weight.* of the adapter are not loaded: diffusers loads"
    ):
        pipeline.load_lora_weights({**ours, f"{part}.x.lora_A.weight": torch.ones(2, 2)}, adapter_name="a")
    assert pipeline.get_list_adapters() == {"transformer": ["a"]}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* of the adapter are not loaded")
        pipeline.load_lora_weights(ours, adapter_name="b")


# FLUX


def test_a_control_adapter_is_unloaded_without_a_trace(packed_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = packed_of("flux")
    pipeline = load_pipeline(folder)
    pipeline.transformer.requires_grad_(False)  # as peft leaves it
    before, width = state_of(pipeline, "flux"), pipeline.transformer.config.in_channels
    layer = pipeline.transformer.x_embedder
    control = {
        "transformer.x_embedder.lora_A.weight": torch.randn(2, 2 * width),
        "transformer.x_embedder.lora_B.weight": torch.randn(layer.out_features, 2),
    }
    for reset in (False, True):
        pipeline.load_lora_weights(dict(control), adapter_name="control")
        assert pipeline.transformer.config.in_channels == 2 * width
        pipeline.unload_lora_weights(reset_to_overwritten_params=reset)
        assert pipeline.transformer.x_embedder is layer
        assert pipeline.transformer.config.in_channels == width
        assert state_of(pipeline, "flux") == before
    broken = control | {"transformer.x_embedder.lora_B.weight": torch.full((layer.out_features, 2), torch.nan)}
    with refused("has values that are not finite"):
        pipeline.load_lora_weights(broken, adapter_name="control")
    assert pipeline.transformer.x_embedder is layer
    assert state_of(pipeline, "flux") == before
    pipeline.save_pretrained(tmp_path / "saved")
    first, saved = (
        load_file(next((each / "transformer").glob("*.safetensors"))) for each in (folder, tmp_path / "saved")
    )
    assert first.keys() == saved.keys()
    assert torch.equal(
        predict(load_pipeline(tmp_path / "saved").transformer, "flux"), predict(pipeline.transformer, "flux")
    )


def test_a_model_is_not_saved_with_a_float_layer_in_the_place_of_a_packed_one(
    packed_of: Callable[[str], Path], tmp_path: Path
) -> None:
    pipeline = load_pipeline(packed_of("sana"))
    layer = pipeline.transformer.proj_out
    assert isinstance(layer, PackedLinear)
    pipeline.transformer.proj_out = layer.to_float()
    for part in (pipeline, pipeline.transformer):
        with refused("proj_out are float layers, which the config says nothing of"):
            part.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_an_adapter_of_fused_projections_is_refused(packed_of: Callable[[str], Path]) -> None:
    pipeline = load_pipeline(packed_of("flux"))
    tensors = made(pipeline.transformer)
    pipeline.transformer.fuse_qkv_projections()
    before = state_of(pipeline, "flux")
    with refused(r"projections of .*attn are fused, .* of to_q would change nothing: call unfuse_qkv_projections\(\)"):
        pipeline.load_lora_weights(dict(tensors), adapter_name="a")
    assert state_of(pipeline, "flux") == before
    pipeline.transformer.unfuse_qkv_projections()
    pipeline.load_lora_weights(dict(tensors), adapter_name="a")
    assert state_of(pipeline, "flux")["output"] != before["output"]


def test_kohya_names_that_diffusers_does_not_know(packed_of: Callable[[str], Path]) -> None:
    pipeline = load_pipeline(packed_of("flux"))
    name = "lora_unet_double_blocks_0_nowhere"
    tensors = {f"{name}.lora_{end}.weight": torch.ones(4, 4) for end in ("down", "up")}
    with refused("diffusers could not load the adapter into this FluxPipeline: Incompatible keys detected: .*nowhere"):
        pipeline.load_lora_weights(tensors | {f"{name}.alpha": torch.tensor(4.0)})
    assert pipeline.get_list_adapters() == {}
