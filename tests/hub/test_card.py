"""The card: made from the run's files only, valid for the Hub's own client, and clear about what is missing."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load
from PIL import Image

from fbqat_hub.evaluation.results import Record, write_records
from fbqat_hub.hub.card import write_card
from fbqat_hub.hub.tables import htp_certificates

RECIPE = {
    "name": "Sana-tiny-FBQAT-W4A8",
    "family": "sana",
    "teacher": "somebody/sana-tiny",
    "method": "fbqat",
    "license": "cc-by-sa-4.0",
    "license_link": "https://creativecommons.org/licenses/by-sa/4.0/",
    "attribution": "All emojis designed by OpenMoji.",
    "dataset": {"path": "openmoji"},
    "generation": {"height": 64, "complex_human_instruction": None, "guidance_scale": 4.5},
    "prompts": ["flag of france"],
    "steps": 400,
    "seed": 7,
    "learning_rate": 2.0e-4,
    "an_unknown_key": {"nested": [1, 2]},
}
VALUES = {
    ("ptq-mse", "kd_loss"): 0.01234, ("ptq-mse", "psnr"): 21.5,
    ("fbqat", "kd_loss"): 0.002171, ("fbqat", "psnr"): 30.25, ("fbqat", "fd_teacher"): 0.0303,
    ("fbqat", "bits_per_weight"): 4.07,
}  # fmt: skip


def record(method: str, metric: str, value: float, **changes) -> Record:
    given = {
        "suite": "method", "family": "sana", "n": 89, "seed": 7, "spread": 1.5 if metric == "psnr" else None,
        "command": "fbqat evaluate run", "versions": {"python": "3.11", "torch": "2.13.0+cpu", "diffusers": "0.42.1"},
        "machine": {"cpu": "Test CPU", "cores": 2}, "date": "2026-11-23T01:00:00+00:00",
        "extra": {"extractor": "openmoji-cnn-1"} if metric == "fd_teacher" else {},
    }  # fmt: skip
    return Record(method=method, metric=metric, value=value, **{**given, **changes})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "transformer").mkdir(parents=True)
    (folder / "images").mkdir()
    (folder / "model_index.json").write_text("{}")
    (folder / "transformer" / "config.json").write_text("{}")
    (folder / "images" / "samples.safetensors").write_bytes(bytes(8))
    (folder / "transformer" / "model.safetensors").write_bytes(bytes(3 * 2**20 // 2))
    (folder / "recipe.yaml").write_text("# a comment that stays\n" + yaml.safe_dump(RECIPE, sort_keys=False))
    write_records(folder / "results.json", [record(*key, value) for key, value in VALUES.items()])
    for name in ("comparison.png", "curve.png", "grid.png"):
        Image.new("RGB", (4, 4)).save(folder / "images" / name)
    return folder


def test_the_front_matter_is_what_the_hub_reads(run: Path) -> None:
    path = write_card(run)
    assert path == run / "README.md"
    data = metadata_load(path)
    assert data["base_model"] == "somebody/sana-tiny"
    assert data["base_model_relation"] == "quantized"
    assert data["library_name"] == "diffusers"
    assert data["pipeline_tag"] == "text-to-image"
    assert data["license"] == "cc-by-sa-4.0"
    assert data["license_link"].startswith("https://")
    assert {"fbqat", "4-bit", "sana"} <= set(data["tags"])
    assert data["datasets"] == ["openmoji"]
    results = {r.metric_type: r.metric_value for r in ModelCard.load(path).data.eval_results}
    assert results == {metric: value for (method, metric), value in VALUES.items() if method == "fbqat"}


def test_the_code_block_starts_with_our_import_and_calls_as_the_recipe_says(run: Path) -> None:
    code = re.search(r"```python\n(.*?)```", write_card(run).read_text(), re.DOTALL)[1]
    assert code.splitlines()[0].startswith("import fbqat_hub")
    call = next(
        node for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "pipe"
    )  # fmt: skip
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    assert given.pop("prompt").value == "flag of france"
    assert ast.unparse(given.pop("generator")).endswith("manual_seed(7)")
    assert {name: ast.literal_eval(value) for name, value in given.items()} == RECIPE["generation"]
    assert 'from_pretrained(".", dtype=torch.float32)' in code
    assert 'from_pretrained("me/Sana", dtype=torch.float32)' in write_card(run, "me/Sana").read_text()
    index = {"_class_name": "StableDiffusion3Pipeline", "text_encoder_3": [None, None], "image_encoder": [None, None]}
    (run / "model_index.json").write_text(json.dumps(index))
    assert 'from_pretrained(".", text_encoder_3=None, dtype=torch.float32)' in write_card(run).read_text()


def test_results_are_a_table_with_our_method_in_bold_and_gaps_left_empty(run: Path) -> None:
    text = write_card(run).read_text()
    rows = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    }
    assert rows["PTQ, MSE clip"] == ["0.01234", "", "21.5 ± 1.5", ""]
    assert rows["**FB-QAT, this project's default**"] == ["**0.002171**", "**0.0303**", "**30.25 ± 1.5**", "**4.07**"]
    assert "PSNR to the teacher (dB) ↑, n = 89" in text
    assert "`openmoji-cnn-1`" in text
    assert "SSIM" not in text
    assert "LPIPS" not in text


@pytest.mark.parametrize(("training", "said"), [("blockwise", True), ("end_to_end", False)])
def test_a_model_that_was_trained_block_by_block_says_so(training: str, said: bool, run: Path) -> None:
    (run / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"training": training}))
    assert ("(`fbqat`), trained block by block.\n" in write_card(run).read_text()) == said


def test_several_seeds_become_mean_and_spread_over_seeds(run: Path) -> None:
    write_records(run / "results.json", [record("fbqat", "kd_loss", 0.002371, seed=8)])
    assert "**0.002271 ± 0.00014 (2 seeds)**" in write_card(run).read_text()


def test_sizes_pictures_recipe_and_what_was_never_run_are_there(run: Path) -> None:
    text = write_card(run).read_text()
    assert "| `transformer/` | 1.50 MiB | diffusers, CPU or GPU |" in text
    assert all(f"(images/{name})" in text for name in ("comparison.png", "curve.png", "grid.png"))
    assert "# a comment that stays" in text
    assert "an_unknown_key" in text
    stack = "python 3.11, torch 2.13.0+cpu, diffusers 0.42.1"
    assert f"| Quality against the teacher | Test CPU, 2 cores; {stack}; 2026-11-23 | verified |" in text
    assert "| HTP context binary on a phone | any Snapdragon | never run |" in text
    assert "emulator of the Hexagon tensor processor | never run" in text
    assert "## HTP" not in text
    assert "All emojis designed by OpenMoji." in text
    assert "Apache-2.0" in text
    assert "fbqat evaluate run" in text


def test_the_certificate_is_shown_with_where_it_ran(run: Path, tmp_path: Path) -> None:
    (run / "htp").mkdir()
    (run / "htp" / "transformer.bin").write_bytes(bytes(2**20))
    certificate = {
        "sqnr_db": {"torch": 21.123456},
        "soc": "sm8750",
        "tensors": [{"name": "x"}],
        "onnx": f"{tmp_path}/run/x.onnx",
    }
    (run / "htp" / "certificate.json").write_text(json.dumps(certificate))
    text = write_card(run).read_text()
    assert "Ran on: x86 emulator. Never ran on: a phone." in text
    assert "| `sqnr_db.torch` | 21.12 |" in text
    assert "| `tensors` | 1 entries |" in text
    assert "| `onnx` | x.onnx |" in text
    assert "| `htp/transformer.bin` | 1.00 MiB | HTP context binary, phone |" in text
    assert "emulator of the Hexagon tensor processor | verified" in text


def test_of_bundles_for_several_chips_the_card_has_the_first_certificate(run: Path) -> None:
    """A folder of the run each, in the order of their names; one that is no object is refused by name."""
    for soc in ("sm8750", "sm8650"):
        (run / "htp" / soc).mkdir(parents=True)
        (run / "htp" / soc / "certificate.json").write_text(json.dumps({"asked": {"soc": soc}}))
        (run / "htp" / soc / "transformer.bin").write_bytes(bytes(2**20))
    assert [each["asked"]["soc"] for each in htp_certificates(run)] == ["sm8650", "sm8750"]
    text = write_card(run).read_text()
    assert "| `asked.soc` | sm8650 |" in text
    assert "| `htp/sm8750/transformer.bin` | 1.00 MiB |" in text
    (run / "htp" / "sm8650" / "certificate.json").write_text("[]")
    with pytest.raises(ValueError, match=r"sm8650/certificate.json holds a JSON list; an object is needed"):
        write_card(run)


def test_a_full_certificate_is_a_summary_a_table_of_tensors_and_the_rest_folded(run: Path) -> None:
    (run / "htp").mkdir()
    tensor = {"name": "sample", "shape": [1, 16, 8, 8], "scale": 6.603821377e-05, "offset": -39312}
    certificate = {
        "asked": {"soc": "sm8750"},
        "seconds": {"compile": 1.5},
        "pictures": {"mean_psnr_db": 32.5},
        "files": {"transformer.bin": {"bytes": 7}},
        "tensors": {"inputs": [], "outputs": [tensor]},
    }
    (run / "htp" / "certificate.json").write_text(json.dumps(certificate))
    summary, rest = write_card(run).read_text().split("<summary>The rest of the certificate</summary>")
    assert "| outputs | sample | 1, 16, 8, 8 | 6.60382138e-05 | -39312 |" in summary
    assert "| `asked.soc` | sm8750 |" in summary
    assert "| `pictures.mean_psnr_db` | 32.5 |" in summary
    assert "seconds.compile" not in summary
    assert "files.transformer.bin" not in summary
    assert "| `seconds.compile` | 1.5 |" in rest


def test_no_local_path_reaches_the_card(run: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teachers" / "sana-tiny"
    recipe = {**RECIPE, "teacher": str(teacher), "cache": f"{tmp_path}/cache"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    path = write_card(run)
    assert str(tmp_path) not in path.read_text()
    assert metadata_load(path)["base_model"] == "sana-tiny"


def test_a_path_that_yaml_wrote_in_two_lines_is_cut_too(run: Path) -> None:
    """As it does at a space of a long one; and none is cut where another begins the same."""
    folder = "/home/ada/" + "a long name " * 10 + "x/it's"
    recipe = RECIPE | {"teacher": f"{folder}/my sana", "dataset": {"path": "imagefolder", "data_dir": folder}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    assert len((run / "recipe.yaml").read_text().splitlines()) > len(yaml.safe_dump(RECIPE).splitlines()) + 1
    text = write_card(run).read_text()
    assert "/home/ada" not in text
    assert "a long name" not in text
    assert re.search(r"^teacher: my sana$", text, re.MULTILINE)
    assert re.search(r"^  data_dir: .*it'+s'?$", text, re.MULTILINE)


def test_results_are_of_the_prompts_that_they_were_measured_on(run: Path) -> None:
    """Pictures of --prompts mjhq-30k say nothing of the data set that the recipe names."""
    measured = record("fbqat", "psnr", 30.0, extra={"prompts": "mjhq-30k"})
    write_records(run / "results.json", [measured])
    found = {each.metric_type: each.dataset_name for each in ModelCard.load(write_card(run)).data.eval_results}
    assert (found["psnr"], found["kd_loss"]) == ("playgroundai/MJHQ-30K", "openmoji")


@pytest.mark.parametrize(
    ("changes", "named", "shown"),
    [
        ({"dataset": {"path": "imagefolder", "data_dir": "pictures"}}, None, "imagefolder"),
        ({"dataset": {"path": "/data/cats"}}, None, "cats"),
        ({"dataset": {"prompts": "prompts.txt"}}, None, "prompts.txt"),
        ({"dataset": {"path": "ye-pop"}}, ["Ejafa/ye-pop"], "Ejafa/ye-pop"),
        ({"method": "ptq-mse"}, None, None),
        ({"method": "ptq-mse", "quantization": {"activation_range": "static"}}, ["openmoji"], "openmoji"),
        ({"method": "ptq-gptq", "calibration_prompts": 3}, None, None),
    ],
)
def test_data_sets_are_those_of_the_hub_that_were_used(
    changes: dict, named: list[str] | None, shown: str | None, run: Path
) -> None:
    """Of a converted pipeline none; the Hub has no page of a folder, and refuses some such names."""
    (run / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | changes))
    path = write_card(run)
    assert metadata_load(path).get("datasets") == named
    found = re.search(r"\| data \(\[?([^\])]*)", path.read_text())
    assert (found and found[1]) == shown


def test_codes_of_prompts_are_made_again_by_convert(run: Path) -> None:
    """`fbqat train` refuses such a recipe."""
    changes = {"method": "ptq-gptq", "calibration_prompts": 3, "quantization": {"average_bits": 4.5}, "lora": "a/b"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | changes | {"lora_scale": 0.5, "text_encoders": "w8a8"}))
    assert (
        "fbqat convert somebody/sana-tiny --output run --method gptq --prompts prompts.txt --lora a/b --lora-scale 0.5 "
        "--average-bits 4.5 --text-encoders w8a8  # 3 prompts, which are not part of this folder\n"
    ) in write_card(run).read_text()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"generation": [1]}, r"recipe\.yaml: recipe: generation is \[1\]; it must be a mapping"),
        ({"prompts": 5}, r"recipe\.yaml: recipe: prompts is 5; it must be a list of texts"),
        ({"seed": "x"}, r"recipe\.yaml: recipe: seed is 'x'; it must be a whole number from 0 to"),
        (
            {"quantization": {"weight_bits": None}},
            r"recipe\.yaml: quantization: weight_bits is None; it must be a whole",
        ),
        ({"method": ["fbqat"]}, r"recipe\.yaml: unknown method \['fbqat'\]"),
    ],
)
def test_a_wrong_value_of_the_recipe_is_named(changes: dict, says: str, run: Path) -> None:
    (run / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | changes))
    with pytest.raises(ValueError, match=says):
        write_card(run)


@pytest.mark.parametrize("tensors", [{"inputs": [1]}, {"inputs": None}, {"a": 1}])
def test_tensors_that_are_not_described_are_no_table(tensors: dict, run: Path) -> None:
    (run / "htp").mkdir()
    (run / "htp" / "certificate.json").write_text(json.dumps({"asked": {"soc": "sm8750"}, "tensors": tensors}))
    assert "The graph's inputs and outputs" not in write_card(run).read_text()


def test_the_card_is_the_same_each_time_and_leaves_nothing_beside(run: Path) -> None:
    first, before = write_card(run).read_bytes(), sorted(run.iterdir())
    assert write_card(run).read_bytes() == first
    assert sorted(run.iterdir()) == before


def test_a_run_with_results_and_recipe_alone_still_has_a_card(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({key: RECIPE[key] for key in ("name", "family", "teacher", "method", "license")})
    )
    write_records(tmp_path / "results.json", [record("vqat", "psnr", 20.0)])
    path = write_card(tmp_path)
    assert "model-index" not in metadata_load(path)
    assert "This folder holds no weights." in path.read_text()


def test_missing_and_broken_files_are_named_with_the_command_that_makes_them(run: Path) -> None:
    (run / "htp").mkdir()
    (run / "htp" / "certificate.json").write_text("[]")
    with pytest.raises(ValueError, match=r"certificate\.json holds a JSON list"):
        write_card(run)
    (run / "recipe.yaml").write_text("name: x\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml lacks family, teacher, method;"):
        write_card(run)
    (run / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "method": "magic"}))
    with pytest.raises(ValueError, match="unknown method 'magic'"):
        write_card(run)
    (run / "results.json").unlink()
    (run / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    with pytest.raises(FileNotFoundError, match=r"results\.json is missing.*fbqat evaluate"):
        write_card(run)
    (run / "recipe.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"recipe\.yaml is missing.*fbqat train"):
        write_card(run)
    assert not (run / "README.md").exists()
