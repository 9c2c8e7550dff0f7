"""The child process that holds Qualcomm's compiler: `python -P htp_worker.py job.json`.

Run by `fbqat_hub.export.htp`, never imported by it: two builds in one process make different files, and a crash of
the compiler must not take the caller along. The job says `action: compile` or `action: run`; the answer is a JSON
file beside it.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def peak_rss_mib() -> float:
    """This process's own peak of resident memory (`getrusage` would report the parent's, kept across exec)."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found else float("nan")


def session(model: str, provider_options: dict[str, str], entries: dict[str, str]) -> Any:
    """A session with every node on QNN, or an exception.

    `providers=["QNNExecutionProvider"]` would silently run on the CPU: QNN is a plug-in, so its library is
    registered and its devices are picked by name.
    """
    import onnxruntime
    import onnxruntime_qnn

    onnxruntime.register_execution_provider_library("QNNExecutionProvider", onnxruntime_qnn.get_library_path())
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == "QNNExecutionProvider"]
    if not devices:
        raise RuntimeError("the QNN execution provider registered no device on this machine")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    backend = {"backend_path": onnxruntime_qnn.get_qnn_htp_path()}
    options.add_provider_for_devices(devices[:1], backend | provider_options)
    made = onnxruntime.InferenceSession(model, sess_options=options)
    made.disable_fallback()  # `run` would otherwise retry elsewhere on failure and hide the first error
    return made


def main(job_path: str) -> None:
    """Do the job of the JSON file and write its `result` file.

    Keys of a job: `action`, `model`, `provider_options`, `session_entries`, `result`; to run, also `inputs` (an .npz
    of `<index>/<input name>`), `count` and `outputs` (the .npz to write, of
    `<index>/<place of the output>`).
    """
    with open(job_path, encoding="utf-8") as file:
        job: dict[str, Any] = json.load(file)
    start = time.perf_counter()
    loaded = session(job["model"], job["provider_options"], job["session_entries"])
    result: dict[str, Any] = {"load_seconds": time.perf_counter() - start}
    if job["action"] == "run":
        start = time.perf_counter()
        feeds = np.load(job["inputs"])
        names = [item.name for item in loaded.get_inputs()]
        outputs = {
            f"{index}/{place}": output
            for index in range(job["count"])
            for place, output in enumerate(loaded.run(None, {name: feeds[f"{index}/{name}"] for name in names}))
        }
        result["run_seconds"] = time.perf_counter() - start
        np.savez(job["outputs"], **outputs)
    result["peak_rss_mib"] = peak_rss_mib()
    result["providers"] = loaded.get_providers()
    with open(job["result"], "w", encoding="utf-8") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main(sys.argv[1])
