"""A pipeline as what an Android developer ships: graphs, manifest, golden values, host parts and a runner."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fbqat_hub.export.bundle.float_part import build_part
from fbqat_hub.export.bundle.host import host_parts
from fbqat_hub.export.bundle.manifest import denoiser_sections, write_manifest
from fbqat_hub.export.bundle.pipeline import Generated, generate, picture_psnr, record_inputs
from fbqat_hub.export.bundle.text_bundle import PROBE, build_text
from fbqat_hub.export.bundle.text_encoder import COMPONENTS, recorded_tokens
from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.folder import staging
from fbqat_hub.export.htp.checks import check_asked, check_bundle
from fbqat_hub.export.htp.export import build_transformer
from fbqat_hub.export.htp.graph import STEPS
from fbqat_hub.export.htp.runtime import qnn_session
from fbqat_hub.export.htp.targets import Target
from fbqat_hub.export.onnx.float_graph import as_feed
from fbqat_hub.export.onnx.items import check_items
from fbqat_hub.export.onnx.precision import precision_named
from fbqat_hub.export.progress import Progress
from fbqat_hub.families import Family
from fbqat_hub.families.graph import GraphWrapper, Item

_RUNTIME = Path(__file__).parent / "runtime"
#: Scripts that travel with every bundle; none of them imports this package.
_SCRIPTS = (_RUNTIME / "generate.py", _RUNTIME / "text.py", Path(qnn_session.__file__))

#: Pictures generated with the emulator in the loop against those of the packed pipeline in torch, the mean of their
#: PSNR. A wrong graph leaves noise or another picture: under 10 dB. Rounding that 20 steps amplify costs more than one
#: forward shows, so this gate is for gross faults.
MIN_PICTURE_PSNR_DB = 12.0


def export_bundle(
    pipeline: Any,
    output_dir: str | os.PathLike[str],
    *,
    prompts: Sequence[str],
    call: Mapping[str, Any],
    calibration: Sequence[Item] | None = None,
    held_out: Sequence[Item] | None = None,
    soc: str = "sm8750",
    precision: str = "w4a8",
    a16: Sequence[str] = (),
    graphs: int = 1,
    pictures: int = 2,
    texts: Sequence[str] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """Export a packed pipeline: transformer and decoder as context binaries, and all that a phone needs beside them.

    Beside what `export_htp` makes, the folder has the graphs of the decoder and of the text encoders (W8A16) with their
    tokenizers, `manifest.json` (SHA-256 and size of every file, target, tensors of every graph, the sampler),
    `host.safetensors` (timestep embeddings, the sampler's matrix, noise and text embeddings of the bundle's prompts,
    token embeddings), `golden.safetensors` (inputs and outputs), a runner without torch (`generate.py`) and a README.
    Text encoders that cannot be exported are left out, with the reason in the certificate's `text_left_out`.

    Args:
        pipeline: a pipeline of a family in `FAMILIES` with a packed transformer; as it was after the call.
        prompts: the first `pictures` are generated with the emulator in the loop and go into the bundle.
        call: arguments of the pipeline call, e.g. height, width, num_inference_steps, guidance_scale.
        calibration, held_out: as `export_htp`; what the pipeline feeds its denoiser while it generates `prompts` if
            None (the last prompt is held out).
        soc, progress: as `export_htp`.
        precision: a key of `PRESETS`, or "auto": 8 bits wherever the output's SQNR keeps `TARGET_DB`.
        a16: fnmatch patterns of further layers at 16 activation bits.
        graphs: as `export_htp`; the runner runs them in the manifest's order (`denoiser`).
        pictures: how many, at least 1.
        texts: to calibrate the text encoders on; `prompts` if there are none.

    Returns:
        The certificate.

    Raises:
        HTPUnavailableError: a needed package cannot be imported; says what to install.
        ValueError, ExportError: bad input, a failed step, a failed audit or a gate not met; nothing is left at
            `output_dir`.
    """
    target = check_asked(output_dir, soc, graphs=graphs, pictures=pictures)
    chosen, target_db = precision_named(precision, a16)
    if pictures > len(prompts):
        raise ExportError(f"pictures is {pictures}; give 1 to {len(prompts)}, as many as there are prompts")
    if len(prompts) < 2 and (calibration is None or held_out is None):
        raise ExportError("calibration needs at least 2 prompts: the last one is held out")
    family = check_bundle(pipeline, a16, graphs)
    from fbqat_hub.export.htp import certificate, compiler

    encoders = [name for name in COMPONENTS if getattr(pipeline, name, None) is not None]
    # to trace and calibrate the transformer, the decoder and the encoders; to compile each graph; pictures and the end
    steps = 2 * (2 + len(encoders)) + (graphs + 1 + len(encoders)) * len(STEPS) + 3
    with staging(output_dir) as folder, Progress(steps, progress) as bar:
        with bar.step("generate in torch"):
            with recorded_tokens(pipeline) as tokens:  # first: the scheduler must keep what the prompts set
                generate(pipeline, PROBE, {**call, "num_inference_steps": 1}, 0)
            generated = [generate(pipeline, prompt, call, seed) for seed, prompt in enumerate(prompts[:pictures])]
        if calibration is None or held_out is None:
            with bar.step("record inputs"):
                calibration = record_inputs(pipeline, prompts[:-1], call)
                held_out = record_inputs(pipeline, prompts[-1:], call, seed=len(prompts))[::5][:8]
        check_items("calibration", calibration, family.constant_inputs)
        check_items("held_out", held_out, family.constant_inputs)
        section, wrapper = build_transformer(
            pipeline.transformer,
            family,
            calibration,
            held_out,
            folder,
            target,
            chosen,
            bar,
            target_db=target_db,
            graphs=graphs,
        )
        host, settings = host_parts(generated, pipeline, wrapper, call)
        section["graphs"] = {"decoder": _build_decoder(pipeline, family, generated, settings, folder, target, bar)}
        # the last of a picture's items is of its last step, with the prompt
        given = [(each.prompt, wrapper.host_inputs(each.items[-1])) for each in generated]
        instruction = family.instruction(pipeline, call)
        text = build_text(
            pipeline, tokens, texts or prompts, given, instruction, settings["mask_bias"], folder, target, bar
        )
        section["graphs"] |= text.sections
        section["text_left_out"] = text.left_out
        chain = {name: part["tensors"] for name, part in denoiser_sections(section).items()}
        with bar.step("pictures"), compiler.EmulatorChain(folder, chain, target) as emulator:
            section["pictures"] = _pictures(pipeline, generated, call, wrapper, folder, emulator)
            _write_parts(folder, host | text.tables, held_out, wrapper, emulator)
        section["golden_inputs"] = len(held_out)
        written = certificate.write(folder, target, section, bar.seconds)
        write_manifest(folder, written, settings, [each.prompt for each in generated], text.described, target)
        return written


def _build_decoder(
    pipeline: Any,
    family: Family,
    generated: Sequence[Generated],
    settings: Mapping[str, Any],
    folder: Path,
    target: Target,
    bar: Progress,
) -> dict[str, Any]:
    """The decoder's graph at W8A16, calibrated on and compared for the latents of the pictures generated."""
    sides = [side // pipeline.vae_scale_factor for side in settings["picture_size"]]
    items = [{"latents": family.unpack_latents(each.latents, *sides)} for each in generated]
    wrapper = family.decoder_graph(pipeline.vae)
    with torch.no_grad():
        expected = [wrapper.module(*wrapper.host_inputs(item).values())[0] for item in items]
    kind = type(pipeline.vae).__name__
    return build_part("decoder", kind, wrapper, items, items, expected, folder, target, bar)[0]


def _pictures(
    pipeline: Any,
    generated: Sequence[Generated],
    call: Mapping[str, Any],
    wrapper: GraphWrapper,
    folder: Path,
    emulator: Any,
) -> dict[str, Any]:
    """The same pictures with the emulator in the denoiser's place; saved in `pictures/`, compared, gated."""
    from PIL import Image

    def denoise(item: Item) -> Tensor:
        return torch.from_numpy(emulator.run(as_feed(wrapper.host_inputs(item)))[0])

    (folder / "pictures").mkdir()
    rows: list[dict[str, Any]] = []
    for seed, each in enumerate(generated):
        emulated = generate(pipeline, each.prompt, call, seed, denoise).picture
        for name, picture in (("torch", each.picture), ("emulator", emulated)):
            Image.fromarray(picture).save(folder / "pictures" / f"{seed}-{name}.png")
        rows.append({"prompt": each.prompt, "seed": seed, "psnr_db": picture_psnr(each.picture, emulated)})
    mean = sum(row["psnr_db"] for row in rows) / len(rows)
    if not mean >= MIN_PICTURE_PSNR_DB:
        raise ExportError(
            f"pictures generated with the emulator in the loop: mean PSNR to torch's is {mean:.1f} dB, at least "
            f"{MIN_PICTURE_PSNR_DB:g} dB is needed; give layers 16 bits (--precision auto, --a16 PATTERN)"
        )
    return {"mean_psnr_db": round(mean, 3), "threshold_db": MIN_PICTURE_PSNR_DB, "each": rows}


def _write_parts(
    folder: Path, host: Mapping[str, Tensor], held_out: Sequence[Item], wrapper: GraphWrapper, emulator: Any
) -> None:
    """`host.safetensors`, `golden.safetensors` (the transformer's inputs and the emulator's outputs), the runner."""
    from safetensors.numpy import save_file as save_arrays
    from safetensors.torch import save_file

    save_file(dict(host), folder / "host.safetensors")
    golden: dict[str, np.ndarray] = {}
    for index, item in enumerate(held_out):
        feed = as_feed(wrapper.host_inputs(item))
        golden.update({f"{index}.{name}": value for name, value in feed.items()})
        golden[f"{index}.sample"] = emulator.run(feed)[0]
    save_arrays(golden, folder / "golden.safetensors")
    for script in _SCRIPTS:
        shutil.copyfile(script, folder / script.name)
