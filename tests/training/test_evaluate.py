"""`evaluate` of a run: what it draws and keeps, what it records, and what it reuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load
from PIL import Image

from fbqat_hub import cli
from fbqat_hub.evaluation.folders import PictureFolder, read_picture
from fbqat_hub.evaluation.metrics import psnr
from fbqat_hub.evaluation.results import Record, peak_rss_mib, read_records, write_records
from fbqat_hub.hub.card import write_card
from fbqat_hub.training import evaluate as module
from fbqat_hub.training.distill import cache_folder
from fbqat_hub.training.evaluate import DEFAULT, draw, draw_folder, evaluate
from fbqat_hub.training.recipe import load_recipe


@pytest.fixture(scope="module")
def run(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run that may be written to, evaluated once."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(run_folder, folder)
    evaluate(folder, progress=False)
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The prompts of every batch that is drawn."""
    asked = []

    def recorded(pipeline, prompts, *arguments, **options):
        asked.append(list(prompts))
        return draw(pipeline, prompts, *arguments, **options)

    monkeypatch.setattr(module, "draw", recorded)
    return asked


def test_records_of_the_default_metrics(run: Path) -> None:
    records = {record.metric: record for record in read_records(run / "results.json") if record.method == "fbqat"}
    assert set(records) == set(DEFAULT)
    loss, recipe = records["kd_loss"], load_recipe(run / "recipe.yaml")
    bins = loss.extra["by_timestep"]
    assert sum(row["n"] for row in bins) == loss.n == recipe.evaluation_settings()["draws"]
    assert sum(row["value"] * row["n"] for row in bins) / loss.n == pytest.approx(loss.value)
    assert all(0 <= row["low"] <= row["high"] <= 1000 for row in bins)
    for metric in ("psnr", "ssim", "fd_teacher", "fd_real"):
        assert records[metric].n == 4
        assert records[metric].extra["prompts"] == recipe.dataset["path"]
    low, high = records["psnr"].interval
    assert low <= records["psnr"].value <= high
    assert records["fd_teacher"].extra["extractor"] == records["fd_real"].extra["extractor"] == "openmoji-cnn-1"
    assert records["fd_real"].extra["teacher_value"] > 0
    assert "prompts" not in records["bits_per_weight"].extra


def test_sizes_of_teacher_and_student(run: Path, recipe_fields: dict) -> None:
    records = [record for record in read_records(run / "results.json") if record.suite == "loading"]
    found = {(record.method, record.metric): record.value for record in records}
    for method, folder in (("teacher", Path(recipe_fields["teacher"])), ("fbqat", run)):
        stored = (folder / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
        assert found.pop((method, "denoiser_mib")) == stored / 2**20
    assert found == {}


@pytest.mark.slow
def test_peak_memory_is_of_a_process_of_its_own(copy: Path) -> None:
    ballast = torch.ones(2**28)  # 1 GiB of this process
    peaks = {record.method: record for record in evaluate(copy, metrics=["peak_rss_mib"], progress=False)}
    assert set(peaks) == {"teacher", "fbqat"}
    for record in peaks.values():
        assert (record.suite, record.unit) == ("loading", "MiB")
        assert 100 < record.value < peak_rss_mib()
    del ballast
    (copy / "transformer" / "config.json").write_text("{")
    with pytest.raises(RuntimeError, match=r"peak memory of .* could not be measured: ValueError: .* is not JSON"):
        evaluate(copy, metrics=["peak_rss_mib"], progress=False)


def test_pictures_are_kept_with_their_prompts_and_are_what_was_measured(run: Path) -> None:
    folder = PictureFolder.open(run)
    assert list(folder.files) == list(folder.prompts) == [f"{index:05d}" for index in range(4)]
    rows = [json.loads(line) for line in (run / "images" / "samples" / "metadata.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == [0, 1, 2, 3]
    recipe = load_recipe(run / "recipe.yaml")
    originals = [
        PictureFolder.open(path) for path in cache_folder(recipe).glob("teacher-*")
        if dict(PictureFolder.open(path).prompts) == dict(folder.prompts)
    ]  # fmt: skip
    pairs = [
        [torch.stack([read_picture(file) for file in each.files.values()]).float() / 255 for each in (folder, other)]
        for other in originals
    ]
    value = next(record.value for record in read_records(run / "results.json") if record.metric == "psnr")
    assert any(psnr(*pair).mean().item() == pytest.approx(value) for pair in pairs)
    assert Image.open(run / "images" / "comparison.png").width > 300
    assert (run / "images" / "curve.png").is_file()


def test_nothing_is_drawn_again_until_the_model_or_the_prompts_change(copy: Path, drawn) -> None:
    # A copied folder has other file times, so its first evaluation draws the student anew, but not the teacher.
    first = evaluate(copy, metrics=["psnr"], progress=False)
    assert len(drawn) == 1
    again = evaluate(copy, metrics=["psnr"], progress=False)
    assert len(drawn) == 1
    assert [record.value for record in again] == [record.value for record in first]
    evaluate(copy, images=3, metrics=["psnr"], progress=False)
    assert [len(batch) for batch in drawn[1:]] == [3, 3]
    assert len(PictureFolder.open(copy).files) == 3
    assert sorted(path.name for path in (copy / "images").iterdir()) == ["comparison.png", "curve.png", "samples"]


def test_a_stage_is_measured_in_a_folder_of_its_own(staged_run: Path, tmp_path: Path, capsys) -> None:
    """Losses and sizes of three models; the run's own results stay as they are; the cards have a row for each width."""
    run = shutil.copytree(staged_run, tmp_path / "run")
    found = {}
    for bits, option in ((4, []), (6, ["--stage", "6"]), (8, ["--stage", "8"])):
        metrics = ["kd_loss", "bits_per_weight", *(["psnr"] if bits == 6 else [])]
        assert cli.main(["evaluate", str(run), *option, "--metrics", *metrics]) == 0
        folder = run if bits == 4 else run / "stages" / f"w{bits}"
        assert capsys.readouterr().out.endswith(f"saved {folder / 'results.json'}\n")
        found[bits] = {record.metric: record for record in read_records(folder / "results.json")}
        assert {record.extra["weight_bits"] for record in found[bits].values()} == {bits}
    assert len({each["kd_loss"].value for each in found.values()}) == 3
    stored = [found[bits]["bits_per_weight"].value for bits in (4, 6, 8)]
    assert 4 < stored[0] < 8 < stored[1] == stored[2]
    assert (run / "stages" / "w6" / "images" / "comparison.png").is_file()
    assert [path.name for path in (run / "images").iterdir()] == ["curve.png"]
    assert cli.main(["evaluate", str(run), "--stage", "7"]) == 1
    assert "has no stage of 7 bits; it kept 8, 6" in capsys.readouterr().err

    write_card(run)
    text, of_stage = ((folder / "README.md").read_text() for folder in (run, run / "stages" / "w6"))
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    for bits, branch in ((8, "`w8`"), (6, "`w6`"), (4, "`w4` and `main`")):
        loss = f"{found[bits]['kd_loss'].value:.4g}"
        assert f"| {bits} bits | {branch} | {loss}" in rows[f"{bits} bits"], rows
        assert rows[f"{bits} bits"] in of_stage
    assert "quantized to W6A8 (6-bit weights, 8-bit activations)" in of_stage
    assert metadata_load(run / "stages" / "w6" / "README.md")["tags"][1:3] == ["6-bit", "w6a8"]
    assert "fbqat evaluate run --stage 6" in of_stage


def test_an_interrupted_drawing_goes_on_where_it_stopped(run_folder: Path, tmp_path: Path, drawn, monkeypatch) -> None:
    recipe = load_recipe(run_folder / "recipe.yaml")
    recipe = replace(recipe, evaluation={**recipe.evaluation, "batch_size": 2})
    prompts = ["red", "green", "blue", "mint", "sky"]
    pipeline = module.load_pipeline(run_folder)
    whole = draw_folder(lambda: pipeline, prompts, recipe, tmp_path / "whole", progress=False)

    save, saved = Image.Image.save, []

    def interrupted(picture: Image.Image, path: Path, format: str) -> None:
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(path)
        save(picture, path, format)

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw_folder(lambda: pipeline, prompts, recipe, tmp_path / "parts", progress=False)
    assert not (tmp_path / "parts").exists()
    monkeypatch.setattr(Image.Image, "save", save)
    drawn.clear()
    parts = draw_folder(lambda: pipeline, prompts, recipe, tmp_path / "parts", progress=False)
    assert drawn == [["blue", "mint"], ["sky"]]
    assert [file.read_bytes() for file in parts] == [file.read_bytes() for file in whole]


def test_prompts_of_another_set_replace_the_records_of_pictures(copy: Path, drawn) -> None:
    other = Record(suite="method", family="sana", method="vqat", metric="psnr", value=1.0, n=1, seed=1)
    write_records(copy / "results.json", [other])
    records = evaluate(copy, prompts="openmoji", images=2, metrics=["ssim"], progress=False)
    assert [(record.metric, record.n, record.extra["prompts"]) for record in records] == [("ssim", 2, "openmoji")]
    kept = [(record.method, record.metric) for record in read_records(copy / "results.json")]
    loading = [("teacher", "denoiser_mib"), ("fbqat", "denoiser_mib")]
    assert kept == [("fbqat", "kd_loss"), ("fbqat", "bits_per_weight"), *loading, ("vqat", "psnr"), ("fbqat", "ssim")]
    assert drawn[0] == drawn[1]
    assert list(PictureFolder.open(copy).prompts.values()) == drawn[0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"metrics": ["psnr", "fid"]}, "unknown metrics fid; known: kd_loss, psnr, .*fid_teacher"),
        ({"metrics": []}, "no metrics to measure"),
        ({"prompts": "mjhq", "metrics": ["psnr"]}, "Did you mean 'mjhq-30k'"),
        ({"prompts": "openmoji", "images": 10**6, "metrics": ["psnr"]}, "openmoji has .* --images asks for 1000000"),
        ({"images": 0}, "evaluation.images is 0"),
    ],
)
def test_wrong_requests_are_named_and_leave_the_run_as_it_was(copy: Path, options: dict, says: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    with pytest.raises(ValueError, match=says):
        evaluate(copy, progress=False, **options)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
