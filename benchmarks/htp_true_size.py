"""Sana-600M at true size to an HTP context binary: time, peak memory, bytes. Random weights; one forward is compared.

python -m benchmarks.htp_sana_600m            # -> benchmarks/results/htp.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn

from fbqat_hub.evaluation.results import Record, write_records
from fbqat_hub.export import export_htp
from fbqat_hub.export.runtime.qnn_session import peak_rss_mib
from fbqat_hub.quantization import ActivationScheme, PackedLinear, PackedPointwiseConv2d
from fbqat_hub.quantization.convert import quantizable

RESULTS = Path(__file__).parent / "results" / "htp.json"


def sana_600m(blocks: int) -> nn.Module:
    """A packed Sana-600M of random weights: 28 blocks, 36 heads of 32, 512 px (16 x 16 latents of 32 channels).

    Built layer by layer, so that no more than one layer is in float at a time.
    """
    with torch.device("meta"):
        model = SanaTransformer2DModel(
            in_channels=32, out_channels=32, num_layers=blocks, num_attention_heads=36, attention_head_dim=32,
            num_cross_attention_heads=16, cross_attention_head_dim=72, cross_attention_dim=1152, caption_channels=2304,
            mlp_ratio=2.5, sample_size=16, patch_size=1,
        )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    scheme = ActivationScheme(bits=8, range="per_token")
    for name, layer in quantizable(model).items():
        kind = PackedPointwiseConv2d if isinstance(layer, nn.Conv2d) else PackedLinear
        out_features, in_features = layer.weight.shape[:2]
        packed = kind(in_features, out_features, bias=layer.bias is not None, activation_scheme=scheme)
        packed.weight_packed.data.random_(0, 256, generator=generator)
        # codes of -8..7 have a standard deviation of 4.6; weights of 1 / sqrt(in) keep activations near 1
        packed.weight_scale.fill_(in_features**-0.5 / 4.6)
        if packed.bias is not None:
            packed.bias.data.zero_()
        model.set_submodule(name, packed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            owner, _, last = name.rpartition(".")
            noise = torch.randn(tensor.shape, generator=generator)
            value = 1 + 0.1 * noise if "norm" in name else 0.1 * noise
            is_parameter = isinstance(tensor, nn.Parameter)
            setattr(model.get_submodule(owner), last, nn.Parameter(value, False) if is_parameter else value)
    return model.eval()


def items(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Inputs of 256 picture tokens and 300 text tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "hidden_states": torch.randn(1, 32, 16, 16, generator=generator),
            "encoder_hidden_states": torch.randn(1, 300, 2304, generator=generator),
            "timestep": 1000 * torch.rand(1, generator=generator),
        }
        for _ in range(count)
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=28, help="transformer blocks (default: 28, all)")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the export")
    parser.add_argument("--dry-run", action="store_true", help="leave benchmarks/results as it is")
    parser.add_argument("--note", default="idle", help="what else the machine did, for the record (default: idle)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    model = sana_600m(options.blocks)
    certificate = export_htp(model, items(2, seed=1), items(1, seed=2), options.output, probe_blocks=1)
    parity = certificate["parity"]
    shape = f"Sana-600M, {options.blocks} blocks, 512 px, 256 + 300 tokens, random weights"
    extra = {
        "shape": shape,
        "export_seconds": round(time.perf_counter() - began, 1),
        "steps_seconds": certificate["seconds"],
        "compiler": certificate["compiler"],
        "emulator": certificate["emulator"],
        "cost": certificate["cost"],
        "emulator_vs_cpu_qdq_db": parity["emulator_vs_cpu_qdq"]["sqnr_db"],
        "machine_was": options.note,
    }
    print(json.dumps(extra | {"peak_rss_mib": peak_rss_mib()}, indent=2))
    if options.dry_run:
        return
    common = {"suite": "htp", "family": "sana", "method": "ptq-maxabs", "seed": 0, "n": 1, "extra": extra}
    memory = Record(**common, metric="peak_rss_mib", value=peak_rss_mib())
    sqnr = Record(**common, metric="sqnr_db", value=parity["emulator_vs_torch_packed"]["sqnr_db"])
    print(f"saved {write_records(RESULTS, [memory, sqnr]).name}")


if __name__ == "__main__":
    main()
