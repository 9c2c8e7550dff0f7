"""`evaluate` of a run: what it draws and keeps, what it records, and what it reuses."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import metadata_load
from PIL import Image
from safetensors.torch import load_file, save_file

from fbqat_hub import cli
from fbqat_hub.components import Component
from fbqat_hub.evaluation.folders import PictureFolder
from fbqat_hub.evaluation.metrics import psnr
from fbqat_hub.evaluation.results import Record, peak_rss_mib, read_records, write_records
from fbqat_hub.hub.card import write_card
from fbqat_hub.pictures import read_picture
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.quantization import PackedLayer, named_layers
from fbqat_hub.training import samples as module
from fbqat_hub.training.cache import cache_folder
from fbqat_hub.training.evaluate import DEFAULT, evaluate, layer_widths
from fbqat_hub.training.ptq import convert_pipeline
from fbqat_hub.training.recipe import load_recipe
from fbqat_hub.training.samples import (
    asked_prompts,
    generate_folder,
    generate_samples,
    student_pictures,
    teacher_pictures,
)


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
def generated(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The prompts of every batch that is generated."""
    asked = []

    def recorded(pipeline, prompts, *arguments, **options):
        asked.append(list(prompts))
        return generate_samples(pipeline, prompts, *arguments, **options)

    monkeypatch.setattr(module, "generate_samples", recorded)
    return asked


def test_records_of_the_default_metrics(run: Path) -> None:
    records = {record.metric: record for record in read_records(run / "results.json") if record.method == "fbqat"}
    assert set(records) == set(DEFAULT)
    loss, recipe = records["kd_loss"], load_recipe(run / "recipe.yaml")
    bins = loss.extra["by_timestep"]
    assert sum(row["n"] for row in bins) == loss.n == recipe.evaluation.draws
    assert sum(row["value"] * row["n"] for row in bins) / loss.n == pytest.approx(loss.value)
    assert all(0 <= row["low"] <= row["high"] <= 1000 for row in bins)
    for metric in ("psnr", "ssim", "fd_teacher", "fd_real"):
        assert records[metric].n == 4
        assert records[metric].extra["prompts"] == Path(recipe.dataset["path"]).name
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
    peaks = {record.method: record for record in evaluate(copy, metrics=["peak_rss_mib"], progress=False).records}
    assert set(peaks) == {"teacher", "fbqat"}
    for record in peaks.values():
        assert (record.suite, record.unit) == ("loading", "MiB")
        assert 100 < record.value < peak_rss_mib()
    del ballast
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(dict(list(load_file(weights).items())[1:]), weights, metadata={"format": "pt"})
    with pytest.raises(ChildProcessError, match=r"peak memory of .* could not be measured: ValueError: .* lacks "):
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


def test_nothing_is_generated_again_until_the_model_or_the_prompts_change(copy: Path, generated) -> None:
    # A copied folder has other file times, so its first evaluation draws the student anew, but not the teacher.
    first = evaluate(copy, metrics=["psnr"], progress=False).records
    assert len(generated) == 1
    again = evaluate(copy, metrics=["psnr"], progress=False).records
    assert len(generated) == 1
    assert [record.value for record in again] == [record.value for record in first]
    evaluate(copy, images=3, metrics=["psnr"], progress=False)
    assert [len(batch) for batch in generated[1:]] == [3, 3]
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


def test_an_interrupted_generation_goes_on_where_it_stopped(
    run_folder: Path, tmp_path: Path, generated, monkeypatch
) -> None:
    recipe = load_recipe(run_folder / "recipe.yaml")
    recipe = replace(recipe, evaluation=replace(recipe.evaluation, batch_size=2))
    prompts = ["red", "green", "blue", "mint", "sky"]
    pipeline = load_pipeline(run_folder)
    whole = generate_folder(lambda: pipeline, prompts, recipe, tmp_path / "whole", progress=False)

    save, saved = Image.Image.save, []

    def interrupted(picture: Image.Image, path: Path, format: str) -> None:
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(path)
        save(picture, path, format)

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_folder(lambda: pipeline, prompts, recipe, tmp_path / "parts", progress=False)
    assert not (tmp_path / "parts").exists()
    monkeypatch.setattr(Image.Image, "save", save)
    generated.clear()
    parts = generate_folder(lambda: pipeline, prompts, recipe, tmp_path / "parts", progress=False)
    assert generated == [["blue", "mint"], ["sky"]]
    assert [file.read_bytes() for file in parts] == [file.read_bytes() for file in whole]


def test_pictures_that_two_make_at_once_are_made_once(copy: Path, generated) -> None:
    recipe, prompts = load_recipe(copy / "recipe.yaml"), ["red", "dark green"]
    started = threading.Barrier(2)

    def load() -> Any:
        return load_pipeline(copy)

    def make(_: int) -> list[Path]:
        started.wait()
        ours = student_pictures(load, copy, recipe, prompts, progress=False)
        return [*ours, *teacher_pictures(recipe, prompts, load, progress=False)]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(make, range(2))
    assert first == second
    assert len(first) == 4
    assert generated == [prompts, prompts]


def test_prompts_of_another_set_replace_the_records_of_pictures(copy: Path, generated) -> None:
    other = Record(suite="method", family="sana", method="vqat", metric="psnr", value=1.0, n=1, seed=1)
    write_records(copy / "results.json", [other])
    records = evaluate(copy, prompts="openmoji", images=2, metrics=["ssim"], progress=False).records
    assert [(record.metric, record.n, record.extra["prompts"]) for record in records] == [("ssim", 2, "openmoji")]
    kept = [(record.method, record.metric) for record in read_records(copy / "results.json")]
    loading = [("teacher", "denoiser_mib"), ("fbqat", "denoiser_mib")]
    assert kept == [("fbqat", "kd_loss"), ("fbqat", "bits_per_weight"), *loading, ("vqat", "psnr"), ("fbqat", "ssim")]
    assert generated[0] == generated[1]
    assert list(PictureFolder.open(copy).prompts.values()) == generated[0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"metrics": ["psnr", "fid"]}, "unknown metrics fid; known: kd_loss, psnr, .*fid_teacher"),
        ({"metrics": []}, "no metrics to measure"),
        ({"prompts": "mjhq", "metrics": ["psnr"]}, "Did you mean 'mjhq-30k'"),
        ({"prompts": "openmoji", "images": 10**6, "metrics": ["psnr"]}, "openmoji has .* --images asks for 1000000"),
        ({"images": 0}, "images is 0"),
        ({"prompts": "{tmp}/words.txt", "metrics": ["psnr", "fd_real"]}, "words.txt has prompts and no real pictures"),
        ({"prompts": "{tmp}/empty.txt", "metrics": ["psnr"]}, "empty.txt is empty"),
        (
            {"prompts": "{tmp}/words.txt", "images": 3, "metrics": ["psnr"]},
            "words.txt has 2 prompts, and --images asks",
        ),
        ({"prompts": "nosuch", "images": 3, "metrics": ["kd_loss"]}, "prompts and images are of pictures, and kd_loss"),
        ({"device": "cuda:7"}, "device is cuda:7, but this machine has"),
    ],
)
def test_wrong_requests_are_named_before_anything_is_loaded(copy: Path, options: dict, says: str, monkeypatch) -> None:
    (copy.parent / "words.txt").write_text("red\nblue\n")
    (copy.parent / "empty.txt").write_text("\n")
    monkeypatch.setattr("fbqat_hub.training.evaluate.load_pipeline", None)
    monkeypatch.setattr("fbqat_hub.training.evaluate.float_pipeline", None)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    if "prompts" in options:
        options = {**options, "prompts": options["prompts"].replace("{tmp}", str(copy.parent))}
    with pytest.raises(ValueError, match=says):
        evaluate(copy, progress=False, **options)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


@pytest.mark.parametrize(
    ("name", "added", "says"),
    [
        ("results.json", "x", "results.json is not JSON"),
        (
            "training_log.jsonl",
            '{"step": 8, "lo',
            "training_log.jsonl, line .*each line is an object with step and loss",
        ),
    ],
)
def test_a_damaged_file_is_named_before_anything_is_loaded(
    name: str, added: str, says: str, copy: Path, monkeypatch
) -> None:
    monkeypatch.setattr("fbqat_hub.training.evaluate.load_pipeline", None)
    monkeypatch.setattr("fbqat_hub.training.evaluate.float_pipeline", None)
    with (copy / name).open("a") as file:
        file.write(added)
    with pytest.raises(ValueError, match=says):
        evaluate(copy, progress=False)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    for path, says in (
        (tmp_path / "none", "none is no folder"),
        (tmp_path, "has no recipe.yaml; give the folder of a"),
    ):
        with pytest.raises(FileNotFoundError, match=says):
            evaluate(path)


def test_prompts_of_a_file_and_fewer_pictures_than_the_recipe_has_prompts(
    copy: Path, generated, tmp_path: Path
) -> None:
    (tmp_path / "words.txt").write_text("sky\ndark blue\nmint\n")
    found = evaluate(copy, prompts=str(tmp_path / "words.txt"), metrics=["ssim"], progress=False).records
    assert [(record.n, record.extra["prompts"]) for record in found] == [(3, "words.txt")]
    assert generated[0] == ["sky", "dark blue", "mint"]
    recipe = replace(load_recipe(copy / "recipe.yaml"), prompts=["a", "b", "c"])
    assert asked_prompts(recipe, None, 2, False).texts == ["a", "b"]
    assert len(asked_prompts(recipe, None, None, False).texts) == 4


def edited(folder: Path, prefix: str, level: float) -> None:
    """The tensors of a component whose names begin so, filled with a level."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            tensor.fill_(level)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_model_that_overflows_is_refused(copy: Path) -> None:
    """Every stored number is finite; what it computes is not. Its pictures would be black, and the SSIM 1."""
    edited(copy / "transformer", "proj_out.bias", 3e38)
    before = (copy / "results.json").read_bytes()
    with pytest.raises(ValueError, match=r"4 of 4 pictures of SanaPipeline are not finite \(NaN\), first that of '"):
        evaluate(copy, prompts=None, metrics=["psnr", "ssim"], progress=False)
    with pytest.raises(ValueError, match=r"held-out loss is not finite in 1 of 1 draws: .* is broken"):
        evaluate(copy, metrics=["kd_loss"], progress=False)
    assert (copy / "results.json").read_bytes() == before


def test_a_model_that_makes_one_colour_is_refused(copy: Path, tmp_path: Path, fbqat_cache: Path) -> None:
    edited(copy / "vae", "decoder.", 0.0)
    with pytest.raises(ValueError, match="4 of 4 pictures are of one colour throughout where the teacher's are not"):
        evaluate(copy, metrics=["psnr", "ssim"], progress=False)
    # both sides black: equal, and worth nothing
    teacher = shutil.copytree(load_recipe(copy / "recipe.yaml").teacher, tmp_path / "teacher")
    edited(teacher / "vae", "decoder.", 0.0)
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    (copy / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "teacher": str(teacher)}))
    with pytest.raises(ValueError, match="each of the teacher's 4 pictures is of one colour throughout"):
        evaluate(copy, metrics=["psnr", "ssim"], progress=False)


def test_what_cannot_be_measured_says_why_and_its_older_record_goes(copy: Path) -> None:
    """The student is the teacher itself: all pictures are equal. One picture has no distance."""
    shutil.rmtree(copy / "transformer")
    shutil.copytree(Path(load_recipe(copy / "recipe.yaml").teacher) / "transformer", copy / "transformer")
    found = evaluate(copy, metrics=["psnr", "ssim"], progress=False)
    assert [(record.metric, record.value) for record in found.records] == [("ssim", 1.0)]
    assert found.not_measured == {"psnr": "all 4 pairs are equal, and the PSNR of equal pictures is infinite"}
    assert "psnr" not in {record.metric for record in read_records(copy / "results.json")}
    assert "fd_teacher" in {record.metric for record in read_records(copy / "results.json")}
    reasons = evaluate(copy, images=1, metrics=["ssim", "fd_teacher", "fd_real"], progress=False).not_measured
    assert list(reasons) == ["fd_teacher", "fd_real"]
    assert reasons["fd_teacher"].startswith("a distance of two sets needs at least 2 pictures")


def test_layers_of_several_widths_are_drawn_and_are_on_the_card(tiny_sana: Path, tmp_path: Path) -> None:
    run = convert_pipeline(str(tiny_sana), tmp_path / "run", {"average_bits": 5.0}, progress=False)
    evaluate(run, metrics=["bits_per_weight"], progress=False)
    assert (run / "images" / "widths.png").is_file()
    wide = {
        name
        for name, bits in layer_widths(Component(run / "transformer", "diffusers", "ModelMixin")).items()
        if bits == 8
    }
    layers = named_layers(load_pipeline(run).transformer, PackedLayer)
    assert wide == {name for name, layer in layers if layer.weight_bits == 8}
    text = write_card(run, "me/mixed").read_text()
    assert "quantized to W4A8 (weights of 4 and 8 bits, 5.0 on average, 8-bit activations)" in text
    assert "## Bits of each layer\n\n![" in text
    assert text.count("images/widths.png") == 1


def test_one_width_is_no_picture(run: Path) -> None:
    assert not (run / "images" / "widths.png").exists()
