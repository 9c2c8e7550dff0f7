"""The model card of a run: made from what the run measured and from nothing else.

results.json, recipe.yaml, images/*.png, htp/certificate.json  ->  README.md, and one in each stage that was measured
"""

from __future__ import annotations

import json
import os
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from fbqat_hub.checked import Count, Options, Seed, Texts, checked
from fbqat_hub.components import left_out
from fbqat_hub.evaluation.results import METHODS, METRICS, Record, read_records
from fbqat_hub.files import shipped, whole
from fbqat_hub.hub.card_data import FILE, CardData, data_of_run
from fbqat_hub.hub.names import public_name, repo_problem, without_local_paths
from fbqat_hub.hub.tables import (
    SUITE_TITLES,
    Width,
    by_metric,
    certificate_tables,
    checks_table,
    files_of,
    files_table,
    htp_certificates,
    number,
    results_table,
    unit_suffix,
    widths_table,
)
from fbqat_hub.stages import branch_name, find_stage, stages_of
from fbqat_hub.untrusted import read_yaml

TEMPLATE = shipped("model_cards/template.md")

HUB = "https://huggingface.co"
OWN = "fbqat-hub/"
# Where a recipe names a data set by a short name of this project.
PROMPT_DATA = {
    "ye-pop": "Ejafa/ye-pop",
    "mjhq-30k": "playgroundai/MJHQ-30K",
    "pixart-eval-30k": "PixArt-alpha/PixArt-Eval30K",
}
_NEEDED = ("name", "family", "teacher", "method")
# Methods whose codes need no data, unless ranges of activations are measured on it.
_NEAREST = ("ptq-maxabs", "ptq-mse")


@checked("quantization")
class _Bits:
    weight_bits: Count = 4
    activation_bits: Count = 8


@checked("recipe")
class _Used:
    """What else a card reads of a recipe, which may be one of an older version, or written by hand."""

    generation: Options = field(default_factory=dict)
    prompts: Texts = field(default_factory=list)
    seed: Seed = 0
    quantization: _Bits = field(default_factory=_Bits)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a card is made from.

    Attributes:
        recipe, recipe_text: of the run, parsed and as written.
        records: what was measured; empty for a model that was not run.
        certificate: of the export, if there was one.
        images: names of the pictures in ``images/`` beside the card.
        files: (path, bytes, what for) of what is worth downloading.
        source: what ``from_pretrained`` takes: a Hub id or a folder.
        left_out: parts that ``from_pretrained`` has to be told are not there.
        made_by: the command that makes ``source``, where it is not published.
        data: what was not measured: licence, attribution, notes.
        stage: the bit width of the run's stage that the card is of; None for the run's own.
        widths: of the run and its stages, where it kept any.
    """

    recipe: Mapping[str, Any]
    recipe_text: str
    records: Sequence[Record]
    certificate: Mapping[str, Any] | None = None
    images: Sequence[str] = ()
    files: Sequence[tuple[str, int, str]] = ()
    source: str = "."
    left_out: Sequence[str] = ()
    made_by: str = ""
    data: CardData = field(default_factory=CardData)
    stage: int | None = None
    widths: Sequence[Width] = ()

    @property
    def weight_bits(self) -> int:
        """Of the weights that the card is of."""
        return self.stage or _quantization(self.recipe, "weight_bits", 4)

    @property
    def activation_bits(self) -> int:
        """As the recipe says."""
        return _quantization(self.recipe, "activation_bits", 8)


def _quantization(recipe: Mapping[str, Any], key: str, default: int) -> int:
    return int(_section(recipe, "quantization").get(key, default))


def _section(recipe: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    given = recipe.get(key)
    return given if isinstance(given, Mapping) else {}


def write_card(
    run_dir: str | os.PathLike[str], repo_id: str | None = None, data: str | os.PathLike[str] | None = None
) -> Path:
    """Write ``run_dir/README.md``, the model card of a finished run, and one of each of its stages that was measured.

    Every number comes from ``results.json``, ``htp/certificate.json`` or the sizes of the files themselves; a
    metric that was not measured is not mentioned. The card is written beside and renamed.

    Args:
        run_dir: a run's folder with ``results.json``, ``recipe.yaml``, and where they exist ``images/`` and
            ``htp/certificate.json``.
        repo_id: the Hub repository the folder will be published as, for the code block; None loads the folder
            itself.
        data: YAML file of licence, attribution and notes (`fbqat_hub.hub.card_data`), kept in the run as ``card.yaml``;
            None takes the run's own, or those that ship for its base model.

    Returns:
        The run's card.

    Raises:
        FileNotFoundError: ``results.json`` or ``recipe.yaml`` is missing; names the command that makes it.
        ValueError: ``repo_id`` is none, a file is broken, or the recipe lacks a key that the card needs.
    """
    if repo_id is not None and (problem := repo_problem(repo_id)):
        raise ValueError(problem)
    run = Path(run_dir)
    facts = facts_of_run(run, data=None if data is None else Path(data))
    if not facts.records:
        raise ValueError(f"{run / 'results.json'} holds no records. Run: fbqat evaluate {shlex.quote(str(run))}")
    cards = {run: facts}
    for bits, folder in stages_of(run).items():
        if (folder / "results.json").is_file():
            cards[folder] = replace(facts_of_run(run, bits), data=facts.data)
    for folder, found in cards.items():
        with whole(folder / "README.md") as partial:
            partial.write_text(card(replace(found, source=repo_id or found.source)), encoding="utf-8")
    facts.data.save(run / FILE)
    return run / "README.md"


def facts_of_run(run: Path, stage: int | None = None, data: Path | None = None) -> Facts:
    """What a run's folder holds for its card, or for that of a stage.

    Raises:
        FileNotFoundError, ValueError: as `write_card`.
    """
    recipe = read_recipe(run / "recipe.yaml")
    folder = run if stage is None else find_stage(run, stage)
    results = folder / "results.json"
    if not results.is_file():
        raise FileNotFoundError(
            f"{results} is missing; a card shows measured numbers only. Run: fbqat evaluate {shlex.quote(str(run))}"
        )
    files = files_of(run)
    if stage is not None:
        files = [*files_of(folder), *(row for row in files if not row[0].startswith(("transformer/", "htp/")))]
    return Facts(
        recipe=recipe,
        recipe_text=(run / "recipe.yaml").read_text(encoding="utf-8"),
        records=read_records(results),
        certificate=next(iter(htp_certificates(folder)), None),
        images=sorted(path.name for path in (folder / "images").glob("*.png")),
        files=files,
        source="." if (run / "model_index.json").is_file() or not (run / "pipeline").is_dir() else "./pipeline",
        left_out=left_out(run) if (run / "model_index.json").is_file() else (),
        stage=stage,
        widths=_widths(run, recipe),
        data=data_of_run(run, recipe, data),
    )


def _widths(run: Path, recipe: Mapping[str, Any]) -> list[Width]:
    """Of the run and its stages, the widest first; none where it kept no stages."""
    stages = stages_of(run)
    folders = {**stages, _quantization(recipe, "weight_bits", 4): run} if stages else {}
    found = []
    for bits, folder in folders.items():
        results = folder / "results.json"
        weights = sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors"))
        found.append(Width(bits, read_records(results) if results.is_file() else [], weights))
    return found


def card(facts: Facts) -> str:
    """The card as Markdown with front matter."""
    return ModelCard(f"---\n{_front_matter(facts).to_yaml()}\n---\n\n{_body(facts)}").content


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe with the keys that a card needs."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; training saves it. Run: fbqat train RECIPE --output {shlex.quote(str(path.parent))}"
        )
    recipe = read_yaml(path)
    missing = [key for key in _NEEDED if not (isinstance(recipe, dict) and recipe.get(key))]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}; a card needs {', '.join(_NEEDED)}. Add them and run fbqat card again."
        )
    if not isinstance(recipe["method"], str) or recipe["method"] not in METHODS:
        raise ValueError(f"{path}: unknown method {recipe['method']!r}. Known: {', '.join(METHODS)}.")
    try:
        quantization = _section(recipe, "quantization")
        bits = {item.name: quantization[item.name] for item in fields(_Bits) if item.name in quantization}
        _Used(
            **{name: recipe[name] for name in ("generation", "prompts", "seed") if recipe.get(name) is not None},
            quantization=_Bits(**bits),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return recipe


def _front_matter(facts: Facts) -> ModelCardData:
    recipe, datasets = facts.recipe, [name for name in _trained_on(facts.recipe) if _may_be_on_the_hub(name)]
    measured = [
        EvalResult(
            task_type="text-to-image",
            dataset_type=_measured_on(group[-1], recipe),
            dataset_name=_measured_on(group[-1], recipe),
            metric_type=metric,
            metric_name=f"{METRICS[metric].title}{unit_suffix(metric)}",
            metric_value=statistics.fmean(record.value for record in group),
        )
        for metric, group in by_metric(
            r for r in facts.records if r.method == recipe["method"] and r.suite == "method"
        ).items()
    ]
    extra = {"license_name": facts.data.license_name, "datasets": datasets}
    return ModelCardData(
        base_model=_base_models(recipe),
        base_model_relation="quantized",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[
            "fbqat",
            f"{facts.weight_bits}-bit",
            f"w{facts.weight_bits}a{facts.activation_bits}",
            "quantization-aware-training",
            str(recipe["family"]),
        ],
        license=facts.data.license,
        license_link=facts.data.license_link or None,
        model_name=str(recipe["name"]) if measured else None,
        eval_results=measured or None,
        **{key: value for key, value in extra.items() if value},
    )


def _base_models(recipe: Mapping[str, Any]) -> str | list[str]:
    """The teacher, and the adapter that was merged where it is on the Hub."""
    teacher, adapter = public_name(str(recipe["teacher"])), public_name(str(recipe.get("lora") or ""))
    return [teacher, adapter] if "/" in adapter else teacher


def _body(facts: Facts) -> str:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    recipe, records, images, data = facts.recipe, facts.records, facts.images, facts.data
    quantization = recipe.get("quantization")
    comparison = [name for name in images if name.startswith("comparison")]
    curves = [name for name in images if name.startswith("curve")]
    layer_widths = [name for name in images if name.startswith("widths")]
    licence = data.license_name or data.license
    teacher = public_name(str(recipe["teacher"]))
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        recipe=recipe,
        teacher=teacher,
        # those that ship have the form of a Hub id and are not on the Hub
        teacher_link=teacher if teacher.startswith(OWN) else _linked(teacher),
        lora=_linked(str(recipe["lora"])) if recipe.get("lora") else None,
        method_title=METHODS[recipe["method"]],
        license=f"[{licence}]({data.license_link})" if data.license_link else licence,
        data=data,
        datasets=[f"[{name}]({HUB}/datasets/{name})" if "/" in name else name for name in _trained_on(recipe)],
        code=_code(facts),
        made_by=facts.made_by,
        made_again=_made_again(recipe),
        source=facts.source,
        notes=data.notes,
        stage=facts.stage,
        weight_bits=facts.weight_bits,
        average_bits=quantization.get("average_bits") if isinstance(quantization, Mapping) else None,
        activation_bits=facts.activation_bits,
        text_encoders=_text_encoders(recipe),
        widths=widths_table(facts.widths, recipe["method"]) if facts.widths else None,
        comparison=[quote(name) for name in comparison],
        curves=[quote(name) for name in curves],
        layer_widths=[quote(name) for name in layer_widths],
        pictures=[quote(name) for name in images if name not in (*comparison, *curves, *layer_widths)],
        tables=[
            {"title": title, **results_table([r for r in records if r.suite == suite], recipe["method"])}
            for suite, title in SUITE_TITLES.items()
            if any(r.suite == suite for r in records)
        ],
        with_memory=any(record.suite == "loading" and record.metric == "peak_rss_mib" for record in records),
        with_intervals=any(record.interval for record in records),
        extractors=sorted({str(r.extra["extractor"]) for r in records if "extractor" in r.extra}),
        sizes=files_table(facts.files),
        bits=[number(r.value) for r in records if r.metric == "bits_per_weight" and r.method == recipe["method"]][:1],
        checks=checks_table(records, facts.certificate),
        certificate=certificate_tables(facts.certificate) if facts.certificate else None,
        recipe_text=without_local_paths(facts.recipe_text.rstrip(), recipe),
        commands=list(dict.fromkeys(r.command for r in records)),
        versions=records[-1].versions if records else {},
    )


def _made_again(recipe: Mapping[str, Any]) -> str:
    """The command that makes the model again. Training takes no codes that were calibrated on prompts."""
    count = recipe.get("calibration_prompts")
    if not count:
        return "fbqat train recipe.yaml --output run"
    words = ["fbqat", "convert", public_name(str(recipe["teacher"])), "--output", "run", "--method", "gptq"]
    words += ["--prompts", "prompts.txt"]
    if recipe.get("lora"):
        words += ["--lora", public_name(str(recipe["lora"])), "--lora-scale", str(recipe.get("lora_scale", 1.0))]
    if average := _section(recipe, "quantization").get("average_bits"):
        words += ["--average-bits", str(average)]
    if recipe.get("text_encoders"):
        words += ["--text-encoders", str(recipe["text_encoders"])]
    return f"{shlex.join(words)}  # {count} prompts, which are not part of this folder"


def _linked(name: str) -> str:
    """A Hub id as a link; of a local path the last part only."""
    name = public_name(name)
    return f"[{name}]({HUB}/{name})" if "/" in name else name


def _text_encoders(recipe: Mapping[str, Any]) -> dict[str, str] | None:
    """Of a precision such as "w8a8" in the recipe: bits of the weights, and the activations in words."""
    found = re.fullmatch(r"w(\d)(?:a(\d))?", str(recipe.get("text_encoders")))
    if found is None:
        return None
    return {
        "weight_bits": found[1],
        "activations": f"{found[2]}-bit activations" if found[2] else "float activations",
    }


def _code(facts: Facts) -> str:
    """The snippet of the card: loads the pipeline and draws one picture as the recipe says."""
    recipe = facts.recipe
    generation = dict(recipe.get("generation") or {})
    prompts = recipe.get("prompts") or ["red heart"]
    prompt = generation.pop("prompt", None) or recipe.get("prompt") or prompts[0]
    seed = int(recipe.get("seed") or 0)
    call = "".join(f"    {name}={_literal(value)},\n" for name, value in generation.items())
    source = json.dumps(facts.source)
    if facts.stage is not None and facts.source != ".":
        source += f', revision="{branch_name(facts.stage)}"'
    without = "".join(f", {name}=None" for name in facts.left_out)
    return (
        "import fbqat_hub  # teaches diffusers the packed format\n"
        "import torch\n"
        "from diffusers import DiffusionPipeline\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({source}{without}, dtype=torch.float32)\n"
        f"image = pipe(\n    prompt={json.dumps(prompt, ensure_ascii=False)},\n{call}"
        f"    generator=torch.Generator().manual_seed({seed}),\n).images[0]\n"
        'image.save("picture.png")'
    )


def _literal(value: Any) -> str:
    """A value in Python, a text in double quotes as in all our code."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _dataset_names(recipe: Mapping[str, Any]) -> list[str]:
    given = recipe.get("dataset")
    if isinstance(given, Mapping):
        given = given.get("name") or given.get("path") or given.get("prompts")
    names = [public_name(str(name)) for name in (given if isinstance(given, list) else [given]) if name]
    return [PROMPT_DATA.get(name, name) for name in names]


def _trained_on(recipe: Mapping[str, Any]) -> list[str]:
    """The data of the recipe; none for codes that were found without it, as by fbqat convert."""
    is_static = _section(recipe, "quantization").get("activation_range") == "static"
    if recipe.get("calibration_prompts") or (recipe["method"] in _NEAREST and not is_static):
        return []
    return _dataset_names(recipe)


def _may_be_on_the_hub(dataset: str) -> bool:
    """A folder, a prompt file or a loader such as imagefolder is none; the Hub refuses a card or links elsewhere."""
    return "/" in dataset or dataset == "openmoji"


def _measured_on(record: Record, recipe: Mapping[str, Any]) -> str:
    """What a record's prompts are of; the recipe's data where it has none."""
    prompts = record.extra.get("prompts")
    named = [PROMPT_DATA.get(str(prompts), str(prompts))] if prompts else _dataset_names(recipe)
    return named[0] if named else "unnamed"
