"""Publish: all problems in one list, one commit of the right files, nothing twice, nothing private."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.numpy import save_file

from fbqat_hub import cli
from fbqat_hub.hub.client import HubError
from fbqat_hub.hub.contents import Item, private_things
from fbqat_hub.hub.manifest import parse_manifest
from fbqat_hub.hub.publish import publish
from tests.hub.conftest import CARD, FINE_TOKEN, PUBLISHED, READ_TOKEN, REPO, TOKEN
from tests.hub.server import LoopbackHub


def problems_of(run: Path, repo: str = REPO, **options: Any) -> str:
    with pytest.raises(ValueError, match="not ready to be published") as caught:
        publish(run, repo, **options)
    return "\n".join(caught.value.__notes__)


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    """Rewrite a YAML or JSON file by a function of what it holds."""
    tree = yaml.safe_load(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))


def test_one_commit_of_the_right_files(hub: LoopbackHub, run: Path) -> None:
    """What belongs, with the card's code loading the repository; checkpoints, samples, pickles, libraries stay."""
    lines: list[str] = []
    publish(run, REPO, private=True, say=lines.append)
    repository = hub.repositories[REPO]
    assert sorted(repository.files) == sorted([".gitattributes", *PUBLISHED])
    assert len(repository.commits) == 2  # that of the new repository, and ours
    assert repository.private
    assert b'from_pretrained("me/Tiny-FBQAT-W4A8", dtype' in repository.files["README.md"].content
    manifest = parse_manifest(repository.files["fbqat.json"].content)
    held = {path: (len(blob.content), blob.sha256) for path, blob in repository.files.items()}
    assert {path: (each.size, each.sha256) for path, each in manifest.files.items()} == {
        path: held[path] for path in PUBLISHED if path != "fbqat.json"
    }
    assert lines[0].startswith("me/Tiny-FBQAT-W4A8 (new, private): 10 files, 10 to upload")
    assert "stays here: notes.txt, checkpoints/step-00000002/state.safetensors, htp/libQnnHtp.so and 3 more" in lines
    assert lines[-1].startswith("verified: 10 files of ")


def test_dry_run_shows_and_changes_nothing(hub: LoopbackHub, run: Path, capsys) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert cli.main(["publish", str(run), "--repo", REPO, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {path} " in out for path in PUBLISHED)
    assert out.endswith("dry run: nothing was uploaded.\n")
    assert hub.repositories == {}
    assert {step for step, _, _ in hub.requests if step} == {"whoami", "validate", "info"}
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_only_what_changed_is_sent_again(hub: LoopbackHub, run: Path) -> None:
    publish(run, REPO)
    hub.requests.clear()
    lines: list[str] = []
    publish(run, REPO, say=lines.append)
    assert "me/Tiny-FBQAT-W4A8: nothing changed, nothing uploaded" in lines
    assert (hub.count("commit"), hub.count("put"), hub.count("preupload")) == (0, 0, 0)
    assert len(hub.repositories[REPO].commits) == 2

    hub.repositories[REPO].commit(
        {**hub.repositories[REPO].files, "by-hand.md": hub.repositories[REPO].files["README.md"]}
    )
    (run / "htp" / "transformer.bin").write_text("another binary")
    (run / "images" / "comparison.png").unlink()
    publish(run, REPO, say=lines.append)
    assert hub.count("put") == 1
    assert "\n  images/comparison.png " in lines[-3]
    files = hub.repositories[REPO].files
    assert files["htp/transformer.bin"].content == b"another binary"
    assert "images/comparison.png" not in files  # ours, and gone from the run
    assert "by-hand.md" in files  # not ours


def test_a_cut_upload_goes_on(hub: LoopbackHub, run: Path) -> None:
    """The commit fails after the large files arrived: nothing is published, and the next run does not send them."""
    hub.fail("commit", 503)
    with pytest.raises(HubError, match=r"^upload to me/Tiny-FBQAT-W4A8: HTTP 503 .*run the same command again"):
        publish(run, REPO)
    assert list(hub.repositories[REPO].files) == [".gitattributes"]
    assert hub.count("put") == 3
    publish(run, REPO)
    assert hub.count("put") == 3
    assert sorted(hub.repositories[REPO].files) == sorted([".gitattributes", *PUBLISHED])


def test_a_change_by_somebody_else_is_not_overwritten(hub: LoopbackHub, run: Path, monkeypatch) -> None:
    publish(run, REPO)
    (run / "htp" / "transformer.bin").write_text("another binary")
    listed = hub.tree

    def tree_then_somebody_commits(*arguments: Any) -> Any:
        answer = listed(*arguments)
        hub.repositories[REPO].commit(dict(hub.repositories[REPO].files))
        return answer

    monkeypatch.setattr(hub, "tree", tree_then_somebody_commits)
    with pytest.raises(HubError, match=r"HTTP 412 .*changed meanwhile; run the same command again"):
        publish(run, REPO)
    assert hub.repositories[REPO].files["htp/transformer.bin"].content == b"context binary 0"


def test_what_the_hub_holds_is_compared_after(hub: LoopbackHub, run: Path, monkeypatch) -> None:
    """A Hub that keeps something else than was sent is told from one that does not."""
    kept = hub.commit

    def commit_and_lose_one(*arguments: Any) -> Any:
        answer = kept(*arguments)
        del hub.repositories[REPO].files["model_index.json"]
        return answer

    monkeypatch.setattr(hub, "commit", commit_and_lose_one)
    with pytest.raises(HubError, match=r"the Hub does not hold model_index.json as sent"):
        publish(run, REPO)


def test_rate_limit_waits_as_long_as_asked(hub: LoopbackHub, run: Path, tmp_path: Path, monkeypatch) -> None:
    from tests.hub.conftest import point_client_at

    slept = point_client_at(hub, tmp_path, monkeypatch)
    hub.fail("preupload", 429)
    publish(run, REPO)
    assert slept == [8.0]  # Retry-After: 7, and one by the client


def test_bundle_in_a_repository_of_its_own(hub: LoopbackHub, run: Path) -> None:
    publish(run, REPO, device_repo=True, collection="Tiny ones")
    bundle = "me/Tiny-FBQAT-W4A8-QNN-SM8750"
    assert not any(path.startswith("htp/") for path in hub.repositories[REPO].files)
    files = hub.repositories[bundle].files
    assert {path for path in files if "/" in path} == {
        "htp/certificate.json", "htp/transformer.bin", "images/comparison.png", "scheduler/scheduler_config.json",
    }  # fmt: skip
    card = ModelCard(files["README.md"].content.decode())
    assert card.data.base_model == REPO
    assert {"fbqat", "qnn", "sm8750"} <= set(card.data.tags)
    assert card.data.eval_results is None
    assert REPO in card.text
    assert [item["id"] for each in hub.collections.values() for item in each["items"]] == [REPO, bundle]
    publish(run, REPO, device_repo=True, collection="Tiny ones")
    assert len(hub.collections) == 1


def test_no_bundle_for_a_device_repository(hub: LoopbackHub, run: Path) -> None:
    shutil.rmtree(run / "htp")
    assert "has no HTP bundle for --device-repo. Run: fbqat export" in problems_of(run, device_repo=True)


def test_all_problems_in_one_list(hub: LoopbackHub, run: Path, capsys) -> None:
    change(run / "recipe.yaml", lambda recipe: recipe.update(license="other"))
    (run / "README.md").write_text("---\nlicense: other\ntags: [art]\n---\n")
    save_file({}, run / "transformer" / "diffusion_pytorch_model.safetensors")
    with (run / "transformer" / "diffusion_pytorch_model.safetensors").open("ab") as file:
        file.write(b"more")
    (run / "scheduler" / "scheduler_config.json").write_text("")
    assert cli.main(["publish", str(run), "--repo", "you/x"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    problems = [line for line in err.splitlines() if line.startswith("  - ")]
    for expected in (
        "lacks base_model, base_model_relation, library_name, pipeline_tag. Run: fbqat card",
        "tags lack fbqat",
        "license is other; the Hub then asks for license_name and license_link",
        "diffusion_pytorch_model.safetensors is damaged or cut short",
        "scheduler_config.json is empty",
        "scheduler lacks scheduler_config.json",
        "--repo you/x: the token is of me, who may publish under: me, lab, readers",
    ):
        assert sum(expected in problem for problem in problems) == 1, expected
    assert len(problems) == 7
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (lambda run: (run / "README.md").unlink(), "README.md is missing. Run: fbqat card"),
        (lambda run: (run / "README.md").write_text("---\na: [\n---\n"), "the front matter is no YAML"),
        (lambda run: shutil.rmtree(run / "scheduler"), "scheduler is missing, and model_index.json names it"),
        (lambda run: (run / "transformer/config.json").write_text("{}"), "transformer is not quantized by fbqat"),
        (
            lambda run: change(
                run / "transformer/config.json", lambda it: it["quantization_config"].update(weight_bits=9)
            ),
            "transformer is not quantized by fbqat",
        ),
        (
            lambda run: (run / "transformer/diffusion_pytorch_model.safetensors").unlink(),
            "transformer has no safetensors, but diffusion_pytorch_model.bin",
        ),
        (lambda run: change(run / "recipe.yaml", lambda it: it.pop("license")), "the base model's licence is unknown"),
        (lambda run: (run / "results.json").write_text("{"), "results.json is not JSON"),
        (lambda run: change(run / "recipe.yaml", lambda it: it.pop("family")), "recipe.yaml lacks family"),
        (
            lambda run: change(run / "recipe.yaml", lambda it: it.update(license="cc-by-nc-nd-4.0")),
            "licence cc-by-nc-nd-4.0 forbids passing on changed versions",
        ),
    ],
)
def test_local_problem(breaking: Callable[[Path], None], message: str, hub: LoopbackHub, run: Path) -> None:
    breaking(run)
    assert message in problems_of(run)


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        ("", REPO, "no token: log in with `hf auth login`"),
        (READ_TOKEN, REPO, "the token may only read"),
        (FINE_TOKEN, REPO, "the fine-grained token has no write permission (repo.write) for me"),
        (TOKEN, "readers/x", "me may only read in readers"),
        (TOKEN, "x", "give owner/name, e.g. me/x"),
        (TOKEN, "me/a--b", "--repo me/a--b: "),
        (TOKEN, "me/taken", "me/taken exists and was not published by fbqat (config.json); choose another name"),
    ],
)
def test_token_and_name(token: str, repo: str, message: str, hub: LoopbackHub, run: Path, monkeypatch) -> None:
    hub.add("me/taken", {"config.json": b"{}"})
    monkeypatch.setenv("HF_TOKEN", token)
    assert message in problems_of(run, repo)


def test_a_fine_grained_token_for_the_owner_is_enough(hub: LoopbackHub, run: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", FINE_TOKEN)
    publish(run, "lab/Tiny-FBQAT-W4A8")
    assert "fbqat.json" in hub.repositories["lab/Tiny-FBQAT-W4A8"].files


def test_an_invalid_token_is_said(hub: LoopbackHub, run: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN + "x")
    with pytest.raises(HubError, match=r"check the token: HTTP 401.*log in with `hf auth login`"):
        publish(run, REPO)


def test_base_model_and_visibility(hub: LoopbackHub, run: Path) -> None:
    """The base model's page decides on the licence; a gated one under its own terms wants them along."""
    card = "---\nlicense: other\n---\n"
    hub.add("somebody/base", {"README.md": card.encode()}, gated="auto")
    problems = problems_of(run)
    assert "license 'apache-2.0'; the base model's page says 'other'" in problems
    assert "somebody/base is gated with licence 'other': put the licence's text beside recipe.yaml" in problems
    change(
        run / "recipe.yaml",
        lambda recipe: recipe.update(license="other", license_name="own", license_link="https://example.org/l"),
    )
    (run / "LICENSE.md").write_text("the terms")
    assert "license is 'apache-2.0', and the card's data say 'other'. Run: fbqat card" in problems_of(run)
    (run / "README.md").write_text((run / "README.md").read_text().replace("license: apache-2.0", "license: other"))
    publish(run, REPO)
    assert hub.repositories[REPO].files["LICENSE.md"].content == b"the terms"
    assert "is public already" in problems_of(run, private=True)


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("results.json", b'{"onnx": "/home/ada/x.onnx"}', "results.json, line 1: local path '/home/ada/x.onnx'"),
        ("a/config.json", b'{\n "p": "C:\\\\Users\\\\ada"}', "line 2: local path"),
        ("README.md", b"see ~/models/sana", "local path '~/models'"),
        ("README.md", f"cd {Path(__file__).parent}".encode(), "local path"),
        ("x/tokenizer.json", b'"hf_' + b"A" * 34 + b'"', "x/tokenizer.json: holds a token"),
        ("README.md", b"as ada_lovelace did", "holds 'ada_lovelace', the name of this user"),
        ("htp/t.bin", b"\0" * (2**20 - 5) + b"hf_" + b"a" * 34 + b"\0", "htp/t.bin: holds a token"),
        ("htp/t.onnx", b"\0" + str(Path.home()).encode() + b"/x.py", "a path of this user's home folder"),
    ],
)
def test_private_things_are_found(path: str, content: bytes, message: str, monkeypatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "ada_lovelace")
    found = private_things([Item(path, content)], "ada")
    assert len(found) == 1
    assert message in found[0]
    assert "AAAA" not in found[0]


def test_public_things_pass(monkeypatch) -> None:
    """Addresses, names of graph nodes, fractions, closing tags, vocabularies, and the name one publishes under."""
    monkeypatch.setattr("getpass.getuser", lambda: "ada_lovelace")
    text = (
        "https://huggingface.co/ada_lovelace/b </details> /transformer_blocks.0/attn1/MatMul and/or 1/2 (images/x.png)"
    )
    vocabulary = b'{"/usr/bin": 1, "/home/": 2, "~/x": 3}'
    items = [Item("README.md", text.encode()), Item("tokenizer/tokenizer.json", vocabulary)]
    assert private_things(items, "Ada_Lovelace") == []


def test_the_hub_is_asked_of_the_front_matter_before_a_repository_is_made(hub: LoopbackHub, run: Path) -> None:
    """A base model with a space in its name, say: the Hub's own words, and nothing is left there."""
    (run / "README.md").write_text(CARD.replace("somebody/base", "my finetune"))
    problems = problems_of(run)
    assert f"the Hub does not take the front matter of {REPO}'s README.md: " in problems
    assert "base_model with value my finetune is not valid" in problems
    assert "It comes from recipe.yaml (teacher, lora, dataset) and card.yaml (license)" in problems
    assert hub.repositories == {}


def test_a_model_index_that_is_none_is_named(hub: LoopbackHub, run: Path) -> None:
    (run / "README.md").write_text(CARD.replace("- name: Tiny-FBQAT-W4A8", "- nam: x"))
    assert "README.md: Invalid `model_index` in metadata" in problems_of(run, device_repo=True)


@pytest.mark.parametrize("loads", ['"me/other"', '"me/other", revision="w6"', '"."'])
def test_the_card_loads_what_it_is_published_as(loads: str, hub: LoopbackHub, run: Path) -> None:
    """Also one that `fbqat card --repo` wrote for another name."""
    (run / "README.md").write_text(CARD.replace('"."', loads))
    publish(run, REPO)
    code = hub.repositories[REPO].files["README.md"].content.decode()
    assert code.endswith(f'pipe = DiffusionPipeline.from_pretrained("{REPO}", dtype=torch.float32)\n')


def test_a_link_out_of_the_run_is_refused(hub: LoopbackHub, run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (run / "transformer" / "secret.json").symlink_to(tmp_path / "secret.json")
    (run / "transformer" / "a:b.json").write_text("{}")
    problems = problems_of(run)
    assert "secret.json is a link to a file outside the run" in problems
    assert "a:b.json has a name that not every system can hold" in problems


def test_tokens_are_never_shown_or_stored(hub: LoopbackHub, run: Path, tmp_path: Path, capfd, caplog) -> None:
    """Not in outputs, logs of every level, errors, the run, the cache or what is published; nor sent to the CDN."""
    logging.getLogger().setLevel(logging.DEBUG)
    (run / "results.json").write_text(json.dumps({"note": f"token {TOKEN}"}))
    assert cli.main(["publish", str(run), "--repo", REPO]) == 1
    (run / "results.json").unlink()
    hub.fail("put", 403)
    assert cli.main(["publish", str(run), "--repo", REPO]) == 1
    assert cli.main(["publish", str(run), "--repo", REPO]) == 0
    assert cli.main(["pull", REPO, "--output", str(tmp_path / "pulled")]) == 0
    out, err = capfd.readouterr()
    assert "line 1: holds a token" in err
    seen = out + err + caplog.text
    assert TOKEN not in seen
    assert "secret-signature" not in err.rpartition("fbqat: error:")[2]
    on_disk = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(on_disk) > 30
    assert [path for path in on_disk if TOKEN.encode() in path.read_bytes()] == []
    assert not any(TOKEN.encode() in blob.content for blob in hub.repositories[REPO].files.values())
    sent = [headers for step, _, headers in hub.requests if step in ("put", "cdn")]
    assert len(sent) >= 6
    assert not any("authorization" in headers for headers in sent)
