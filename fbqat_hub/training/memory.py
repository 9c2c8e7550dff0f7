"""Peak memory of loading a pipeline and drawing one picture with it on the CPU, in a process of its own.

What a process has loaded once stays in its peak, so teacher and student each get a fresh one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fbqat_hub.export.htp.runtime.qnn_session import peak_rss_mib
from fbqat_hub.pipelines import load_pipeline, load_stage
from fbqat_hub.training.recipe import Recipe


def peak_of_a_picture(source: str, recipe: Recipe, prompt: str, stage: int | None = None) -> float:
    """Peak resident memory, in MiB, of a fresh process that loads a pipeline in float32 and draws one picture.

    Args:
        source: folder or Hub id of a pipeline.
        recipe: for the arguments of the pipeline call.
        stage: bit width of a stage that the run ``source`` kept.

    Raises:
        RuntimeError: the process failed (out of memory, say), with its last words; or the system does not tell
            (``/proc`` is Linux's).
    """
    steps = recipe.evaluation_settings()["inference_steps"]
    call = {**recipe.generation, "prompt": prompt, "num_inference_steps": steps}
    command = [sys.executable, "-m", "fbqat_hub.training.memory", json.dumps([source, stage, call])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise RuntimeError(f"peak memory of {source} could not be measured: {said[0]}")
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    """Of the fresh process: draw, and print the peak."""
    source, stage, call = json.loads(sys.argv[1])
    dtype = torch.float32
    pipeline: Any = load_pipeline(source, dtype) if stage is None else load_stage(Path(source), stage, dtype)
    pipeline(**call, generator=torch.Generator().manual_seed(0))
    print(peak_rss_mib())


if __name__ == "__main__":
    main()
