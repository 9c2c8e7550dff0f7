"""Speed of other 4-bit quantizers on this CPU, beside float32, bfloat16 and the packed model.

    python -m benchmarks.speed_peers        # -> benchmarks/results/speed-peers.json and docs/images/speed-peers.png

Each peer has an environment of its own, made under --work with the versions of PACKAGES above the packages that this
Python has (torch, diffusers). Every row is a process of its own that waits while another computes: in a round each does
one forward, so that a change of the machine's speed meets all. All quantize the same float weights, to 4 bits, each at
what its documentation gives for a CPU; the error of a row is that of its output to the float32 model's.

The model is that of benchmarks/speed_cpu.py. Its 1x1 convolutions, most of its weights, are linear layers by another
name; as such they are given to peers that quantize linear layers only. What does not work is a row with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.speed_cpu import float_model, inputs, packed_copy, resident_mib, settle

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "speed-peers.json"
PLOT = ROOT / "docs" / "images" / "speed-peers.png"
COMMAND = "python -m benchmarks.speed_peers"
# with what each needs that neither torch nor diffusers brings
PACKAGES: dict[str, tuple[str, ...]] = {
    "torchao": ("torchao==0.18.0",),
    "sdnq": ("sdnq==0.2.8", "openvino==2026.4.1", "openvino-telemetry==2025.2.0"),  # its int8 products on a CPU
    "optimum-quanto": ("optimum-quanto==0.2.7", "ninja==1.13.2"),
    "bitsandbytes": ("bitsandbytes==0.50.2",),
    "hqq": ("hqq==0.2.8.post1", "termcolor==3.3.0", "einops==0.8.2"),
    "gguf": ("gguf==0.19.0",),
}


class Peer(NamedTuple):
    """A row: who quantizes, how, and in which dtype the model computes."""

    package: str
    setting: str
    dtype: str
    build: Callable[[Any], Any]
    compiled: bool = False


def _layers(model: Any) -> dict[str, Any]:
    """The linear layers that every row quantizes: all but the last."""
    import torch

    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "proj_out" and min(layer.weight.shape) > 32
    }


def pointwise_as_linear(model: Any) -> Any:
    """The model with its 1x1 convolutions as linear layers."""
    import torch

    from fbqat_hub.quantization.layer import is_pointwise

    class Pointwise(torch.nn.Module):
        def __init__(self, convolution: Any) -> None:
            super().__init__()
            out, into = convolution.weight.shape[:2]
            self.linear = torch.nn.Linear(into, out, bias=convolution.bias is not None)
            self.linear.weight = torch.nn.Parameter(convolution.weight.detach().reshape(out, into))
            self.linear.bias = convolution.bias

        def forward(self, x: Any) -> Any:
            return self.linear(x.movedim(-3, -1)).movedim(-1, -3)

    for name, layer in list(model.named_modules()):
        if is_pointwise(layer) and min(layer.weight.shape[:2]) > 32:
            model.set_submodule(name, Pointwise(layer))
    return model


def _each_layer(model: Any, made: Callable[[Any], Any]) -> Any:
    model = pointwise_as_linear(model)
    for name, layer in _layers(model).items():
        model.set_submodule(name, made(layer))
    return model


def torchao_w4a8(model: Any) -> Any:
    import torch
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup, quantize_

    model = pointwise_as_linear(model)
    chosen = set(_layers(model))
    config = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
    quantize_(model, config, filter_fn=lambda _, name: name in chosen)
    return model


def torchao_int4(model: Any) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    model = pointwise_as_linear(model)
    chosen = set(_layers(model))
    quantize_(model, Int4WeightOnlyConfig(group_size=128), filter_fn=lambda _, name: name in chosen)
    return model


def sdnq_quantized(model: Any, **how: Any) -> Any:
    import torch
    from sdnq import sdnq_post_load_quant

    model = sdnq_post_load_quant(
        pointwise_as_linear(model),
        weights_dtype="int4",
        add_skip_keys=False,
        modules_to_not_convert=["proj_out"],
        quantization_device=torch.device("cpu"),
        return_device=torch.device("cpu"),
        **how,
    )
    return model[0] if isinstance(model, tuple) else model


def quanto_int4(model: Any) -> Any:
    from optimum.quanto import freeze, qint4, quantize

    quantize(pointwise_as_linear(model), weights=qint4, exclude=["proj_out"])
    freeze(model)
    return model


def bitsandbytes_nf4(model: Any) -> Any:
    import bitsandbytes as bnb
    import torch

    def made(layer: Any) -> Any:
        new = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=layer.weight.dtype,
            quant_type="nf4", quant_storage=torch.uint8,
        )  # fmt: skip
        new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        new.bias = layer.bias
        return new.to("cpu")

    return _each_layer(model, made)


def hqq_int4(model: Any) -> Any:
    from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

    HQQLinear.set_backend(HQQBackend.PYTORCH)
    config = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    return _each_layer(
        model, lambda layer: HQQLinear(layer, config, compute_dtype=layer.weight.dtype, device="cpu", del_orig=True)
    )


def gguf_q4_0(model: Any) -> Any:
    import gguf
    import torch
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    def made(layer: Any) -> Any:
        kind = gguf.GGMLQuantizationType.Q4_0
        stored = torch.from_numpy(gguf.quants.quantize(layer.weight.detach().float().numpy(), kind))
        new = GGUFLinear(
            layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=layer.weight.dtype,
            device=torch.device("cpu"),
        )  # fmt: skip
        new.weight = GGUFParameter(stored, quant_type=kind)
        new.bias = layer.bias
        return new

    return _each_layer(model, made)


def _same(model: Any) -> Any:
    return model


PEERS: dict[str, Peer] = {
    "float32": Peer("", "diffusers, eager", "float32", _same),
    "bfloat16": Peer("", "diffusers, eager", "bfloat16", _same),
    "fbqat": Peer("", "W4A8, a scale per channel", "float32", packed_copy),
    "fbqat, bfloat16": Peer("", "W4A8, a scale per channel", "bfloat16", packed_copy),
    "torchao W4A8": Peer(
        "torchao", "Int8DynamicActivationIntxWeightConfig(int4, groups of 32)", "float32", torchao_w4a8
    ),
    "torchao W4A8, compiled": Peer(
        "torchao", "as the row above, torch.compile", "float32", torchao_w4a8, compiled=True
    ),
    "torchao int4": Peer("torchao", "Int4WeightOnlyConfig(group_size=128)", "bfloat16", torchao_int4),
    "SDNQ W4A8": Peer(
        "sdnq", "int4, use_quantized_matmul", "float32",
        lambda model: sdnq_quantized(model, use_quantized_matmul=True),
    ),
    "SDNQ int4": Peer("sdnq", "int4, weights only", "float32", sdnq_quantized),
    "quanto int4": Peer("optimum-quanto", "qint4 weights", "float32", quanto_int4),
    "bitsandbytes NF4": Peer("bitsandbytes", "Linear4bit, nf4", "float32", bitsandbytes_nf4),
    "HQQ int4": Peer("hqq", "4 bits, groups of 64, backend PYTORCH", "float32", hqq_int4),
    "GGUF Q4_0": Peer("gguf", "diffusers' GGUFLinear, Q4_0", "float32", gguf_q4_0),
}  # fmt: skip


def worker(name: str, threads: int, reference: Path) -> None:
    """Make a row's model, then one forward for each line of standard input, its milliseconds on standard output."""
    import torch
    from safetensors.torch import load_file, save_file

    peer, said = PEERS[name], sys.stdout
    sys.stdout = sys.stderr  # what libraries print
    torch.set_num_threads(threads)
    dtype = getattr(torch, peer.dtype)
    call = inputs(dtype=dtype)
    with torch.no_grad():
        model = float_model().to(dtype)
        model(**call)  # what libraries load and keep is no weight
        settle()
        before = resident_mib() - sum(weight.nbytes for weight in model.parameters()) / 2**20
        model = peer.build(model).eval()
        if peer.compiled:
            model = torch.compile(model)
        output = model(**call).sample.float().contiguous()
        model(**call)
        settle()
        found = {"weights_mib": resident_mib() - before}
        if name == "float32":
            save_file({"output": output}, reference)
        else:
            wanted = load_file(reference)["output"]
            found["error"] = float((output - wanted).norm() / wanted.norm())
        print(json.dumps(found), file=said, flush=True)
        for _ in sys.stdin:
            began = time.perf_counter()
            model(**call)
            print(1e3 * (time.perf_counter() - began), file=said, flush=True)


def environment(package: str, work: Path) -> Path:
    """The Python of a peer's own environment, made if it is not there: its packages above those of this Python."""
    folder = work / package
    python = folder / "bin" / "python"
    if not package:
        return Path(sys.executable)
    if not (folder / "made").exists():
        venv.create(folder, with_pip=False, symlinks=True, clear=True)
        site = next(folder.glob("lib/python*/site-packages"))
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site]
        subprocess.run([*install, *PACKAGES[package]], check=True)
        (site / "below.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        (folder / "made").touch()
    return python


class Row:
    """A row's process, or the reason why there is none."""

    def __init__(self, name: str, python: Path, threads: int, reference: Path, log: Path) -> None:
        self.name, self.times, self.log = name, [], log
        command = [python, "-m", "benchmarks.speed_peers", "--worker", name, "--threads", str(threads)]
        variables = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [*command, "--reference", reference], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                text=True, env=variables, cwd=ROOT,
            )  # fmt: skip
        self.found: dict[str, Any] = self._read(json.loads) or {"reason": self._reason()}

    def forward(self) -> None:
        if "reason" in self.found:
            return
        print(file=self.process.stdin, flush=True)
        self.times.append(self._read(float))

    def _read(self, parse: Callable[[str], Any]) -> Any:
        line = self.process.stdout.readline()
        return parse(line) if line else None

    def _reason(self) -> str:
        errors = [line for line in self.log.read_text().splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line)]
        return errors[-1].strip()[:200] if errors else "it ended without a word"

    def close(self) -> dict[str, Any]:
        self.process.stdin.close()
        self.process.wait()
        peer = PEERS[self.name]
        timed = {"ms": statistics.median(self.times), "ms_min": min(self.times)} if self.times else {}
        return {
            "name": self.name, "packages": PACKAGES.get(peer.package, ()), "setting": peer.setting, "dtype": peer.dtype,
            **self.found, **timed,
        }  # fmt: skip


def plot(found: dict[str, Any], path: Path) -> None:
    """Bars of each row's time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted((row for row in found["rows"] if "ms" in row), key=lambda row: -row["ms"])
    figure, axes = pyplot.subplots(figsize=(8, 0.36 * len(rows) + 1.3), layout="constrained")
    own = {"float32": "0.55", "bfloat16": "0.55"}
    colours = ["tab:orange" if row["name"].startswith("fbqat") else own.get(row["name"], "tab:blue") for row in rows]
    bars = axes.barh([row["name"] for row in rows], [row["ms"] for row in rows], color=colours)
    labels = axes.bar_label(bars, fmt="%.0f", padding=3)
    quantized = [row["ms"] for row in rows if row["name"] not in own]
    axes.set_xlim(0, 1.15 * max(quantized))  # a longer bar of a base leaves the frame, its number does not
    for bar, label in zip(bars, labels, strict=True):
        if bar.get_width() > axes.get_xlim()[1]:
            label.set_visible(False)
            place = (0.99, bar.get_y() + bar.get_height() / 2)
            how = {"color": "white", "ha": "right", "va": "center", "transform": axes.get_yaxis_transform()}
            axes.text(*place, f"{bar.get_width():.0f} →", **how)
    axes.set_xlabel("one forward, ms")
    machine = found["machine"]
    axes.set_title(
        f"Two blocks of Sana-600M's shape, 512 px\n{machine['cpu']}, {found['threads']} thread, {found['date'][:10]}",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", nargs="+", choices=PEERS, default=list(PEERS), help="float32 is always one")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "peers", help="where environments are made")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--worker", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.threads, options.reference)
        return

    from fbqat_hub.evaluation.results import machine, now, versions

    options.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in dict.fromkeys(["float32", *options.rows]):
        python = environment(PEERS[name].package, options.work)
        log = options.work / f"{name.replace(' ', '-').replace(',', '')}.log"
        row = Row(name, python, options.threads, options.work / "float32.safetensors", log)
        print(f"{name:24s} {row.found.get('reason', 'ready')}", flush=True)
        rows.append(row)
    for _ in range(options.rounds):
        for row in rows:
            row.forward()
    found = {
        "command": COMMAND, "date": now(), "machine": machine(), "versions": versions(), "threads": options.threads,
        "rounds": options.rounds, "rows": [row.close() for row in rows],
    }  # fmt: skip
    for row in found["rows"]:
        if "ms" in row:
            print(f"{row['name']:24s} {row['ms']:8.0f} ms  error {row.get('error', 0):.4f}")
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    plot(found, options.plot)


if __name__ == "__main__":
    main()
