"""diffusers: load and save packed checkpoints with plain ``from_pretrained``, quantize float ones on load.

``register`` puts the quantizer into diffusers' two tables; ``import fbqat_hub`` calls it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fbqat_hub.config import FBQATConfig, is_packed
from fbqat_hub.hub.manifest import check_component
from fbqat_hub.integrations.checkpoint import (
    attach_quantizer,
    check_shape,
    described,
    packed_layers,
    quantized,
    refuse_incomplete,
    refuse_static,
)
from fbqat_hub.integrations.diffusers_models import is_fused_copy, refuse_adapters
from fbqat_hub.integrations.wrapping import around
from fbqat_hub.quantization.convert import named_layers, quantizable, replace_layers
from fbqat_hub.quantization.packed import BUFFERS, PackedLayer
from fbqat_hub.quantization.sensitivity import rounding_errors, weight_sensitivity
from fbqat_hub.quantization.widths import WIDTHS, widths_of_average
from fbqat_hub.weights import StoredTensor, check_values, read_header, read_tensor


def register() -> None:
    """Make diffusers know ``quant_method: fbqat``. Safe to call again."""
    auto.AUTO_QUANTIZER_MAPPING["fbqat"] = FBQATDiffusersQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["fbqat"] = FBQATConfig


def register_single_file() -> None:
    """Make ``from_single_file`` read packed weights. Safe to call again."""
    from diffusers.loaders.single_file_model import FromOriginalModelMixin

    around(FromOriginalModelMixin, "from_single_file", _from_single_file)


def attach(model: Any, config: FBQATConfig) -> None:
    """As `attach_quantizer`, of a model of diffusers."""
    attach_quantizer(model, FBQATDiffusersQuantizer(config, pre_quantized=True))


class _StoredConfig(FBQATConfig):
    """The config of a packed model, read from its folder."""


def _from_single_file(original: Callable[..., Any], cls: Any, source: Any = None, **options: Any) -> Any:
    """Packed weights in one file are read as the config of their folder says, which the file itself does not.

    Raises:
        ValueError: ``source`` is packed, and ``config`` does not name the folder of a packed model.
    """
    if options.get("quantization_config") is None:
        folder = options.get("config")
        stored = _stored_config(cls, folder, options) if isinstance(folder, str) else None
        if stored is None and _is_packed_file(source):
            raise ValueError(_NO_CONFIG)
        options["quantization_config"] = stored
    return original(cls, source, **options)


def _stored_config(cls: Any, folder: str, options: Mapping[str, Any]) -> _StoredConfig | None:
    """The config in the folder or repository of a packed model, of others None."""
    names = ("subfolder", "token", "local_files_only", "cache_dir")
    place = {name: options[name] for name in names if name in options}
    written = cls.load_config(folder, revision=options.get("config_revision"), **place)
    return _StoredConfig(**written["quantization_config"]) if is_packed(written) else None


_NO_CONFIG = (
    "this file is packed already, and says nothing of how: leave out quantization_config, and give config=, the folder "
    "or Hub id that it belongs to (with subfolder=), or load that with from_pretrained."
)


def _is_packed_file(source: Any) -> bool:
    """Of a state dict, or of a safetensors file here; another file is diffusers' to read, or to refuse."""
    keys: Iterable[str] = source if isinstance(source, Mapping) else ()
    if isinstance(source, str | Path) and Path(source).is_file():
        with suppress(SafetensorError), safe_open(source, framework="pt") as file:
            keys = file.keys()
    return any(key.endswith(".weight_packed") for key in keys)


class FBQATDiffusersQuantizer(DiffusersQuantizer):
    """Swaps linear layers for packed ones before loading, and checks every tensor that goes into them.

    A layer that the model's class keeps in fp32 (``_keep_in_fp32_modules``) is packed as well; its bias, and what it is
    to other libraries, is fp32.
    """

    quantization_config: FBQATConfig
    requires_calibration = False
    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: FBQATConfig, **kwargs: Any) -> None:
        self._of_folder = isinstance(quantization_config, _StoredConfig)
        # A copy: what is learned of one model is not written into the caller's config, which may serve another.
        super().__init__(FBQATConfig(**quantization_config.to_dict()), **kwargs)
        self._dtype = torch.float32
        self._keys: list[str] = []
        self._files: dict[str, tuple[Path, StoredTensor]] = {}  # tensor -> its file, and where it is in it
        self._layers: dict[str, PackedLayer] = {}
        self._floats: set[str] = set()
        self._hidden: dict[str, Tensor] = {}  # of a packed single file
        if not self.pre_quantized:
            refuse_static(self.quantization_config)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to check: torch is all that is needed."""

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        self._dtype = torch_dtype or torch.float32
        return self._dtype

    def get_special_dtypes_update(self, model: nn.Module, torch_dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Of scales, so that an automatic device map counts them as the 4 bytes that they are."""
        own = {name: value.dtype for name, value in model.named_buffers() if self.keeps_dtype(name)}
        return {**super().get_special_dtypes_update(model, torch_dtype), **own}

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        files = [Path(file) for file in checkpoint_files]
        others = [file for file in files if file.suffix != ".safetensors"]
        if self.pre_quantized and others:
            raise ValueError(f"{others[0]} is no safetensors file; packed checkpoints are stored in these only.")
        if files:
            check_component(files[0].parent)
        self._files = {
            key: (file, stored) for file in files if file not in others for key, stored in read_header(file).items()
        }
        if len(files) > 1 and not others:
            loaded_keys[:] = self._files  # what the shards hold, whatever their index says
        self._keys = loaded_keys  # the loader's own list: it compares with it after the layers were swapped
        return loaded_keys

    def _process_model_before_weight_loading(
        self,
        model: nn.Module,
        state_dict: dict[str, Tensor] | None = None,
        keep_in_fp32_modules: Iterable[str] = (),
        **kwargs: Any,
    ) -> None:
        for name, layer in quantizable(model).items():
            if not set(name.split(".")).isdisjoint(keep_in_fp32_modules):
                layer.to(torch.float32)
        if state_dict is not None:
            for key in self._hidden:
                state_dict.pop(key.removesuffix("_packed"), None)
            state_dict.update(self._hidden)
            self._keys = list(state_dict)
        self._floats = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        self._layers = packed_layers(model, self.quantization_config)
        self._refuse_wrong_keys(model)
        if (average_bits := self.quantization_config.average_bits) is not None:
            if self.pre_quantized:
                raise ValueError("the checkpoint's config has average_bits, which says nothing of its layers' widths.")
            self._choose_widths(average_bits, state_dict)
            self._layers = packed_layers(model, self.quantization_config)
        for name, packed in self._layers.items():
            model.set_submodule(name, packed)
        if not self.pre_quantized:
            ours = {f"{name}.weight" for name in self._layers}
            self._keys[:] = [key for key in self._keys if key not in ours]
            self._keys += [f"{name}.{tensor}" for name in self._layers for tensor in ("weight_packed", "weight_scale")]
        if state_dict is not None:
            self._take(state_dict)

    def _choose_widths(self, average_bits: float, state_dict: dict[str, Tensor] | None) -> None:
        """Give the config widths of the average that it asks for, by the weights alone. All of them are read once more.

        Args:
            state_dict: all tensors, where there are no files.
        """
        scores, sizes = {}, {}
        names_of: dict[int, str] = {}
        for name, layer in self._layers.items():
            if id(layer) in names_of:  # shared: its first name is enough
                continue
            names_of[id(layer)] = name
            if state_dict is None and f"{name}.weight" not in self._files:
                raise ValueError("average_bits compares all weights before one is packed; give a model in safetensors.")
            weight = self._float_weight(f"{name}.weight", state_dict or {})
            self._check_weight(layer, name, weight)
            errors = rounding_errors(weight, self.quantization_config.weight_scheme(), WIDTHS)
            scores[name] = weight_sensitivity(weight, errors)
            sizes[name] = layer.out_features * layer.in_features
        chosen = widths_of_average(scores, sizes, average_bits)
        self.quantization_config = self.quantization_config.with_widths(chosen)

    def _float_weight(self, key: str, state_dict: dict[str, Tensor]) -> Tensor:
        """Read from its file, if it has one: the loader's tensors map the file, and each page read would stay."""
        return self.read(key) if key in self._files else state_dict[key]

    def read(self, key: str) -> Tensor:
        """A tensor of the float files, not checked; what conversion changes of it, a subclass does here."""
        return read_tensor(*self._files[key])

    def _check_weight(self, layer: PackedLayer, name: str, weight: Tensor) -> None:
        check_shape(layer, name, weight.shape)
        check_values(weight, self._place(f"{name}.weight"))

    def _refuse_wrong_keys(self, model: nn.Module) -> None:
        """Compare what is stored with what the model, whose layers are still float, will hold."""
        expected = set(model.state_dict())
        harmless: list[str] = []
        if self.pre_quantized:
            expected -= {f"{name}.weight" for name in self._layers}
            expected |= {f"{name}.{tensor}" for name, layer in self._layers.items() for tensor in layer.state_dict()}
        else:
            harmless = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
        missing = sorted(expected - set(self._keys))
        extra = sorted(set(self._keys) - expected)
        extra = [key for key in extra if not any(re.search(pattern, key) for pattern in harmless)]
        refuse_incomplete(model, missing, extra, packed=self.pre_quantized)

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self._layers:
            return self._single_file(state_dict)
        state_dict = dict(state_dict)
        self._take(state_dict)
        return state_dict

    def _single_file(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """What ``from_single_file`` asks first, before it has renamed the tensors and made a model.

        The tensors come as ``state_dict`` of ``_process_model_before_weight_loading``, and are taken there. If their
        names are not the float model's, diffusers takes them for those of another program, and renames them; so what a
        packed file has of its own is hidden until then.
        """
        packed = _is_packed_file(state_dict)
        if packed and not self._of_folder:
            raise ValueError(_NO_CONFIG)
        if self._of_folder and not packed:
            raise ValueError(
                "config= is that of a packed model, and the file is not packed; give quantization_config=, or the "
                "config of the float model."
            )
        self.pre_quantized = packed  # diffusers says True, whatever the file is
        if not packed:
            refuse_static(self.quantization_config)
            return state_dict
        own = ("weight_packed", *BUFFERS)
        self._hidden = {key: value for key, value in state_dict.items() if key.rpartition(".")[2] in own}
        weights = (key.removesuffix("_packed") for key in self._hidden if key.endswith("_packed"))
        rest = {key: value for key, value in state_dict.items() if key not in self._hidden}
        return rest | dict.fromkeys(weights, torch.empty(0))

    def _take(self, state_dict: dict[str, Tensor]) -> None:
        """Check every tensor of a file, quantize the weights of float ones, and keep scales from the loader's cast."""
        for key, value in list(state_dict.items()):
            name, _, tensor = key.rpartition(".")
            layer, place = self._layers.get(name), self._place(key)
            if layer is not None and tensor == "weight_packed":
                layer.check_stored(tensor, value, place)
            elif layer is not None and tensor in BUFFERS:
                # The loader would cast it to the model's dtype; scales stay fp32.
                layer.check_stored(tensor, value, place)
                layer._buffers[tensor] = state_dict.pop(key).clone()
            else:
                if key in self._floats and not value.is_floating_point():
                    raise ValueError(f"{place} is {value.dtype}; a float tensor is needed here.")
                if layer is not None and tensor == "weight":
                    self._quantize(layer, name, state_dict)
                    continue
                check_values(value, place)
                if value.dtype.is_floating_point and value.dtype.itemsize == 1:  # float8: nothing computes in it
                    state_dict[key] = value.to(self._dtype)

    def keeps_dtype(self, name: str) -> bool:
        """True of a tensor of a packed layer that is stored as docs/format.md has it, whatever the model's dtype."""
        layer, _, tensor = name.rpartition(".")
        return layer in self._layers and tensor in ("weight_packed", *BUFFERS)

    def packed(self, key: str) -> dict[str, Tensor]:
        """What a tensor of the float files becomes: read, checked and, if it is a packed layer's weight, quantized.

        After ``preprocess_model``. Nothing is kept in the model.
        """
        name, _, tensor = key.rpartition(".")
        if name not in self._layers or tensor != "weight":
            return self.maybe_update_state_dict({key: self.read(key)})
        layer = self._layers[name]
        empty = layer.weight_scale
        packed = self.maybe_update_state_dict({key: torch.empty(0, dtype=self._files[key][1].dtype)})
        packed[f"{name}.weight_scale"], layer.weight_scale = layer.weight_scale, empty
        return packed

    def _place(self, key: str) -> str:
        return f"{self._files[key][0]}: {key}" if key in self._files else key

    def _quantize(self, layer: PackedLayer, name: str, state_dict: dict[str, Tensor]) -> None:
        weight = self._float_weight(f"{name}.weight", state_dict)
        del state_dict[f"{name}.weight"]
        self._check_weight(layer, name, weight)
        packed, layer.weight_scale = quantized(layer, name, weight, self.quantization_config)
        state_dict[f"{name}.weight_packed"] = packed

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        return param_name.endswith(".weight_packed") and param_name.rpartition(".")[0] in self._layers

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        layer = model.get_submodule(param_name.rpartition(".")[0])
        assert isinstance(layer, PackedLayer)
        layer.weight_packed = nn.Parameter(param_value.to(target_device), requires_grad=False)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self._layers, self._floats, self._keys, self._files, self._hidden = {}, set(), [], {}, {}
        self.write_config(model)  # from_single_file does not
        return model

    def write_config(self, model: Any) -> None:
        """Put the config, with the layers left in float and all widths by name, where ``save_pretrained`` finds it."""
        self.quantization_config = described(model, self.quantization_config)
        model.register_to_config(quantization_config=self.quantization_config)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        # fused projections are stored as what they were fused of; diffusers_models refuses other forms than safetensors
        return {key: value for key, value in state_dict.items() if not is_fused_copy(key, state_dict)}, {}

    def _dequantize(self, model: Any) -> Any:
        refuse_adapters(model, "dequantize")
        layers = [layer for _, layer in named_layers(model, PackedLayer)]
        replace_layers(model, {layer: layer.to_float().to(layer.weight.dtype) for layer in layers})
        kept = {key: value for key, value in model._internal_dict.items() if key != "quantization_config"}
        model._internal_dict = FrozenDict(kept)
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True
