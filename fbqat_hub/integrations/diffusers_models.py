"""diffusers' models and pipelines, where they must know that a layer is packed.

Each function puts a few lines around one method of diffusers, for packed models only; ``registration`` calls it when
diffusers' module has been imported. Each may be called again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fbqat_hub.integrations.wrapping import around
from fbqat_hub.quantization.convert import named_layers
from fbqat_hub.quantization.packed import PackedLayer, PackedLinear
from fbqat_hub.text import names as listed
from fbqat_hub.weights import check_values

# what diffusers fuses -> what it fuses it of
_FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
# first parts of the names in an adapter of a pipeline's other models
_OTHERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


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


def register_adapters() -> None:
    """Loading of adapters into a model."""
    from diffusers.loaders.peft import PeftAdapterMixin

    around(PeftAdapterMixin, "load_lora_adapter", _load_adapter)


def register_lora_pipelines() -> None:
    """Loading of adapters into a FLUX pipeline."""
    from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin

    around(FluxLoraLoaderMixin, "_maybe_expand_transformer_param_shape_or_error_", _widen)
    around(FluxLoraLoaderMixin, "_maybe_expand_lora_state_dict", _expand)


def adapted_layers(model: nn.Module) -> list[str]:
    """Names of the packed layers that an adapter's layer stands in the place of, or into which one was fused."""
    packed = dict(named_layers(model, PackedLayer))
    return [name for name, layer in packed.items() if name.endswith(".base_layer") or layer.delta_down is not None]


def refuse_adapters(model: nn.Module, what: str) -> None:
    """Raise ValueError if an adapter is loaded into, or fused with, a packed model, which ``what`` would lose or break.

    Args:
        what: the operation, as a sentence begins with it.
    """
    if found := adapted_layers(model):
        raise ValueError(
            f"{what} is not possible with an adapter loaded or fused ({listed(found)}). Call unfuse_lora() if it was "
            "fused, then unload_lora_weights() (a model: unload_lora()); save the adapter by itself, with "
            "save_lora_adapter() or save_lora_weights()."
        )


def _is_packed(model: object) -> bool:
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
    if "dtype" in kwargs and kwargs["dtype"] is None and _is_packed(model):
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
    if not _is_packed(model):
        return
    if not options.get("safe_serialization", True):
        raise ValueError("packed weights are saved as safetensors only; leave safe_serialization=True.")
    refuse_adapters(model, "save_pretrained of a packed model")


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
        name: parts for name, parts in groups.items() if None not in parts and any(_is_packed(part) for part in parts)
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
    if lacking and _is_packed(model):
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


def is_fused_copy(key: str, state_dict: Mapping[str, Any]) -> bool:
    """True for a tensor of fused projections whose parts are in the state dict as well."""
    parent, _, _ = key.rpartition(".")
    parent, _, name = parent.rpartition(".")
    return name in _FUSED and f"{parent}.{_FUSED[name][-1]}.weight_packed" in state_dict


# adapters


def _load_adapter(
    original: Callable[..., None], model: Any, source: Any, prefix: str | None = "transformer", **kwargs: Any
) -> None:
    """Never silent where an adapter leaves a packed model as it was.

    Raises:
        ValueError: no tensor of the adapter belongs to the model, its tensors have other shapes, or values that are not
            finite.
    """
    before = set(getattr(model, "peft_config", {}))
    taken = kwargs.get("adapter_name") in before and not kwargs.get("hotswap")  # diffusers says so
    if taken or not _is_packed(model):
        return original(model, source, prefix, **kwargs)
    tensors = dict(source) if isinstance(source, Mapping) else None
    if tensors is not None:
        for name, values in tensors.items():
            check_values(values, f"the adapter's {name}")
        _refuse_foreign(model, tensors, prefix)
    try:
        original(model, source, prefix, **kwargs)
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        _forget(model, set(getattr(model, "peft_config", {})) - before)
        raise ValueError(
            f"the adapter does not fit this {type(model).__name__}: {' '.join(str(error).split())[:400].rstrip('.')}. "
            "It was made for another architecture or size, or is damaged; nothing of it is loaded."
        ) from error
    if tensors is None and not kwargs.get("hotswap"):
        new = set(getattr(model, "peft_config", {})) - before
        if not new:
            raise _nothing_matches(model, prefix, {})
        try:
            for name, values in model.named_parameters():
                if any(f".{adapter}" in name for adapter in new):
                    check_values(values.detach(), f"the adapter's {name}")
        except ValueError:
            _forget(model, new)
            raise
    return None


def _lora_layers(model: nn.Module) -> list[Any]:
    from peft.tuners.lora.layer import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _forget(model: Any, adapters: Iterable[str]) -> None:
    """Take away what a failed load left, so that the next finds the model as it was."""
    for adapter in adapters:
        model.delete_adapters(adapter)
    if not getattr(model, "peft_config", None) and _lora_layers(model):
        model.unload_lora()
        model._hf_peft_config_loaded = False


def _refuse_foreign(model: Any, tensors: Mapping[str, Tensor], prefix: str | None) -> None:
    """Raise ValueError if the adapter names modules, and the model has none of them; diffusers loads those in part."""
    start = f"{prefix}." if prefix else ""
    ours = [key.removeprefix(start) for key in tensors if key.startswith(start)]
    modules = {key.partition(".lora")[0].partition(".lokr")[0] for key in ours}
    known = {name.replace(".base_layer", "") for name, _ in model.named_modules()}
    if not modules & known and (ours or not any(key.partition(".")[0] in _OTHERS for key in tensors)):
        raise _nothing_matches(model, prefix, tensors)


def _nothing_matches(model: Any, prefix: str | None, tensors: Mapping[str, Tensor]) -> ValueError:
    start = f"{prefix}." if prefix else ""
    example = next(name for name, _ in named_layers(model, PackedLayer)).replace(".base_layer", "")
    given = f"has {listed(list(tensors)[:3])}" if tensors else f"has no name that begins with {start!r}"
    return ValueError(
        f"no tensor of the adapter belongs to this {type(model).__name__}, so it would change nothing: it {given}; "
        f"names here are like {start}{example}.lora_A.weight. It was made for another architecture, or needs another "
        "prefix."
    )


def _widen(
    original: Callable[..., bool], cls: type, transformer: Any, lora_state_dict: Any = None, *args: Any, **kwargs: Any
) -> bool:
    """A control adapter may widen the input layer; where any other differs, it is an adapter of another model.

    Raises:
        ValueError: names that layer.
    """
    tensors = lora_state_dict or {}
    for name, layer in named_layers(transformer, PackedLayer):
        place = f"transformer.{name.replace('.base_layer', '')}"
        down, up = (tensors.get(f"{place}.{part}.weight") for part in ("lora_A", "lora_B"))
        if down is None or up is None or place.endswith("x_embedder"):
            continue
        given, has = (len(up), down.shape[1]), (layer.out_features, layer.in_features)
        if given != has:
            raise ValueError(
                f"the adapter does not fit this {type(transformer).__name__}: it has {place} of {given[1]} inputs and "
                f"{given[0]} outputs, the model of {has[1]} and {has[0]}. It was made for another size."
            )
    return original(cls, transformer, lora_state_dict, *args, **kwargs)


def _expand(original: Callable[..., Any], cls: type, transformer: Any, lora_state_dict: Any) -> Any:
    """diffusers looks shapes up in the state dict, which has no ``weight`` of a packed layer."""
    return original(cls, _Described(transformer) if _is_packed(transformer) else transformer, lora_state_dict)


class _Described:
    """A model whose state dict has each packed layer's logical weight as well."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def state_dict(self) -> dict[str, Tensor]:
        weights = {f"{name}.weight": layer.weight for name, layer in named_layers(self._model, PackedLayer)}
        return {**self._model.state_dict(), **weights}
