"""`fbqat convert` of a FLUX.1-shaped pipeline of random weights, and loading what it made: time and peak memory.

    python -m benchmarks.convert_true_size --work /some/disk                      # -> benchmarks/results/convert.json
    python -m benchmarks.convert_true_size --work /some/disk --double 2 --single 4   # minutes instead
    python -m benchmarks.convert_true_size --work /some/disk --load                  # loading alone, of random codes

With all blocks it takes 33 GB of disk for the source (12 billion weights and a text encoder of T5-XXL's shape, in bf16)
and 16 GB for the result; both are removed at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn
from transformers import T5Config, T5EncoderModel

from fbqat_hub.config import FBQATConfig
from fbqat_hub.evaluation.results import machine, now, peak_rss_mib, versions
from fbqat_hub.families import FAMILIES
from fbqat_hub.files import shipped, whole
from fbqat_hub.integrations.checkpoint import packed_layers
from fbqat_hub.integrations.diffusers import attach
from fbqat_hub.weights import TensorFile

RESULTS = Path(__file__).parent / "results" / "convert.json"
# google/t5-v1_1-xxl, the second text encoder of FLUX.1
T5_XXL = {
    "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip
# All weights are cut from so many random numbers.
_NUMBERS = 2**28
_LOAD = """
import sys, torch, fbqat_hub
from diffusers import FluxTransformer2DModel
FluxTransformer2DModel.from_pretrained(sys.argv[1], subfolder="transformer", dtype=torch.bfloat16)
"""


def write_random(model: nn.Module, path: Path, numbers: torch.Tensor) -> None:
    """The tensors of ``model`` (on the meta device) in bf16, in one file."""
    shapes = {name: (torch.bfloat16, tensor.shape) for name, tensor in model.state_dict().items()}
    shapes.pop("encoder.embed_tokens.weight", None)  # the same as T5's shared.weight
    place = 0
    with TensorFile(path, shapes) as file:
        for name, (_, shape) in shapes.items():
            place = (place + 4099) % len(numbers)  # another start for each: no two tensors are the same
            end = place + shape.numel()
            enough = numbers if end <= len(numbers) else numbers.repeat(math.ceil(end / len(numbers)))
            file.write(name, enough[place:end].view(shape))


def put_random(folder: Path, denoiser: Any, text_encoder: Any, name: str) -> None:
    """Random weights of two models (on the meta device), in the place of a pipeline's transformer and of ``name``.

    Their standard deviation is 0.02.
    """
    text_encoder.config.architectures = [type(text_encoder).__name__]
    for part in ("transformer", name):
        shutil.rmtree(folder / part)
    denoiser.save_config(folder / "transformer")
    text_encoder.config.save_pretrained(folder / name)
    numbers = torch.randn(_NUMBERS, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    write_random(denoiser, folder / "transformer" / "diffusion_pytorch_model.safetensors", numbers)
    write_random(text_encoder, folder / name / "model.safetensors", numbers)


def source(folder: Path, double: int, single: int) -> int:
    """Make the pipeline; returns how many parameters its denoiser has."""
    shutil.copytree(shipped("training/teachers") / "flux-schnell-tiny", folder)
    with torch.device("meta"):
        denoiser = FluxTransformer2DModel(num_layers=double, num_single_layers=single)
        text_encoder = T5EncoderModel(T5Config(**T5_XXL))
    put_random(folder, denoiser, text_encoder, "text_encoder_2")
    return sum(tensor.numel() for tensor in denoiser.parameters())


def packed_source(folder: Path, double: int, single: int) -> int:
    """Make a packed denoiser of random codes, as a conversion would write it; returns its bytes."""
    with torch.device("meta"):
        denoiser = FluxTransformer2DModel(num_layers=double, num_single_layers=single).to(torch.bfloat16)
    config = FBQATConfig(module_overrides=FAMILIES["flux"].activation_overrides)
    layers = packed_layers(denoiser, config)
    for name, layer in layers.items():
        denoiser.set_submodule(name, layer)
    attach(denoiser, config)
    denoiser.save_config(folder / "transformer")
    tensors, numbers = denoiser.state_dict(), torch.randint(0, 256, (2**28,), dtype=torch.uint8)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    with TensorFile(path, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}) as file:
        for name, tensor in tensors.items():
            if name.endswith("weight_packed"):
                file.write(name, numbers[: tensor.numel()].view(tensor.shape))
            else:
                file.write(name, torch.full(tensor.shape, 0.01, dtype=tensor.dtype))
    return path.stat().st_size


def measured(command: list[str]) -> dict[str, float]:
    """Seconds by the clock and of processor time, and peak memory, of a fresh process.

    Raises:
        ChildProcessError: it failed.
    """
    began, before, peak = time.perf_counter(), _processor_seconds(), 0.0
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            peak = max(peak, peak_rss_mib(process.pid) or 0.0)
            time.sleep(0.1)
    if process.returncode:
        raise ChildProcessError(f"{command} failed with {process.returncode}")
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "processor_seconds": round(_processor_seconds() - before, 1),
        "peak_mib": round(peak),
    }


def _processor_seconds() -> float:
    """Of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def save(method: str, found: dict[str, Any]) -> None:
    """Keep what was measured of one way to find codes beside that of the others."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with whole(RESULTS) as partial:
        partial.write_text(json.dumps(results | {method: found}, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def load_alone(work: Path, double: int, single: int) -> None:
    """Record what loading a packed denoiser takes."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        packed = packed_source(Path(folder), double, single)
        load = measured([sys.executable, "-c", _LOAD, folder])
    found = {
        "command": f"python -m benchmarks.convert_true_size --load --double {double} --single {single}",
        "threads": torch.get_num_threads(),
        "packed_denoiser_bytes": packed,
        "load": load | {"peak_over_packed_bytes": round(load["peak_mib"] * 2**20 / packed, 3)},
        "machine": machine(),
        "versions": versions(),
        "date": now(),
    }
    save("load", found)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convert_true_size",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work", type=Path, required=True, help="folder on a disk with room")
    parser.add_argument("--double", type=int, default=19, help="double blocks (default: 19, FLUX.1's)")
    parser.add_argument("--single", type=int, default=38, help="single blocks (default: 38, FLUX.1's)")
    parser.add_argument("--load", action="store_true", help="only load a denoiser of random codes")
    options = parser.parse_args()
    if options.load:
        return load_alone(options.work, options.double, options.single)
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        folder, output = Path(work) / "source", Path(work) / "packed"
        parameters = source(folder, options.double, options.single)
        convert = measured([sys.executable, "-m", "fbqat_hub.cli", "convert", str(folder), "--output", str(output)])
        load = measured([sys.executable, "-c", _LOAD, str(output)])
        packed = sum(path.stat().st_size for path in (output / "transformer").glob("*.safetensors"))
        text_encoder = (folder / "text_encoder_2" / "model.safetensors").stat().st_size
    found = {
        "command": f"python -m benchmarks.convert_true_size --double {options.double} --single {options.single}",
        "denoiser_parameters": parameters,
        "threads": torch.get_num_threads(),
        "text_encoder_bytes": text_encoder,
        "packed_denoiser_bytes": packed,
        "convert": convert,
        "load": load | {"peak_over_packed_bytes": round(load["peak_mib"] * 2**20 / packed, 3)},
        "machine": machine(),
        "versions": versions(),
        "date": now(),
    }
    save("nearest", found)


if __name__ == "__main__":
    main()
