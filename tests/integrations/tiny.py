"""Tiny denoisers of every family, packed, and arguments of their forward at any size."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from fbqat_hub.config import FBQATConfig
from fbqat_hub.families import get_family
from fbqat_hub.integrations.diffusers import attach
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.quantization import PackedLayer, convert, named_layers, prepare
from tests.conftest import call_of, subprocess_environment

# of an autoencoder that halves nothing
_VAE = {"block_out_channels": [1], "temperal_downsample": []}


def pack_denoiser(pipeline: Any, family: str) -> Any:
    """The pipeline's denoiser, packed in place as quantize-on-load packs it."""
    config = FBQATConfig(module_overrides=get_family(family).activation_overrides)
    prepare(pipeline.transformer, config.weight_scheme(), **config.layer_options())
    convert(pipeline.transformer)
    attach(pipeline.transformer, config)
    return pipeline.transformer


def denoiser_inputs(
    family: str, model: Any, batch: int = 2, height: int = 4, width: int = 4, text_tokens: int = 8
) -> dict[str, Any]:
    """Random arguments of the denoiser's forward for latents of a height and a width, the same at every call."""
    random = torch.Generator().manual_seed(batch)
    of_family, config = get_family(family), model.config
    shapes = of_family.conditioning_shapes(config, {"max_sequence_length": text_tokens})
    conditioning = {
        name: torch.ones(batch, *shape) if name.endswith("_mask") else torch.randn(batch, *shape, generator=random)
        for name, shape in shapes.items()
    }
    channels = of_family.latent_shape({"transformer": config, "vae": _VAE}, (height, width))[0]
    latents = torch.randn(batch, channels, height, width, generator=random)
    inputs: dict[str, Any] = dict(of_family.denoiser_inputs(latents, torch.linspace(100.0, 900.0, batch), conditioning))
    if family == "pixart-sigma":
        inputs["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return inputs


@torch.no_grad()
def predict(model: Any, family: str, **size: int) -> Tensor:
    """What the family's sampler takes of the denoiser for ``denoiser_inputs``, in the model's dtype."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return get_family(family).predict(model, in_dtype(denoiser_inputs(family, base, **size), base.dtype))


def in_dtype(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The float tensors of ``inputs`` in another dtype."""

    def of(value: Any) -> Any:
        if isinstance(value, list):
            return [of(each) for each in value]
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: of(value) for name, value in inputs.items()}


def packed_as(source: Path, folder: Path, **settings: Any) -> Path:
    """A pipeline whose denoiser diffusers quantizes on load."""
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": FBQATConfig(**settings)})
    DiffusionPipeline.from_pretrained(source, quantization_config=mapping).save_pretrained(folder)
    return folder


def layers_of(folder: Path) -> dict[str, PackedLayer]:
    return dict(named_layers(load_pipeline(folder, torch.float32).transformer, PackedLayer))


def static_ranges(packed: Path, folder: Path) -> Path:
    """A packed pipeline whose denoiser has a static activation range in every layer."""
    pipeline = load_pipeline(packed)
    pipeline.save_pretrained(folder)
    weights = folder / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    for name, _ in named_layers(pipeline.transformer, PackedLayer):
        tensors |= {f"{name}.input_scale": torch.tensor(0.1), f"{name}.input_zero_point": torch.tensor(3).int()}
    save_file(tensors, weights, metadata={"format": "pt"})
    config = json.loads((folder / "transformer/config.json").read_text())
    config["quantization_config"]["activation_range"] = "static"
    (folder / "transformer/config.json").write_text(json.dumps(config))
    return folder


def drawn(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """One picture of a tiny Sana pipeline, always from the same noise."""
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(3)
    call = call_of("sana", pipeline)
    picture: Tensor = pipeline(prompt="dark red", generator=random, output_type="pt", **call).images.float()
    return picture


def adapter_changes(packed: Path, exported: Path, adapter: Path) -> list[Tensor]:
    """What an adapter of a packed Sana, saved at ``adapter``, changes of its output and of the exported one's, flat."""
    peft = pytest.importorskip("peft")
    model = load_pipeline(packed, torch.float32).transformer
    torch.manual_seed(0)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    model.save_lora_adapter(adapter)
    other = type(model).from_pretrained(exported, subfolder="transformer", dtype=torch.float32)
    other.load_lora_adapter(adapter, prefix=None, use_safetensors=True)
    changes: list[Tensor] = []
    for each in (model, other):
        with torch.no_grad():
            adapted = each(**denoiser_inputs("sana", each)).sample
            each.disable_adapters()
            changes.append((adapted - each(**denoiser_inputs("sana", each)).sample).flatten())
    return changes


def read_elsewhere(program: str, folder: Path, kind: str, target: Path) -> dict[str, Tensor]:
    """What a program that does not import this package writes to ``target`` of a pipeline's denoiser of a class."""
    command = [sys.executable, "-c", program, str(folder), kind, str(target)]
    done = subprocess.run(command, env=subprocess_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(target)


@contextmanager
def refused(message: str, record: Callable[[str, object], None] | None = None) -> Iterator[None]:
    """A ValueError that says ``message``; with pytest's ``record_property``, noted for the tables of what works."""
    with pytest.raises(ValueError, match=message) as caught:
        yield
    if record:
        record("state", "refused")
        record("error", str(caught.value))
