"""Compile a QDQ graph to a QNN HTP context binary, and run a context binary on the x86 emulator.

Both happen in a child process (`runtime/worker.py`). Nothing here ran on a phone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx

from fbqat_hub.evaluation.results import peak_rss_mib
from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.htp.targets import Target
from fbqat_hub.export.memory import trim_heap

_WORKER = Path(__file__).parent / "runtime" / "worker.py"
_ANSWER = "fbqat-answer "

PERFORMANCE_MODE = "burst"
FINALIZATION_MODE = 3  # the most thorough


def provider_options(target: Target) -> dict[str, str]:
    """Options of the QNN execution provider for `target` (an unknown one is ignored without a word: keep the list)."""
    return {
        "htp_performance_mode": PERFORMANCE_MODE,
        "htp_graph_finalization_optimization_mode": str(FINALIZATION_MODE),
        "soc_model": str(target.soc_model),
        "htp_arch": str(target.htp_arch),
        "vtcm_mb": str(target.vtcm_mb),
    }


class Worker:
    """A child process with one session; loading compiles where the model is a QDQ graph.

    Attributes:
        loaded: the child's answer to loading: `seconds`; `hardware`, what ONNX Runtime says QNN's device is;
            `assigned`, execution provider -> op -> how many of the graph's nodes it was given.
        seconds: what all runs so far took.
        peak_rss_mib: of the child so far; None where the system does not tell.

    Raises:
        ExportError: the child failed or crashed (signal named); ends with its last words.
    """

    def __init__(
        self, action: str, model: Path, options: dict[str, str], entries: dict[str, str] | None = None
    ) -> None:
        self.action, self.seconds = action, 0.0
        trim_heap()
        self._folder = tempfile.TemporaryDirectory(prefix="fbqat-htp-")
        scratch = Path(self._folder.name)
        # The model goes by its bare name: ONNX Runtime hashes the path it is given into the graph's name, and the
        # same graph must compile to the same bytes in any folder.
        job = {"model": model.name, "provider_options": options, "session_entries": entries or {}}
        (scratch / "job.json").write_text(json.dumps(job))
        # The child finds what the parent finds, and loads ONNX Runtime and nothing of ours, torch or diffusers.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path if path)}
        self._words = (scratch / "stderr.txt").open("w+", errors="replace")
        self._child = subprocess.Popen(
            [sys.executable, str(_WORKER), str(scratch / "job.json")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
            errors="replace",
            cwd=model.resolve().parent,
        )
        self._said: list[str] = []
        try:
            self.loaded = self._answer()
        except BaseException:
            self.close()
            raise

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if line.startswith(_ANSWER):
                found: dict[str, Any] = json.loads(line.removeprefix(_ANSWER))
                self.peak_rss_mib = peak_rss_mib(self._child.pid)
                return found
            self._said.append(line.rstrip())
        raise self._failure(self._child.wait())

    def _failure(self, status: int) -> ExportError:
        self._words.seek(0)
        # what stands at the left margin: the messages, not the frames of a traceback
        lines = [*self._words.read().splitlines(), *self._said]
        words = [line for line in lines if line.strip() and not line.startswith(" ")]
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return ExportError(
            f"HTP {self.action} failed ({how}). Its last words:\n" + "\n".join(words[-8:]) + "\n"
            "(a message about CPU fallback means an op QNN refused, or a soc_model it does not know)"
        )

    def run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        """All outputs for one feed (graph inputs by name, float32)."""
        assert self._child.stdin is not None
        path = Path(self._folder.name) / "feed.npz"
        np.savez(path, **feed)  # type: ignore[arg-type]
        try:
            self._child.stdin.write(f"{path}\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise self._failure(self._child.wait()) from None
        self.seconds += self._answer()["seconds"]
        with np.load(path.with_suffix(".out.npz")) as outputs:
            return [outputs[name] for name in outputs.files]

    def close(self) -> None:
        """End the child."""
        if self._child.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it is gone already
                self._child.stdin.close()
        self._child.wait()
        if self._child.stdout is not None:
            self._child.stdout.close()
        self._words.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._child.kill()
        self.close()


def emulator(context: Path, target: Target) -> Worker:
    """The x86 emulator with a compiled context (the ONNX file with the EPContext node) loaded from its files."""
    return Worker("run", context, provider_options(target))


class EmulatorChain:
    """Emulators of graphs that run in order, each fed by name with the first inputs and with what earlier ones made.

    Args:
        folder: where `<name>.onnx` of each graph is.
        graphs: name -> `inputs` and `outputs` (`certificate.describe_tensors`), in order.

    Raises:
        ExportError: see `Worker`.
    """

    def __init__(self, folder: Path, graphs: Mapping[str, Mapping[str, Any]], target: Target) -> None:
        self.graphs = graphs
        with contextlib.ExitStack() as stack:  # closes those already open where one fails
            self._workers = {name: stack.enter_context(emulator(folder / f"{name}.onnx", target)) for name in graphs}
            self._stack = stack.pop_all()

    def run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        """All outputs of the last graph for one feed (inputs by name, float32)."""
        values = dict(feed)
        for name, worker in self._workers.items():
            outputs = worker.run({tensor["name"]: values[tensor["name"]] for tensor in self.graphs[name]["inputs"]})
            made = (tensor["name"] for tensor in self.graphs[name]["outputs"])
            values.update(zip(made, outputs, strict=True))
        return outputs

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


def compile_context(qdq: Path, context: Path, target: Target, scratch: Path) -> Worker:
    """Compile `qdq` for `target`.

    Writes `context` (an ONNX file with one EPContext node), the binary beside it (named `<stem>_qnn.bin`), and the
    compiler's own JSON description of the graph under `scratch/qnn_graph`.

    Returns:
        The child that did it, closed: `loaded` (`seconds`, `assigned`) and `peak_rss_mib`.

    Raises:
        ExportError: see `Worker`.
    """
    graphs = scratch / "qnn_graph"
    graphs.mkdir(parents=True, exist_ok=True)
    options = provider_options(target) | {
        "dump_json_qnn_graph": "1",
        "json_qnn_graph_dir": str(graphs.resolve()),
        "enable_htp_spill_fill_buffer": "1",  # writes its size into the node (`audit.spill_fill_bytes`), not the binary
    }
    entries = {
        "ep.context_enable": "1",
        "ep.context_file_path": str(context.resolve()),
        "ep.context_embed_mode": "0",
    }
    with Worker("compile", qdq, options, entries) as worker:
        return worker


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


def run_probe(probe: Path, feeds: Sequence[dict[str, np.ndarray]], target: Target) -> list[list[np.ndarray]]:
    """Compile `probe` in memory and run it on the emulator; all its outputs, in order, for each feed.

    Raises:
        ExportError: see `Worker`.
    """
    with Worker("probe", probe, provider_options(target)) as worker:
        return [worker.run(feed) for feed in feeds]
