"""diffusers' models and pipelines, where they must know that a layer is packed.

Each function puts a few lines around one method of diffusers, for packed models only; ``registration`` calls it when
diffusers' module has been imported. Each may be called again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fbqat_hub.integrations.wrapping import around
from fbqat_hub.quantization.convert import matches, named_layers, quantizable
from fbqat_hub.quantization.packed import PackedLayer, PackedLinear
from fbqat_hub.text import names as listed

# what diffusers fuses -> what it fuses it of
_FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


def register_models() -> None:
    """Counting, saving and moving of a model."""
    from diffusers.models.modeling_utils import ModelMixin

    around(ModelMixin, "num_parameters", _count)
    around(ModelMixin, "save_pretrained", _save_model)
    around(ModelMixin, "to", _move)


def register_pipelines() -> None:
    """Saving of a pipeline."""
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    around(DiffusionPipeline, "save_pretrained", _save_pipeline)


def register_attention() -> None:
    """Fused projections of attention modules."""
    from diffusers.models.attention import AttentionModuleMixin

    around(AttentionModuleMixin, "fuse_projections", _fuse)


def register_attention_processor() -> None:
    """Fused projections of attention modules of the older class."""
    from diffusers.models.attention_processor import Attention

    around(Attention, "fuse_projections", _fuse)


def register_sd3() -> None:
    """Fused projections of SD3, which diffusers has a processor for in some models only."""
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    around(SD3Transformer2DModel, "fuse_qkv_projections", _fuse_sd3)


def refuse_adapters(model: nn.Module, what: str) -> None:
    """Raise ValueError if an adapter is loaded into, or fused with, a packed model, which ``what`` would lose or break.

    Args:
        what: the operation, as a sentence begins with it.
    """
    packed = dict(named_layers(model, PackedLayer))
    loaded = [name for name in packed if name.endswith(".base_layer")]
    fused = [name for name, layer in packed.items() if layer.delta_down is not None and name not in loaded]
    if fused:
        raise ValueError(
            f"{what} is not possible with an adapter fused whose own layers are unloaded ({listed(fused)}): it cannot "
            "be taken out any more. Load the base again; to ship a merged model use `fbqat convert --lora ADAPTER`."
        )
    if loaded:
        raise ValueError(
            f"{what} is not possible with an adapter loaded or fused ({listed(loaded)}). Call unfuse_lora() if it was "
            "fused, then unload_lora_weights() (a model: unload_lora()); save the adapter by itself, with "
            "save_lora_adapter() or save_lora_weights()."
        )


def is_packed_model(model: object) -> bool:
    """True of a module that has packed layers."""
    return isinstance(model, nn.Module) and next(named_layers(model, PackedLayer), None) is not None


# models


def _count(original: Callable[..., int], model: nn.Module, only_trainable: bool = False, *args: Any, **kw: Any) -> int:
    """Weights count as weights, not as the bytes that hold them."""
    count = original(model, only_trainable, *args, **kw)
    if only_trainable:
        return count
    layers = (layer for _, layer in named_layers(model, PackedLayer))
    return count + sum(layer.in_features * layer.out_features - layer.weight_packed.numel() for layer in layers)


def _move(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """``save_lora_adapter`` asks for ``to(dtype=None)``, which diffusers takes for a cast of a quantized model."""
    if "dtype" in kwargs and kwargs["dtype"] is None and is_packed_model(model):
        del kwargs["dtype"]
        if not args and not kwargs:
            return model
    return original(model, *args, **kwargs)


def _save_model(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    _refuse_saving(model, kwargs)
    return original(model, *args, **kwargs)


def _save_pipeline(original: Callable[..., Any], pipeline: Any, *args: Any, **kwargs: Any) -> Any:
    for component in pipeline.components.values():
        _refuse_saving(component, kwargs)
    return original(pipeline, *args, **kwargs)


def _refuse_saving(model: Any, options: Mapping[str, Any]) -> None:
    """Before anything is written."""
    if not is_packed_model(model):
        return
    if not options.get("safe_serialization", True):
        raise ValueError("packed weights are saved as safetensors only; leave safe_serialization=True.")
    refuse_adapters(model, "save_pretrained of a packed model")
    quantizer = getattr(model, "hf_quantizer", None)
    kept = quantizer.quantization_config.modules_to_not_convert if quantizer is not None else ["*"]
    if new := [name for name in quantizable(model) if not matches(name, kept)]:
        raise ValueError(
            f"save_pretrained of a packed model is not possible: {listed(new)} are float layers, which the config says "
            "nothing of, so that what is written could not be loaded. Take away what put them there (an IP-Adapter: "
            "unload_ip_adapter()), or load the base again."
        )


# attention


@torch.no_grad()
def _fuse(original: Callable[..., None], attention: Any, *args: Any, **kwargs: Any) -> None:
    """One packed layer in the place of two or three of the same input: the same codes and scales, one below the other.

    Raises:
        ValueError: an adapter is loaded, or the layers are not all packed, or round their input differently.
    """
    fused = "to_kv" if getattr(attention, "is_cross_attention", False) else "to_qkv"
    groups = {name: [getattr(attention, part, None) for part in _FUSED[name]] for name in (fused, "to_added_qkv")}
    found = {
        name: parts
        for name, parts in groups.items()
        if None not in parts and any(is_packed_model(part) for part in parts)
    }
    made = {name: _concatenated(name, parts) for name, parts in found.items()}
    original(attention, *args, **kwargs)
    for name, layer in made.items():
        if name in attention._modules:
            setattr(attention, name, layer)


def _fuse_sd3(original: Callable[..., None], model: Any) -> None:
    """Raise ValueError where diffusers' fused processor does not compute what the model does, of float models too.

    It takes no dual attention, at which the next forward would fail, and leaves out the normalisation of query and key.
    """
    lacking = [name for name in ("dual_attention_layers", "qk_norm") if model.config.get(name)]
    if lacking and is_packed_model(model):
        raise ValueError(
            f"fuse_qkv_projections is not possible with {' and '.join(lacking)}, which SD3.5 has: diffusers' fused "
            "processor computes without. Leave the projections as they are."
        )
    original(model)


def _concatenated(name: str, parts: Iterable[Any]) -> PackedLinear:
    layers = []
    for part, source in zip(parts, _FUSED[name], strict=True):
        if not isinstance(part, PackedLayer) or part.delta_down is not None:
            why = "is not packed, and others are" if isinstance(part, nn.Linear) else "has an adapter"
            raise ValueError(
                f"the projections cannot be fused into {name}: {source} {why}. Unload and unfuse adapters first; "
                "where a layer was left in float, leave the projections as they are."
            )
        layers.append(part)
    return PackedLinear.concatenated(layers)


def fused_parts(attention: nn.Module) -> tuple[str, ...]:
    """Names of the projections that an attention module does not use, since it has them fused."""
    from diffusers.models.attention import AttentionModuleMixin

    # the older class is not told when its projections are not fused any more; its processor is another then
    own = isinstance(attention, AttentionModuleMixin)
    used = own or type(getattr(attention, "processor", None)).__name__.startswith("Fused")
    if not used or not getattr(attention, "fused_projections", False):
        return ()
    return tuple(part for name, parts in _FUSED.items() if name in attention._modules for part in parts)


def is_fused_copy(key: str, state_dict: Mapping[str, Any]) -> bool:
    """True for a tensor of fused projections whose parts are in the state dict as well."""
    parent, _, _ = key.rpartition(".")
    parent, _, name = parent.rpartition(".")
    return name in _FUSED and f"{parent}.{_FUSED[name][-1]}.weight_packed" in state_dict
