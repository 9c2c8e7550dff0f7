"""FSDP2 holds a packed model in parts, and its output is the whole model's to the bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import subprocess_environment

SHARDED = """
import sys

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fbqat_hub.pipelines import load_pipeline
from tests.integrations.tiny import predict

distributed.init_process_group("gloo")
mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
model = load_pipeline(sys.argv[1], torch.float32).transformer
whole = predict(model, "sana")
for block in model.transformer_blocks:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
local = model.transformer_blocks[0].attn1.to_q.weight_packed.to_local()
assert local.shape[0] * 2 == model.transformer_blocks[0].attn1.to_q.weight_packed.shape[0], local.shape
assert torch.equal(predict(model, "sana"), whole)
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_hold_half_of_the_codes_each(packed_folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script), str(packed_folder)], env=subprocess_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
