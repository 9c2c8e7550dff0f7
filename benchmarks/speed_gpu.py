"""Speed and memory of the packed denoisers on a GPU, against bf16 and other libraries, in one call.

    python -m benchmarks.speed_gpu          # writes benchmarks/results/speed-gpu.json; then python -m benchmarks.tables
    python -m benchmarks.speed_gpu --device cpu --small --output rows.json      # tries the harness; not to be quoted

Denoisers of true size with random weights in bf16. "gemm" times each linear layer's shape alone, "step" one forward of
the denoiser, eager and compiled; 1x1 convolutions, most of Sana's weights, are linear layers for the other libraries,
which would leave them in bf16; FLUX.1 has one double and two single blocks, as many to one as in the whole. Each way
is applied to a fresh copy, warmed up, and timed; values are medians. A way that is not installed, or fails, is a row
with its reason.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import fbqat_hub
from benchmarks.markdown import markdown
from benchmarks.speed_peers import pointwise_as_linear

RESULTS = Path(__file__).parent / "results" / "speed-gpu.json"
COMMAND = "python -m benchmarks.speed_gpu"
# name -> recipe whose base it is, what of its config is changed, said of it
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "Sana 600M": ("sana-600m", {}, "whole"),
    "Sana 1.5 1.6B": ("sana-1.5-1.6b", {}, "whole"),
    "PixArt-Sigma": ("pixart-sigma", {}, "whole"),
    "SD3.5 medium": ("sd3.5-medium", {}, "whole"),
    "FLUX.1": ("flux-schnell", {"num_layers": 1, "num_single_layers": 2}, "1 of 19 double and 2 of 38 single blocks"),
}
SMALL = {"tiny Sana": ("sana-tiny", {}, "whole"), "tiny FLUX.1": ("flux-schnell-tiny", {}, "whole")}


@dataclass(frozen=True)
class Way:
    """A way to run the linear layers of a model in less than bf16.

    Attributes:
        name: as the tables have it.
        setting: what was chosen of the library's options.
        package: that it needs, beside torch; "" for none.
        apply: changes a bf16 model that lies on its device, given the recipe.
        memory: of ours, what ``fbqat_hub.set_memory`` is given.
    """

    name: str
    setting: str
    package: str
    apply: Callable[[Any, Any], Any]
    memory: Literal["fast", "large"] = "fast"


def _ours(model: Any, recipe: Any) -> Any:
    from fbqat_hub.quantization import convert, prepare

    config = recipe.config()
    prepare(model, replace(config.weight_scheme(), clip="max_abs"), **config.layer_options())
    convert(model)
    return model


def _torchao(config: str, **options: Any) -> Callable[[Any, Any], Any]:
    def apply(model: Any, recipe: Any) -> Any:
        from torchao import quantization

        model = pointwise_as_linear(model)
        quantization.quantize_(model, getattr(quantization, config)(**options))
        return model

    return apply


def _sdnq(model: Any, recipe: Any) -> Any:
    from sdnq import sdnq_post_load_quant

    return sdnq_post_load_quant(
        pointwise_as_linear(model),
        weights_dtype="uint4",
        quantized_matmul_dtype="int8",
        use_quantized_matmul=True,
        add_skip_keys=False,
    )


def _each_linear(model: Any, replaced: Callable[[Any], Any]) -> Any:
    from torch import nn

    model = pointwise_as_linear(model)
    for name, layer in [(name, layer) for name, layer in model.named_modules() if type(layer) is nn.Linear]:
        model.set_submodule(name, replaced(layer))
    return model


def _bitsandbytes(model: Any, recipe: Any) -> Any:
    import bitsandbytes
    import torch

    def replaced(layer: Any) -> Any:
        device = layer.weight.device
        new = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, torch.bfloat16, quant_type="nf4"
        )
        new.weight = bitsandbytes.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
        new.bias = layer.bias
        return new.to(device)

    return _each_linear(model, replaced)


def _gguf(model: Any, recipe: Any) -> Any:
    import gguf
    import torch
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q4_0

    def replaced(layer: Any) -> Any:
        if layer.in_features % 32:
            return layer
        device = layer.weight.device
        packed = torch.from_numpy(gguf.quants.quantize(layer.weight.data.float().cpu().numpy(), kind)).to(device)
        new = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, torch.bfloat16, device="meta")
        new.weight, new.bias = GGUFParameter(packed, quant_type=kind), layer.bias
        return new

    return _each_linear(model, replaced)


WAYS = (
    Way("bf16", "torch", "", lambda model, recipe: model),
    Way("this project", "W4A8, dynamic per-token ranges", "", _ours),
    Way("this project, int8 kept", "the same, memory is large", "", _ours, "large"),
    Way("torchao int8", "dynamic W8A8", "torchao", _torchao("Int8DynamicActivationInt8WeightConfig")),
    Way(
        "torchao int4", "weights only, groups of 128, tiles", "torchao",
        _torchao("Int4WeightOnlyConfig", group_size=128, int4_packing_format="tile_packed_to_4d"),
    ),
    Way(
        "torchao int4, mslk", "weights only, groups of 128, plain", "mslk",
        _torchao("Int4WeightOnlyConfig", group_size=128),
    ),
    Way("SDNQ", "uint4, int8 matmul", "sdnq", _sdnq),
    Way("bitsandbytes", "NF4, bf16 compute", "bitsandbytes", _bitsandbytes),
    Way("GGUF", "Q4_0, diffusers' layers", "gguf", _gguf),
)  # fmt: skip


def installed(package: str) -> bool:
    """Whether a distribution is there; nothing is imported."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


class Harness:
    """Builds, times and measures on one device.

    Args:
        device: "cuda" or "cpu".
        rounds: timed forwards, after ``warmup`` that are not.
        small: tiny models and a compiler that only traces.
    """

    def __init__(self, device: str, rounds: int, warmup: int = 3, *, small: bool = False) -> None:
        import torch

        self.torch, self.device, self.rounds, self.warmup = torch, torch.device(device), rounds, warmup
        self.models, self.backend = (SMALL, "aot_eager") if small else (MODELS, "inductor")

    def model(self, name: str) -> tuple[Any, Any, Any]:
        """The recipe, the configs of its base as changed, and its denoiser: bf16, random weights."""
        from fbqat_hub.training.bases import build, configs_of
        from fbqat_hub.training.recipe import load_recipe

        recipe_name, changes, _ = self.models[name]
        recipe = load_recipe(recipe_name)
        configs = dict(configs_of(recipe.teacher))
        configs["transformer"] = {**configs["transformer"], **changes}
        self.torch.manual_seed(0)
        default = self.torch.get_default_dtype()
        self.torch.set_default_dtype(self.torch.bfloat16)
        try:
            with self.torch.device(self.device):
                model = build(configs["transformer"])
        finally:
            self.torch.set_default_dtype(default)
        return recipe, configs, model.eval().requires_grad_(False)

    def inputs(self, recipe: Any, configs: Any, pixels: int, batch: int) -> dict[str, Any]:
        """Random arguments of the denoiser's forward on the device."""
        from fbqat_hub.training.footprint import denoiser_arguments

        torch = self.torch
        torch.manual_seed(0)

        def moved(value: Any) -> Any:
            if isinstance(value, list):
                return [moved(each) for each in value]
            if not isinstance(value, torch.Tensor):
                return value
            if not value.is_floating_point():
                return value.contiguous().to(self.device)
            drawn = torch.randn(value.shape) if not value.any() else value
            return drawn.to(self.device, torch.bfloat16)

        made = denoiser_arguments(
            replace(recipe, generation={**recipe.generation, "height": pixels, "width": pixels}), configs, batch
        )
        return {name: moved(value) for name, value in made.items()}

    def free(self) -> None:
        """Give memory back and start its count anew."""
        self.torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()

    def memory(self, peak: bool) -> float | None:
        """MiB that are, or at most were, allocated on the card."""
        if self.device.type != "cuda":
            return None
        cuda = self.torch.cuda
        return float(cuda.max_memory_allocated() if peak else cuda.memory_allocated()) / 2**20

    def time(self, call: Callable[[], Any]) -> dict[str, float]:
        """Milliseconds of a call: the median and the quartiles."""
        cuda, times = self.device.type == "cuda", []
        with self.torch.inference_mode():
            for turn in range(self.warmup + self.rounds):
                if cuda:
                    self.torch.cuda.synchronize()
                began = time.perf_counter()
                call()
                if cuda:
                    self.torch.cuda.synchronize()
                if turn >= self.warmup:
                    times.append(1e3 * (time.perf_counter() - began))
        low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        return {"ms": middle, "ms_low": low, "ms_high": high}

    def rows(
        self, name: str, way: Way, parts: list[str], sizes: list[int], batches: list[int]
    ) -> Iterator[dict[str, Any]]:
        """Every measurement of a way on a model; a row with ``skipped`` for what cannot be measured."""
        common = {"model": name, "what": self.models[name][2], "way": way.name, "setting": way.setting}
        if way.package and not installed(way.package):
            yield {**common, "skipped": f"{way.package} is not installed"}
            return
        fbqat_hub.set_memory(way.memory)
        try:
            recipe, configs, model = self.model(name)
            shapes = self.shapes(recipe, configs, model, sizes) if "gemm" in parts else set()
            model = way.apply(model, recipe)
            self.free()
        except Exception as error:
            yield {**common, "skipped": _reason(error)}
            return
        weights = self.memory(peak=False)
        for mode in ("eager", "compiled") if "step" in parts else ():
            for pixels in sizes:
                for batch in batches:
                    row = {**common, "part": "step", "mode": mode, "pixels": pixels, "batch": batch}
                    self.free()
                    try:
                        inputs = self.inputs(recipe, configs, pixels, batch)
                        run = self.torch.compile(model, backend=self.backend) if mode == "compiled" else model
                        found = self.time(lambda run=run, inputs=inputs: run(**inputs, return_dict=False))
                        yield {**row, **found, "weights_mib": weights, "peak_mib": self.memory(peak=True)}
                    except Exception as error:
                        yield {**row, "skipped": _reason(error)}
        del model
        self.free()
        for tokens, inputs_, outputs in sorted(shapes):
            row = {**common, "part": "gemm", "tokens": tokens, "in": inputs_, "out": outputs}
            try:
                yield {**row, **self.gemm(way, recipe, tokens, inputs_, outputs)}
            except Exception as error:
                yield {**row, "skipped": _reason(error)}

    def shapes(self, recipe: Any, configs: Any, model: Any, sizes: list[int]) -> set[tuple[int, int, int]]:
        """(tokens, in, out) of the linear layers that are quantized, batch 1."""
        from fbqat_hub.integrations.checkpoint import targets_of

        found: set[tuple[int, int, int]] = set()

        def note(layer: Any, arguments: Any, output: Any) -> None:
            found.add((arguments[0].numel() // layer.in_features, layer.in_features, layer.out_features))

        linear = self.torch.nn.Linear
        wanted = [target.layer for target in targets_of(model, recipe.config())]
        hooks = [layer.register_forward_hook(note) for layer in wanted if isinstance(layer, linear)]
        with self.torch.inference_mode():
            for pixels in sizes:
                model(**self.inputs(recipe, configs, pixels, 1), return_dict=False)
        for hook in hooks:
            hook.remove()
        return found

    def gemm(self, way: Way, recipe: Any, tokens: int, inputs: int, outputs: int) -> dict[str, float]:
        """One layer alone, eager."""
        torch = self.torch
        layer = torch.nn.Linear(inputs, outputs, device=self.device, dtype=torch.bfloat16).requires_grad_(False)
        model = way.apply(torch.nn.Sequential(layer), _AllLayers())
        x = torch.randn(1, tokens, inputs, device=self.device, dtype=torch.bfloat16)
        return self.time(lambda: model(x))


class _AllLayers:
    """In a recipe's place: nothing is left out."""

    def config(self) -> Any:
        from fbqat_hub.config import FBQATConfig

        return FBQATConfig()


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The whole record."""
    from fbqat_hub.evaluation.results import machine, now, versions

    harness = Harness(options.device, options.rounds, small=options.small)
    rows = []
    for name in options.models or harness.models:
        for way in WAYS:
            for row in harness.rows(name, way, options.parts, options.sizes, options.batches):
                rows.append(row)
                place = " ".join(
                    str(row[key]) for key in ("part", "mode", "pixels", "batch", "tokens", "in", "out") if key in row
                )
                said = row["skipped"] if "skipped" in row else f"{row['ms']:.2f} ms"
                print(f"{name:14s} {way.name:13s} {place:28s} {said}", flush=True)
            harness.free()
    packages = [way.package for way in WAYS if way.package]
    return {
        "command": COMMAND,
        "date": now(),
        "machine": machine(),
        "versions": versions("triton", *packages),
        "device": options.device,
        "rounds": options.rounds,
        "rows": rows,
    }


def speed_gpu_table(path: Path = RESULTS) -> str:
    """A step of each model by each way, as times of bf16's; "not measured" where there is no record."""
    if not path.exists():
        return f"**Not measured.** No GPU was at hand. On a machine that has one: `{COMMAND}`."
    found = json.loads(path.read_text(encoding="utf-8"))
    steps = {
        (row["model"], row["pixels"], row["batch"], row["mode"], row["way"]): row
        for row in found["rows"]
        if row.get("part") == "step"
    }
    ways = list(dict.fromkeys(row["way"] for row in found["rows"]))
    rows = []
    for model, pixels, batch, mode in dict.fromkeys(key[:4] for key in steps):
        base = steps.get((model, pixels, batch, mode, "bf16"), {}).get("ms")
        cells = []
        for way in ways:
            row = steps.get((model, pixels, batch, mode, way), {})
            if "ms" not in row:
                cells.append("–")
                continue
            ratio = f", {base / row['ms']:.2f}×" if base and way != "bf16" else ""
            peak = f", {row['peak_mib'] / 1024:.1f} GiB" if row["peak_mib"] is not None else ""
            cells.append(f"{row['ms']:.1f} ms{ratio}{peak}")
        rows.append((model, f"{pixels} px", str(batch), mode, *cells))
    reasons: dict[str, list[str]] = {}
    for row in found["rows"]:
        if "skipped" in row:
            reasons.setdefault(f"{row['way']}: {row['skipped']}", []).append(row["model"])
    skipped = "".join(f"- {why} ({', '.join(dict.fromkeys(models))})\n" for why, models in reasons.items())
    machine = found["machine"]
    return (
        f"{markdown(('model', 'size', 'batch', 'mode', *ways), rows)}\n\n"
        f"One forward of the denoiser: median of {found['rounds']}, how many times as fast as bf16, peak memory of the "
        f"card. {machine.get('gpu', machine['cpu'])}, torch {found['versions']['torch']}, {found['date'][:10]}."
        + (f"\n\nNot measured:\n\n{skipped.rstrip()}" if skipped else "")
    )


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command's options; says what is wrong with them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models of 64 and 128 pixels, two rounds")
    parser.add_argument("--models", nargs="+", choices=(*MODELS, *SMALL))
    parser.add_argument("--parts", nargs="+", choices=("gemm", "step"), default=["gemm", "step"])
    parser.add_argument("--sizes", nargs="+", type=int, help="pixels a side (512 1024)")
    parser.add_argument("--batches", nargs="+", type=int, help="(1 2 4)")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.output == RESULTS and (options.device == "cpu" or options.small):
        parser.error("the tracked results are of a GPU and of true sizes; give --output FILE.")
    given = (("sizes", [64, 128], [512, 1024]), ("batches", [1, 2], [1, 2, 4]), ("rounds", 2, 20))
    for name, of_small, of_true in given:
        if getattr(options, name) is None:
            setattr(options, name, of_small if options.small else of_true)
    return options


def main() -> int:
    options = parsed()
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            f"no GPU: torch {torch.__version__} sees none. Run this on a machine with one; "
            "--device cpu --small --output FILE tries the harness.",
            file=sys.stderr,
        )
        return 1
    from fbqat_hub.files import whole

    found = measure(options)
    with whole(options.output) as partial:
        partial.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"saved {options.output.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
