"""A pipeline as what an Android developer ships: graphs, manifest, golden values, host parts and a runner."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fbqat_hub.export.bundle.decoder import QuantizedDecoder, quantize_decoder
from fbqat_hub.export.bundle.float_part import compile_part
from fbqat_hub.export.bundle.host import host_parts
from fbqat_hub.export.bundle.manifest import denoiser_sections, write_manifest
from fbqat_hub.export.bundle.pipeline import (
    Generated,
    encode_prompts,
    generate,
    picture_psnr,
    record_inputs,
    remembering,
)
from fbqat_hub.export.bundle.targets_table import write_targets
from fbqat_hub.export.bundle.text_bundle import PROBE, QuantizedText, check_text, compile_text, quantize_text
from fbqat_hub.export.bundle.text_encoder import COMPONENTS, graphs_of, recorded_tokens
from fbqat_hub.export.bundle.tiles import decoder_tiles
from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.folder import staging
from fbqat_hub.export.htp.checks import check_asked, check_bundle, check_prompts, check_samples, check_tuning
from fbqat_hub.export.htp.export import QuantizedTransformer, compile_transformer, quantize_transformer
from fbqat_hub.export.htp.graph import STEPS
from fbqat_hub.export.htp.runtime import qnn_session
from fbqat_hub.export.htp.targets import Target
from fbqat_hub.export.onnx.float_graph import Feed, as_feed
from fbqat_hub.export.onnx.items import check_items, spread
from fbqat_hub.export.onnx.precision import precision_named
from fbqat_hub.export.progress import Progress
from fbqat_hub.families.graph import GraphWrapper, Item

if TYPE_CHECKING:
    from fbqat_hub.export.onnx.tuning import Tuning

_RUNTIME = Path(__file__).parent / "runtime"
#: Scripts that travel with every bundle; none of them imports this package.
_SCRIPTS = (*(_RUNTIME / name for name in ("generate.py", "text.py", "tiles.py")), Path(qnn_session.__file__))

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
    soc: str | Sequence[str] = "sm8750",
    precision: str = "w4a8",
    target_db: float | None = None,
    a16: Sequence[str] = (),
    graphs: int = 1,
    pictures: int = 2,
    texts: Sequence[str] = (),
    tuning: Tuning | None = None,
    decoder_tile: int | None = None,
    samples: int = 100,
    quick: bool = False,
    load: Callable[[str], torch.nn.Module] | None = None,
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
        soc: a key of `TARGETS`. Of several there is a bundle each, `output_dir/<soc>`, and a table of them in
            `output_dir/README.md`; what does not depend on the target is made once.
        progress: as `export_htp`.
        precision: a key of `PRESETS`, or "auto": 8 bits wherever the output's SQNR keeps `target_db`.
        target_db: of "auto", from 15 to 60 dB; `precision.TARGET_DB` if None.
        a16: fnmatch patterns of further layers at 16 activation bits.
        graphs: as `export_htp`; the runner runs them in the manifest's order (`denoiser`).
        pictures: how many, at least 1.
        texts: to calibrate the text encoders on; `prompts` if there are none.
        tuning: as `export_htp`.
        decoder_tile: side in pixels of the tiles that a larger picture is decoded in (`tiles.decoder_tiles`); at most
            `tiles.DEFAULT_TILE` if None.
        samples: of `calibration`, at most, from its beginning to its end.
        quick: for the emulator takes minutes a forward at true size: compare one held-out input, and single ops in the
            transformer's first block only; emulate the first graph of the decoder and of each text encoder only, and
            generate no picture on the emulator. The certificate says so.
        load: for memory, what loads the transformer or the autoencoder ("transformer", "vae") when the text encoders
            are done with; the pipeline may come with any numbers in these two, and is left without what is done with.

    Returns:
        The certificate; of several targets, their certificates by `soc`.

    Raises:
        HTPUnavailableError: a needed package cannot be imported; says what to install.
        ValueError, ExportError: bad input, a failed step, a failed audit or a gate not met; nothing is left at
            `output_dir`.
    """
    asked = {"graphs": graphs, "pictures": pictures, "decoder_tile": decoder_tile, "samples": samples}
    targets = check_asked(output_dir, soc, **asked)
    check_tuning(tuning.steps if tuning else 0, graphs)
    chosen, target_db = precision_named(precision, a16, target_db)
    check_samples(target_db, samples if calibration is None else min(samples, len(calibration)))
    check_prompts(prompts, pictures)
    if len(prompts) < 2 and (calibration is None or held_out is None):
        raise ExportError("calibration needs at least 2 prompts: the last one is held out")
    family = check_bundle(pipeline, a16, graphs, call)
    tiles = decoder_tiles(pipeline, family, call, decoder_tile)
    encoders = (getattr(pipeline, name, None) for name in COMPONENTS)
    in_stages = tiles is not None and "overlap" not in tiles
    parts = 1 + sum(graphs_of(each) for each in encoders if each is not None)
    parts += len(family.decoder_stages(pipeline.vae)) if in_stages else 1
    records = calibration is None or held_out is None
    # encoding and generating; tracing, calibrating and quantizing each part; compiling each graph, and pictures
    steps = 2 + records + (target_db is not None) + 3 * parts + graphs - 1 + bool(tuning)
    steps += len(targets) * ((graphs - 1 + parts) * len(STEPS) + (not quick))
    with (
        staging(output_dir) as folder,
        tempfile.TemporaryDirectory(prefix=".quantized.", dir=folder.parent) as scratch,
        remembering(pipeline, "encode_prompt"),
        Progress(steps, progress) as bar,
    ):
        shared = Path(scratch)
        shown, instruction = prompts[:pictures], family.instruction(pipeline, call)
        with bar.step("encode prompts"), recorded_tokens(pipeline) as tokens:
            encode_prompts(pipeline, [PROBE, *(prompts if records else shown)], call)
        text = quantize_text(pipeline, tokens, texts or prompts, shown, instruction, shared, bar, load is not None)
        if load is not None:
            pipeline.transformer, pipeline.vae = load("transformer"), load("vae")
        with bar.step("generate in torch"):
            generated = [generate(pipeline, prompt, call, seed) for seed, prompt in enumerate(shown)]
        if calibration is None or held_out is None:
            with bar.step("record inputs"):
                seen = prompts[:-1]
                calibration = [item for each in generated[: len(seen)] for item in each.items]
                calibration += record_inputs(pipeline, seen[len(generated) :], call, seed=len(generated))
                held_out = record_inputs(pipeline, prompts[-1:], call, seed=len(prompts))[::5][:8]
        calibration, held_out = spread(calibration, samples), spread(held_out, 1) if quick else held_out
        check_items("calibration", calibration, family.constant_inputs)
        check_items("held_out", held_out, family.constant_inputs)
        wrapper = family.graph(pipeline.transformer, calibration[0])
        host, settings = host_parts(generated, pipeline, wrapper, call)
        # the last of a picture's items is of its last step, with the prompt
        given = [(each.prompt, wrapper.host_inputs(each.items[-1])) for each in generated]
        text = check_text(text, given, settings["mask_bias"])
        decoder = quantize_decoder(pipeline, family, generated, settings["picture_size"], tiles, shared, bar)
        host |= {name: torch.from_numpy(value) for name, value in decoder.norms.items()}
        transformer = quantize_transformer(
            pipeline.transformer,
            family,
            wrapper,
            calibration,
            held_out,
            shared,
            chosen,
            bar,
            target_db=target_db,
            graphs=graphs,
            tuning=tuning,
        )
        if load is not None and quick:
            pipeline.transformer = pipeline.vae = None
        made = _Quantized(transformer=transformer, decoder=decoder, text=text, host=host, settings=settings)
        if isinstance(soc, str):
            certificates = _compile(made, pipeline, call, generated, folder, targets[0], quick, bar)
        else:
            certificates = {}
            for target in targets:
                inside = folder / target.name
                inside.mkdir()
                certificates[target.name] = _compile(made, pipeline, call, generated, inside, target, quick, bar)
            write_targets(folder, certificates)
        return certificates


@dataclass(frozen=True, kw_only=True)
class _Quantized:
    """What bundles for all targets are made of; settings as `host.host_parts` has them."""

    transformer: QuantizedTransformer
    decoder: QuantizedDecoder
    text: QuantizedText
    host: Mapping[str, Tensor]
    settings: Mapping[str, Any]


def _compile(
    made: _Quantized,
    pipeline: Any,
    call: Mapping[str, Any],
    generated: Sequence[Generated],
    folder: Path,
    target: Target,
    quick: bool,
    bar: Progress,
) -> dict[str, Any]:
    """The bundle for one target, in `folder`; its certificate."""
    from fbqat_hub.export.htp import certificate, compiler

    transformer = made.transformer
    section, outputs = compile_transformer(transformer, folder, target, bar, probe_blocks=1 if quick else None)
    section["graphs"] = {}
    for place, part in enumerate(made.decoder.parts):  # a graph each
        section["graphs"] |= compile_part(part, folder, target, bar, quick=quick, emulate=int(place == 0))
    text, sections = compile_text(made.text, folder, target, bar, quick)
    section["graphs"] |= sections
    section["text_left_out"] = text.left_out
    section["decoder_tiles"] = made.decoder.tiles
    _write_parts(folder, made.host, generated, transformer.held_out, outputs)
    section["pictures"] = None
    if not quick:
        chain = {name: part["tensors"] for name, part in denoiser_sections(section).items()}
        with bar.step("pictures"), compiler.EmulatorChain(folder, chain, target) as emulator:
            section["pictures"] = _pictures(pipeline, generated, call, transformer.wrapper, folder, emulator)
    section["golden_inputs"] = len(transformer.held_out)
    written = certificate.write(folder, target, section, bar.seconds)
    prompts = [each.prompt for each in generated]
    write_manifest(folder, written, made.settings, made.decoder.stages, prompts, text.described, target)
    return written


def _pictures(
    pipeline: Any,
    generated: Sequence[Generated],
    call: Mapping[str, Any],
    wrapper: GraphWrapper,
    folder: Path,
    emulator: Any,
) -> dict[str, Any]:
    """The same pictures with the emulator in the denoiser's place; saved in `pictures/`, compared, gated."""

    def denoise(item: Item) -> Tensor:
        return torch.from_numpy(emulator.run(as_feed(wrapper.host_inputs(item)))[0])

    rows: list[dict[str, Any]] = []
    for seed, each in enumerate(generated):
        emulated = generate(pipeline, each.prompt, call, seed, denoise).picture
        Image.fromarray(emulated).save(folder / "pictures" / f"{seed}-emulator.png")
        rows.append({"prompt": each.prompt, "seed": seed, "psnr_db": picture_psnr(each.picture, emulated)})
    mean = sum(row["psnr_db"] for row in rows) / len(rows)
    if not mean >= MIN_PICTURE_PSNR_DB:
        raise ExportError(
            f"pictures generated with the emulator in the loop: mean PSNR to torch's is {mean:.1f} dB, at least "
            f"{MIN_PICTURE_PSNR_DB:g} dB is needed; give layers 16 bits (--precision auto, --a16 PATTERN)"
        )
    return {"mean_psnr_db": round(mean, 3), "threshold_db": MIN_PICTURE_PSNR_DB, "each": rows}


def _write_parts(
    folder: Path,
    host: Mapping[str, Tensor],
    generated: Sequence[Generated],
    held_out: Sequence[Feed],
    outputs: Sequence[np.ndarray],
) -> None:
    """`host.safetensors`, `golden.safetensors` (the transformer's inputs and the emulator's outputs), the pictures by
    torch, the runner."""
    from safetensors.numpy import save_file as save_arrays
    from safetensors.torch import save_file

    save_file(dict(host), folder / "host.safetensors")
    golden: dict[str, np.ndarray] = {}
    for index, (feed, output) in enumerate(zip(held_out, outputs, strict=True)):
        golden.update({f"{index}.{name}": value for name, value in feed.items()})
        golden[f"{index}.sample"] = output
    save_arrays(golden, folder / "golden.safetensors")
    (folder / "pictures").mkdir()
    for index, each in enumerate(generated):
        Image.fromarray(each.picture).save(folder / "pictures" / f"{index}-torch.png")
    for script in _SCRIPTS:
        shutil.copyfile(script, folder / script.name)
