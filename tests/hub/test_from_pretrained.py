"""Pipelines of the Hub: what plain ``from_pretrained("owner/name")`` sees of a damaged download, and what only
``fbqat pull`` sees (docs/publishing.md, SECURITY.md); float ones as teachers, whatever variants they have.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError

from fbqat_hub.hub.client import HubError
from fbqat_hub.hub.contents import collect
from fbqat_hub.hub.manifest import MANIFEST
from fbqat_hub.hub.names import public_name
from fbqat_hub.hub.publish import hashes_of, manifest_of
from fbqat_hub.hub.pull import pull
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training.bases import parameters
from fbqat_hub.training.distill import train
from fbqat_hub.training.loop import Loop
from fbqat_hub.training.ptq import convert_pipeline
from fbqat_hub.training.recipe import Recipe, recipe_of_run
from tests.conftest import weights_of
from tests.hub.conftest import REPO
from tests.hub.server import LoopbackHub

TEACHER = "me/tiny-teacher"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def published(run_folder: Path) -> dict[str, bytes]:
    """Path -> content of what publishing the tiny run puts on the Hub, but for a card."""
    items, _, _ = collect(run_folder, REPO)
    contents = {item.path: item.open().read() for item in items}
    return {**contents, MANIFEST: manifest_of(run_folder, run_folder, items, hashes_of(items)).to_bytes()}


@pytest.fixture
def snapshot(hub: LoopbackHub, published: dict[str, bytes]) -> Path:
    """The repository as ``from_pretrained`` left it in the Hub's cache."""
    hub.add(REPO, published)
    DiffusionPipeline.from_pretrained(REPO)
    (folder,) = Path(constants.HF_HUB_CACHE).glob("*/snapshots/*")
    assert not (folder / MANIFEST).exists()  # diffusers fetches what it knows
    return folder


def rewrite(path: Path, content: bytes) -> None:
    """Change what the cache holds of a file, a link to its blob."""
    path.resolve().write_bytes(content)


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_a_weight_file_that_lost_its_last_byte_is_refused(snapshot: Path, component: str) -> None:
    """By safetensors: the header says how long the file is."""
    (path,) = (snapshot / component).glob("*.safetensors")
    rewrite(path, path.read_bytes()[:-1])
    with pytest.raises((OSError, SafetensorError)):
        DiffusionPipeline.from_pretrained(REPO)
    with pytest.raises(ValueError, match=f"{component}/{path.name} is damaged or cut short"):
        load_pipeline(REPO)


@pytest.mark.parametrize("path", [WEIGHTS, "scheduler/scheduler_config.json"])
def test_a_missing_file_is_fetched_or_refused(snapshot: Path, hub: LoopbackHub, path: str) -> None:
    (snapshot / path).unlink()
    hub.fail("info", 503, times=99)
    with pytest.raises(OSError, match=r"is incomplete: 1 file\(s\) are missing"):
        DiffusionPipeline.from_pretrained(REPO)
    hub.heal()
    hub.fail("tree", 503, times=99)
    DiffusionPipeline.from_pretrained(REPO)
    assert (snapshot / path).is_file()


def test_a_download_that_is_cut_is_an_error_and_the_next_call_completes_it(
    hub: LoopbackHub, published: dict[str, bytes]
) -> None:
    hub.add(REPO, published)
    hub.fail("cdn", "cut", times=99)
    with pytest.raises(HTTPError):
        DiffusionPipeline.from_pretrained(REPO)
    hub.heal()
    DiffusionPipeline.from_pretrained(REPO)


def test_a_changed_byte_is_seen_by_pull_alone(snapshot: Path, published: dict[str, bytes]) -> None:
    """The last byte of the weights is a value like any other. The pull names the file and fetches it again."""
    rewrite(snapshot / WEIGHTS, published[WEIGHTS][:-1] + bytes([published[WEIGHTS][-1] ^ 1]))
    DiffusionPipeline.from_pretrained(REPO)
    load_pipeline(REPO)
    lines: list[str] = []
    pull(REPO, say=lines.append)
    assert lines[0].startswith(f"fetched again, for not being as published: {WEIGHTS}: has SHA-256 ")
    assert (snapshot / WEIGHTS).read_bytes() == published[WEIGHTS]


def test_after_a_pull_sizes_are_compared_with_the_manifest(snapshot: Path, published: dict[str, bytes]) -> None:
    pull(REPO)
    rewrite(snapshot / "transformer" / "config.json", published["transformer/config.json"] + b" ")
    with pytest.raises(ValueError, match=r"transformer/config.json has \d+ bytes of \d+. Fetch it again"):
        DiffusionPipeline.from_pretrained(REPO)


# float pipelines


def upload(hub: LoopbackHub, folder: Path, variant: str | None = None, onto: dict[str, bytes] | None = None) -> dict:
    """Add a folder as TEACHER, its weight files named by a variant; returns path -> content."""
    files = dict(onto or {})
    for path in folder.rglob("*"):
        if path.suffix == ".safetensors" or (path.is_file() and not onto):
            name = path.relative_to(folder).as_posix()
            name = name.replace(".safetensors", f".{variant}.safetensors") if variant else name
            files[name] = path.read_bytes()
    hub.add(TEACHER, files)
    return files


def passed_on(output: Path, source: Path) -> None:
    """All parts but the denoiser are the source's, byte for byte, and no links into the Hub's cache."""
    assert [path for path in output.rglob("*") if path.is_symlink()] == []
    for path in source.rglob("*"):
        name = path.relative_to(source)
        if path.is_file() and name.parts[0] != "transformer":
            assert (output / name).read_bytes() == path.read_bytes(), name


def test_a_teacher_of_the_hub_is_passed_on_as_it_is_stored(
    hub: LoopbackHub, half_sana: Path, recipe_fields: dict[str, Any], tmp_path: Path
) -> None:
    upload(hub, half_sana)
    passed_on(convert_pipeline(TEACHER, tmp_path / "converted"), half_sana)
    recipe = Recipe(**{**recipe_fields, "teacher": TEACHER, "method": "ptq-mse", "steps": 0})
    passed_on(train(recipe, tmp_path / "trained", progress=False), half_sana)


def test_the_only_variant_of_a_repository_is_taken(hub: LoopbackHub, half_sana: Path, tmp_path: Path) -> None:
    upload(hub, half_sana, "fp16")
    assert load_pipeline(TEACHER).vae.dtype == torch.float16
    passed_on(convert_pipeline(TEACHER, tmp_path / "out"), half_sana)
    hub.fail("info", 503, times=99)  # and from the cache when the Hub does not answer
    assert load_pipeline(TEACHER).vae.dtype == torch.float16


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_of_two_variants_one_is_downloaded(
    variant: str | None, hub: LoopbackHub, half_sana: Path, tiny_sana: Path, tmp_path: Path
) -> None:
    upload(hub, half_sana, "fp16", onto=upload(hub, tiny_sana))
    output = convert_pipeline(TEACHER, tmp_path / "out", variant=variant)
    for name in ("vae", "text_encoder"):
        source = half_sana if variant else tiny_sana
        assert weights_of(output / name).read_bytes() == weights_of(source / name).read_bytes()
    loaded = list(Path(constants.HF_HUB_CACHE).glob("*/snapshots/*/*/*.safetensors"))
    assert {"fp16" in path.name for path in loaded} == {variant is not None}


def test_variants_to_choose_from_are_named(hub: LoopbackHub, half_sana: Path, tmp_path: Path) -> None:
    upload(hub, half_sana, "bf16", onto=upload(hub, half_sana, "fp16"))
    with pytest.raises(ValueError, match=rf"{TEACHER} has the variants bf16, fp16; choose one of them"):
        convert_pipeline(TEACHER, tmp_path / "out")
    with pytest.raises(ValueError, match=f"{TEACHER} has no weights of variant fp32; it has bf16, fp16"):
        convert_pipeline(TEACHER, tmp_path / "out", variant="fp32")
    assert not (tmp_path / "out").exists()


def test_a_repository_that_is_not_there_is_said(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add("me/empty", {"README.md": b""})
    for repo, message in (("me/none", "no folder here: HTTP 404"), ("me/empty", "no folder here: HTTP 404")):
        with pytest.raises(HubError, match=message):
            convert_pipeline(repo, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def other(folder: Path, tmp_path: Path) -> Path:
    """A pipeline like this one whose denoiser is another."""
    pipeline = load_pipeline(folder)
    with torch.no_grad():
        pipeline.transformer.proj_out.weight.mul_(2)
    pipeline.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_a_revision_is_taken_and_the_commit_is_written_down(hub: LoopbackHub, half_sana: Path, tmp_path: Path) -> None:
    """Of ``owner/name@revision``: a commit or a branch; what is unknown is said. Cards name the repository alone."""
    upload(hub, half_sana)
    first = HfApi().model_info(TEACHER).sha
    upload(hub, other(half_sana, tmp_path))
    second = HfApi().model_info(TEACHER).sha
    weights = "transformer/diffusion_pytorch_model.safetensors"
    written = {}
    for asked, commit in ((TEACHER, second), (f"{TEACHER}@main", second), (f"{TEACHER}@{first}", first)):
        output = convert_pipeline(asked, tmp_path / asked.replace("/", "-"))
        recipe = recipe_of_run(output / "recipe.yaml")
        assert recipe.teacher == f"{TEACHER}@{commit}"
        assert public_name(recipe.teacher) == TEACHER
        written[asked] = (output / weights).read_bytes()
    assert written[TEACHER] == written[f"{TEACHER}@main"] != written[f"{TEACHER}@{first}"]
    assert parameters(f"{TEACHER}@{first}") == parameters(str(half_sana))
    with pytest.raises(HubError, match=f"{TEACHER}@v9.*HTTP 404"):
        convert_pipeline(f"{TEACHER}@v9", tmp_path / "out")


def test_a_resumed_run_keeps_the_teacher_that_it_began_with(
    hub: LoopbackHub, half_sana: Path, recipe_fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(hub, half_sana)
    began = HfApi().model_info(TEACHER).sha
    recipe = Recipe(**{**recipe_fields, "teacher": TEACHER, "steps": 4, "save_every": 2})
    straight = train(recipe, tmp_path / "straight", progress=False)

    def interrupted(self: Loop, done: int) -> None:
        keep(self, done)
        if done == 2:
            raise KeyboardInterrupt

    keep = Loop.keep
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "keep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "run", progress=False)
    upload(hub, other(half_sana, tmp_path))
    assert HfApi().model_info(TEACHER).sha != began
    run = train(recipe, tmp_path / "run", resume=True, progress=False)
    assert recipe_of_run(run / "recipe.yaml").teacher == f"{TEACHER}@{began}"
    assert weights_of(run / "transformer").read_bytes() == weights_of(straight / "transformer").read_bytes()
    with pytest.raises(ValueError, match=r"another recipe, .*: teacher: '.*' -> 'me/tiny-teacher@main'"):
        train(replace(recipe, teacher=f"{TEACHER}@main"), run, resume=True, progress=False)
