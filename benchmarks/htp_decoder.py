"""The 16-channel decoder of FLUX.1 and SD3.5 at true width for a picture of 512 px, as graphs between its group norms.

python -m benchmarks.htp_decoder --output runs/kl-16-512              # -> benchmarks/results/htp.json

Every graph is compiled, and the whole picture decoded with the exact CPU reference of all of them. Then the emulator
runs the middle tile of one graph after the other, from the picture backwards, for some ten minutes to some hours.
Stopped at any time, the same command goes on, and with `--compile-only` records what there is. Random weights, random
latents.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from benchmarks.htp_parts import kl
from benchmarks.htp_true_size import RESULTS, PeakMemory
from fbqat_hub.evaluation.results import Record, write_records
from fbqat_hub.export.bundle.decoder import calls, describe_stage, quantize_stage, stage_norm
from fbqat_hub.export.bundle.pipeline import picture_psnr
from fbqat_hub.export.bundle.runtime.tiles import as_pixels, stage_map
from fbqat_hub.export.bundle.tiles import DEFAULT_TILE
from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.htp import certificate, compiler
from fbqat_hub.export.htp.graph import compile_binary
from fbqat_hub.export.htp.targets import target_for
from fbqat_hub.export.onnx.parity import compare
from fbqat_hub.export.onnx.reference import exact_session
from fbqat_hub.export.progress import Progress
from fbqat_hub.families import get_family

LATENTS = (1, 16, 64, 64)
PICTURE = 8 * LATENTS[2]


def compile_all(folder: Path, bar: Progress) -> list[dict[str, Any]]:
    """Every stage's graph and binary in `folder`; what is known of each. The last also has PSNR and SQNR of the
    picture by the CPU reference to torch's. `<graph>.npz` has a tile: inputs, and what torch and CPU make of it."""
    torch.manual_seed(0)
    stages = get_family("flux").decoder_stages(kl(1).eval())
    latents = torch.randn(LATENTS, generator=torch.Generator().manual_seed(1)).numpy()
    exact, quantized = {"latents": latents}, {"latents": latents}
    norms: dict[str, np.ndarray] = {}
    known = []
    for number, stage in enumerate(stages):
        described = describe_stage(f"decoder_{number:02}", stage, exact, [DEFAULT_TILE] * 2)
        name = described["graph"]
        norms |= stage_norm(name, stage)
        part = quantize_stage(stage, described, [exact], norms, "AutoencoderKL", folder, bar)
        (graph,), (feed,) = part.graphs, part.held_out
        session = exact_session(str(graph.path))
        with bar.step(f"{name}: reference"):
            quantized[described["makes"]] = stage_map(_first(session), described, quantized, norms)
        scratch = folder / "scratch" / name
        scratch.mkdir(parents=True)
        with bar.step(f"{name}: compile"):
            began = time.perf_counter()
            made = compile_binary(graph.path, folder / f"{name}.onnx", target_for("sm8750"), scratch, graph.stored_bits)
        if not made["coverage"]["all_on_qnn"]:
            raise ExportError(f"{name} is not all on QNN: {made['coverage']}")
        np.savez(folder / f"{name}.npz", **feed, torch=graph.expected[0]["made"], cpu=_first(session)(feed))
        known.append(
            {
                "stage": described,
                "kind": type(stage.wrapper.module).__name__.strip("_").lower(),
                "calls": calls(described),
                "compile_seconds": round(time.perf_counter() - began, 1),
                "binary_bytes": made["cost"]["binary_bytes"],
                "spill_fill_bytes": made["cost"]["spill_fill_bytes"],
            }
        )
    pictures = [as_pixels(maps["picture"][0]) for maps in (exact, quantized)]
    known[-1]["picture_psnr_db"] = picture_psnr(*pictures)
    known[-1]["picture_sqnr_db"] = compare([exact["picture"]], [quantized["picture"]])["sqnr_db"]
    return known


def _first(session: Any) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    return lambda feed: session.run(None, feed)[0]


def emulate(name: str, folder: Path) -> dict[str, Any]:
    """The emulator on a graph's tile, against the CPU reference and torch."""
    with np.load(folder / f"{name}.npz") as stored:
        tile = dict(stored)
    inputs = [value.name for value in onnx.load(folder / f"{name}.qdq.onnx").graph.input]
    with compiler.emulator(folder / f"{name}.onnx", target_for("sm8750")) as emulator:
        (made,) = emulator.run({each: tile[each] for each in inputs})
    return {
        "emulate_seconds": round(emulator.seconds, 1),
        "emulator_vs_cpu_qdq_db": compare([tile["cpu"]], [made])["sqnr_db"],
        "emulator_vs_torch_db": compare([tile["torch"]], [made])["sqnr_db"],
        "ran_on": certificate.ran_on(emulator.loaded["hardware"]),
    }


def record(known: list[dict[str, Any]], peak: float) -> Record:
    """What is known so far, as one record: its value is the whole picture's."""
    return Record(
        suite="htp",
        family="flux",
        method="ptq-maxabs",
        metric="psnr",
        value=known[-1]["picture_psnr_db"],
        n=1,
        seed=0,
        command="python -m benchmarks.htp_decoder --output runs/kl-16-512",
        extra={
            "part": "kl-16-512",
            "picture": PICTURE,
            "picture_sqnr_db": known[-1]["picture_sqnr_db"],
            "peak_rss_mib": peak,
            "stages": known,
        },
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the graphs, and to go on in")
    parser.add_argument("--graphs", nargs="+", default=[], metavar="NAME", help="emulate these; all if there are none")
    parser.add_argument("--compile-only", action="store_true", help="emulate nothing")
    parser.add_argument("--dry-run", action="store_true", help="leave benchmarks/results as it is")
    options = parser.parse_args()
    state = options.output / "known.json"
    if not state.exists():
        options.output.mkdir(parents=True)
        memory = PeakMemory()
        memory.start()
        with Progress(5 * len(get_family("flux").decoder_stages(kl(1))), shown=True) as bar:
            known = compile_all(options.output, bar)
        state.write_text(json.dumps({"known": known, "peak": memory.mib}, indent=2))
    found = json.loads(state.read_text())
    known = {each["stage"]["graph"]: each for each in found["known"]}
    if unknown := set(options.graphs) - set(known):
        parser.error(f"--graphs {' '.join(sorted(unknown))}: there are {', '.join(known)}")
    for name in options.graphs or reversed(known):
        done = options.output / f"{name}.emulated.json"
        if not (options.compile_only or done.exists() or "emulate_seconds" in known[name]):
            done.write_text(json.dumps(emulate(name, options.output)))
            print(name, done.read_text(), flush=True)
    for name, each in known.items():
        if (done := options.output / f"{name}.emulated.json").exists():
            each |= json.loads(done.read_text())
    if not options.dry_run:
        print(f"saved {write_records(RESULTS, [record(found['known'], found['peak'])]).name}")


if __name__ == "__main__":
    main()
