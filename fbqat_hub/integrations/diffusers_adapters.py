"""diffusers' loading, fusing and unloading of adapters, where a model is packed.

What is wrong with an adapter is said before anything of it is loaded; a refusal leaves all models as they were. Each
function puts a few lines around one method of diffusers; ``registration`` calls those that begin with ``register``.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fbqat_hub.integrations.diffusers_models import fused_parts, is_packed_model
from fbqat_hub.integrations.wrapping import around
from fbqat_hub.lora import AdapterError, pairs_of
from fbqat_hub.quantization.convert import named_layers
from fbqat_hub.quantization.packed import PackedLayer
from fbqat_hub.text import names as listed
from fbqat_hub.weights import check_values

# what libraries raise for an adapter that they cannot use
_UNUSABLE = (RuntimeError, ValueError, LookupError, TypeError, AttributeError)
# the layer of FLUX that a control adapter makes wider, and its width's name in the config
_WIDENED, _WIDTH = "x_embedder", "in_channels"


def register_adapters() -> None:
    """Adapters of one model."""
    from diffusers.loaders.peft import PeftAdapterMixin

    around(PeftAdapterMixin, "load_lora_adapter", _load_adapter)
    around(PeftAdapterMixin, "fuse_lora", _fuse)
    around(PeftAdapterMixin, "unload_lora", _unload)


def register_lora_pipelines() -> None:
    """Adapters of the models of a pipeline."""
    from diffusers.loaders import lora_pipeline
    from diffusers.loaders.lora_base import LoraBaseMixin

    around(LoraBaseMixin, "fuse_lora", _fuse_pipeline)
    for loader in vars(lora_pipeline).values():
        own = isinstance(loader, type) and issubclass(loader, LoraBaseMixin) and loader is not LoraBaseMixin
        if own and "load_lora_weights" in vars(loader):
            around(loader, "load_lora_weights", _load_pipeline)
    flux = lora_pipeline.FluxLoraLoaderMixin
    around(flux, "_maybe_expand_transformer_param_shape_or_error_", _widen)
    around(flux, "_maybe_expand_lora_state_dict", _expand)


# loading


def _load_pipeline(original: Callable[..., None], pipeline: Any, *args: Any, **kwargs: Any) -> None:
    models = _models_of(pipeline)
    if not any(map(is_packed_model, models.values())):
        return original(pipeline, *args, **kwargs)
    with _unchanged_if_refused(type(pipeline).__name__, *models.values()):
        original(pipeline, *args, **kwargs)


def _load_adapter(
    original: Callable[..., None],
    model: Any,
    source: Any,
    prefix: str | None = "transformer",
    hotswap: bool = False,
    **kwargs: Any,
) -> None:
    """Check an adapter, for the text encoders of its pipeline too, and then load it.

    Raises:
        AdapterError: no tensor of it belongs to the model, half of a pair is missing, or it has other shapes or ranks,
            values that are not finite, or layers that are fused; the name is taken; or it cannot be swapped in.
    """
    pipeline = kwargs.get("_pipeline")
    models = _models_of(pipeline) | ({prefix: model} if prefix else {})
    if not is_packed_model(model) and not any(map(is_packed_model, models.values())):
        return original(model, source, prefix, hotswap, **kwargs)
    with _unchanged_if_refused(type(model).__name__, model):
        tensors = dict(source) if isinstance(source, Mapping) else _read(source, kwargs)
        for name, values in tensors.items():
            try:
                check_values(values, f"the adapter's {name}")
            except ValueError as error:
                raise AdapterError(str(error)) from None
        if prefix is None:
            _check_part(model, tensors, "", kwargs.get("adapter_name"), hotswap)
        else:
            _check_parts(model, tensors, prefix, models, kwargs.get("adapter_name"), hotswap)
        original(model, tensors, prefix, hotswap, **kwargs)
    return None


def _models_of(pipeline: Any) -> dict[str, nn.Module]:
    """What diffusers loads adapters into, by the first part of their tensors' names."""
    found = {name: getattr(pipeline, name, None) for name in getattr(pipeline, "_lora_loadable_modules", ())}
    return {name: model for name, model in found.items() if isinstance(model, nn.Module)}


def _read(source: Any, options: dict[str, Any]) -> dict[str, Tensor]:
    """As diffusers reads it; the options of reading are taken out, and what the file says of itself is put in."""
    from diffusers.loaders.lora_base import _fetch_state_dict

    place = ("weight_name", "use_safetensors", "local_files_only", "cache_dir", "proxies", "token", "revision")
    taken = {name: options.pop(name, None) for name in (*place, "subfolder", "metadata")}
    tensors, options["metadata"] = _fetch_state_dict(
        source,
        **taken,
        force_download=options.pop("force_download", False),
        user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
        allow_pickle=False,
    )
    return dict(tensors)


@contextmanager
def _unchanged_if_refused(what: str, *models: nn.Module) -> Iterator[None]:
    """On an error the models are what they were: modules, adapters, which are active, what is fused."""
    objects: list[Any] = [module for model in models for module in model.modules()]
    objects += [model.config for model in models if hasattr(model, "config")]
    plain = (dict, OrderedDict, list, set)
    attributes = [(vars(each), dict(vars(each))) for each in objects]
    contents = [(value, value.copy()) for _, own in attributes for value in own.values() if type(value) in plain]
    trained = [(each, each.requires_grad) for model in models for each in model.parameters()]
    try:
        yield
    except BaseException as error:
        for current, before in [*attributes, *contents]:
            current.clear()
            (current.extend if isinstance(current, list) else current.update)(before)
        for parameter, value in trained:
            parameter.requires_grad_(value)
        if isinstance(error, AdapterError | torch.OutOfMemoryError) or not isinstance(error, _UNUSABLE):
            raise
        said = " ".join(str(error).split())[:400].rstrip(".")
        raise AdapterError(
            f"diffusers could not load the adapter into this {what}: {said}. Nothing of it is loaded."
        ) from error


def _check_parts(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    prefix: str,
    models: Mapping[str, nn.Module],
    adapter: str | None,
    hotswap: bool,
) -> None:
    """Each part of an adapter against its model, before one of them is loaded."""
    found: dict[str, dict[str, Tensor]] = {part: {} for part in models}
    other = []
    for name, values in tensors.items():
        part, _, rest = name.partition(".")
        if part in found:
            found[part][rest] = values
        else:
            other.append(name)
    if not any(found.values()):
        raise _nothing_matches(model, f"{prefix}.", tensors)
    for part, own in found.items():
        if own and part != prefix and hotswap:
            raise AdapterError(f"the adapter has a part for {part}, which cannot be swapped; load it without hotswap.")
        if own:
            _check_part(models[part], own, f"{part}.", adapter, hotswap)
    if other:
        warnings.warn(
            f"{listed(other)} of the adapter are not loaded: diffusers loads what begins with "
            f"{' or '.join(f'{part}.' for part in found)} here.",
            stacklevel=2,
        )


def _check_part(
    model: nn.Module, tensors: Mapping[str, Tensor], prefix: str, adapter: str | None, hotswap: bool
) -> None:
    """One model's part of an adapter; names are without the prefix, which messages show."""
    taken = getattr(model, "peft_config", {})
    if adapter in taken and not hotswap:
        raise AdapterError(f"Adapter name {adapter} already in use in the model - please select a new adapter name.")
    tensors = _check_fits(model, tensors, prefix)
    if not hotswap:
        return
    if adapter not in taken:
        raise AdapterError(
            f"there is no adapter {adapter!r} to swap (loaded: {listed(taken) or 'none'}); load it without hotswap."
        )
    if any(adapter in layer.merged_adapters for layer in _tuner_layers(model)):
        raise AdapterError(f"adapter {adapter!r} is fused: call unfuse_lora(), then swap it.")
    from peft import get_peft_model_state_dict

    running = get_peft_model_state_dict(model, adapter_name=adapter)
    if more := [f"{prefix}{name}" for name in tensors if name not in running]:
        raise AdapterError(
            f"the adapter cannot be swapped in for {adapter!r}, which has no {listed(more)}; a hot-swap needs one of "
            "the same layers. Load it under a name of its own."
        )


def _check_fits(
    model: nn.Module, tensors: Mapping[str, Tensor], prefix: str, resized: Collection[str] = ()
) -> Mapping[str, Tensor]:
    """Names, pairs and shapes of an adapter against the layers of a model.

    Args:
        resized: layers whose width diffusers makes the adapter's.

    Returns:
        The tensors by the names that they get.

    Raises:
        AdapterError: as ``_load_adapter``.
    """
    tensors = _renamed(model, tensors)
    layers = {name.replace(".base_layer", ""): layer for name, layer in model.named_modules()}
    modules = {name.partition(".lora_")[0].partition(".lokr_")[0]: name for name in tensors}
    if not modules.keys() & layers:
        raise _nothing_matches(model, prefix, {f"{prefix}{name}": values for name, values in tensors.items()})
    for module in modules.keys() & layers:
        parent, _, own = module.rpartition(".")
        if own in fused_parts(layers[parent]):
            raise AdapterError(
                f"the projections of {parent} are fused, and an adapter of {own} would change nothing: call "
                "unfuse_qkv_projections(), then load it."
            )
    shapes = {name: tuple(values.shape) for name, values in tensors.items()}
    for module, (down, up) in pairs_of(shapes, "the adapter").items():
        layer = layers.get(module)
        if not isinstance(layer, nn.Linear | nn.Conv2d) or getattr(layer, "groups", 1) > 1 or module in resized:
            continue
        given, has = (up[0], down[1]), tuple(layer.weight.shape[:2])
        if given != has:
            raise AdapterError(
                f"the adapter does not fit this {type(model).__name__}: it has {prefix}{module} of {given[1]} inputs "
                f"and {given[0]} outputs, the model of {has[1]} and {has[0]}. It was made for another architecture or "
                "size."
            )
    return tensors


def _renamed(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of older spellings, as diffusers renames them."""
    from diffusers import ModelMixin
    from diffusers.utils import state_dict_utils

    if isinstance(model, ModelMixin):
        renamed: dict[str, Tensor] = state_dict_utils.convert_unet_state_dict_to_peft(dict(tensors))
        return renamed
    renamed = state_dict_utils.convert_state_dict_to_peft(state_dict_utils.convert_state_dict_to_diffusers(tensors))
    if hasattr(model, "text_model"):
        return renamed
    return {name.removeprefix("text_model."): values for name, values in renamed.items()}


def _nothing_matches(model: nn.Module, prefix: str, tensors: Mapping[str, Tensor]) -> AdapterError:
    example = next(name for name, each in model.named_modules() if isinstance(each, nn.Linear))
    if any(name.startswith("lora_unet_") or ".lora_down." in name for name in tensors):
        why = "diffusers does not translate kohya's names for this pipeline. Convert the file to diffusers' names."
    else:
        why = "It was made for another architecture, or needs another prefix."
    return AdapterError(
        f"no tensor of the adapter belongs to this {type(model).__name__}, so it would change nothing: it has "
        f"{listed(tensors, 3) or 'none'}; names here are like {prefix}{example.replace('.base_layer', '')}"
        f".lora_A.weight. {why}"
    )


def _tuner_layers(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


# fusing


def _fuse(
    original: Callable[..., None],
    model: Any,
    lora_scale: float = 1.0,
    safe_fusing: bool = False,
    adapter_names: list[str] | None = None,
) -> None:
    from fbqat_hub.integrations.peft import check_merge

    check_merge([model], adapter_names, safe_fusing)
    original(model, lora_scale, safe_fusing, adapter_names)


def _fuse_pipeline(
    original: Callable[..., None],
    pipeline: Any,
    components: list[str] | None = None,
    lora_scale: float = 1.0,
    safe_fusing: bool = False,
    adapter_names: list[str] | None = None,
    **kwargs: Any,
) -> None:
    from fbqat_hub.integrations.peft import check_merge

    models = [model for name, model in _models_of(pipeline).items() if name in (components or ())]
    check_merge(models, adapter_names, safe_fusing)
    original(pipeline, components, lora_scale, safe_fusing, adapter_names, **kwargs)


# control adapters of FLUX, which are of a wider input layer


def _widen(
    original: Callable[..., bool], cls: type, transformer: Any, lora_state_dict: Any = None, *args: Any, **kwargs: Any
) -> bool:
    """A control adapter may widen the input layer; where any other differs, it is an adapter of another model.

    The packed layer is kept, and put back when adapters are unloaded.
    """
    packed = dict(named_layers(transformer, PackedLayer))
    if not packed:
        return original(cls, transformer, lora_state_dict, *args, **kwargs)
    if lora_state_dict:
        own = {name.removeprefix("transformer."): values for name, values in lora_state_dict.items()}
        _check_fits(transformer, own, "transformer.", resized=[_WIDENED])
    widened = original(cls, transformer, lora_state_dict, *args, **kwargs)
    for name, layer in packed.items():
        if transformer.get_submodule(name) is not layer:
            vars(transformer)["_narrow_layer"] = layer
    transformer._overwritten_params = None  # of which diffusers makes a float layer
    return widened


def _expand(original: Callable[..., Any], cls: type, transformer: Any, lora_state_dict: Any) -> Any:
    """diffusers looks shapes up in the state dict, which has no ``weight`` of a packed layer."""
    return original(cls, _Described(transformer) if is_packed_model(transformer) else transformer, lora_state_dict)


class _Described:
    """A model whose state dict has each packed layer's logical weight as well."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def state_dict(self) -> dict[str, Tensor]:
        weights = {f"{name}.weight": layer.weight for name, layer in named_layers(self._model, PackedLayer)}
        return {**self._model.state_dict(), **weights}


def _unload(original: Callable[..., None], model: Any) -> None:
    """Put a packed input layer back that was made wider; not where that was fused, which stays as on a float model."""
    narrow = vars(model).pop("_narrow_layer", None)
    wide = getattr(model, _WIDENED, None)
    original(model)
    if narrow is not None and not getattr(wide, "merged", False):
        setattr(model, _WIDENED, narrow.to(model.get_submodule(_WIDENED).weight.device))
        setattr(model.config, _WIDTH, narrow.in_features)
