"""diffusers: load and save packed checkpoints with plain ``from_pretrained``, quantize float ones on load.

``register`` puts the quantizer into diffusers' two tables; ``import fbqat_hub`` calls it.
"""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import CustomDtype
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from fbqat_hub.config import FBQATConfig
from fbqat_hub.hub.manifest import check_component
from fbqat_hub.integrations.checkpoint import (
    BUFFERS,
    check_shape,
    check_stored,
    described,
    packed_layers,
    quantized,
    refuse_incomplete,
    refuse_static,
)
from fbqat_hub.integrations.diffusers_models import is_fused_copy, refuse_adapters
from fbqat_hub.quantization.convert import named_layers, replace_layers
from fbqat_hub.quantization.packed import PackedLayer
from fbqat_hub.quantization.packing import NIBBLE
from fbqat_hub.quantization.sensitivity import rounding_errors, weight_sensitivity
from fbqat_hub.quantization.widths import WIDTHS, LayerSize, widths_of_average
from fbqat_hub.weights import StoredTensor, check_values, read_header, read_tensor


def register() -> None:
    """Make diffusers know ``quant_method: fbqat``. Safe to call again."""
    auto.AUTO_QUANTIZER_MAPPING.setdefault("fbqat", FBQATQuantizer)
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault("fbqat", FBQATConfig)


def attach(model: Any, config: FBQATConfig) -> None:
    """Make a model that was just converted one that ``save_pretrained`` writes as a packed checkpoint.

    What it writes as ``modules_to_not_convert`` are the sorted names of the quantizable layers that are not packed, and
    as ``weight_bits_by_module`` the widths of those that have not ``weight_bits``.

    Raises:
        ValueError: a layer was packed at another width than the config's.
    """
    for name, layer in named_layers(model, PackedLayer):
        shared = [other for other, module in model.named_modules(remove_duplicate=False) if module is layer]
        own = [bits for pattern, bits in config.weight_bits_by_module.items() if fnmatch.filter(shared, pattern)]
        if layer.weight_bits != (bits := [config.weight_bits, *own][-1]):
            raise ValueError(
                f"{name} is packed at {layer.weight_bits} bits, and the config has {bits}; move the model there with "
                "set_bit_width before convert, or give the config its width in weight_bits_by_module."
            )
    model.hf_quantizer = FBQATQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.hf_quantizer.write_config(model)


class FBQATQuantizer(DiffusersQuantizer):
    """Swaps linear layers for packed ones before loading, and checks every tensor that goes into them."""

    quantization_config: FBQATConfig
    requires_calibration = False

    def __init__(self, quantization_config: FBQATConfig, **kwargs: Any) -> None:
        # A copy: what is learned of one model is not written into the caller's config, which may serve another.
        super().__init__(FBQATConfig(**quantization_config.to_dict()), **kwargs)
        self._dtype = torch.float32
        self._keys: list[str] = []
        self._files: dict[str, tuple[Path, StoredTensor]] = {}  # tensor -> its file, and where it is in it
        self._layers: dict[str, PackedLayer] = {}
        self._floats: set[str] = set()
        if not self.pre_quantized:
            refuse_static(self.quantization_config)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to check: torch is all that is needed."""

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        self._dtype = torch_dtype or torch.float32
        return self._dtype

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> Any:
        return CustomDtype.INT4 if self.quantization_config.weight_bits <= NIBBLE else torch.int8

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
        self, model: nn.Module, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        if state_dict is not None:
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
            sizes[name] = LayerSize(layer.out_features, layer.in_features)
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

        The tensors come as ``state_dict`` of ``_process_model_before_weight_loading``, and are taken there.
        """
        if any(key.endswith(".weight_packed") for key in state_dict):
            raise ValueError("this file is packed already; load the folder that it belongs to with from_pretrained.")
        self.pre_quantized = False  # diffusers says True, whatever the file is
        refuse_static(self.quantization_config)
        return state_dict

    def _take(self, state_dict: dict[str, Tensor]) -> None:
        """Check every tensor of a file, quantize the weights of float ones, and keep scales from the loader's cast."""
        for key, value in list(state_dict.items()):
            name, _, tensor = key.rpartition(".")
            layer, place = self._layers.get(name), self._place(key)
            if layer is not None and tensor == "weight_packed":
                check_stored(layer, tensor, value, place)
            elif layer is not None and tensor in BUFFERS:
                # The loader would cast it to the model's dtype; scales stay fp32.
                check_stored(layer, tensor, value, place)
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
        self._layers, self._floats, self._keys, self._files = {}, set(), [], {}
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
        dtype = model.dtype
        replace_layers(model, {layer: layer.to_float().to(dtype) for _, layer in named_layers(model, PackedLayer)})
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
