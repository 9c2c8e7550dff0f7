"""``fbqat export``: a run, or any packed pipeline, to a bundle for a phone.

It joins what may not import each other: the recipe and its data (`training`), the loader (`integrations`) and the
exporter (`export`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fbqat_hub.components import read_index
from fbqat_hub.export import ExportError
from fbqat_hub.export.bundle.export import export_bundle
from fbqat_hub.export.bundle.text_encoder import COMPONENTS, compute_in_float32
from fbqat_hub.export.bundle.tiles import decoder_tiles
from fbqat_hub.export.htp.checks import check_asked, check_bundle, check_prompts, check_samples, check_tuning
from fbqat_hub.export.onnx.precision import precision_named
from fbqat_hub.pipelines import check_source, downloaded, load_pipeline
from fbqat_hub.training.calibration import export_data, teacher_draws
from fbqat_hub.training.recipe import recipe_of_run
from fbqat_hub.untrusted import read_json

# Components that the text encoders' part of the work does without.
_LOADED_LATER = ("transformer", "vae")


def _without_numbers(run: str | Path) -> tuple[Any, Callable[[str], torch.nn.Module]]:
    """A pipeline in as little memory as its text encoders need, and what loads its transformer and its autoencoder.

    In the pipeline these two have memory that nothing was written to, which takes none.
    """
    folder = downloaded(run)
    parts = read_index(folder)[1]

    def load(name: str) -> torch.nn.Module:
        loaded: Any = parts[name].load(torch.float32)
        if name == "vae":
            loaded.encoder = None  # nothing is encoded
        module: torch.nn.Module = loaded
        return module

    at_hand = {name: parts[name].load(torch.float32, meta=True).to_empty(device="cpu") for name in _LOADED_LATER}
    for name in COMPONENTS:
        if name in parts and "quantization_config" in read_json(parts[name].folder / "config.json"):
            at_hand[name] = compute_in_float32(parts[name].load())
    return load_pipeline(folder, torch.float32, **at_hand), load


def export_run(
    run: str | Path,
    output: Path,
    *,
    soc: str | Sequence[str] = "sm8750",
    precision: str = "w4a8",
    target_db: float | None = None,
    a16: Sequence[str] = (),
    graphs: int = 1,
    prompts: Sequence[str] = (),
    pictures: int = 2,
    tune: int = 0,
    decoder_tile: int | None = None,
    samples: int = 100,
    quick: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Compile a packed pipeline for a Snapdragon's NPU; returns what ``export_bundle`` returns.

    Ranges that training did not set are calibrated on 100 training samples of the run's recipe, and the certificate is
    measured on 8 samples of the test split. With ``prompts``, or without a recipe, both come from what the pipeline
    feeds its denoiser while it generates the prompts; the last one is held out.

    What is asked for is checked first: before the pipeline is loaded, and what needs the model before data is encoded.

    Args:
        run: folder of a run, or a folder or Hub id of any packed pipeline.
        output: must not exist, or be empty.
        soc, precision, target_db, a16, graphs: as ``export_bundle``.
        prompts: to calibrate on and to generate; the recipe's if there are none.
        tune: steps of training the QDQ graph towards the recipe's teacher on training samples, before it is compiled.
        pictures: generated with the emulator in the loop, of the first prompts; of a recipe's no more than it has.
        decoder_tile, samples, quick: as ``export_bundle``.

    Raises:
        ExportError: a pipeline in full precision, no recipe and fewer than two prompts, or steps to ``tune`` without a
            recipe's data; what ``export_bundle`` raises.
        FileNotFoundError, ValueError: ``run`` is no pipeline that can be loaded.
    """
    check_asked(output, soc, graphs=graphs, pictures=pictures, decoder_tile=decoder_tile, samples=samples)
    check_tuning(tune, graphs)
    check_samples(precision_named(precision, target_db=target_db)[1], samples)
    if prompts:
        check_prompts(prompts, pictures if len(prompts) > 1 else 1)
    check_source(run)
    denoiser = Path(run) / "transformer" / "config.json"
    if denoiser.is_file() and "quantization_config" not in read_json(denoiser):
        raise ExportError(f"{run} is in full precision; quantize it first: fbqat convert {run} --output FOLDER")
    saved = Path(run) / "recipe.yaml"
    recipe = recipe_of_run(saved) if saved.is_file() else None
    if len(prompts) < 2 and (prompts or recipe is None):
        raise ExportError(
            f"{run}: {'one prompt was given' if prompts else 'there is no recipe.yaml'}; calibration needs at least "
            "two prompts, of which the last is held out: --prompts FILE, one a line"
        )
    if tune and (prompts or recipe is None):
        raise ExportError(
            f"{run}: tuning needs the training data and the teacher of a recipe, and "
            f"{'prompts were given' if prompts else 'there is no recipe.yaml'}; export a run that fbqat train made, "
            "without --prompts, or leave out --tune"
        )
    pipeline, load = _without_numbers(run)
    family = check_bundle(pipeline, a16, graphs, recipe.generation if recipe else None)
    call = recipe.generation if recipe else family.own_call(pipeline)
    decoder_tiles(pipeline, family, call, decoder_tile)
    data = export_data(recipe, pipeline.scheduler) if recipe and not prompts else None
    shown = data.prompts if data else list(prompts)
    tuning = None
    if tune and recipe:
        from fbqat_hub.export.onnx.tuning import Tuning

        draw, teacher = teacher_draws(recipe, pipeline.scheduler)
        tuning = Tuning(steps=tune, seed=recipe.seed, draw=draw, teacher=teacher)
    return export_bundle(
        pipeline,
        output,
        prompts=shown,
        call=call,
        calibration=data.calibration if data else None,
        held_out=data.held_out if data else None,
        soc=soc,
        precision=precision,
        target_db=target_db,
        a16=a16,
        graphs=graphs,
        pictures=min(pictures, len(shown)),
        texts=data.texts if data else (),
        tuning=tuning,
        decoder_tile=decoder_tile,
        samples=samples,
        quick=quick,
        load=load,
        progress=progress,
    )
