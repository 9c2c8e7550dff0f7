"""The child process that holds Qualcomm's compiler or emulator: `python worker.py job.json`.

Run by `htp.compiler`, never imported by it: two builds in one process make different files, and a crash of
the compiler must not take the caller along.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from qnn_session import devices, qnn_session  # type: ignore[import-not-found]  # beside this script

#: What a line on standard output starts with where it is an answer and not the library's own words.
ANSWER = "fbqat-answer "
#: Makes ONNX Runtime keep which execution provider was given which node.
RECORD = {"session.record_ep_graph_assignment_info": "1"}


def answer(**values: Any) -> None:
    """Tell the parent something."""
    print(f"\n{ANSWER}{json.dumps(values)}", flush=True)


def main(job_path: str) -> None:
    """Open the session of the JSON file (`model`, `provider_options`, `session_entries`), then run what is asked.

    Each line of standard input is the path of an .npz of graph inputs by name; all outputs, in order, go to the same
    path with the suffix .out.npz.
    """
    job: dict[str, Any] = json.loads(Path(job_path).read_text(encoding="utf-8"))
    start = time.perf_counter()
    loaded = qnn_session(job["model"], job["provider_options"], job["session_entries"] | RECORD)
    assigned: dict[str, Counter[str]] = {}
    for part in loaded.get_provider_graph_assignment_info():
        assigned.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
    answer(
        seconds=time.perf_counter() - start,
        hardware=devices()[0].device.type.name,
        assigned=assigned,
    )
    for line in sys.stdin:
        path = Path(line.strip())
        start = time.perf_counter()
        with np.load(path) as feed:
            outputs = loaded.run(None, dict(feed))
        np.savez(path.with_suffix(".out.npz"), *outputs)
        answer(seconds=time.perf_counter() - start)


if __name__ == "__main__":
    main(sys.argv[1])
