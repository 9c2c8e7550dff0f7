"""diffusers: load and save packed checkpoints with plain ``from_pretrained``, quantize float ones on load.

``register`` puts the quantizer into diffusers' two tables; ``import fbqat_hub`` calls it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import CustomDtype
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from fbqat_hub.config import FBQATConfig
from fbqat_hub.quantization.convert import matches, named_layers, quantizable, scheme_for
from fbqat_hub.quantization.linear import FakeQuantizedLinear, PackedLinear, PackedPointwiseConv2d

_BUFFERS = ("weight_scale", "input_scale", "input_zero_point")


def register() -> None:
    """Make diffusers know ``quant_method: fbqat``. Safe to call again."""
    auto.AUTO_QUANTIZER_MAPPING.setdefault("fbqat", FBQATQuantizer)
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault("fbqat", FBQATConfig)


def attach(model: nn.Module, config: FBQATConfig) -> None:
    """Make a model that was just converted one that ``save_pretrained`` writes as a packed checkpoint.

    ``config.modules_to_not_convert`` becomes the sorted names of the quantizable layers that are not packed.
    """
    config.modules_to_not_convert = sorted(quantizable(model))
    model.register_to_config(quantization_config=config)
    model.hf_quantizer = FBQATQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = config.quant_method


def load_pipeline(source: str | Path, **options: Any) -> DiffusionPipeline:
    """``DiffusionPipeline.from_pretrained`` in float32, after checking that a local ``source`` is a pipeline.

    Args:
        source: folder, or Hub id.
        options: further arguments of ``from_pretrained``.

    Raises:
        ValueError: a folder without ``model_index.json``.
    """
    folder = Path(source)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ValueError(f"{source} is not a diffusers pipeline: it has no model_index.json. Give a pipeline's folder.")
    return DiffusionPipeline.from_pretrained(str(source), **{"torch_dtype": torch.float32, **options})


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """Save a whole pipeline into ``folder``, which may hold other files; ``model_index.json`` comes last.

    Unlike ``save_pretrained`` it leaves nothing that looks whole when it is interrupted, and it leaves out
    ``_name_or_path``, which leaks local paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    for path in [partial / "model_index.json", *partial.glob("*/config.json")]:
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "model_index.json"):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    partial.rmdir()


class FBQATQuantizer(DiffusersQuantizer):
    """Swaps linear layers for packed ones before loading, and checks every tensor that goes into them."""

    quantization_config: FBQATConfig
    requires_calibration = False

    def __init__(self, quantization_config: FBQATConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._loaded_keys: set[str] = set()
        self._layers: dict[str, PackedLinear] = {}
        if not self.pre_quantized and quantization_config.activation_range == "static":
            raise ValueError(
                "activation_range is 'static', which quantize-on-load cannot calibrate; use 'per_token', or train with "
                "`fbqat train`, which does."
            )

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to check: torch is all that is needed."""

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        return torch.float32 if torch_dtype is None else torch_dtype

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> Any:
        return CustomDtype.INT4

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self._loaded_keys = set(loaded_keys)
        return loaded_keys

    def _process_model_before_weight_loading(
        self, model: nn.Module, device_map: Any = None, keep_in_fp32_modules: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        layers = quantizable(model)
        skip = config.modules_to_not_convert
        for pattern in skip:
            if not any(matches(name, [pattern]) for name in layers):
                examples = ", ".join(list(layers)[:3])
                raise ValueError(
                    f"modules_to_not_convert has {pattern!r}, which matches no linear layer or 1x1 convolution of "
                    f"{type(model).__name__}; there are e.g. {examples}."
                )
        for name, layer in layers.items():
            if matches(name, skip):
                continue
            kind = PackedPointwiseConv2d if isinstance(layer, nn.Conv2d) else PackedLinear
            out_features, in_features = layer.weight.shape[:2]
            packed = kind(
                in_features,
                out_features,
                bias=layer.bias is not None,
                activation_scheme=scheme_for(name, config.activation_scheme(), config.module_overrides),
                group_size=config.group_size,
                dtype=layer.weight.dtype,
                device="meta",
            )
            model.set_submodule(name, packed)
            self._layers[name] = packed
        config.modules_to_not_convert = sorted(set(layers) - set(self._layers))
        if self.pre_quantized:
            self._refuse_wrong_keys(model)

    def _refuse_wrong_keys(self, model: nn.Module) -> None:
        expected = set(model.state_dict())
        missing, extra = sorted(expected - self._loaded_keys), sorted(self._loaded_keys - expected)
        problems = [f"missing tensors: {', '.join(missing[:5])}" + _more(missing)] if missing else []
        problems += [f"extra tensors: {', '.join(extra[:5])}" + _more(extra)] if extra else []
        if problems:
            raise ValueError(
                f"this is not a whole {type(model).__name__} checkpoint of format 1: {'; '.join(problems)}. "
                "Download or convert it again."
            )

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        state_dict = dict(state_dict)
        for key in list(state_dict):
            name, _, tensor = key.rpartition(".")
            layer = self._layers.get(name)
            if layer is None:
                continue
            if not self.pre_quantized and tensor == "weight":
                self._quantize(layer, name, state_dict)
            elif tensor == "weight_packed":
                _check_tensor(key, state_dict[key], torch.uint8, layer.weight_packed.shape)
            elif tensor in _BUFFERS:
                # The loader would cast it to the model's dtype; scales stay fp32.
                value = state_dict.pop(key)
                _check_tensor(key, value, torch.int32 if tensor == "input_zero_point" else torch.float32)
                self._set_buffer(layer, key, value)
        return state_dict

    def _quantize(self, layer: PackedLinear, name: str, state_dict: dict[str, Tensor]) -> None:
        weight = state_dict.pop(f"{name}.weight")
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name}.weight has values that are not finite; it cannot be quantized.")
        source: nn.Linear | nn.Conv2d = nn.Linear(1, 1, bias=False)
        source.weight = nn.Parameter(weight, requires_grad=False)
        scheme = self.quantization_config.weight_scheme()
        packed = PackedLinear.from_fake_quantized(FakeQuantizedLinear(source, scheme, layer.activation_scheme))
        state_dict[f"{name}.weight_packed"] = packed.weight_packed.data
        self._set_buffer(layer, f"{name}.weight_scale", packed.weight_scale)

    @staticmethod
    def _set_buffer(layer: PackedLinear, key: str, value: Tensor) -> None:
        buffer = key.rpartition(".")[2]
        expected = getattr(layer, buffer)
        if value.shape != expected.shape:
            raise ValueError(f"{key} has shape {tuple(value.shape)}; this model needs {tuple(expected.shape)}.")
        if value.is_floating_point() and not bool((torch.isfinite(value) & (value > 0)).all()):
            raise ValueError(f"{key} has scales that are not finite and above 0; the file is damaged.")
        layer._buffers[buffer] = value.clone()

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        if self.pre_quantized:
            return missing_keys
        ours = {f"{name}.{tensor}" for name in self._layers for tensor in ("weight_packed", "weight_scale")}
        return [key for key in missing_keys if key not in ours]

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
        name = param_name.rpartition(".")[0]
        layer = model.get_submodule(name)
        assert isinstance(layer, PackedLinear)
        layer.weight_packed = nn.Parameter(param_value.to(target_device), requires_grad=False)
        if unexpected_keys is not None and f"{name}.weight" in unexpected_keys:
            unexpected_keys.remove(f"{name}.weight")

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self._layers, self._loaded_keys = {}, set()
        return model

    def _dequantize(self, model: Any) -> Any:
        for name, layer in list(named_layers(model, PackedLinear)):
            model.set_submodule(name, layer.to_float())
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


def _check_tensor(key: str, value: Tensor, dtype: torch.dtype, shape: torch.Size | None = None) -> None:
    if value.dtype != dtype:
        raise ValueError(f"{key} is {value.dtype}; format 1 stores it as {dtype}.")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{key} has shape {tuple(value.shape)}; this model needs {tuple(shape)}.")


def _more(names: list[str]) -> str:
    return f" and {len(names) - 5} more" if len(names) > 5 else ""
