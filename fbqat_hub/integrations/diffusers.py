"""diffusers: load and save packed checkpoints with plain ``from_pretrained``, quantize float ones on load.

``register`` puts the quantizer into diffusers' two tables; ``import fbqat_hub`` calls it.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import CustomDtype
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from fbqat_hub.config import FBQATConfig
from fbqat_hub.files import whole
from fbqat_hub.hub.manifest import check_component
from fbqat_hub.quantization.convert import named_layers, quantizable, replace_layers, targets
from fbqat_hub.quantization.linear import PackedLinear, PackedPointwiseConv2d
from fbqat_hub.quantization.packing import NIBBLE, check_codes, pack
from fbqat_hub.quantization.quantize import quantize_weight
from fbqat_hub.stages import find_stage
from fbqat_hub.untrusted import PICKLES, check_model, check_pipeline, is_model

_BUFFERS = ("weight_scale", "input_scale", "input_zero_point")


def register() -> None:
    """Make diffusers know ``quant_method: fbqat``. Safe to call again."""
    auto.AUTO_QUANTIZER_MAPPING.setdefault("fbqat", FBQATQuantizer)
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault("fbqat", FBQATConfig)


def attach(model: Any, config: FBQATConfig) -> None:
    """Make a model that was just converted one that ``save_pretrained`` writes as a packed checkpoint.

    ``config.modules_to_not_convert`` becomes the sorted names of the quantizable layers that are not packed.

    Raises:
        ValueError: the layers were packed at another width than the config's.
    """
    if wrong := {layer.weight_bits for _, layer in named_layers(model, PackedLinear)} - {config.weight_bits}:
        raise ValueError(
            f"the model's layers are packed at {', '.join(map(str, sorted(wrong)))} bits, and weight_bits is "
            f"{config.weight_bits}; set_bit_width(model, {config.weight_bits}) before convert."
        )
    config.modules_to_not_convert = sorted(quantizable(model))
    model.register_to_config(quantization_config=config)
    model.hf_quantizer = FBQATQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = config.quant_method


def load_pipeline(source: str | Path, **components: Any) -> Any:
    """A whole pipeline in float32, from safetensors only, after ``check_source``.

    Unlike plain ``from_pretrained``, which fills in random numbers with a warning, it refuses a component that lacks
    tensors.

    Args:
        source: folder, or Hub id, which is downloaded first.
        components: parts that are at hand, by name; they are not loaded.

    Raises:
        FileNotFoundError, ValueError: as ``check_source``.
        ValueError: a component that its class cannot load, named.
    """
    from diffusers import DiffusionPipeline  # takes seconds, and `import fbqat_hub` must not

    check_source(source)
    folder = downloaded(source, **components)
    for name, (library, class_name) in check_pipeline(folder).items():
        if name not in components and is_model(folder / name):
            components[name] = _load_model(folder / name, library, class_name)
    with _refused(folder):
        return DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **components)


def downloaded(source: str | Path, **components: Any) -> Path:
    """The folder of a pipeline: ``source`` itself, or where the Hub's cache has it, downloaded if need be.

    Args:
        components: as ``load_pipeline``; they are not downloaded.
    """
    from diffusers import DiffusionPipeline

    folder = Path(source)
    if folder.is_dir():
        return folder
    return Path(DiffusionPipeline.download(str(source), use_safetensors=True, **components))


def load_stage(run: Path, bits: int) -> Any:
    """A run's pipeline with the denoiser of a kept stage in place of its own, as ``load_pipeline``.

    Raises:
        FileNotFoundError: the run kept no stage of this width.
        FileNotFoundError, ValueError: as ``load_pipeline``.
    """
    folder = find_stage(run, bits) / "transformer"
    check_source(run)
    check_model(folder)
    return load_pipeline(run, transformer=_load_model(folder, *check_pipeline(run)["transformer"]))


def save_stage(model: Any, folder: Path) -> None:
    """Save a packed denoiser alone as ``folder/transformer``, in place of what has the name."""
    with whole(folder) as partial:
        model.save_pretrained(partial / "transformer")
        _strip_paths(partial / "transformer" / "config.json")
        shutil.rmtree(folder, ignore_errors=True)


def _load_model(folder: Path, library: str, class_name: str) -> Any:
    with _refused(folder):
        kind = getattr(importlib.import_module(library), class_name)
        model, found = kind.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    missing = sorted(found["missing_keys"])
    # transformers' checkpoints may hold more than one of its models takes, a decoder beside the encoder, say
    extra = sorted(found["unexpected_keys"]) if library == "diffusers" else []
    for names, what in ((missing, "lacks tensors of"), (extra, "has tensors that are none of")):
        if names:
            raise ValueError(
                f"{folder} {what} a {class_name}: {', '.join(names[:5])}{_more(names)}. Download or convert it again."
            )
    return model


@contextmanager
def _refused(folder: Path) -> Iterator[None]:
    """Whatever a class of another library says of files that do not fit it, as one ValueError that names them."""
    try:
        yield
    except (ImportError, OSError, ValueError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"{folder} cannot be loaded ({type(error).__name__}: {error}). Download or convert it again."
        ) from error


def check_source(source: str | Path) -> None:
    """Refuse what cannot be a pipeline, and a local one that is damaged or hostile, before anything is loaded.

    Args:
        source: folder, or Hub id (owner/name; only its form is checked).

    Raises:
        FileNotFoundError: neither a folder nor in the form of a Hub id.
        ValueError: a folder without ``model_index.json``, one with a file of another size than published
            (``fbqat.json``), or as ``check_pipeline``.
    """
    folder, text = Path(source), str(source)
    if not folder.is_dir():
        if folder.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
            raise FileNotFoundError(f"{source} is no folder, nor a Hub id such as owner/name.")
        return
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{source} is not a diffusers pipeline: it has no model_index.json. Give a pipeline's folder.")
    for component in sorted({path.parent for path in folder.glob("*/*.json")}):
        check_component(component)
    check_pipeline(folder)


def save_pipeline(pipeline: Any, folder: Path, source: str | Path | None = None) -> None:
    """Save a whole pipeline into ``folder``, which may hold other files; ``model_index.json`` comes last.

    Components that are not quantized are copied from ``source``, the folder that they were loaded from, if it is one:
    they stay as they were stored, in float16, say.

    Unlike ``save_pretrained`` it leaves nothing that looks whole when it is interrupted, and it leaves out
    ``_name_or_path``, which leaks local paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        pipeline.save_pretrained(partial)
        for component in partial.iterdir():
            original = Path(source or partial) / component.name
            if source and original.is_dir() and not getattr(getattr(pipeline, component.name), "is_quantized", False):
                shutil.rmtree(component)
                shutil.copytree(
                    original, component, ignore=shutil.ignore_patterns("*.py", *(f"*{end}" for end in PICKLES))
                )
        for path in [partial / "model_index.json", *partial.glob("*/*config.json")]:
            _strip_paths(path)
        (folder / "model_index.json").unlink(missing_ok=True)
        for path in sorted(partial.iterdir(), key=lambda path: path.name == "model_index.json"):
            target = folder / path.name
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _strip_paths(path: Path) -> None:
    """Take ``_name_or_path``, a local path, out of a component's configuration."""
    config = json.loads(path.read_text())
    if {"_name_or_path", "name_or_path"} & set(config):
        kept = {key: value for key, value in config.items() if not key.endswith("name_or_path")}
        path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


class FBQATQuantizer(DiffusersQuantizer):
    """Swaps linear layers for packed ones before loading, and checks every tensor that goes into them."""

    quantization_config: FBQATConfig
    requires_calibration = False

    def __init__(self, quantization_config: FBQATConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._loaded_keys: set[str] = set()
        self._layers: dict[str, PackedLinear] = {}
        if not self.pre_quantized and quantization_config.needs_calibration:
            raise ValueError(
                "the activation range is 'static', which quantize-on-load cannot calibrate; use 'per_token', or train "
                "with `fbqat train`, which does."
            )

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to check: torch is all that is needed."""

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        return torch.float32 if torch_dtype is None else torch_dtype

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> Any:
        return CustomDtype.INT4 if self.quantization_config.weight_bits <= NIBBLE else torch.int8

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        others = [file for file in checkpoint_files if not str(file).endswith(".safetensors")]
        if self.pre_quantized and others:
            raise ValueError(f"{others[0]} is no safetensors file; format 1 is stored in these only.")
        if checkpoint_files:
            check_component(Path(checkpoint_files[0]).parent)
        self._loaded_keys = set(loaded_keys)
        return loaded_keys

    def _process_model_before_weight_loading(
        self, model: nn.Module, device_map: Any = None, keep_in_fp32_modules: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        skip, overrides = config.modules_to_not_convert, config.module_overrides
        for layer, names, scheme in targets(model, config.activation_scheme(), not_convert=skip, overrides=overrides):
            kind = PackedPointwiseConv2d if isinstance(layer, nn.Conv2d) else PackedLinear
            out_features, in_features = layer.weight.shape[:2]
            try:
                packed = kind(
                    in_features,
                    out_features,
                    weight_bits=config.weight_bits,
                    bias=layer.bias is not None,
                    activation_scheme=scheme,
                    group_size=config.group_size,
                    dtype=layer.weight.dtype,
                    device="meta",
                )
            except ValueError as error:
                raise ValueError(
                    f"{names[0]} cannot be quantized: {error} Give another, or put the layer into "
                    "modules_to_not_convert."
                ) from error
            for name in names:
                model.set_submodule(name, packed)
                self._layers[name] = packed
        config.modules_to_not_convert = sorted(quantizable(model))
        self._refuse_wrong_keys(model)

    def _refuse_wrong_keys(self, model: nn.Module) -> None:
        expected = set(model.state_dict())
        if not self.pre_quantized:
            ours = {f"{name}.{tensor}" for name in self._layers for tensor in ("weight_packed", "weight_scale")}
            expected = (expected - ours) | {f"{name}.weight" for name in self._layers}
        missing = sorted(expected - self._loaded_keys)
        # of float checkpoints diffusers knows which extra tensors are harmless
        extra = sorted(self._loaded_keys - expected) if self.pre_quantized else []
        problems = [f"missing tensors: {', '.join(missing[:5])}" + _more(missing)] if missing else []
        problems += [f"extra tensors: {', '.join(extra[:5])}" + _more(extra)] if extra else []
        if problems:
            raise ValueError(
                f"this is not a whole {type(model).__name__} checkpoint{' of format 1' if self.pre_quantized else ''}: "
                f"{'; '.join(problems)}. Download or convert it again."
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
                _check_tensor(key, state_dict[key], layer.weight_packed.dtype, layer.weight_packed.shape)
                _check_codes(key, state_dict[key], layer.weight_bits)
            elif tensor in _BUFFERS:
                # The loader would cast it to the model's dtype; scales stay fp32.
                dtype = torch.int32 if tensor == "input_zero_point" else torch.float32
                value, shape = state_dict.pop(key), getattr(layer, tensor).shape
                _check_tensor(key, value, dtype, shape)
                _check_range(key, value, layer.activation_scheme.bits)
                layer._buffers[tensor] = value.clone()
        return state_dict

    def _quantize(self, layer: PackedLinear, name: str, state_dict: dict[str, Tensor]) -> None:
        weight = state_dict.pop(f"{name}.weight")
        shape = torch.Size((layer.out_features, layer.in_features))
        if weight.shape[:2] != shape or weight.numel() != shape.numel():
            raise ValueError(f"{name}.weight has shape {tuple(weight.shape)}; this model needs {tuple(shape)}.")
        try:
            codes, layer.weight_scale = quantize_weight(weight, self.quantization_config.weight_scheme())
        except ValueError as error:
            raise ValueError(f"{name}.weight cannot be quantized: {error}") from error
        state_dict[f"{name}.weight_packed"] = pack(codes, layer.weight_bits)

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
        dtype = model.dtype
        replace_layers(model, {layer: layer.to_float().to(dtype) for _, layer in named_layers(model, PackedLinear)})
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


def _check_tensor(key: str, value: Tensor, dtype: torch.dtype, shape: torch.Size) -> None:
    if value.dtype != dtype:
        raise ValueError(f"{key} is {value.dtype}; format 1 stores it as {dtype}.")
    if value.shape != shape:
        raise ValueError(f"{key} has shape {tuple(value.shape)}; this model needs {tuple(shape)}.")


def _check_codes(key: str, value: Tensor, bits: int) -> None:
    """Two codes of four bits fill a byte, whatever they are; one code in a byte of its own can leave its grid."""
    if value.dtype == torch.int8:
        try:
            check_codes(value, bits)
        except ValueError as error:
            raise ValueError(f"{key}: {error} The file is damaged.") from None


def _check_range(key: str, value: Tensor, bits: int) -> None:
    if value.is_floating_point():
        if not bool((torch.isfinite(value) & (value > 0)).all()):
            raise ValueError(f"{key} has scales that are not finite and above 0; the file is damaged.")
    elif not 0 <= int(value) <= 2**bits - 1:
        raise ValueError(f"{key} is {int(value)}; with {bits}-bit activations it must be from 0 to {2**bits - 1}.")


def _more(names: list[str]) -> str:
    return f" and {len(names) - 5} more" if len(names) > 5 else ""
