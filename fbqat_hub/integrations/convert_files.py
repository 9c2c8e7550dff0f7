"""A float denoiser's files to packed ones, tensor by tensor: memory is that of the largest tensor, not of the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from fbqat_hub.components import Component
from fbqat_hub.config import FBQATConfig
from fbqat_hub.integrations.diffusers import FBQATDiffusersQuantizer
from fbqat_hub.quantization.packed import PackedLayer
from fbqat_hub.weights import TensorFile, check_values, read_header, stored_dtype

# Of a file, as diffusers' save_pretrained has it.
_SHARD = "10GB"
# Gives a tensor of the float files by its name.
Read = Callable[[str], Tensor]
# Takes a packed layer by its name.
Save = Callable[[str, PackedLayer], None]


def convert_files(
    denoiser: Component,
    config: FBQATConfig,
    target: Path,
    variant: str | None = None,
    *,
    shard: int | str = _SHARD,
    done: Callable[[int], None] = lambda count: None,
    change: Callable[[str, Tensor], Tensor] | None = None,
    pack: Callable[[FBQATConfig, Read, Save], None] | None = None,
) -> None:
    """Write the packed denoiser that quantize-on-load and ``save_pretrained`` would write, byte for byte.

    Args:
        denoiser: in float.
        config: how to quantize it, per-token or per-tensor activations.
        target: new folder.
        variant: of the weights, see ``Component.weights``.
        shard: bytes of a file at most, as diffusers takes it.
        done: is told of bytes of the source as they are done.
        change: of each tensor of the source, by its name, before it is quantized; an adapter that is merged, say.
        pack: finds the codes of all layers in place of rounding each weight by itself; it is given the config with all
            widths, what reads a tensor, changed and checked, and what takes a packed layer.

    Raises:
        ValueError: a tensor that is missing, extra, of another shape or not finite, named with its file; or a config
            that does not suit the model.
    """
    files = denoiser.weights(variant).files
    model = denoiser.load(variant=variant, meta=True)
    quantizer = _Changing(config, change)
    dtype = quantizer.update_torch_dtype(stored_dtype(files))
    quantizer.maybe_update_loaded_keys(
        [key for file in files for key in read_header(file)], [str(file) for file in files]
    )
    quantizer.preprocess_model(model)
    stored = {
        name: tensor if quantizer.keeps_dtype(name) else tensor.to(dtype) for name, tensor in model.state_dict().items()
    }
    target.mkdir(parents=True)
    split = split_torch_state_dict_into_shards(
        stored, max_shard_size=shard, filename_pattern="diffusion_pytorch_model{suffix}.safetensors"
    )
    with ExitStack() as stack:
        written = {
            name: stack.enter_context(
                TensorFile(target / name, {key: (stored[key].dtype, stored[key].shape) for key in keys})
            )
            for name, keys in split.filename_to_tensors.items()
        }

        def write(name: str, value: Tensor, file: Path) -> None:
            if name in stored:  # else one that its class ignores
                written[split.tensor_to_filename[name]].write(name, _as(stored[name], value, f"{file}: {name}"))

        def save(name: str, layer: PackedLayer) -> None:
            for tensor in ("weight_packed", "weight_scale"):
                write(f"{name}.{tensor}", getattr(layer, tensor), target)
            packed.add(f"{name}.weight")

        packed: set[str] = set()
        if pack is not None:
            pack(quantizer.quantization_config, quantizer.checked, save)
        for file in files:
            for key, place in read_header(file).items():
                for name, value in quantizer.packed(key).items() if key not in packed else ():
                    write(name, value, file)
                done(place.end - place.begin)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (target / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    quantizer.postprocess_model(model)
    model.save_config(target)


def checked_tensors(
    denoiser: Component, variant: str | None = None, change: Callable[[str, Tensor], Tensor] | None = None
) -> Read:
    """What reads a tensor of a float denoiser by its name, changed as in `convert_files`, and refuses NaN."""
    quantizer = _Changing(FBQATConfig(), change)
    files = denoiser.weights(variant).files
    keys = [key for file in files for key in read_header(file)]
    quantizer.maybe_update_loaded_keys(keys, [str(file) for file in files])
    return quantizer.checked


class _Changing(FBQATDiffusersQuantizer):
    """Quantizes what ``change`` makes of the tensors."""

    def __init__(self, config: FBQATConfig, change: Callable[[str, Tensor], Tensor] | None) -> None:
        super().__init__(config, pre_quantized=False)
        self._change = change
        self._finite: set[str] = set()

    def read(self, key: str) -> Tensor:
        value = super().read(key)
        return value if self._change is None else self._change(key, value)

    def checked(self, key: str) -> Tensor:
        """As ``read``; refused, the first time, if it is not finite."""
        value = self.read(key)
        if key not in self._finite:
            check_values(value, self._place(key))
            self._finite.add(key)
        return value


def _as(like: Tensor, value: Tensor, what: str) -> Tensor:
    if value.shape != like.shape:
        raise ValueError(f"{what} has shape {tuple(value.shape)}; this model needs {tuple(like.shape)}.")
    return value.to(like.dtype) if value.is_floating_point() else value
