"""What an adapter (LoRA) changes of a 4-bit base, beside its change of the float base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor

from fbqat_hub.components import read_index
from fbqat_hub.config import is_packed
from fbqat_hub.evaluation.pictures import comparison_sheet
from fbqat_hub.families import Family, component_configs, family_of
from fbqat_hub.files import whole
from fbqat_hub.generation import generate_pictures
from fbqat_hub.hub.adapter import DIFFUSERS_FILE, PEFT_CONFIG, PEFT_FILE
from fbqat_hub.hub.client import step
from fbqat_hub.hub.names import repo_and_revision
from fbqat_hub.inputs import seeds
from fbqat_hub.lora import AdapterError, pairs_of
from fbqat_hub.pictures import as_image
from fbqat_hub.pipelines import downloaded, load_pipeline
from fbqat_hub.text import names
from fbqat_hub.training.generate import generation_of
from fbqat_hub.training.seeding import generator
from fbqat_hub.training.teachers import resolve_teacher
from fbqat_hub.untrusted import read_json
from fbqat_hub.version import __version__
from fbqat_hub.weights import check_finite, read_header

_ADAPTER = "checked"
# beside the card, and around what the card has of it
_CARD_OUTPUT, _CARD_START, _CARD_END = "lora-check.json", "<!-- fbqat lora check -->", "<!-- /fbqat lora check -->"
# what the denoiser is asked where no prompt is given; any text serves, since only a change is measured
_PROMPTS = ("a red heart", "a house beside a tree", "the flag of france", "a cat")


@dataclass(frozen=True)
class Check:
    """The passport of an adapter.

    Attributes:
        adapter, base, float_base: Hub ids, or names of local folders and files, without their paths.
        matched: tensors of the adapter that belong to a module of the pipeline.
        unmatched: names of those that do not.
        change: norm of the change of the denoiser's output over the norm of the output, on the 4-bit base.
        float_change: the same on the float base; None where none was given, as are the next two.
        cosine: between the two changes.
        norm_ratio: norm of the change on the 4-bit base over that on the float base.
        inputs: how many seeded inputs were measured.
    """

    adapter: str
    base: str
    float_base: str | None
    matched: int
    unmatched: list[str]
    change: float
    float_change: float | None
    cosine: float | None
    norm_ratio: float | None
    inputs: int

    def rows(self) -> list[tuple[str, str]]:
        """What is said of it: name and value."""
        missing = f" ({names(self.unmatched)})" if self.unmatched else ""
        rows = [
            ("tensors matched", f"{self.matched} of {self.matched + len(self.unmatched)}"),
            ("not matched", f"{len(self.unmatched)}{missing}"),
            ("change, 4-bit base", f"{self.change:.2%} of the output"),
        ]
        if self.float_change is not None:
            rows += [
                ("change, float base", f"{self.float_change:.2%} of the output"),
                ("cosine of changes", f"{self.cosine:.4f}"),
                ("ratio of norms", f"{self.norm_ratio:.4f}"),
            ]
        return rows

    def text(self) -> str:
        """A table of two columns."""
        return "\n".join(f"{name:20s} {value}" for name, value in self.rows())


@dataclass(frozen=True)
class _Measured:
    """Of one base: tensors that matched, names that did not, outputs [N, ...], and pictures without and with."""

    matched: int
    unmatched: list[str]
    before: Tensor
    change: Tensor
    pictures: list[Tensor]


def check(
    adapter: str,
    base: str,
    float_base: str | None = None,
    *,
    prompts: Sequence[str] = (),
    output: Path | None = None,
    card: bool = False,
    seed: int = 0,
) -> Check:
    """Measure what an adapter changes of a 4-bit base, and of the float base if one is given.

    The denoiser's output is compared on four inputs that depend on ``seed`` only. The text encoders of ``base`` make
    the conditioning of both.

    Args:
        adapter: a safetensors file, a folder with one (the layouts of diffusers and peft), or a Hub id.
        base, float_base: folder or Hub id of a packed pipeline, and of a float one.
        prompts: generate with each, without and with the adapter.
        output: JSON file to write; the picture sheet is written beside it, with the ending .png.
        card: write the passport into the README.md of the adapter's folder, in place of an earlier one; ``output`` is
            then lora-check.json in that folder, where none is given.

    Raises:
        ValueError: no tensor of the adapter matches, or it changes nothing; an output that is no JSON file; prompts
            without an output; a base that is not packed, or a float base that is; bases of different families; a card
            of an adapter that is no local folder, or with an output elsewhere and pictures.
    """
    import peft  # noqa: F401  # an extra: that it is missing is said before anything is loaded

    if card:
        folder = _folder_of(adapter)
        output = output or folder / _CARD_OUTPUT
        if prompts and output.resolve().parent != folder.resolve():
            raise ValueError(f"--card shows the pictures, which must be in {folder}: leave --output out.")
    if output is not None and (output.suffix.lower() != ".json" or output.is_dir()):
        raise ValueError(f"output is {output}; it must be a file that ends in .json.")
    if prompts and output is None:
        raise ValueError("--prompt makes a sheet of pictures beside the JSON file; say where with --output FILE.json.")
    file = adapter_file(adapter)
    check_finite(file)
    folders = [downloaded(resolve_teacher(source)) for source in (base, float_base) if source is not None]
    packed = [is_packed(read_json(folder / "transformer" / "config.json")) for folder in folders]
    if not packed[0]:
        raise ValueError(
            f"{base} is not quantized, and --base is the 4-bit pipeline; convert it, or give it as --float."
        )
    if packed[1:] == [True]:
        raise ValueError(f"{float_base} is quantized, and --float is the full-precision pipeline.")
    classes = [read_index(folder)[0] for folder in folders]
    if len(set(classes)) > 1:
        raise ValueError(f"{base} is a {classes[0]}, and {float_base} a {classes[1]}; give two of one family.")
    family = family_of(classes[0])
    inputs: dict[str, Tensor] | None = None
    call: dict[str, Any] = {}
    found: list[_Measured] = []
    for folder in folders:
        pipeline = load_pipeline(folder, torch.float32)
        if inputs is None:
            call = generation_of(folder, pipeline)
            inputs = _seeded_inputs(pipeline, family, call, seed)
        found.append(_measure(pipeline, family, file, inputs, prompts, call, seed))
        del pipeline
    of_base, of_float = found[0], found[1] if float_base is not None else None
    result = Check(
        adapter=shown_name(adapter),
        base=shown_name(base),
        float_base=None if float_base is None else shown_name(float_base),
        matched=of_base.matched,
        unmatched=of_base.unmatched,
        change=_ratio(of_base.change, of_base.before),
        float_change=_ratio(of_float.change, of_float.before) if of_float else None,
        cosine=_cosine(of_base.change, of_float.change) if of_float else None,
        norm_ratio=_ratio(of_base.change, of_float.change) if of_float else None,
        inputs=len(_PROMPTS),
    )
    if output is not None:
        if prompts:
            _write_sheet(output.with_suffix(".png"), found, prompts)
        with whole(output) as partial:
            partial.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
        if card:
            _write_card(_folder_of(adapter), base, result, output.with_suffix(".png").name if prompts else None)
    return result


def shown_name(source: str) -> str:
    """A Hub id as it is; of what is local its name, without the path.

    >>> shown_name("someone/some-model")
    'someone/some-model'
    """
    return Path(source).resolve().name if Path(source).exists() else source


def card_head(base: str, title: str) -> str:
    """The beginning of an adapter's README.md; a base on the Hub is linked."""
    relation = "" if Path(base).exists() else f"base_model: {base}\nbase_model_relation: adapter\n"
    return f"---\nlibrary_name: diffusers\n{relation}tags: [lora, fbqat]\n---\n\n# {title}\n"


def _folder_of(adapter: str) -> Path:
    """Of a local adapter."""
    place = Path(adapter)
    if not place.exists():
        raise ValueError(f"--card writes into the adapter's folder, and {adapter} is not on this machine; download it.")
    return place if place.is_dir() else place.parent


def _write_card(folder: Path, base: str, found: Check, picture: str | None) -> None:
    """Put the passport into README.md, in place of an earlier one or at the end."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else card_head(base, f"LoRA for {found.base}")
    beside = f", and on `{found.float_base}`" if found.float_base else ""
    lines = [
        _CARD_START,
        "## Checked on the 4-bit base",
        "",
        f"On `{found.base}`{beside}, {found.inputs} seeded inputs, by `fbqat lora check` of fbqat_hub {__version__}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in found.rows()),
        *(["", f"![Each prompt without and with the adapter, from the same seed]({picture})"] if picture else []),
        _CARD_END,
    ]
    block = "\n".join(lines)
    before, start, rest = text.partition(_CARD_START)
    if start:
        text = before + block + rest.partition(_CARD_END)[2]
    else:
        text = f"{text.rstrip()}\n\n{block}\n"
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def adapter_file(adapter: str) -> Path:
    """The safetensors file of an adapter; of a Hub id the file is downloaded.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: another kind of file, or a folder with none or several to choose from; half of a low-rank pair, or
            one of two ranks; a configuration of peft's that is not one of a LoRA.
        HubError: the Hub refused or failed.
    """
    file = _found(adapter)
    pairs_of({key: tensor.shape for key, tensor in read_header(file).items()}, str(file))
    if (path := file.parent / PEFT_CONFIG).is_file():
        config = read_json(path)
        kind = config.get("peft_type") if isinstance(config, dict) else None
        if kind != "LORA":
            raise ValueError(f"{path} has peft_type {kind}; it must be a LoRA's configuration, with peft_type LORA.")
    return file


def _found(adapter: str) -> Path:
    place = Path(adapter)
    if place.is_file():
        if place.suffix != ".safetensors":
            raise ValueError(f"{adapter} is no safetensors file; other formats can run programs and are not read.")
        return place
    if not place.is_dir():
        repo, revision = repo_and_revision(adapter)
        if place.is_absolute() or repo.count("/") != 1 or adapter.startswith("."):
            raise FileNotFoundError(
                f"{adapter} is no file or folder, nor a Hub id such as owner/name or owner/name@revision."
            )
        with step(f"download the adapter {adapter}"):
            wanted = ["*.safetensors", PEFT_CONFIG]
            place = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    for name in (DIFFUSERS_FILE, PEFT_FILE):
        if (place / name).is_file():
            return place / name
    files = sorted(place.glob("*.safetensors"))
    if len(files) != 1:
        found = f"it has {names([file.name for file in files])}" if files else "it has no safetensors file"
        raise ValueError(f"{adapter} is no adapter: {found}; give the file, or a folder with {DIFFUSERS_FILE}.")
    return files[0]


def load_adapter(pipeline: Any, file: Path, name: str = _ADAPTER) -> tuple[int, list[str]]:
    """Load an adapter into a pipeline: by diffusers, or by peft where the file stands beside a config of peft's.

    Returns:
        How many of its tensors belong to a module of the pipeline, and the names of those that do not.

    Raises:
        ValueError: none does, one has another shape, or diffusers loads no adapter into such a pipeline.
    """
    try:
        tensors = _load(pipeline, file, name)
    except AdapterError:
        raise
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
        said = " ".join(str(error).split())[:400].rstrip(".")
        raise ValueError(
            f"{file} does not fit this {type(pipeline.transformer).__name__}: {said}. It was made for another "
            "architecture or size, or is damaged."
        ) from error
    known = {
        f"{part}.{module}"
        for part, model in pipeline.components.items()
        if isinstance(model, torch.nn.Module)
        for module, layer in model.named_modules()
        if name in getattr(layer, "lora_A", ())
    }
    unmatched = [key for key in tensors if _module_of(key, pipeline) not in known]
    if len(unmatched) == len(tensors):
        raise ValueError(f"no tensor of {file} belongs to a module of {type(pipeline).__name__}: {names(unmatched)}.")
    return len(tensors) - len(unmatched), unmatched


def _load(pipeline: Any, file: Path, name: str) -> Mapping[str, Any]:
    """The adapter's tensors, by the names that their modules have."""
    if (file.parent / PEFT_CONFIG).is_file():
        return _load_peft(pipeline.transformer, file, name)
    if not hasattr(pipeline, "load_lora_weights"):
        raise AdapterError(
            f"diffusers loads no adapter into a {type(pipeline).__name__}; give one in peft's layout, a folder with "
            f"{PEFT_CONFIG} and {PEFT_FILE}."
        )
    found = type(pipeline).lora_state_dict(str(file))
    pipeline.load_lora_weights(str(file), adapter_name=name)
    tensors: Mapping[str, Any] = found[0] if isinstance(found, tuple) else found
    return tensors


def _load_peft(model: Any, file: Path, name: str) -> dict[str, Tensor]:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    tensors = {key.removeprefix("base_model.model."): value for key, value in load_file(file).items()}
    known = dict(model.named_modules())
    if not any(key.partition(".lora_")[0] in known for key in tensors):
        raise AdapterError(f"no tensor of {file} belongs to {type(model).__name__}: it has {names(list(tensors)[:3])}.")
    inject_adapter_in_model(LoraConfig.from_pretrained(str(file.parent)), model, name)
    set_peft_model_state_dict(model, tensors, name)
    return tensors


def _module_of(key: str, pipeline: Any) -> str:
    """Component and module that a tensor of an adapter is for."""
    module = key.partition(".lora")[0]
    return module if module.partition(".")[0] in pipeline.components else f"transformer.{module}"


@torch.no_grad()
def _seeded_inputs(pipeline: Any, family: Family, call: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Arguments of the denoiser's forward at noise levels of training, of random latents of unit variance."""
    configs = component_configs(pipeline)
    size = {**family.native_size(configs), **call}
    shape = (len(_PROMPTS), *family.latent_shape(configs, (size["height"], size["width"])))
    random = generator(seed, "lora check")
    latents, noise = (torch.randn(shape, generator=random) for _ in range(2))
    progress = torch.linspace(0.2, 0.8, len(_PROMPTS))
    noisy, timestep = family.noisy(pipeline.scheduler, latents, noise, progress, family.sampler_steps(call))
    conditioning = family.encode_prompts(pipeline, _PROMPTS, call) | family.picture_conditioning(latents)
    return family.denoiser_inputs(noisy, timestep, conditioning)


def _measure(
    pipeline: Any,
    family: Family,
    file: Path,
    inputs: dict[str, Tensor],
    prompts: Sequence[str],
    call: dict[str, Any],
    seed: int,
) -> _Measured:
    """Without the adapter, and then with it."""
    outputs, pictures = [], []
    matched: int = 0
    unmatched: list[str] = []
    for with_adapter in (False, True):
        if with_adapter:
            matched, unmatched = load_adapter(pipeline, file)
            _refuse_zero(pipeline, file)
        with torch.no_grad():
            outputs.append(family.predict(pipeline.transformer, inputs))
        if prompts:
            pictures.append(generate_pictures(pipeline, prompts, call, seeds(seed, len(prompts))))
    change = outputs[1] - outputs[0]
    if not torch.isfinite(change).all():
        raise ValueError(f"the denoiser's output with {file} is not finite: the adapter, or the model, is broken.")
    if not change.any():
        raise ValueError(
            f"the adapter changes nothing of the denoiser's output on {len(change)} inputs, though {file} matches "
            f"{matched} tensors: its values are too small, or it is for a text encoder only."
        )
    return _Measured(matched, unmatched, outputs[0], change, pictures)


def _refuse_zero(pipeline: Any, file: Path) -> None:
    """Raise ValueError if the adapter is one as it is before training."""
    models = [model for model in pipeline.components.values() if isinstance(model, torch.nn.Module)]
    ends = (f".lora_B.{_ADAPTER}.weight", f".lora_embedding_B.{_ADAPTER}")
    layers = [weight for model in models for name, weight in model.named_parameters() if name.endswith(ends)]
    if layers and not any(weight.any() for weight in layers):
        raise ValueError(
            f"the adapter changes nothing: all lora_B of {file} are zero ({len(layers)} layers), as before training."
        )


def _ratio(a: Tensor, b: Tensor) -> float:
    return float(a.norm() / b.norm())


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def _write_sheet(path: Path, found: Sequence[_Measured], prompts: Sequence[str]) -> None:
    columns = {
        f"{base}{how}": [as_image(picture) for picture in pictures]
        for base, measured in zip(("4-bit base", "float base"), found, strict=False)
        for how, pictures in zip(("", ", with adapter"), measured.pictures, strict=True)
    }
    with whole(path) as partial:
        comparison_sheet(columns, prompts).save(partial, format="PNG")
