"""Compile a QDQ graph to a QNN HTP context binary, and run a context binary on the x86 emulator.

Both happen in a child process (`htp_worker`). Nothing here ran on a phone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.htp_worker import peak_rss_mib
from fbqat_hub.export.targets import Target

__all__ = ["compile_context", "emulate", "peak_rss_mib", "provider_options", "rename_binary", "run_probe"]

_WORKER = Path(__file__).with_name("htp_worker.py")


def provider_options(target: Target) -> dict[str, str]:
    """Options of the QNN execution provider for `target` (an unknown one is ignored without a word: keep the list)."""
    return {
        "htp_performance_mode": "burst",
        "htp_graph_finalization_optimization_mode": "3",
        "soc_model": str(target.soc_model),
        "htp_arch": str(target.htp_arch),
        "vtcm_mb": str(target.vtcm_mb),
    }


def _call_worker(job: dict[str, Any], model: Path, folder: Path, timeout: float) -> dict[str, Any]:
    """Run one job in a child and return its result.

    Raises:
        ExportError: the child failed, crashed (signal named) or ran past `timeout` seconds; ends with its last words.
    """
    job_path, result_path = folder / f"{job['action']}.job.json", folder / f"{job['action']}.result.json"
    job_path.write_text(json.dumps(job | {"model": model.name, "result": str(result_path.resolve())}))
    # The model goes by its bare name: ONNX Runtime hashes the path it is given into the graph's name, and the same
    # graph must compile to the same bytes in any folder. The child finds what the parent finds, and starts as a bare
    # script (-P: its folder is not put on the path): it loads ONNX Runtime and nothing of ours, torch or diffusers.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path if path)}
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(_WORKER), str(job_path.resolve())],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
            cwd=model.resolve().parent,
        )
    except subprocess.TimeoutExpired:
        raise ExportError(f"HTP {job['action']} was stopped after {timeout:.0f} s; give it more time") from None
    if done.returncode == 0 and result_path.exists():
        result: dict[str, Any] = json.loads(result_path.read_text())
        return result
    # what stands at the left margin: the messages, not the frames of a traceback
    words = [line for line in (done.stderr + done.stdout).splitlines() if line.strip() and not line.startswith(" ")]
    how = f"exit status {done.returncode}"
    if done.returncode < 0:
        how = f"killed by {signal.Signals(-done.returncode).name}"
    raise ExportError(
        f"HTP {job['action']} failed ({how}). Its last words:\n" + "\n".join(words[-8:]) + "\n"
        "(a message about CPU fallback means an op QNN refused, or a soc_model it does not know)"
    )


def compile_context(
    qdq: Path, context: Path, target: Target, scratch: Path, *, timeout: float = 3600
) -> dict[str, Any]:
    """Compile `qdq` for `target`.

    Writes `context` (an ONNX file with one EPContext node), the binary beside it (named `<stem>_qnn.bin`), and the
    compiler's own JSON description of the graph under `scratch/qnn_graph`.

    Returns:
        `load_seconds` (the compilation), `peak_rss_mib`, `providers` of the child.

    Raises:
        ExportError: see `_call_worker`.
    """
    graphs = scratch / "qnn_graph"
    graphs.mkdir(parents=True, exist_ok=True)
    job = {
        "action": "compile",
        "provider_options": provider_options(target)
        | {"dump_json_qnn_graph": "1", "json_qnn_graph_dir": str(graphs.resolve())},
        "session_entries": {
            "ep.context_enable": "1",
            "ep.context_file_path": str(context.resolve()),
            "ep.context_embed_mode": "0",
        },
    }
    return _call_worker(job, qdq, scratch, timeout)


def rename_binary(context: Path) -> Path:
    """Call the binary beside `context` `<stem>.bin` (ONNX Runtime makes `<stem>_qnn.bin`), in the node as well."""
    model = onnx.load(context)
    made, wanted = context.with_name(f"{context.stem}_qnn.bin"), context.with_suffix(".bin")
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "ep_cache_context":
                if attribute.s.decode() != made.name:
                    raise ExportError(f"the context refers to {attribute.s.decode()!r}, expected {made.name!r}")
                attribute.s = wanted.name.encode()
    made.rename(wanted)
    onnx.save(model, context)
    return wanted


def run_probe(
    probe: Path, feed: dict[str, np.ndarray], target: Target, scratch: Path, *, timeout: float = 3600
) -> list[np.ndarray]:
    """Compile `probe` in memory and run it once on the emulator; returns all its outputs in order.

    Raises:
        ExportError: see `_call_worker`.
    """
    return _run(probe, [feed], target, scratch, timeout)[0][0]


def emulate(
    context: Path, feeds: Sequence[dict[str, np.ndarray]], target: Target, scratch: Path, *, timeout: float = 3600
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Run the compiled context on the x86 emulator, from the file, in a process of its own.

    Args:
        context: the ONNX file with the EPContext node.
        feeds: graph inputs by name, float32.

    Returns:
        The first output for each feed, and `load_seconds`, `run_seconds`, `peak_rss_mib` of the child.

    Raises:
        ExportError: see `_call_worker`.
    """
    outputs, result = _run(context, feeds, target, scratch, timeout)
    return [arrays[0] for arrays in outputs], result


def _run(
    model: Path, feeds: Sequence[dict[str, np.ndarray]], target: Target, scratch: Path, timeout: float
) -> tuple[list[list[np.ndarray]], dict[str, Any]]:
    """Run `model` in a child; all outputs of each feed."""
    inputs, outputs = scratch / "inputs.npz", scratch / "outputs.npz"
    np.savez(inputs, **{f"{index}/{name}": value for index, feed in enumerate(feeds) for name, value in feed.items()})  # type: ignore[arg-type]
    job = {
        "action": "run",
        "provider_options": provider_options(target),
        "session_entries": {},
        "inputs": str(inputs.resolve()),
        "outputs": str(outputs.resolve()),
        "count": len(feeds),
    }
    result = _call_worker(job, model, scratch, timeout)
    with np.load(outputs) as file:
        count = len(file.files) // len(feeds)
        return [[file[f"{index}/{place}"] for place in range(count)] for index in range(len(feeds))], result
