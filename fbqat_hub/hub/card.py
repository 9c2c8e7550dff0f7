"""The model card of a run: made from what the run measured and from nothing else.

results.json, recipe.yaml, images/*.png, htp/certificate.json  ->  README.md
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from fbqat_hub.evaluation.results import METHODS, METRICS, Record, read_records
from fbqat_hub.hub.names import public_name, without_local_paths
from fbqat_hub.hub.tables import (
    SUITE_TITLES,
    by_metric,
    certificate_tables,
    checks_table,
    files_table,
    number,
    results_table,
    unit_suffix,
)

TEMPLATE = Path(__file__).with_name("card_template.md")  # a link to model_cards/template.md

_NEEDED = ("name", "family", "teacher", "method", "license")


def write_card(run_dir: str | os.PathLike[str], repo_id: str | None = None) -> Path:
    """Write ``run_dir/README.md``, the model card of a finished run.

    Every number comes from ``results.json``, ``htp/certificate.json`` or the sizes of the files themselves; a
    metric that was not measured is not mentioned. The card is written beside and renamed.

    Args:
        run_dir: a run's folder with ``results.json``, ``recipe.yaml``, and where they exist ``images/`` and
            ``htp/certificate.json``.
        repo_id: the Hub repository the folder will be published as, for the code block; None loads the folder
            itself.

    Returns:
        The card.

    Raises:
        FileNotFoundError: ``results.json`` or ``recipe.yaml`` is missing; names the command that makes it.
        ValueError: a file is broken, or the recipe lacks a key that the card needs.
    """
    run = Path(run_dir)
    recipe = _recipe(run / "recipe.yaml")
    results = run / "results.json"
    if not results.is_file():
        raise FileNotFoundError(f"{results} is missing; a card shows measured numbers only. Run: fbqat evaluate {run}")
    records = read_records(results)
    if not records:
        raise ValueError(f"{results} holds no records. Run: fbqat evaluate {run}")
    certificate = _certificate(run / "htp" / "certificate.json")

    card = ModelCard(
        f"---\n{_front_matter(recipe, records).to_yaml()}\n---\n\n{_body(run, recipe, records, certificate, repo_id)}"
    )
    path = run / "README.md"
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(card.content, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; training saves it. Run: fbqat train RECIPE --output {path.parent}")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    missing = [key for key in _NEEDED if not (isinstance(recipe, dict) and recipe.get(key))]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}; a card needs {', '.join(_NEEDED)}. Add them and run fbqat card again."
        )
    if recipe["method"] not in METHODS:
        raise ValueError(f"{path}: unknown method {recipe['method']!r}. Known: {', '.join(METHODS)}.")
    return recipe


def _certificate(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        certificate = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); export again.") from error
    if not isinstance(certificate, dict):
        raise ValueError(f"{path} holds a JSON {type(certificate).__name__}; an object is needed: export again.")
    return certificate


def _front_matter(recipe: Mapping[str, Any], records: Sequence[Record]) -> ModelCardData:
    datasets = _dataset_names(recipe)
    measured = [
        EvalResult(
            task_type="text-to-image",
            dataset_type=datasets[0] if datasets else "unnamed",
            dataset_name=datasets[0] if datasets else "unnamed",
            metric_type=metric,
            metric_name=f"{METRICS[metric].title}{unit_suffix(metric)}",
            metric_value=statistics.fmean(record.value for record in group),
        )
        for metric, group in by_metric(
            r for r in records if r.method == recipe["method"] and r.suite == "method"
        ).items()
    ]
    extra = {"license_name": recipe.get("license_name"), "datasets": datasets or None}
    return ModelCardData(
        base_model=public_name(str(recipe["teacher"])),
        base_model_relation="quantized",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["fbqat", "4-bit", "w4a8", "quantization-aware-training", str(recipe["family"])],
        license=str(recipe["license"]),
        license_link=recipe.get("license_link"),
        model_name=str(recipe["name"]) if measured else None,
        eval_results=measured or None,
        **{key: value for key, value in extra.items() if value is not None},
    )


def _body(
    run: Path,
    recipe: Mapping[str, Any],
    records: Sequence[Record],
    certificate: Mapping[str, Any] | None,
    repo_id: str | None,
) -> str:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    images = sorted(path.name for path in (run / "images").glob("*.png")) if (run / "images").is_dir() else []
    comparison = [name for name in images if name.startswith("comparison")]
    licence = recipe.get("license_name") or recipe["license"]
    curves = [name for name in images if name.startswith("curve")]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        recipe=recipe,
        teacher=public_name(str(recipe["teacher"])),
        method_title=METHODS[recipe["method"]],
        license=f"[{licence}]({recipe['license_link']})" if recipe.get("license_link") else licence,
        datasets=_dataset_names(recipe),
        code=_code(run, recipe, repo_id),
        comparison=[quote(name) for name in comparison],
        curves=[quote(name) for name in curves],
        pictures=[quote(name) for name in images if name not in (*comparison, *curves)],
        tables=[
            {"title": title, **results_table([r for r in records if r.suite == suite], recipe["method"])}
            for suite, title in SUITE_TITLES.items()
            if any(r.suite == suite for r in records)
        ],
        extractors=sorted({str(r.extra["extractor"]) for r in records if "extractor" in r.extra}),
        sizes=files_table(run),
        bits=[number(r.value) for r in records if r.metric == "bits_per_weight" and r.method == recipe["method"]][:1],
        checks=checks_table(records, certificate),
        certificate=certificate_tables(certificate) if certificate else None,
        recipe_text=_recipe_text(run / "recipe.yaml", recipe),
        commands=list(dict.fromkeys(r.command for r in records)),
        versions=records[-1].versions,
    )


def _code(run: Path, recipe: Mapping[str, Any], repo_id: str | None) -> str:
    """The snippet of the card: loads the pipeline and draws one picture as the recipe says."""
    generation = dict(recipe.get("generation") or {})
    prompts = recipe.get("prompts") or ["red heart"]
    prompt = generation.pop("prompt", None) or recipe.get("prompt") or prompts[0]
    seed = int(recipe.get("seed") or 0)
    folder = "." if (run / "model_index.json").is_file() or not (run / "pipeline").is_dir() else "./pipeline"
    call = "".join(f"    {name}={value!r},\n" for name, value in generation.items())
    return (
        "import fbqat_hub  # teaches diffusers the W4A8 format\n"
        "import torch\n"
        "from diffusers import DiffusionPipeline\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({json.dumps(repo_id or folder)}, dtype=torch.float32)\n"
        f"image = pipe(\n    {json.dumps(prompt, ensure_ascii=False)},\n{call}"
        f"    generator=torch.Generator().manual_seed({seed}),\n).images[0]\n"
        'image.save("picture.png")'
    )


def _recipe_text(path: Path, recipe: Mapping[str, Any]) -> str:
    """The recipe as written, local paths cut to their last part."""
    return without_local_paths(path.read_text(encoding="utf-8").rstrip(), recipe)


def _dataset_names(recipe: Mapping[str, Any]) -> list[str]:
    given = recipe.get("dataset")
    if isinstance(given, Mapping):
        given = given.get("name") or given.get("path")
    return [public_name(str(name)) for name in (given if isinstance(given, list) else [given]) if name]
