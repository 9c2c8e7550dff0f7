"""transformers: text encoders of 3 to 8 bits by plain ``from_pretrained`` and ``save_pretrained``.

``registration`` calls ``register`` when transformers' quantizers have been imported.

Without this package transformers only warns of an unknown ``quant_method`` and fills the layers with random numbers. So
a saved config has ``transformers_weights``, the field for the name of the weight file, which transformers checks before
it opens one: what it says there is ``NOTICE``, and the error that transformers raises quotes it. With this package the
field is taken away as the config is read.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers import auto as tables
from transformers.quantizers.base import HfQuantizer
from transformers.utils.versions import require_version

from fbqat_hub.checked import one_of
from fbqat_hub.components import Component, quiet, read_index
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
from fbqat_hub.integrations.diffusers_models import refuse_adapters
from fbqat_hub.integrations.wrapping import around
from fbqat_hub.pipelines import Writer
from fbqat_hub.quantization.convert import matches, named_layers, quantizable, replace_layers
from fbqat_hub.quantization.packed import BUFFERS, PackedLayer
from fbqat_hub.untrusted import read_json
from fbqat_hub.weights import StoredTensor, check_finite, check_values, read_header, read_tensor

# name -> bits of weights and of activations; 32 is float
TEXT_ENCODERS = {"w8a8": (8, 8), "w8": (8, 32), "w4a8": (4, 8), "w4": (4, 32)}

# The oldest version that this was tried with; denoisers work with older ones.
_TRANSFORMERS = "5.12"
NOTICE = (
    "the weights of this model are packed by fbqat_hub, without which they cannot be read. Run: pip install fbqat-hub, "
    "and in Python: import fbqat_hub, before the model is loaded"
)


def register() -> None:
    """Make transformers know ``quant_method: fbqat``, and write ``NOTICE``. Safe to call again."""
    tables.AUTO_QUANTIZER_MAPPING.setdefault("fbqat", FBQATHfQuantizer)
    tables.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault("fbqat", FBQATConfig)
    around(PreTrainedConfig, "to_diff_dict", _with_notice)
    around(PreTrainedConfig, "from_dict", _without_notice)


def _with_notice(original: Callable[[Any], dict[str, Any]], config: Any) -> dict[str, Any]:
    plain = original(config)
    if is_packed(plain):
        plain["transformers_weights"] = NOTICE
    return plain


def _without_notice(original: Callable[..., Any], kind: type, plain: dict[str, Any], **kwargs: Any) -> Any:
    given = plain.get("transformers_weights")
    if is_packed(plain) and not str(given).endswith((".safetensors", ".safetensors.index.json")):
        # a sentence, of this version or another
        plain = {key: value for key, value in plain.items() if key != "transformers_weights"}
    return original(kind, plain, **kwargs)


def text_encoder_writers(folder: Path, precision: str | None) -> dict[str, Writer]:
    """Part -> what writes it quantized, for each text encoder of a pipeline's folder; none where precision is None.

    Raises:
        ValueError: an unknown precision, no text encoder, or one that is quantized already.
    """
    if precision is None:
        return {}
    one_of("text_encoders", precision, TEXT_ENCODERS)
    parts = {name: part for name, part in read_index(folder)[1].items() if name.startswith("text_encoder")}
    if not parts:
        raise ValueError(f"{folder} has no text encoder; leave out the text encoders' precision.")
    for part in parts.values():
        if "quantization_config" in read_json(part.folder / "config.json"):
            raise ValueError(f"{part.folder} is quantized already; give a pipeline with full-precision text encoders.")
    return dict.fromkeys(parts, functools.partial(_save_text_encoder, precision))


def _save_text_encoder(
    precision: str, part: Component, target: Path, variant: str | None, done: Callable[[int], None] | None
) -> None:
    """Quantize a text encoder as it is read, and save it."""
    config = text_encoder_config(part, precision, variant)
    with quiet():
        part.load(variant=variant, quantization_config=config).save_pretrained(target)
    if done:
        done(sum(path.stat().st_size for path in part.weights(variant).files))


def text_encoder_config(part: Component, precision: str, variant: str | None = None) -> FBQATConfig:
    """How a text encoder is quantized at a precision of ``TEXT_ENCODERS``.

    Layers that its class keeps in fp32, for their numbers leave the range of float16 (``wo`` of T5), take activations
    in float whatever the precision is.
    """
    weight_bits, activation_bits = TEXT_ENCODERS[precision]
    wide = [f"*.{name}" for name in part.kind._keep_in_fp32_modules or ()]
    layers = quantizable(part.load(variant=variant, meta=True))
    return FBQATConfig(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        module_overrides={each: {"bits": 32} for each in wide if any(matches(layer, [each]) for layer in layers)},
    )


def attach(model: Any, config: FBQATConfig) -> None:
    """As `attach_quantizer`, of a model of transformers."""
    attach_quantizer(model, FBQATHfQuantizer(config, pre_quantized=True))


class FBQATHfQuantizer(HfQuantizer):
    """Swaps linear layers for packed ones, before loading or as each weight is read, and checks what goes into them.

    All weights are compared with the model before one is loaded: transformers itself only warns of what is missing.

    Raises:
        ValueError: a config that does not suit the model; a checkpoint that is not whole, or not in safetensors; a
            tensor that is misshapen or not finite, named.
    """

    quantization_config: FBQATConfig
    requires_calibration = False

    def __init__(self, quantization_config: FBQATConfig, **kwargs: Any) -> None:
        # A copy: what is learned of one model is not written into the caller's config, which may serve another.
        super().__init__(FBQATConfig(**quantization_config.to_dict()), **kwargs)
        self.layers: dict[str, PackedLayer] = {}
        self.files: dict[str, tuple[Path, StoredTensor]] = {}  # stored tensor -> its file, and where it is in it
        if not self.pre_quantized:
            refuse_static(self.quantization_config)
        if self.quantization_config.average_bits is not None:
            raise ValueError(
                "average_bits chooses widths for denoisers; give those of a text encoder in weight_bits_by_module."
            )

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        require_version(f"transformers>={_TRANSFORMERS}", "For packed text encoders: pip install -U transformers")

    def _process_model_before_weight_loading(
        self,
        model: Any,
        checkpoint_files: Iterable[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        if not self.pre_quantized:
            self.quantization_config.modules_to_not_convert = sorted(
                {*self.quantization_config.modules_to_not_convert, *tied_layers(model)}
            )
        _keep_in_fp32(model)
        self.layers = packed_layers(model, self.quantization_config)
        with torch.device("cpu"):  # the loader has made it the meta device
            self._read_headers([Path(file) for file in checkpoint_files or ()])
        if self.pre_quantized:
            for name, layer in self.layers.items():
                model.set_submodule(name, layer)
        if self.files:
            self._refuse_wrong_tensors(model)
        return model

    def _read_headers(self, files: list[Path]) -> None:
        if others := [file for file in files if file.suffix != ".safetensors"]:
            raise ValueError(f"{others[0]} is no safetensors file; only these are packed, or read as packed.")
        if files:
            check_component(files[0].parent)
        for file in files:
            self.files |= {key: (file, stored) for key, stored in read_header(file).items()}
            if not self.pre_quantized:  # of packed weights each tensor is looked at once it is loaded
                check_finite(file)

    def _refuse_wrong_tensors(self, model: Any) -> None:
        """Compare the layers with what is stored, before anything is loaded."""
        stored = _stored_names(model, self.files)
        missing = []
        for name, layer in self.layers.items():
            own = sorted(layer.state_dict()) if self.pre_quantized else ["weight"]
            for tensor in own:
                key = stored.pop(f"{name}.{tensor}", None)
                if key is None:
                    missing.append(f"{name}.{tensor}")
                else:
                    self._check_header(layer, tensor, key)
        extra = [key for key in stored.values() if key.rpartition(".")[2] in ("weight_packed", *BUFFERS)]
        refuse_incomplete(model, missing, extra, packed=self.pre_quantized)

    def _check_header(self, layer: PackedLayer, tensor: str, key: str) -> None:
        file, stored = self.files[key]
        if tensor == "weight":
            check_shape(layer, f"{file}: {key.removesuffix('.weight')}", stored.shape)
            return
        own = getattr(layer, tensor)
        if tensor != "bias" and stored.dtype != own.dtype:
            raise ValueError(f"{file}: {key} is {stored.dtype}; docs/format.md has {own.dtype} there.")
        if stored.shape != tuple(own.shape):
            raise ValueError(f"{file}: {key} has shape {stored.shape}; this model needs {tuple(own.shape)}.")

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        name, _, tensor = param_name.rpartition(".")
        return not self.pre_quantized and tensor == "weight" and name in self.layers

    def get_quantize_ops(self) -> _Quantize:
        return _Quantize(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, layer in named_layers(model, PackedLayer):
            if layer.bias is not None:
                layer.bias.requires_grad_(False)
            for tensor in ("weight_packed", *BUFFERS):
                value = getattr(layer, tensor)
                if value is not None and not value.is_meta:
                    layer.check_stored(tensor, value, f"{name}.{tensor}")
        for name, value in model.state_dict().items():
            if self.pre_quantized and not value.is_meta:
                check_values(value, name)
        self.write_config(model)
        self.layers, self.files = {}, {}
        return model

    def write_config(self, model: Any) -> None:
        """Put the config, with the layers left in float and all widths by name, where ``save_pretrained`` finds it."""
        self.quantization_config = described(model, self.quantization_config)
        model.config.quantization_config = self.quantization_config

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        if not getattr(model, "_hf_peft_config_loaded", False):  # else the adapter is saved, alone
            refuse_adapters(model, "save_pretrained of a packed model")
        return None, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        refuse_adapters(model, "dequantize")
        floats: dict[nn.Module, nn.Module] = {
            layer: layer.to_float().to(layer.weight.dtype) for _, layer in named_layers(model, PackedLayer)
        }
        replace_layers(model, floats)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class _Quantize(ConversionOps):
    """A float weight to codes and scale, as it is read; its layer is swapped for a packed one then."""

    def __init__(self, quantizer: FBQATHfQuantizer) -> None:
        self._quantizer = quantizer

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        full_layer_name: str,
        model: nn.Module,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        (value,) = input_dict.values()
        value = value[0] if isinstance(value, list) else value
        name = full_layer_name.removesuffix(".weight")
        layer = self._quantizer.layers[name]
        weight = value
        if len(source_patterns) == 1 and source_patterns[0] in self._quantizer.files:
            file, stored = self._quantizer.files[source_patterns[0]]
            if stored.dtype != value.dtype:  # not as the loader cast it
                weight = read_tensor(file, stored).to(value.device)
        packed, scale = quantized(layer, name, weight, self._quantizer.quantization_config)
        _swap(model, name, layer)
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {f"{name}.weight_packed": packed, f"{name}.weight_scale": scale}


def _swap(model: nn.Module, name: str, layer: PackedLayer) -> None:
    """Put a packed layer where a float one is, with the bias that this was given already."""
    before = model.get_submodule(name)
    if layer.bias is not None and before is not layer:
        layer.bias = before.bias  # type: ignore[assignment]
    model.set_submodule(name, layer)


def tied_layers(model: Any) -> list[str]:
    """Linear layers that share their weight with an embedding: an output head, which stays in float with it."""
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    shared = {key.removesuffix(".weight") for pair in tied.items() for key in pair}
    return sorted(shared & set(quantizable(model)))


def _keep_in_fp32(model: Any) -> None:
    """Make the layers fp32, still without numbers, that the model computes in fp32 whatever its dtype is.

    A packed layer then takes and gives fp32: in T5, whose feed-forward leaves the range of float16.
    """
    dtype = model.config.dtype
    patterns: list[str] = []
    if dtype == torch.float16:
        patterns += model._keep_in_fp32_modules or ()
    if dtype in (torch.float16, torch.bfloat16):
        patterns += model._keep_in_fp32_modules_strict or ()
    for name, layer in quantizable(model).items():
        if any(re.search(pattern.replace("*", ".*"), f"{name}.weight") for pattern in patterns):
            layer.to(torch.float32)


def _stored_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Name in the model -> the stored tensor that transformers' loader puts there.

    Checkpoints of several classes keep the names of an older version, or have another prefix.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    own = model.state_dict()
    found = {}
    for key in stored:
        name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, own)
        if name not in own and key in own:
            name, _ = rename_source_key(key, [], [], model.base_model_prefix, own)
        found[name] = key
    return found
