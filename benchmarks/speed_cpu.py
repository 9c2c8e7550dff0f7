"""Speed and size of the packed model on a CPU, against float32 in the same process.

    python benchmarks/speed_cpu.py          # writes benchmarks/results/speed-cpu.json

Two blocks of Sana-600M's shape at 512 px (256 latent tokens, 300 text tokens, batch 1), random weights. Float32 and
packed forwards take turns, so that a change of the machine's speed meets both; the ratio is of medians. Every setting
has processes of its own, whose median ratio counts. Each limits this machine to the instructions that it names, and is
measured where it has them; results of the others stay as they are.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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
# what oneDNN, torch and the C kernel are limited to
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "FBQAT_INSTRUCTIONS": "avx2"}
AVX_VNNI = {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", "ATEN_CPU_CAPABILITY": "avx2", "FBQAT_INSTRUCTIONS": "avx-vnni"}
AVX512 = {"FBQAT_INSTRUCTIONS": "avx512-vnni"}
NO_COMPILER = {"FBQAT_COMPILE": "0"}


class Setting(NamedTuple):
    """What a process is limited to."""

    environment: dict[str, str]
    threads: int
    dtype: str = "float32"
    memory: str = "fast"
    eighth_at_8_bits: bool = False
    group_size: int | None = None


# A setting's place is the seed of its record, which tells them apart: nothing here depends on one.
SETTINGS: dict[str, Setting] = {
    "AVX-512 VNNI, 1 thread": Setting(AVX512, 1),
    "AVX-512 VNNI, 2 threads": Setting(AVX512, 2),
    "AVX-512 VNNI, 1 thread, bfloat16 in and out": Setting(AVX512, 1, dtype="bfloat16"),
    "AVX-512 VNNI, 1 thread, 4.5 bits on average": Setting(AVX512, 1, eighth_at_8_bits=True),
    "AVX-512 VNNI, 1 thread, groups of 32": Setting(AVX512, 1, group_size=32),
    "AVX-512 VNNI, 1 thread, no C compiler": Setting({**AVX512, **NO_COMPILER}, 1),
    "AVX-VNNI, 1 thread": Setting(AVX_VNNI, 1),
    "AVX-VNNI, 1 thread, no C compiler": Setting({**AVX_VNNI, **NO_COMPILER}, 1),
    "AVX2 only, 1 thread": Setting(AVX2, 1),
    "AVX2 only, 2 threads": Setting(AVX2, 2),
    "AVX2 only, 1 thread, bfloat16 in and out": Setting(AVX2, 1, dtype="bfloat16"),
    "AVX2 only, 1 thread, 4.5 bits on average": Setting(AVX2, 1, eighth_at_8_bits=True),
    "AVX2 only, 1 thread, groups of 32": Setting(AVX2, 1, group_size=32),
    "AVX2 only, 1 thread, no C compiler": Setting({**AVX2, **NO_COMPILER}, 1),
    "AVX2 only, 1 thread, no C compiler, small memory": Setting({**AVX2, **NO_COMPILER}, 1, memory="small"),
}


def float_model(**changes: Any) -> Any:
    """The float model of ``SHAPE``, random weights, always the same."""
    import torch
    from diffusers import SanaTransformer2DModel

    torch.manual_seed(0)
    return SanaTransformer2DModel(**{**SHAPE, **changes}).eval()


# An eighth of the weights of two blocks: at 8 bits they make 4.5 on average.
EIGHTH = "transformer_blocks.*.ff.conv_point"


def packed_copy(model: Any, eighth_at_8_bits: bool = False, group_size: int | None = None) -> Any:
    """Its packed twin, in the same dtype."""
    import copy

    from fbqat_hub.quantization import ActivationScheme, WeightScheme, convert, prepare

    packed = copy.deepcopy(model)
    widths = {EIGHTH: 8} if eighth_at_8_bits else None
    scheme = WeightScheme(granularity="per_group" if group_size else "per_channel", group_size=group_size)
    prepare(packed, scheme, ActivationScheme(), overrides={"proj_out": {"bits": 16}}, widths=widths)
    convert(packed)
    return packed.to(model.dtype)


def inputs(side: int = 16, batch: int = 1, dtype: Any = None) -> dict[str, Any]:
    """Arguments of a forward: latents of side x side tokens, 300 text tokens."""
    import torch

    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 32, side, side).to(dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, 300, 2304).to(dtype=dtype),
        "timestep": torch.full((batch,), 500.0).to(dtype=dtype),
    }


def resident_mib() -> float:
    """Memory of this process that is in RAM."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def settle() -> None:
    """Free what can be freed, and give it back to the system."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def in_turn(forwards: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, taking turns; two rounds before warm up."""
    import torch

    times: dict[str, list[float]] = {name: [] for name in forwards}
    with torch.no_grad():
        for turn in range(rounds + 2):
            for name, forward in forwards.items():
                began = time.perf_counter()
                forward()
                if turn >= 2:
                    times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(setting: str, rounds: int) -> dict[str, Any]:
    """Forward times in milliseconds, float32 and packed in turn; bytes that packed layers keep, and what they store."""
    import torch

    import fbqat_hub
    from fbqat_hub.quantization import stored_bits_per_weight
    from fbqat_hub.quantization.convert import named_layers
    from fbqat_hub.quantization.packed import PackedLayer

    how = SETTINGS[setting]
    torch.set_num_threads(how.threads)
    fbqat_hub.set_memory(how.memory)
    dtype = getattr(torch, how.dtype)
    float32 = float_model()
    packed = packed_copy(float32, how.eighth_at_8_bits, how.group_size).to(dtype)
    call, half = inputs(), inputs(dtype=dtype)
    times = in_turn({"float32": lambda: float32(**call), "packed": lambda: packed(**half)}, rounds)
    layers = [layer for _, layer in named_layers(packed, PackedLayer)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return {**times, "bits": stored_bits_per_weight(packed), "resident": sum(map(kept_bytes, layers)) / weights}


def kept_bytes(layer: Any) -> int:
    """What a packed layer keeps of its weight: packed bytes, scales, and the int8 copy that oneDNN's kernel keeps."""
    copies = getattr(layer.weight_packed.untyped_storage(), "fbqat_prepared", {})
    unpacked = layer.in_features * layer.out_features * len(copies)
    return layer.weight_packed.nbytes + layer.weight_scale.nbytes + unpacked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="forwards of each model in a process (default: 9)")
    parser.add_argument("--processes", type=int, default=5, help="of each setting (default: 5); their median counts")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="(default: all)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--one", choices=SETTINGS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.rounds)))
        return

    from fbqat_hub.evaluation.results import Record, write_records
    from fbqat_hub.quantization.kernels.native import instructions_here

    records, four_bits = [], 0.0
    for seed, (setting, how) in enumerate(SETTINGS.items()):
        if setting not in options.settings or how.environment["FBQAT_INSTRUCTIONS"] not in instructions_here():
            continue
        command = [sys.executable, __file__, "--one", setting, "--rounds", str(options.rounds)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(how.threads), **how.environment}
        runs = []
        for _ in range(options.processes):
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
        runs.sort(key=lambda run: run["float32"] / run["packed"])
        ratios = [run["float32"] / run["packed"] for run in runs]
        found, speedup = runs[len(runs) // 2], ratios[len(runs) // 2]
        four_bits = four_bits if how.eighth_at_8_bits or how.group_size else found["bits"]
        print(
            f"{setting:49s} float32 {found['float32']:6.0f} ms   W4A8 {found['packed']:6.0f} ms   {speedup:.2f}x "
            f"faster ({ratios[0]:.2f} to {ratios[-1]:.2f}), {found['resident']:.2f} bytes per weight",
            flush=True,
        )
        extra = {"setting": setting, "float32_ms": found["float32"], "speedup": speedup, "shape": SHAPE}
        extra |= {"resident_bytes_a_weight": found["resident"], "busy": os.getloadavg()[0]}
        extra |= {"stored_bits": found["bits"], "speedups": ratios}
        label = f"W4A8 forward, {setting} ({speedup:.2f}× faster than float32's {found['float32']:.0f} ms)"
        common = {"suite": "speed-cpu", "family": "sana", "method": "ptq-maxabs", "seed": seed}
        records.append(
            Record(
                **common, metric="ms_forward", value=found["packed"], n=options.rounds, extra={**extra, "label": label}
            )
        )
    bits = {"label": "stored bits per weight, scales included", "setting": "any"}
    if four_bits:
        records.append(
            Record(**{**common, "seed": len(SETTINGS)}, metric="bits_per_weight", value=four_bits, n=1, extra=bits)
        )
    print(f"stored bits per weight {four_bits:.3f}\nsaved {write_records(options.output, records).name}")


if __name__ == "__main__":
    main()
