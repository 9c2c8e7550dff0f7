"""A whole model as a bundle for a phone, by one command: text encoder, denoiser, decoder. Random weights.

    python -m benchmarks.htp_whole --model sana-600m --work /some/disk    # -> benchmarks/results/htp.json

Every component has the class, widths and layers of its checkpoint, Efficient-Large-Model/Sana_600M_512px_diffusers
(Gemma-2-2B, 28 blocks, the DC-AE of 32 channels) or PixArt-alpha/PixArt-Sigma-XL-2-512-MS (T5-XXL, 28 blocks, SDXL's
AutoencoderKL); tokenizer and sampler are those of the tiny teacher. Weights are random, so that the figures check that
all of it fits and computes what it should, not pictures. What is in the folder is used again: the pipeline (7 and
11 GB), and what ``fbqat convert`` made of it (4 and 5 GB).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, ModelMixin, PixArtTransformer2DModel, SanaTransformer2DModel
from transformers import Gemma2Config, Gemma2Model, PreTrainedModel, T5Config, T5EncoderModel

from benchmarks.convert_true_size import T5_XXL, put_random
from benchmarks.htp_parts import DC_AE, GEMMA_2_2B, KL
from benchmarks.htp_true_size import MODELS, RESULTS, PeakMemory
from fbqat_hub.evaluation.results import Record, write_records
from fbqat_hub.export.htp.graph import STEPS
from fbqat_hub.files import shipped

PROMPTS = ("a red heart", "two green apples on a plate")
OPTIONS = ("--quick", "--samples", "8", "--images", "1")


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A pipeline at the size of its checkpoint.

    Attributes:
        family: whose tiny teacher has the same classes.
        shape: for the tables.
        denoiser, text_encoder, vae: how each is made.
    """

    family: str
    shape: str
    denoiser: Callable[[], ModelMixin]
    text_encoder: Callable[[], PreTrainedModel]
    vae: Callable[[], ModelMixin]


WHOLE = {
    "sana-600m": Whole(
        family="sana",
        shape="28 blocks and Gemma-2-2B and the DC-AE's decoder, 512 px",
        denoiser=lambda: SanaTransformer2DModel(**MODELS["sana-600m"].config),
        text_encoder=lambda: Gemma2Model(Gemma2Config(**GEMMA_2_2B, num_hidden_layers=26, vocab_size=256000)),
        vae=lambda: AutoencoderDC(**DC_AE),
    ),
    "pixart-sigma": Whole(
        family="pixart-sigma",
        shape="28 blocks and T5-XXL and the AutoencoderKL's decoder, 512 px",
        denoiser=lambda: PixArtTransformer2DModel(
            **{**MODELS["pixart-block"].config, "num_layers": 28, "sample_size": 64}
        ),
        text_encoder=lambda: T5EncoderModel(T5Config(**T5_XXL)),
        vae=lambda: AutoencoderKL(**KL, latent_channels=4, scaling_factor=0.13025),
    ),
}


def source(whole: Whole, folder: Path) -> None:
    """Make the pipeline in ``folder``, weights in bfloat16 as they are published."""
    shutil.copytree(shipped("training/teachers") / f"{whole.family}-tiny", folder)
    with torch.device("meta"):
        denoiser, text_encoder = whole.denoiser(), whole.text_encoder()
    put_random(folder, denoiser, text_encoder, "text_encoder")
    shutil.rmtree(folder / "vae")
    torch.manual_seed(0)
    whole.vae().to(torch.bfloat16).save_pretrained(folder / "vae")


def exported(packed: Path, output: Path, work: Path) -> dict[str, float]:
    """Seconds by the clock, and the most memory in MiB, of the command that makes the bundle."""
    prompts = work / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    began = time.perf_counter()
    command = [sys.executable, "-m", "fbqat_hub.cli", "export", str(packed), "--output", str(output)]
    with subprocess.Popen([*command, "--prompts", str(prompts), *OPTIONS]) as process:
        memory = PeakMemory(process.pid)
        memory.start()
    if process.returncode:
        raise ChildProcessError(f"fbqat export failed with {process.returncode}")
    return {"seconds": round(time.perf_counter() - began, 1), "peak_mib": memory.mib}


def parts(certificate: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each part of the bundle: its graphs, their bytes, what they took, and how near they are."""
    graphs = {"transformer": certificate, **certificate["graphs"]}
    rows = []
    for part in ("text_encoder", "transformer", "decoder"):
        found = {name: each for name, each in graphs.items() if name.startswith(part)}
        first, *_, last = [each["parity"] for each in [*found.values(), *found.values()]]
        steps = {name: took for name, took in certificate["seconds"].items() if name.startswith(part)}
        rows.append(
            {
                "part": part,
                "graphs": len(found),
                "binary_bytes": sum(each["cost"]["binary_bytes"] for each in found.values()),
                "largest_binary_bytes": max(each["cost"]["binary_bytes"] for each in found.values()),
                "spill_fill_bytes": max(each["cost"]["spill_fill_bytes"] for each in found.values()),
                "compiler_peak_mib": max(each["compiler"]["peak_rss_mib"] for each in found.values()),
                "seconds": {
                    step: round(sum(took for name, took in steps.items() if name.endswith(f": {step}")), 1)
                    for step in ("trace", "calibrate", "quantize", *STEPS)
                },
                # of the first graph, and of all of them
                "emulator_vs_cpu_qdq_db": first["emulator_vs_cpu_qdq"]["sqnr_db"],
                "cpu_qdq_vs_torch_packed_db": last["cpu_qdq_vs_torch_packed"]["sqnr_db"],
            }
        )
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=WHOLE, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder on a disk with 30 GB of room")
    parser.add_argument("--dry-run", action="store_true", help="leave benchmarks/results as it is")
    parser.add_argument("--note", default="idle", help="what else the machine did, for the record (default: idle)")
    options = parser.parse_args()
    whole, folder = WHOLE[options.model], options.work / options.model
    original, packed, bundle = (folder / name for name in ("source", "packed", "bundle"))
    if not original.exists():
        source(whole, original)
    if not packed.exists():
        convert = [sys.executable, "-m", "fbqat_hub.cli", "convert", str(original), "--output", str(packed)]
        subprocess.run([*convert, "--text-encoders", "w8", "--set", "num_inference_steps=20"], check=True)
    made = exported(packed, bundle, folder)
    certificate, manifest = (json.loads((bundle / f"{name}.json").read_text()) for name in ("certificate", "manifest"))
    if not manifest["text"]:
        raise SystemExit(f"the bundle has no text encoders: {manifest['text_left_out']}")
    extra = {
        "bundle": options.model,
        "shape": whole.shape,
        "options": " ".join(OPTIONS),
        "export_seconds": made["seconds"],
        "other_seconds": {name: took for name, took in certificate["seconds"].items() if ": " not in name},
        "bundle_bytes": sum(each["bytes"] for each in manifest["files"].values()),
        "table_bytes": sum(each["bytes"] for name, each in manifest["files"].items() if name.startswith("embedding.")),
        "parts": parts(certificate),
        "decoder_tiles": certificate["decoder_tiles"],
        "machine_was": options.note,
    }
    print(json.dumps(extra | {"peak_rss_mib": made["peak_mib"]}, indent=2))
    if not options.dry_run:
        common = {
            "suite": "htp",
            "family": whole.family,
            "method": "ptq-mse",
            "seed": 0,
            "n": 1,
            "extra": extra,
        }
        peak = Record(**common, metric="peak_rss_mib", value=made["peak_mib"])
        sqnr = certificate["parity"]["emulator_vs_torch_packed"]["sqnr_db"]
        print(f"saved {write_records(RESULTS, [peak, Record(**common, metric='sqnr_db', value=sqnr)]).name}")


if __name__ == "__main__":
    main()
