"""Mutated configs, headers, bytes and recipes: a ValueError, or exactly what is stored; nothing else."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fbqat_hub import FBQATConfig
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training.recipe import RECIPES, Recipe, load_recipe

WEIGHTS = Path("transformer/diffusion_pytorch_model.safetensors")
MODELS = ["transformer", "vae", "text_encoder"]
EXAMPLES = [100, pytest.param(3000, marks=pytest.mark.slow)]
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-3, 600)
    | st.floats()
    | st.sampled_from(["", "fbqat", "per_group", "static", "*", "[", "none", "2", "transformer_blocks.*", "\0"])
    | st.text(max_size=8)
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


def fuzz(examples: int, check: Callable[[Any], None], strategy: st.SearchStrategy[Any]) -> None:
    settings(max_examples=examples, deadline=None, database=None, derandomize=examples <= 100)(given(strategy)(check))()


@st.composite
def mutated(draw: st.DrawFn, tree: dict[str, Any]) -> dict[str, Any]:
    """A copy in which one to three places hold something else, are gone, or are new."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        node: Any = tree
        while True:
            key = draw(st.sampled_from(sorted(node)) if isinstance(node, dict) else st.integers(0, len(node) - 1))
            if not (isinstance(node[key], dict | list) and node[key]) or draw(st.booleans()):
                break
            node = node[key]
        match draw(st.sampled_from(["replace", "replace", "replace", "delete", "add"])):
            case "delete" if len(node) > 1:
                del node[key]
            case "add" if isinstance(node, dict):
                node[draw(st.text(max_size=8))] = draw(VALUES)
            case _:
                node[key] = draw(VALUES)
    return tree


@pytest.fixture(scope="module")
def load(packed_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bytes], None]:
    """``load(file, content)``: with that file changed, loading must fail, or give exactly what is stored."""
    folder = shutil.copytree(packed_folder, tmp_path_factory.mktemp("fuzz") / "sana")
    whole = load_pipeline(folder).components

    def check(file: str, content: bytes) -> None:
        component = file.split("/")[0] if "/" in file else "transformer"
        others = {name: part for name, part in whole.items() if name != component}
        # a new file each time: what was loaded is mapped from the old one
        (folder / file).rename(folder / "original")
        (folder / file).write_bytes(content)
        try:
            loaded = load_pipeline(folder, **others).components[component].state_dict()
            stored = load_file(next((folder / component).glob("*.safetensors")))
        except ValueError:
            return
        finally:
            (folder / "original").replace(folder / file)
        assert set(loaded) == set(stored) or (component == "text_encoder" and set(loaded) < set(stored))
        for name, value in loaded.items():
            assert torch.equal(value, stored[name].to(value.dtype)), name

    check(str(WEIGHTS), (folder / WEIGHTS).read_bytes())
    return check


@pytest.mark.parametrize("examples", EXAMPLES)
def test_quantization_config(examples: int) -> None:
    def check(fields: dict[str, Any]) -> None:
        try:
            config = FBQATConfig(**fields)
        except ValueError:
            return
        assert FBQATConfig(**config.to_dict()).to_dict() == config.to_dict()
        json.dumps(config.to_dict())

    fuzz(examples, check, mutated(FBQATConfig(module_overrides={"proj_out": {"bits": 16}}).to_dict()))


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", ["sana-600m", "flux-schnell-tiny"])
def test_recipe(name: str, examples: int, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"

    def check(fields: dict[str, Any]) -> None:
        path.write_text(yaml.dump(fields, Dumper=_NoAliases, allow_unicode=True))
        try:
            recipe = load_recipe(path)
        except ValueError:
            return
        assert isinstance(recipe, Recipe)
        recipe.config().to_dict()

    fuzz(examples, check, mutated(yaml.safe_load((RECIPES / f"{name}.yaml").read_text())))


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("file", [f"{part}/config.json" for part in MODELS] + ["model_index.json"])
def test_config_of_the_folder(
    file: str, examples: int, load: Callable[[str, bytes], None], packed_folder: Path
) -> None:
    tree = json.loads((packed_folder / file).read_text())
    fuzz(examples, lambda changed: load(file, json.dumps(changed).encode()), mutated(tree))


@pytest.mark.parametrize("examples", EXAMPLES)
def test_header(examples: int, load: Callable[[str, bytes], None], packed_folder: Path) -> None:
    data = (packed_folder / WEIGHTS).read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]

    def check(changed: dict[str, Any]) -> None:
        text = json.dumps(changed).encode()
        load(str(WEIGHTS), struct.pack("<Q", len(text)) + text + data[end:])

    fuzz(examples, check, mutated(json.loads(data[8:end])))


@pytest.mark.parametrize("examples", EXAMPLES)
def test_bytes(examples: int, load: Callable[[str, bytes], None], packed_folder: Path) -> None:
    """Any bytes of the file, most often of the header, set to anything; and the file cut or grown."""
    data = (packed_folder / WEIGHTS).read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    place = st.integers(0, end) | st.integers(0, len(data) - 1)

    def check(changes: tuple[list[tuple[int, bytes]], int]) -> None:
        changed = bytearray(data)
        for start, new in changes[0]:
            changed[start : start + len(new)] = new
        length = changes[1]
        load(str(WEIGHTS), bytes(changed[: length or None]))

    edits = st.lists(st.tuples(place, st.binary(min_size=1, max_size=8)), min_size=1, max_size=3)
    fuzz(examples, check, st.tuples(edits, st.just(0) | st.integers(0, len(data))))
