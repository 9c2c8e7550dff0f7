"""Denoisers at true size to HTP context binaries: time, peak memory, bytes, one forward compared. Random weights.

python -m benchmarks.htp_true_size --model sana-600m --output runs/sana-600m   # -> benchmarks/results/htp.json
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch
from torch import Tensor, nn

from fbqat_hub.evaluation.results import Record, write_records
from fbqat_hub.export import export_htp
from fbqat_hub.export.htp.graph import STEPS
from fbqat_hub.families import get_family
from fbqat_hub.quantization import ActivationScheme, PackedLayer, PackedLinear, PackedPointwiseConv2d
from fbqat_hub.quantization.convert import named_layers, targets

RESULTS = Path(__file__).parent / "results" / "htp.json"


@dataclass(frozen=True, kw_only=True)
class TrueSize:
    """A denoiser to export.

    Attributes:
        family: of the results; says the class, and how inputs are made of latents and conditioning.
        config: of the checkpoint, but for the number of blocks and the picture size.
        shape: what was left out, and the tokens, for the tables.
        latents: [N, C, H, W], N = 1.
        conditioning: shapes of what the text encoders make.
        graphs: into how many graphs it is split.
    """

    family: str
    config: dict[str, Any]
    shape: str
    latents: tuple[int, ...]
    conditioning: dict[str, tuple[int, ...]]
    graphs: int = 1

    def items(self, count: int, seed: int) -> list[dict[str, Tensor]]:
        """`count` random inputs of its forward."""
        generator = torch.Generator().manual_seed(seed)
        family = get_family(self.family)
        return [
            family.denoiser_inputs(
                torch.randn(self.latents, generator=generator),
                1000 * torch.rand(1, generator=generator),
                {name: torch.randn(shape, generator=generator) for name, shape in self.conditioning.items()},
            )
            for _ in range(count)
        ]


#: Configurations of the public checkpoints (their transformer/config.json).
MODELS = {
    "sana-600m": TrueSize(
        family="sana",
        config={
            "in_channels": 32, "out_channels": 32, "num_layers": 28, "num_attention_heads": 36,
            "attention_head_dim": 32, "num_cross_attention_heads": 16, "cross_attention_head_dim": 72,
            "cross_attention_dim": 1152, "caption_channels": 2304, "mlp_ratio": 2.5, "sample_size": 16,
            "patch_size": 1,
        },
        shape="all 28 blocks, 512 px: 256 + 300 tokens",
        latents=(1, 32, 16, 16),
        conditioning={"encoder_hidden_states": (1, 300, 2304)},
    ),
    "pixart-block": TrueSize(
        family="pixart-sigma",
        config={
            "num_layers": 1, "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
            "cross_attention_dim": 1152, "caption_channels": 4096, "sample_size": 32, "patch_size": 2,
            "use_additional_conditions": False,
        },
        shape="1 of 28 blocks, 256 px: 256 + 300 tokens",
        latents=(1, 4, 32, 32),
        conditioning={"encoder_hidden_states": (1, 300, 4096)},
    ),
    "sd3-block": TrueSize(
        family="sd3",
        config={
            "num_layers": 2, "num_attention_heads": 24, "attention_head_dim": 64, "in_channels": 16,
            "out_channels": 16, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048, "sample_size": 128, "patch_size": 2, "pos_embed_max_size": 384,
            "dual_attention_layers": (0,), "qk_norm": "rms_norm",
        },
        shape="a dual-attention block and the last one, of 24, 128 px: 64 + 333 tokens",
        latents=(1, 16, 16, 16),
        conditioning={"encoder_hidden_states": (1, 333, 4096), "pooled_projections": (1, 2048)},
    ),
    "flux-blocks": TrueSize(
        family="flux",
        config={
            "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 24, "attention_head_dim": 128,
            "joint_attention_dim": 4096, "pooled_projection_dim": 768, "in_channels": 64, "guidance_embeds": False,
        },
        shape="1 of 19 double and 1 of 38 single blocks, 128 px: 64 + 128 tokens",
        latents=(1, 16, 16, 16),  # 64 tokens of 64 channels
        conditioning={"encoder_hidden_states": (1, 128, 4096), "pooled_projections": (1, 768)},
        graphs=2,
    ),
}  # fmt: skip


def random_packed(described: TrueSize, **config: Any) -> nn.Module:
    """The packed denoiser of random weights, built layer by layer: none of its layers is ever in float."""
    with torch.device("meta"):
        model: nn.Module = getattr(diffusers, get_family(described.family).denoiser_class)(
            **(described.config | config)
        )
    generator = torch.Generator().manual_seed(0)
    scheme = ActivationScheme(bits=8, range="per_token")
    for layer, names, *_ in targets(model, scheme):
        kind = PackedPointwiseConv2d if isinstance(layer, nn.Conv2d) else PackedLinear
        out_features, in_features = layer.weight.shape[:2]
        packed = kind(in_features, out_features, bias=layer.bias is not None, activation_scheme=scheme)
        packed.weight_packed.data.random_(0, 256, generator=generator)
        # codes of -8..7 have a standard deviation of 4.6. Weights of 1 / sqrt(in) would keep activations near 1; they
        # are half of it, or random attention scores of several standard deviations would pick single tokens
        packed.weight_scale.fill_(0.5 * in_features**-0.5 / 4.6)
        if packed.bias is not None:
            packed.bias.data.zero_()
        for name in names:
            model.set_submodule(name, packed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            owner, _, last = name.rpartition(".")
            noise = torch.randn(tensor.shape, generator=generator)
            value = 1 + 0.1 * noise if "norm" in name else 0.1 * noise
            is_parameter = isinstance(tensor, nn.Parameter)
            setattr(model.get_submodule(owner), last, nn.Parameter(value, False) if is_parameter else value)
    return model.eval()


class PeakMemory(threading.Thread):
    """The most memory that a process and its children had together, looked at ten times a second.

    Args:
        pid: of the process; this one if None.

    Attributes:
        mib: resident, in MiB.
    """

    def __init__(self, pid: int | None = None) -> None:
        super().__init__(daemon=True)
        self.mib = 0.0
        self._own = psutil.Process(pid)

    def run(self) -> None:
        while self._own.is_running():
            resident = 0
            for process in [self._own, *self._own.children(recursive=True)]:
                try:
                    resident += process.memory_info().rss
                except psutil.NoSuchProcess:  # it ended meanwhile
                    continue
            self.mib = max(self.mib, resident / 2**20)
            time.sleep(0.1)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--blocks", type=int, help="of sana-600m, with --dry-run (default: 28, all)")
    parser.add_argument("--threads", type=int, default=1, help="of torch; the compiler has its own (default: 1)")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the export")
    parser.add_argument("--dry-run", action="store_true", help="leave benchmarks/results as it is")
    parser.add_argument("--note", default="idle", help="what else the machine did, for the record (default: idle)")
    options = parser.parse_args()
    if options.blocks and not (options.dry_run and options.model == "sana-600m"):
        parser.error("--blocks is for --model sana-600m with --dry-run: results are of the model as it is described")
    torch.set_num_threads(options.threads)
    described, memory = MODELS[options.model], PeakMemory()
    memory.start()
    began = time.perf_counter()
    model = random_packed(described, **({"num_layers": options.blocks} if options.blocks else {}))
    weights = sum(layer.in_features * layer.out_features for _, layer in named_layers(model, PackedLayer))
    certificate = export_htp(
        model,
        described.items(2, seed=1),
        described.items(1, seed=2),
        options.output,
        graphs=described.graphs,
        probe_blocks=1,
    )
    parity, used = certificate["parity"], os.times()
    extra = {
        "model": options.model,
        "shape": described.shape,
        "packed_weights": weights,
        "graphs": described.graphs,
        "export_seconds": round(time.perf_counter() - began, 1),
        # of this process and its children; unlike `export_seconds`, little changed by what else the machine does
        "cpu_seconds": round(used.user + used.system + used.children_user + used.children_system, 1),
        "steps_seconds": {
            step: round(sum(took for name, took in certificate["seconds"].items() if name.endswith(f": {step}")), 1)
            for step in ("trace", "calibrate", "quantize", *STEPS)
        },
        "compiler": certificate["compiler"],
        "emulator": certificate["emulator"],
        "cost": certificate["cost"],
        "emulator_vs_cpu_qdq_db": parity["emulator_vs_cpu_qdq"]["sqnr_db"],
        "probed_blocks": certificate["probed_blocks"],
        "largest_op_error": certificate["op_parity"]["largest"]["error"],
        "threads": options.threads,
        "machine_was": options.note,
    }
    print(json.dumps(extra | {"peak_rss_mib": memory.mib}, indent=2))
    if options.dry_run:
        return
    common = {"suite": "htp", "family": described.family, "method": "ptq-maxabs", "seed": 0, "n": 1, "extra": extra}
    peak = Record(**common, metric="peak_rss_mib", value=memory.mib)
    sqnr = Record(**common, metric="sqnr_db", value=parity["emulator_vs_torch_packed"]["sqnr_db"])
    print(f"saved {write_records(RESULTS, [peak, sqnr]).name}")


if __name__ == "__main__":
    main()
