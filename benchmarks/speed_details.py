"""Where the packed model's time goes on a CPU, how it scales, and what loading it costs.

    python -m benchmarks.speed_details     # -> benchmarks/results/speed-details.json and docs/images/speed-scaling.png

The model is that of benchmarks/speed_cpu.py, float32, one thread. `profile`: the time of a forward by kind of work.
`layer`: parts of one layer of 1152 to 1152 features, 256 tokens, in several ways, the chosen and the left ones.
`shared`: a forward whose layers quantize an input of several of them once.
`scaling`: time and peak memory of a forward, float32 and packed in turn, over tokens, blocks and batch. `loading`: a
packed pipeline of Sana-600M's shape with all 28 blocks, random weights and the text encoder of the tiny pipeline, from
files that are not in memory: reading their bytes, `from_pretrained`, the first forward, each in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.speed_cpu import SHAPE, float_model, in_turn, inputs, packed_copy, resident_mib, settle

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "speed-details.json"
PLOT = ROOT / "docs" / "images" / "speed-scaling.png"
COMMAND = "python -m benchmarks.speed_details"
# what operators are, by a part of their names; the first that fits
KINDS = {
    "packed layers": "packed_linear",
    "layers in float": ("addmm", "aten::mm", "slow_conv2d"),
    "attention": ("scaled_dot_product", "bmm"),
    "depthwise convolution": "mkldnn_convolution",
    "activations": ("silu", "gelu"),
    "normalization": "layer_norm",
}
SIDES, BLOCKS, BATCHES = (16, 23, 32, 45, 64), (1, 2, 4, 8), (1, 2, 4)  # latents of a side: 256 to 4096 tokens
ALL_BLOCKS = 28


def profile(rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of a forward by kind of work, float32 and packed."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    float32, call, rows = float_model(), inputs(), []
    with torch.no_grad():
        for name, model in (("float32", float32), ("packed", packed_copy(float32))):
            model(**call)
            with profiled(activities=[ProfilerActivity.CPU]) as found:
                for _ in range(rounds):
                    model(**call)
            times = dict.fromkeys([*KINDS, "the rest"], 0.0)
            for event in found.key_averages():
                fits = (kind for kind, parts in KINDS.items() for part in _tuple(parts) if part in event.key)
                own = event.self_cpu_time_total / rounds / 1e3
                times[next(fits, "the rest")] += own
            rows.append({"model": name, "ms": times})
    return rows


def _tuple(parts: str | tuple[str, ...]) -> tuple[str, ...]:
    return (parts,) if isinstance(parts, str) else parts


def layer(rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of quantizing an input and of the product, by the kernels and by what was tried beside them."""
    import torch
    from torch import Tensor
    from torch.nn.functional import linear

    from fbqat_hub.quantization import ActivationScheme
    from fbqat_hub.quantization.kernels import cpu, native
    from fbqat_hub.quantization.packing import pack

    torch.manual_seed(0)
    tokens, features, scheme = 256, 1152, ActivationScheme()
    weight, scale, bias = torch.randn(features, features), torch.ones(features), torch.zeros(features)
    codes = torch.randint(-8, 8, weight.shape, dtype=torch.int8)
    packed, prepared = pack(codes, 4), cpu._prepack(codes)
    zeros = torch.zeros(features)
    fbgemm = torch.ops.quantized.linear_prepack(
        torch._make_per_channel_quantized_tensor(codes, scale.double(), zeros.long(), 0), None
    )
    x = torch.randn(tokens, features)
    x_codes, _, _ = cpu._quantize(x, scheme, None, None)
    as_floats = x_codes.float() - 128

    def by_torch(x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp_min_(1e-8).div_(127)
        return torch.div(x, scale).round_().to(torch.int8).view(torch.uint8).bitwise_xor_(128)

    def by_aminmax(x: Tensor) -> Tensor:
        low, high = x.aminmax(dim=-1, keepdim=True)
        scale = torch.maximum(low.neg_(), high).clamp_min_(1e-8).div_(127)
        return torch.div(x, scale).round_().to(torch.int8).view(torch.uint8).bitwise_xor_(128)

    def in_pieces(x: Tensor) -> Tensor:
        return torch.cat([by_torch(piece.float()) for piece in x.split(64)])

    half, quantizing, product = x.bfloat16(), "quantize the input", "multiply"
    ways: list[tuple[str, str, Callable[[], Any]]] = [
        (quantizing, "torch's operators", partial(by_torch, x)),
        (quantizing, "the same with `aminmax`", partial(by_aminmax, x)),
        (quantizing, "the same, 64 tokens at a time", partial(in_pieces, x)),
        (f"{quantizing}, bfloat16", "torch's operators", lambda: by_torch(half.float())),
        (f"{quantizing}, bfloat16", "the same, 64 tokens at a time", partial(in_pieces, half)),
        (product, "float32", lambda: linear(x, weight, bias)),
        (product, "oneDNN, int8", lambda: cpu._integer_matmul(x_codes, 128, prepared, scale)),
        (
            product,
            "FBGEMM, int8",
            lambda: torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(as_floats, 1.0, 128, fbgemm),
        ),
    ]
    if native.load() is not None:
        ways += [
            (quantizing, "C", lambda: cpu._quantize(x, scheme, None, None)),
            (f"{quantizing}, bfloat16", "C", lambda: cpu._quantize(half, scheme, None, None)),
            ("both", "C", lambda: native.packed_linear_native(x, packed, scale, bias, scheme)),
        ]
    again = 8  # what a way needs is in the cache, as what a layer reads is when the layer before has written it
    times = in_turn({f"{part}: {way}": partial(_repeat, run, again) for part, way, run in ways}, 2 * rounds)
    rows = [{"part": part, "way": way, "ms": times[f"{part}: {way}"] / again} for part, way, _ in ways]
    return sorted(rows, key=lambda row: (quantizing not in row["part"], "bfloat16" in row["part"]))


def _repeat(run: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        run()


def shared(rounds: int) -> list[dict[str, Any]]:
    """A trial that is not in the library: q, k and v take the codes of their input from the first of them."""
    import torch
    from torch import Tensor

    from fbqat_hub.quantization.kernels import cpu, native

    if not cpu._is_native():
        return []
    float32, call = float_model(), inputs()
    packed, quantize, last = packed_copy(float32), native.quantize, {}

    def once(tokens: Tensor, *others: Any, **options: Any) -> Any:
        key = (tokens.data_ptr(), tokens.shape, tokens._version)
        if key not in last:
            last.clear()
            last[key] = (tokens, quantize(tokens, *others, **options))  # its memory stays its own while it is kept
        return last[key][1]

    def trial() -> None:
        native.quantize = once
        try:
            packed(**call)
        finally:
            native.quantize = quantize
            last.clear()

    ways = {"float32": partial(float32, **call), "each layer": partial(packed, **call), "once for q, k, v": trial}
    with torch.no_grad():
        times = in_turn(ways, 6 * rounds)
    return [{"way": way, "ms": ms} for way, ms in times.items()]


def high_water_mib() -> float:
    """The most memory that this process had since that was last forgotten."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


def peak_mib(forward: Callable[[], Any]) -> float:
    """What a forward takes at its peak, beyond what the process has before it."""
    settle()
    before = resident_mib()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    forward()
    return high_water_mib() - before


def scaling(rounds: int) -> list[dict[str, Any]]:
    """Time and peak memory of a forward over tokens, blocks and batch."""
    import torch

    points = [("tokens", side * side, {"side": side}, {}) for side in SIDES]
    points += [("blocks", blocks, {}, {"num_layers": blocks}) for blocks in BLOCKS]
    points += [("batch", batch, {"batch": batch}, {}) for batch in BATCHES]
    rows = []
    for what, value, of_inputs, of_model in points:
        float32, call = float_model(**of_model), inputs(**of_inputs)
        models = {"float32": float32, "packed": packed_copy(float32)}
        forwards = {name: partial(model, **call) for name, model in models.items()}
        times = in_turn(forwards, rounds)
        with torch.no_grad():
            peaks = {name: peak_mib(forward) for name, forward in forwards.items()}
        weights = {
            name: sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]) / 2**20
            for name, model in models.items()
        }
        rows.append({"over": what, "value": value, "ms": times, "activations_mib": peaks, "weights_mib": weights})
        print(what, value, {name: round(ms) for name, ms in times.items()}, flush=True)
    return rows


def save_pipeline(folder: Path) -> None:
    """The tiny Sana pipeline with a packed denoiser of Sana-600M's shape and random weights."""
    import torch
    from diffusers import SanaTransformer2DModel

    from fbqat_hub import FBQATConfig
    from fbqat_hub.integrations.checkpoint import described, packed_layers
    from fbqat_hub.quantization.convert import replace_layers

    shutil.copytree(ROOT / "training" / "teachers" / "sana-tiny", folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "transformer")
    with torch.device("meta"):
        model = SanaTransformer2DModel(**{**SHAPE, "num_layers": ALL_BLOCKS})
    config = FBQATConfig(modules_to_not_convert=["proj_out"])
    replace_layers(model, {model.get_submodule(name): layer for name, layer in packed_layers(model, config).items()})
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dtype == torch.uint8:
                tensor.random_(0, 256)
            else:
                tensor.uniform_(1e-4, 1e-3) if name.endswith("_scale") else tensor.normal_(std=0.02)
    model.register_to_config(quantization_config=described(model, config))
    model.save_pretrained(folder / "transformer")


def drop_from_memory(folder: Path) -> list[Path]:
    """The folder's weights, which the system no longer has in memory."""
    files = sorted(folder.rglob("*.safetensors"))
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return files


def load(folder: Path, rounds: int) -> dict[str, float]:
    """Seconds and MiB of reading the bytes, of `from_pretrained` and of the first forward."""
    import torch
    from diffusers import DiffusionPipeline, SanaPipeline  # noqa: F401  # imported before the clock starts

    import fbqat_hub  # noqa: F401

    torch.set_num_threads(1)
    files = drop_from_memory(folder)
    began = time.perf_counter()
    size = sum(len(file.read_bytes()) for file in files)
    read = time.perf_counter() - began
    drop_from_memory(folder)
    settle()
    before = resident_mib()
    Path("/proc/self/clear_refs").write_text("5")
    began = time.perf_counter()
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    loaded = time.perf_counter() - began
    call, times = inputs(), []
    with torch.no_grad():
        for _ in range(rounds + 1):
            began = time.perf_counter()
            pipeline.transformer(**call)
            times.append(time.perf_counter() - began)
    peak = high_water_mib()
    settle()
    resident = resident_mib()
    return {
        "stored_mib": size / 2**20, "read_seconds": read, "load_seconds": loaded, "program_mib": before,
        "peak_mib": peak, "resident_mib": resident, "first_forward_seconds": times[0],
        "later_forward_seconds": statistics.median(times[1:]),
    }  # fmt: skip


def loading(rounds: int) -> list[dict[str, float]]:
    """``load`` in fresh processes."""
    with tempfile.TemporaryDirectory() as work:
        save_pipeline(Path(work))
        command = [sys.executable, "-m", "benchmarks.speed_details", "--load", work]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        found = []
        for _ in range(rounds):
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(found[-1], flush=True)
    return found


def plot(found: dict[str, Any], path: Path) -> None:
    """Time and peak memory of a forward, float32 and packed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    over = ("tokens", "blocks", "batch")
    figure, grid = pyplot.subplots(2, len(over), figsize=(10, 5.2), layout="constrained")
    for column, what in enumerate(over):
        rows = [row for row in found["rows"] if row["over"] == what]
        for name, colour in (("float32", "0.45"), ("packed", "tab:orange")):
            values = [row["value"] for row in rows]
            memory = [row["activations_mib"][name] + row["weights_mib"][name] for row in rows]
            grid[0, column].plot(values, [row["ms"][name] for row in rows], "o-", color=colour, label=name)
            grid[1, column].plot(values, memory, "o-", color=colour, label=name)
        grid[1, column].set_xlabel(what)
        for axes in grid[:, column]:
            axes.set_ylim(bottom=0)
            axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].set_ylabel("one forward, ms")
    grid[1, 0].set_ylabel("weights and peak of a forward, MiB")
    grid[0, 0].legend(frameon=False)
    figure.suptitle(
        f"Two blocks of Sana-600M's shape, 256 tokens, batch 1, where not varied; {found['machine']['cpu']}, one "
        f"thread, {found['date'][:10]}",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)


PARTS: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "profile": profile,
    "layer": layer,
    "shared": shared,
    "scaling": scaling,
    "loading": loading,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}; all, if none is named")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load(options.load, options.rounds)))
        return
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: parts are {', '.join(PARTS)}")

    import torch

    from fbqat_hub.evaluation.results import machine, now, versions

    torch.set_num_threads(1)
    found = json.loads(options.output.read_text()) if options.output.exists() else {}
    for part in options.parts:
        rows = PARTS[part](options.rounds)
        found[part] = {
            "command": f"{COMMAND} {part}", "date": now(), "machine": machine(), "versions": versions(),
            "rounds": options.rounds, "rows": rows,
        }  # fmt: skip
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    if "scaling" in options.parts:
        plot(found["scaling"], options.plot)


if __name__ == "__main__":
    main()
