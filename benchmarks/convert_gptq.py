"""Peak memory of `fbqat convert --method gptq`, block by block, against the same codes from the whole model in memory.

    python -m benchmarks.convert_gptq --work /some/disk              # -> benchmarks/results/convert.json, key "gptq"

The denoiser has Sana-600M's width and random weights in bf16; the other parts are the tiny Sana's. Each way runs in a
process of its own, and their codes are compared.
"""

from __future__ import annotations

import argparse
import inspect
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import SanaTransformer2DModel
from safetensors.torch import load_file, save_file

from benchmarks.convert_true_size import measured, save, write_random
from fbqat_hub.evaluation.results import machine, now, versions
from fbqat_hub.files import shipped
from fbqat_hub.integrations.checkpoint import targets_of
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.quantization import PackedLayer, convert, gptq_initialize, named_layers
from fbqat_hub.quantization.convert import prepare_layers
from fbqat_hub.training.recipe import load_recipe
from fbqat_hub.training.seeding import generator

WEIGHTS = Path("transformer/diffusion_pytorch_model.safetensors")
PROMPTS = ("red heart", "flag of france")
STEPS = 2
CALL: dict[str, Any] = {
    "height": 128, "width": 128, "num_inference_steps": STEPS, "guidance_scale": 3.0, "max_sequence_length": 16,
    "complex_human_instruction": None,
}  # fmt: skip
# Efficient-Large-Model/Sana_600M_512px_diffusers
SANA_600M = {
    "num_attention_heads": 36, "attention_head_dim": 32, "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72, "cross_attention_dim": 1152, "mlp_ratio": 2.5,
}  # fmt: skip


def source(folder: Path, blocks: int) -> int:
    """Make the pipeline; returns how many parameters its denoiser has."""
    shutil.copytree(shipped("training/teachers") / "sana-tiny", folder)
    tiny = SanaTransformer2DModel.load_config(folder / "transformer")
    shutil.rmtree(folder / "transformer")
    with torch.device("meta"):
        denoiser = SanaTransformer2DModel.from_config({**tiny, **SANA_600M, "num_layers": blocks})
    denoiser.save_config(folder / "transformer")
    numbers = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    write_random(denoiser, folder / WEIGHTS, numbers)
    return sum(tensor.numel() for tensor in denoiser.parameters())


@torch.no_grad()
def whole_model(folder: Path, recipe: Path, output: Path) -> None:
    """The packed layers that `fbqat convert` made by ``recipe``, from the whole model in memory, into one file."""
    config, pipeline = load_recipe(recipe).config(), load_pipeline(folder, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    model: Any = pipeline.transformer
    parameters, inputs = inspect.signature(model.forward), []
    hook = model.register_forward_pre_hook(
        lambda _, given, named: inputs.append(dict(parameters.bind(*given, **named).arguments)), with_kwargs=True
    )
    for index, prompt in enumerate(PROMPTS):
        random = generator("calibration picture", prompt, index)
        torch.rand(STEPS, generator=random)
        pipeline(prompt=prompt, generator=random, output_type="latent", use_resolution_binning=False, **CALL)
    hook.remove()
    prepare_layers(model, targets_of(model, config), config.weight_scheme())
    gptq_initialize(model, lambda: inputs)
    convert(model)
    layers = dict(named_layers(model, PackedLayer))
    save_file({f"{name}.weight_packed": layer.weight_packed.data for name, layer in layers.items()}, output)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convert_gptq",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work", type=Path, help="folder on a disk with room")
    parser.add_argument("--blocks", type=int, default=28, help="of the denoiser (default: 28, Sana-600M's)")
    parser.add_argument("--whole", type=Path, nargs=3, metavar=("SOURCE", "RECIPE", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.whole:
        return whole_model(*options.whole)
    if options.work is None:
        parser.error("give --work FOLDER")
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        folder, output, codes, prompts = (Path(work) / name for name in ("source", "packed", "codes", "prompts.txt"))
        parameters = source(folder, options.blocks)
        prompts.write_text("\n".join(PROMPTS))
        call = [f"{name}={'null' if value is None else value}" for name, value in CALL.items()]
        given = [
            "--method",
            "gptq",
            "--prompts",
            str(prompts),
            "--samples",
            str(STEPS * len(PROMPTS)),
            "--device",
            "cpu",
        ]
        python = [sys.executable, "-m"]
        blocks = measured(
            [*python, "fbqat_hub.cli", "convert", str(folder), "--output", str(output), *given, "--set", *call]
        )
        whole = measured(
            [*python, "benchmarks.convert_gptq", "--whole", str(folder), str(output / "recipe.yaml"), str(codes)]
        )
        ours, theirs = load_file(output / WEIGHTS), load_file(codes)
        differing = sum(int((ours[name] != value).sum()) for name, value in theirs.items())
    found = {
        "command": f"python -m benchmarks.convert_gptq --blocks {options.blocks}",
        "denoiser_parameters": parameters,
        "denoiser_float32_mib": round(4 * parameters / 2**20),
        "blocks": options.blocks,
        "samples": STEPS * len(PROMPTS),
        "block_by_block": blocks,
        "whole_model": whole,
        "peak_over_whole_model": round(blocks["peak_mib"] / whole["peak_mib"], 3),
        "differing_bytes_of_codes": differing,
        "machine": machine(),
        "versions": versions(),
        "date": now(),
    }
    save("gptq", found)


if __name__ == "__main__":
    main()
