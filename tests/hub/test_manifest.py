"""fbqat.json: the same bytes for the same files, nothing in it trusted, a folder compared file by file."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fbqat_hub.hub.contents import collect
from fbqat_hub.hub.manifest import Manifest, check_component, check_files, parse_manifest
from fbqat_hub.hub.publish import hashes_of, manifest_of

DIGEST = "0" * 64
GOOD: dict[str, Any] = {
    "manifest_version": 1, "name": "n", "family": "sana", "method": "fbqat", "weight_bits": 4, "activation_bits": 8,
    "base_model": "a/b", "license": "mit", "recipe": {}, "versions": {}, "provenance": {},
    "files": {"a/b.json": {"size": 3, "sha256": DIGEST}},
}  # fmt: skip


def parsed(**changes: Any) -> Manifest:
    return parse_manifest(json.dumps({**copy.deepcopy(GOOD), **changes}).encode())


def test_of_a_run(run: Path) -> None:
    """Sizes and hashes are those of the files, the rest is the recipe's; what is read is what was written."""
    (run / "recipe.yaml").write_text(
        (run / "recipe.yaml").read_text() + f"dataset: {{path: {run}}}\nday: 2026-11-23\nclip: .inf\n"
    )
    items, _, _ = collect(run, "me/x")
    manifest = manifest_of(run, run, items, hashes_of(items))
    weights = (run / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    entry = manifest.files["transformer/diffusion_pytorch_model.safetensors"]
    assert (entry.size, entry.sha256) == (len(weights), hashlib.sha256(weights).hexdigest())
    assert (manifest.family, manifest.weight_bits, manifest.base_model) == ("sana", 4, "somebody/base")
    assert manifest.recipe["dataset"] == {"path": run.name}
    assert (manifest.recipe["day"], manifest.recipe["clip"]) == ("2026-11-23", "inf")
    assert str(run) not in manifest.to_bytes().decode()
    assert manifest.to_bytes() == manifest_of(run, run, items, hashes_of(items)).to_bytes()
    assert parse_manifest(manifest.to_bytes()) == manifest


@pytest.mark.parametrize(
    "path",
    ["../x", "a/../../x", "/etc/passwd", "a//b", "./a", "a\\b", "C:/x", "a:stream", "a\nb", "", "fbqat.json",
     "x " * 600, "a/" + "b" * 256, "ends with space /b", "*.safetensors"],
)  # fmt: skip
def test_a_path_that_leaves_the_folder_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="is no path of a file inside the folder"):
        parsed(files={path: {"size": 1, "sha256": DIGEST}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"manifest_version": 2}, "reads up to 1. Update with: pip install"),
        ({"manifest_version": True}, "manifest_version is True"),
        ({"weight_bits": "4"}, "weight_bits missing, of the wrong type"),
        ({"pickle": "x"}, "pickle missing, of the wrong type, or not known"),
        ({"files": {}}, "lists 0 files"),
        ({"files": {"a": {"size": -1, "sha256": DIGEST}}}, "size of a is -1"),
        ({"files": {"a": {"size": 1.0, "sha256": DIGEST}}}, "size of a is 1.0"),
        ({"files": {"a": {"size": 2**60, "sha256": DIGEST}}}, "size of a is"),
        ({"files": {"a": {"size": 1, "sha256": "0" * 63}}}, "sha256 of a is"),
        ({"files": {"a": {"size": 1}}}, "entry of a must have size and sha256"),
        ({"files": {"a": GOOD["files"]["a/b.json"], "A": GOOD["files"]["a/b.json"]}}, "differ in case only"),
        ({"files": {"a": GOOD["files"]["a/b.json"], "a/b": GOOD["files"]["a/b.json"]}}, "a as a file and as a folder"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed(**changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"files":' * 100_000, "nested too deeply"),
        (b" " * (16 * 2**20 + 1), "larger than 16 MiB"),
        (b'{"a": 1, "a": 2}', "a key stands twice"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON as a manifest needs it"),
        (b"\xff\xfe", "not JSON as a manifest needs it"),
        (b"[]", "holds a JSON list"),
        (b"", "not JSON as a manifest needs it"),
    ],
    ids=["deep", "deep-keys", "large", "twice", "nan", "digits", "not-utf8", "list", "empty"],
)
def test_hostile_json_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_manifest(content)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_mutation_crashes_or_gets_out(data: st.DataObject) -> None:
    """Any value anywhere, any byte changed: a ValueError, or a manifest whose paths stay inside."""
    tree = copy.deepcopy(GOOD)
    value = st.sampled_from([None, True, -1, 0, 1.5, 2**70, "", "0" * 64, "..", [], [{}], {}, {"size": 0}, {"": []}])
    where = data.draw(st.sampled_from(["top", "files", "entry", "path", "bytes"]))
    if where == "top":
        tree[data.draw(st.sampled_from(sorted(GOOD)))] = data.draw(value)
    elif where == "files":
        tree["files"] = data.draw(st.dictionaries(st.text(), value))
    elif where == "entry":
        tree["files"]["a/b.json"][data.draw(st.sampled_from(["size", "sha256"]))] = data.draw(value)
    elif where == "path":
        tree["files"][data.draw(st.text(alphabet="./\\ab:\0~ "))] = {"size": 0, "sha256": DIGEST}
    content = bytearray(json.dumps(tree).encode())
    if where == "bytes":
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        manifest = parse_manifest(bytes(content))
    except ValueError:
        return
    root = Path("/root-of-a-model")
    for path in manifest.files:
        assert (root / path).resolve().is_relative_to(root)
        assert (root / path).resolve() != root


def test_uses() -> None:
    paths = ["README.md", "recipe.yaml", "htp/a.bin", "images/a.png", "transformer/config.json", "tokenizer_2/t.json",
             "text_encoder/config.json", "scheduler/s.json"]  # fmt: skip
    manifest = parsed(files={path: {"size": 1, "sha256": DIGEST} for path in paths})
    assert manifest.files_for(None) == sorted(paths)
    assert manifest.files_for("diffusers") == sorted(set(paths) - {"htp/a.bin", "images/a.png"})
    assert manifest.files_for("htp") == [
        "README.md",
        "htp/a.bin",
        "recipe.yaml",
        "scheduler/s.json",
        "tokenizer_2/t.json",
    ]


def test_a_folder_is_compared_file_by_file(run: Path) -> None:
    items, _, _ = collect(run, "me/x")
    manifest = manifest_of(run, run, items, hashes_of(items))
    paths = sorted(set(manifest.files) - {"README.md"})  # in the run it loads the folder itself
    assert check_files(run, manifest, paths).bad == []
    (run / "model_index.json").unlink()
    (run / "scheduler" / "scheduler_config.json").write_text("{ }")
    flipped = bytearray((run / "htp" / "transformer.bin").read_bytes())
    flipped[3] ^= 1
    (run / "htp" / "transformer.bin").write_bytes(flipped)
    (run / "README.md").write_text("edited on the Hub")
    check = check_files(run, manifest, manifest.files)
    assert check.missing == ["model_index.json"]
    assert [path for path, _ in check.damaged] == ["htp/transformer.bin", "scheduler/scheduler_config.json"]
    assert check.edited
    assert "model_index.json: missing; htp/transformer.bin: has SHA-256 " in str(check)
    assert "scheduler_config.json: has 3 bytes, published with 2" in str(check)


def test_a_component_cut_short_is_refused(run: Path) -> None:
    check_component(run / "transformer")  # no manifest beside it: nothing to compare with
    items, _, _ = collect(run, "me/x")
    (run / "fbqat.json").write_bytes(manifest_of(run, run, items, hashes_of(items)).to_bytes())
    check_component(run / "transformer")
    weights = run / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (run / "transformer" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json is missing; .*safetensors has \d+ bytes of \d+. Fetch it again"):
        check_component(run / "transformer")
    check_component(run / "scheduler")
