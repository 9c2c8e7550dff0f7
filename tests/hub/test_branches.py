"""A branch a bit width: whole pipelines of the stages, never another width under the name, nothing sent twice."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageChops

from fbqat_hub import cli
from fbqat_hub.hub.client import HubError
from fbqat_hub.hub.publish import publish
from fbqat_hub.pipelines import load_stage
from tests.conftest import CALL, subprocess_environment
from tests.hub.conftest import REPO, TOKEN, write_stages
from tests.hub.faults import assert_branches_are_whole
from tests.hub.server import LoopbackHub
from tests.hub.test_publish import problems_of


@pytest.fixture
def staged(run: Path) -> Path:
    """The run of some kilobytes with stages of 8 and 6 bits."""
    return write_stages(run)


def test_each_width_is_a_branch_with_a_whole_pipeline(hub: LoopbackHub, staged: Path) -> None:
    lines: list[str] = []
    publish(staged, REPO, branches=True, say=lines.append)
    repository = hub.repositories[REPO]
    assert list(repository.branches) == ["main", "w8", "w6", "w4"]
    assert_branches_are_whole(hub, staged, REPO)
    assert repository.branches["w4"] == repository.branches["main"]
    card = repository.files_of("w6")["README.md"].content.decode()
    assert 'from_pretrained("me/Tiny-FBQAT-W4A8", revision="w6", dtype' in card
    assert "tags: [fbqat, 6-bit, w6a8" in card
    assert repository.files_of("w6")["images/comparison.png"].content == b"picture of 6 bits"
    # the denoisers, the pictures and the HTP binary; what the branches share is sent once
    assert hub.count("put") == 3 + 2 * 2
    table = next(line for line in lines if line.startswith("me/Tiny-FBQAT-W4A8, branch w6 (new): 8 files, 5 to upload"))
    assert "there already" not in table
    assert [line.split()[0] for line in table.splitlines() if line.endswith("remove")] == [
        "htp/certificate.json", "htp/transformer.bin",
    ]  # fmt: skip
    assert sum(line.startswith("verified: ") for line in lines) == 4


def test_only_what_changed_is_sent_again(hub: LoopbackHub, staged: Path) -> None:
    publish(staged, REPO, branches=True)
    before = dict(hub.repositories[REPO].branches)
    hub.requests.clear()
    lines: list[str] = []
    publish(staged, REPO, branches=True, say=lines.append)
    assert sum("nothing changed, nothing uploaded" in line for line in lines) == 4
    assert (hub.count("commit"), hub.count("put"), hub.count("branch")) == (0, 0, 0)
    assert hub.repositories[REPO].branches == before

    (staged / "stages" / "w6" / "images" / "comparison.png").write_text("another picture")
    (staged / "htp" / "transformer.bin").write_text("another binary")
    publish(staged, REPO, branches=True)
    after = hub.repositories[REPO].branches
    assert after["w8"] == before["w8"]
    assert hub.repositories[REPO].files_of("w6")["images/comparison.png"].content == b"another picture"
    assert hub.repositories[REPO].files_of("w4") == hub.repositories[REPO].files
    assert hub.count("put") == 2
    assert_branches_are_whole(hub, staged, REPO)


def test_a_branch_has_its_name_when_it_is_whole(hub: LoopbackHub, staged: Path) -> None:
    """The commit fails: w6 is not there, what is there says that it is unfinished, and the next run completes it."""
    hub.fail("commit", 503, path="/commit/w6")
    with pytest.raises(
        HubError, match=r"^upload to me/Tiny-FBQAT-W4A8, branch w6: HTTP 503 .*run the same command again"
    ):
        publish(staged, REPO, branches=True)
    assert list(hub.repositories[REPO].branches) == ["main", "w8", "w6-unfinished"]
    sent = hub.count("put")
    publish(staged, REPO, branches=True)
    assert sorted(hub.repositories[REPO].branches) == ["main", "w4", "w6", "w8"]
    assert hub.count("put") == sent
    assert_branches_are_whole(hub, staged, REPO)


def test_what_is_wrong_with_branches_is_said_before_anything_is_sent(hub: LoopbackHub, staged: Path) -> None:
    publish(staged, REPO)
    repository = hub.repositories[REPO]
    repository.branches["w8"] = ""
    repository.commit({"README.md": repository.files["README.md"]}, "w8")
    (staged / "stages" / "w6" / "README.md").unlink()
    weights = staged / "stages" / "w8" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    problems = problems_of(staged, branches=True)
    assert f"w6/README.md is missing. Run: fbqat evaluate {staged} --stage 6 ; fbqat card {staged}" in problems
    assert "w8/transformer/diffusion_pytorch_model.safetensors is damaged or cut short" in problems
    assert "branch w8 of me/Tiny-FBQAT-W4A8 exists and was not published by fbqat" in problems


def test_a_run_without_stages_has_no_branches(hub: LoopbackHub, run: Path) -> None:
    assert "kept no stages for --branches; a recipe keeps them with keep_stages: [8, 6]" in problems_of(
        run, branches=True
    )


@pytest.mark.slow
def test_pulled_and_loaded_by_its_branch(hub: LoopbackHub, staged_run: Path, tmp_path: Path, capsys) -> None:
    """A real run: published with branches; w6 pulled, and drawn with in a fresh process by from_pretrained."""
    run = shutil.copytree(staged_run, tmp_path / "run")
    for option in ([], ["--stage", "8"], ["--stage", "6"]):
        assert cli.main(["evaluate", str(run), *option, "--metrics", "bits_per_weight"]) == 0
    (tmp_path / "licence.yaml").write_text("license: apache-2.0\n")
    assert cli.main(["card", str(run), "--data", str(tmp_path / "licence.yaml")]) == 0
    assert cli.main(["publish", str(run), "--repo", REPO, "--branches"]) == 0
    assert sorted(hub.repositories[REPO].branches) == ["main", "w4", "w6", "w8"]

    assert cli.main(["pull", REPO, "--revision", "w6", "--output", str(tmp_path / "pulled")]) == 0
    assert cli.main(["pull", f"{REPO}@w6"]) == 0
    assert cli.main(["pull", f"{REPO}@w6", "--revision", "w8"]) == 1
    assert "names revision w6, and --revision w8; give one of them" in capsys.readouterr().err
    capsys.readouterr()
    assert cli.main(["list", "--local", "--runs", str(tmp_path)]) == 0
    assert [line.split()[:4] for line in capsys.readouterr().out.splitlines() if "cache" in line] == [
        [REPO, "cache", "sana", "W6A8"]
    ]

    script = f"""
import torch, fbqat_hub
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({REPO!r}, revision="w6", dtype=torch.float32)
assert pipe.transformer.proj_out.weight_bits == 6
pipe("red", generator=torch.Generator().manual_seed(3), **{CALL!r}).images[0].save("picture.png")
"""
    fresh = subprocess_environment(
        HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "other"), HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=fresh, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    drawn = Image.open(tmp_path / "picture.png")
    for pipeline in (load_stage(run, 6), DiffusionPipeline.from_pretrained(tmp_path / "pulled", dtype=torch.float32)):
        picture = pipeline("red", generator=torch.Generator().manual_seed(3), **CALL).images[0]
        assert ImageChops.difference(drawn, picture).getbbox() is None
