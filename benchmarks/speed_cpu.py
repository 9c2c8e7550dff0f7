"""Speed and size of the packed model on a CPU, against float32 in the same process.

    python benchmarks/speed_cpu.py          # writes benchmarks/results/speed-cpu.json

Two blocks of Sana-600M's shape at 512 px (256 latent tokens, 300 text tokens, batch 1), random weights. Float32 and
packed forwards take turns, so that a change of the machine's speed meets both; the ratio is of medians. Every setting
is its own process; "AVX2 only" limits this machine to AVX2, without VNNI.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "speed-cpu.json"
SHAPE = {
    "num_attention_heads": 36,
    "attention_head_dim": 32,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "sample_size": 16,
    "in_channels": 32,
    "out_channels": 32,
    "patch_size": 1,
    "num_layers": 2,
}
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
SETTINGS: dict[str, tuple[dict[str, str], int]] = {
    "all instructions, 1 thread": ({}, 1),
    "all instructions, 2 threads": ({}, 2),
    "AVX2 only, 1 thread": (AVX2, 1),
    "AVX2 only, 2 threads": (AVX2, 2),
}


def measure(threads: int, rounds: int) -> dict[str, Any]:
    """Forward times in milliseconds, float32 and packed in turn, and what the packed layers store."""
    import copy

    import torch
    from diffusers import SanaTransformer2DModel

    from fbqat_hub.quantization import ActivationScheme, WeightScheme, convert, prepare, stored_bits_per_weight

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    float_model = SanaTransformer2DModel(**SHAPE).eval()
    packed = copy.deepcopy(float_model)
    prepare(packed, WeightScheme(), ActivationScheme(), overrides={"proj_out": {"bits": 16}})
    convert(packed)
    inputs = {
        "hidden_states": torch.randn(1, 32, 16, 16),
        "encoder_hidden_states": torch.randn(1, 300, 2304),
        "timestep": torch.tensor([500.0]),
    }
    times: dict[str, list[float]] = {"float32": [], "packed": []}
    with torch.no_grad():
        for turn in range(rounds + 2):
            for name, model in (("float32", float_model), ("packed", packed)):
                began = time.perf_counter()
                model(**inputs)
                if turn >= 2:  # the first two warm up
                    times[name].append(1e3 * (time.perf_counter() - began))
    return {
        "float32": statistics.median(times["float32"]),
        "packed": statistics.median(times["packed"]),
        "bits": stored_bits_per_weight(packed),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--one", type=int, metavar="THREADS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.rounds)))
        return

    from fbqat_hub.evaluation.results import Record, write_records

    records = []
    for seed, (setting, (environment, threads)) in enumerate(SETTINGS.items()):
        command = [sys.executable, __file__, "--one", str(threads), "--rounds", str(options.rounds)]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        speedup = found["float32"] / found["packed"]
        print(
            f"{setting:28s} float32 {found['float32']:6.0f} ms   W4A8 {found['packed']:6.0f} ms   {speedup:.2f}x faster"
        )
        # `seed` tells the settings apart: nothing here depends on one
        extra = {"setting": setting, "float32_ms": found["float32"], "speedup": speedup, "shape": SHAPE}
        label = f"W4A8 forward, {setting} ({speedup:.2f}× faster than float32's {found['float32']:.0f} ms)"
        common = {"suite": "speed-cpu", "family": "sana", "method": "ptq-maxabs", "seed": seed}
        records.append(
            Record(
                **common, metric="ms_forward", value=found["packed"], n=options.rounds, extra={**extra, "label": label}
            )
        )
    bits = {"label": "stored bits per weight, scales included", "setting": "any"}
    records.append(Record(**common, metric="bits_per_weight", value=found["bits"], n=1, extra=bits))
    print(f"stored bits per weight {found['bits']:.3f}\nsaved {write_records(options.output, records).name}")


if __name__ == "__main__":
    main()
