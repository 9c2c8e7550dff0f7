"""The comparison page: both pictures from one prompt and seed, in Python and in a real browser."""

from __future__ import annotations

import io
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fbqat_hub.integrations.gradio import app, generate_pair, open_pair
from fbqat_hub.pipelines import load_pipeline
from tests.conftest import CALL, subprocess_environment


def test_teacher_and_student_generate_what_they_do_alone(run_folder: Path, tiny_sana: Path) -> None:
    pair = open_pair(str(run_folder))
    assert (pair.title, pair.teacher, pair.generation) == (
        "Tiny-FBQAT-W4A8",
        str(tiny_sana),
        CALL | {"num_inference_steps": 9},
    )
    for source, made in zip((tiny_sana, run_folder), generate_pair(pair, "dark red", 3, 2), strict=True):
        pipeline = load_pipeline(source)
        alone = pipeline("dark red", generator=torch.Generator().manual_seed(3), **CALL).images[0]
        assert np.array_equal(np.array(made.image), np.array(alone))
        tensors = pipeline.transformer.state_dict().values()
        assert made.mebibytes == sum(tensor.nbytes for tensor in tensors) / 2**20
        assert made.seconds > 0


def test_any_number_of_steps(teacher_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Of Sana-Sprint's call too, which itself takes two only."""
    shutil.copytree(teacher_of("sana-sprint"), tmp_path / "run")
    recipe = {"name": "Sprint", "teacher": str(tmp_path / "run"), "generation": CALL}
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for made in generate_pair(open_pair(str(tmp_path / "run")), "red", 0, 3):
        assert made.image.size == (32, 32)


@pytest.mark.parametrize(
    ("prompt", "seed", "steps", "message"),
    [
        (" ", 0, 2, "the prompt has 0 characters; write 1 to 1000"),
        ("x" * 1001, 0, 2, "the prompt has 1001 characters"),
        ("red", -1, 2, "the seed is -1"),
        ("red", 2**32, 2, "the seed is 4294967296"),
        ("red", 0, 51, "51 steps were asked for; choose 1 to 50"),
    ],
)
def test_what_cannot_be_generated_is_said(prompt: str, seed: int, steps: int, message: str, run_folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        generate_pair(open_pair(str(run_folder)), prompt, seed, steps)


def test_a_folder_without_its_recipe_has_no_teacher(tiny_sana: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"recipe\.yaml is missing; it names the teacher"):
        open_pair(str(tiny_sana))
    folder = shutil.copytree(tiny_sana, tmp_path / "run")
    (folder / "recipe.yaml").write_text("name: x\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml lacks name or teacher"):
        open_pair(str(folder))


def test_a_page_needs_models_of_different_names(run_folder: Path) -> None:
    pytest.importorskip("gradio")
    for pairs, message in (([], "models are none"), ([open_pair(str(run_folder))] * 2, "once each")):
        with pytest.raises(ValueError, match=message):
            app(pairs)


@pytest.mark.slow
def test_the_page_in_a_browser(run_folder: Path, tmp_path: Path) -> None:
    """`fbqat space`, a prompt typed, both pictures looked at pixel by pixel, and an error shown as such."""
    pytest.importorskip("gradio")
    from playwright.sync_api import sync_playwright

    run = shutil.copytree(run_folder, tmp_path / "runs" / "tiny")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "prompts": ["dark red"]}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fbqat_hub.cli", "space", "--port", str(port)]  # finds runs/tiny
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=subprocess_environment(), stdout=log, stderr=log)
    try:
        while "Running on local URL" not in (tmp_path / "log").read_text():
            assert server.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.5)
        with sync_playwright() as playwright:
            # a browser of the system, or the one of `playwright install chromium`
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page()
            page.set_default_timeout(300_000)
            page.goto(f"http://127.0.0.1:{port}")
            prompt = page.get_by_label("prompt")
            assert prompt.input_value() == "dark red"
            prompt.fill("sky")
            page.get_by_label("seed").fill("5")
            page.get_by_role("button", name="Generate both").click()
            page.get_by_text("MiB; generated in").nth(1).wait_for()
            shown = [page.locator("img[src*='/file=']").nth(number) for number in (0, 1)]
            pictures = [page.request.get(each.get_attribute("src") or "").body() for each in shown]
            for made, picture in zip(generate_pair(open_pair(str(run)), "sky", 5, 2), pictures, strict=True):
                large = made.image.resize((320, 320), Image.Resampling.NEAREST)
                assert np.array_equal(np.array(Image.open(io.BytesIO(picture)).convert("RGB")), np.array(large))
            prompt.fill("")
            page.get_by_role("button", name="Generate both").click()
            page.get_by_text("the prompt has 0 characters; write 1 to 1000.").wait_for()
            browser.close()
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()
