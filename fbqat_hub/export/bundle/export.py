"""A pipeline as what an Android developer ships: graphs, manifest, golden values, host parts and a runner."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fbqat_hub.export.bundle.float_part import build_part
from fbqat_hub.export.bundle.pipeline import denoiser_replaced, record_inputs
from fbqat_hub.export.bundle.sampler import sampler_matrix
from fbqat_hub.export.bundle.text_bundle import PROBE, build_text
from fbqat_hub.export.bundle.text_encoder import COMPONENTS, recorded_tokens
from fbqat_hub.export.errors import ExportError, require_htp
from fbqat_hub.export.htp.export import build_transformer, check_items, staging, write_certificate
from fbqat_hub.export.htp.graph import STEPS, Progress
from fbqat_hub.export.htp.runtime import qnn_session
from fbqat_hub.export.htp.targets import Target, target_for
from fbqat_hub.export.onnx.allocation import TARGET_DB
from fbqat_hub.export.onnx.float_graph import GraphWrapper, as_feed
from fbqat_hub.export.onnx.precision import precision_named
from fbqat_hub.export.onnx.split import describe_chain
from fbqat_hub.export.onnx.wrappers import Item, wrap_decoder
from fbqat_hub.files import listing

FORMAT_VERSION = 1
_RUNTIME = Path(__file__).parent / "runtime"
#: Scripts that travel with every bundle; none of them imports this package.
_SCRIPTS = (_RUNTIME / "generate.py", _RUNTIME / "text.py", Path(qnn_session.__file__))

#: Pictures drawn with the emulator in the loop against those of the packed pipeline in torch, the mean of their PSNR.
#: A wrong graph leaves noise or another picture: under 10 dB. Rounding that 20 steps amplify costs more than one
#: forward shows, so this gate is for gross faults.
MIN_PICTURE_PSNR_DB = 12.0
#: Largest difference of the host's own sampler to the pipeline's latents, over the latents' largest value.
MAX_SAMPLER_ERROR = 1e-3


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One prompt as the packed pipeline drew it in torch.

    Attributes:
        prompt: the text.
        items: the denoiser's inputs, one a step and branch (without the prompt, with it).
        outputs: the denoiser's outputs for them.
        latents: after the last step, as the sampler leaves them.
        picture: uint8 [H, W, 3].
    """

    prompt: str
    items: list[Item]
    outputs: list[Tensor]
    latents: Tensor
    picture: np.ndarray


@torch.no_grad()
def draw(pipeline: Any, prompt: str, call: Mapping[str, Any], seed: int, denoise: Any = None) -> Drawn:
    """Draw one prompt, with `denoise` (an item -> the denoiser's output) in the transformer's place if it is given."""
    own = pipeline.transformer.forward
    items: list[Item] = []
    outputs: list[Tensor] = []
    last: list[Tensor] = []

    def recorded(item: Item) -> Tensor:
        items.append(item)
        outputs.append(denoise(item) if denoise else own(**item, return_dict=False)[0])
        return outputs[-1]

    def keep(_pipeline: Any, _step: int, _time: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        last[:] = [values["latents"]]
        return values

    arguments = {**call, "output_type": "np"}
    if "callback_on_step_end" in inspect.signature(type(pipeline).__call__).parameters:
        arguments["callback_on_step_end"] = keep
    else:  # PixArt-Sigma
        arguments["callback"] = lambda _step, _time, latents: last.__setitem__(slice(None), [latents])
    pipeline.set_progress_bar_config(disable=True)
    with denoiser_replaced(pipeline, recorded):
        images = pipeline([prompt], generator=torch.Generator().manual_seed(seed), **arguments).images
    picture = (255 * images[0]).round().astype(np.uint8)
    return Drawn(prompt=prompt, items=items, outputs=outputs, latents=last[0], picture=picture)


def psnr_db(first: np.ndarray, second: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures in dB; 99 where they are equal."""
    error = float(np.mean(np.square(first.astype(np.float64) - second)))
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def host_parts(
    drawn: Sequence[Drawn], pipeline: Any, wrapper: GraphWrapper, call: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the host computes or stores, checked against what the pipeline did.

    Returns:
        Tensors (`sampler` [steps, 1 + steps], `timestep_embedding` [steps, 256], for each prompt `noise.<i>` and
        `prompt.<i>.<branch>.<input>`), and the manifest's `sampler`: steps, branches, guidance_scale, token_grid
        (height and width of FLUX's latents; null where they are no tokens), picture_size (height, width).

    Raises:
        ExportError: the sampler is not linear, or its matrix does not reproduce the pipeline's latents.
    """
    matrix = sampler_matrix(pipeline.scheduler)
    steps = len(matrix)
    branches = len(drawn[0].items) // steps
    scale = 1.0 if branches == 1 else float(_argument(pipeline, call, "guidance_scale"))
    tensors = {"sampler": torch.from_numpy(matrix)}
    for index, each in enumerate(drawn):
        inputs = [wrapper.host_inputs(item) for item in each.items]
        noise = inputs[0]["hidden_states"]
        tensors[f"noise.{index}"] = noise
        tensors["timestep_embedding"] = torch.cat([item["timestep_embedding"] for item in inputs[::branches]])
        for branch in range(branches):
            for name, value in inputs[branch].items():
                if name not in ("hidden_states", "timestep_embedding"):
                    tensors[f"prompt.{index}.{branch}.{name}"] = value
        terms = [noise]
        for step in range(steps):
            outputs = [value[:, : noise.shape[1]].float() for value in each.outputs[step * branches :][:branches]]
            terms.append(outputs[0] if branches == 1 else outputs[0] + scale * (outputs[1] - outputs[0]))
        latents = torch.tensordot(tensors["sampler"][-1], torch.stack(terms), dims=1)
        error = float((latents - each.latents).abs().max() / each.latents.abs().max())
        if not error <= MAX_SAMPLER_ERROR:
            raise ExportError(
                f"the host's sampler is off by {error:.2g} of the pipeline's latents (at most {MAX_SAMPLER_ERROR:g}); "
                f"does {type(pipeline).__name__} change latents or guidance between steps?"
            )
    tokens = drawn[0].latents.ndim == 3
    grid = [side // pipeline.vae_scale_factor for side in drawn[0].picture.shape[:2]] if tokens else None
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    return contiguous, {
        "steps": steps,
        "branches": branches,
        "guidance_scale": scale,
        "token_grid": grid,
        "picture_size": list(drawn[0].picture.shape[:2]),
    }


def instruction(pipeline: Any, call: Mapping[str, Any]) -> str:
    """What a Sana puts before every prompt, `complex_human_instruction`; nothing of other pipelines."""
    return "\n".join(_argument(pipeline, call, "complex_human_instruction") or ())


def _argument(pipeline: Any, call: Mapping[str, Any], name: str) -> Any:
    """What `pipeline` is called with, its own default where `call` leaves it out; None if it has no such argument."""
    parameter = inspect.signature(type(pipeline).__call__).parameters.get(name)
    return call.get(name, parameter.default) if parameter else None


def unpack_tokens(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """FLUX's tokens [1, h/2 * w/2, 4 C] as latents [1, C, h, w]."""
    height, width = grid
    squares = tokens.view(1, height // 2, width // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(1, -1, height, width)


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
        pipeline: a pipeline of one of the four families with a packed transformer; as it was after the call.
        prompts: the first `pictures` are drawn with the emulator in the loop and go into the bundle.
        call: arguments of the pipeline call, e.g. height, width, num_inference_steps, guidance_scale.
        calibration, held_out: as `export_htp`; what the pipeline feeds its denoiser while it draws `prompts` if None
            (the last prompt is held out).
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
        ExportError: bad input, a failed step, a failed audit or a gate not met; nothing is left at `output_dir`.
    """
    require_htp()
    from fbqat_hub.export.htp import compiler

    target, auto = target_for(soc), precision == "auto"
    chosen = precision_named("w4a8" if auto else precision, a16)
    if not 1 <= pictures <= len(prompts):
        raise ExportError(f"pictures is {pictures}; give 1 to {len(prompts)}, as many as there are prompts")
    encoders = [name for name in COMPONENTS if getattr(pipeline, name, None) is not None]
    # to trace and calibrate the transformer, the decoder and the encoders; to compile each graph; drawing and the end
    bar = Progress(2 * (2 + len(encoders)) + (graphs + 1 + len(encoders)) * len(STEPS) + 3, progress)
    try:
        with staging(output_dir) as folder:
            with bar.step("draw in torch"):
                with recorded_tokens(pipeline) as tokens:  # first: the scheduler must keep what the prompts set
                    draw(pipeline, PROBE, {**call, "num_inference_steps": 1}, 0)
                drawn = [draw(pipeline, prompt, call, seed) for seed, prompt in enumerate(prompts[:pictures])]
            if calibration is None or held_out is None:
                if len(prompts) < 2:
                    raise ExportError("calibration needs at least 2 prompts: the last one is held out")
                with bar.step("record inputs"):
                    calibration = record_inputs(pipeline, prompts[:-1], call)
                    held_out = record_inputs(pipeline, prompts[-1:], call, seed=len(prompts))[::5][:8]
            check_items("calibration", calibration)
            check_items("held_out", held_out)
            section, wrapper = build_transformer(
                pipeline.transformer,
                calibration,
                held_out,
                folder,
                target,
                chosen,
                bar,
                target_db=TARGET_DB if auto else None,
                graphs=graphs,
            )
            host, settings = host_parts(drawn, pipeline, wrapper, call)
            section["graphs"] = {"decoder": _build_decoder(pipeline.vae, drawn, settings, folder, target, bar)}
            # the last of a drawing's items is of its last step, with the prompt
            given = [(each.prompt, wrapper.host_inputs(each.items[-1])) for each in drawn]
            text = build_text(
                pipeline, tokens, texts or prompts, given, instruction(pipeline, call), folder, target, bar
            )
            section["graphs"] |= text.sections
            section["text_left_out"] = text.left_out
            chain = {name: part["tensors"] for name, part in _denoiser(section).items()}
            with bar.step("pictures"), compiler.EmulatorChain(folder, chain, target) as emulator:
                section["pictures"] = _pictures(pipeline, drawn, call, wrapper, folder, emulator)
                _write_parts(folder, host | text.tables, held_out, wrapper, emulator)
            section["golden_inputs"] = len(held_out)
            certificate = write_certificate(folder, target, section, bar)
            _write_manifest(folder, certificate, settings, [each.prompt for each in drawn], text.described, target)
            return certificate
    finally:
        bar.bar.close()


def _build_decoder(
    vae: nn.Module, drawn: Sequence[Drawn], settings: Mapping[str, Any], folder: Path, target: Target, bar: Progress
) -> dict[str, Any]:
    """The decoder's graph at W8A16, calibrated on and compared for the latents of the pictures drawn."""
    wrapper = wrap_decoder(vae)
    grid = settings["token_grid"]
    items = [{"latents": unpack_tokens(each.latents, grid) if grid else each.latents} for each in drawn]
    return build_part("decoder", type(vae).__name__, wrapper, items, items, folder, target, bar)


def _pictures(
    pipeline: Any, drawn: Sequence[Drawn], call: Mapping[str, Any], wrapper: GraphWrapper, folder: Path, emulator: Any
) -> dict[str, Any]:
    """Draw the same pictures with the emulator in the denoiser's place; saved in `pictures/`, compared, gated."""
    from PIL import Image

    def denoise(item: Item) -> Tensor:
        return torch.from_numpy(emulator.run(as_feed(wrapper.host_inputs(item)))[0])

    (folder / "pictures").mkdir()
    rows: list[dict[str, Any]] = []
    for seed, each in enumerate(drawn):
        emulated = draw(pipeline, each.prompt, call, seed, denoise).picture
        for name, picture in (("torch", each.picture), ("emulator", emulated)):
            Image.fromarray(picture).save(folder / "pictures" / f"{seed}-{name}.png")
        rows.append({"prompt": each.prompt, "seed": seed, "psnr_db": round(psnr_db(each.picture, emulated), 3)})
    mean = sum(row["psnr_db"] for row in rows) / len(rows)
    if not mean >= MIN_PICTURE_PSNR_DB:
        raise ExportError(
            f"pictures drawn with the emulator in the loop: mean PSNR to torch's is {mean:.1f} dB, at least "
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


def _denoiser(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """The transformer's graphs by name, in order, from its section of the certificate."""
    parts: Mapping[str, Any] = section.get("parts", {"transformer": section})
    return parts


def _write_manifest(
    folder: Path,
    certificate: Mapping[str, Any],
    settings: Mapping[str, Any],
    prompts: Sequence[str],
    text: Sequence[Mapping[str, Any]],
    target: Target,
) -> None:
    """`manifest.json` and `README.md`; the manifest lists every other file."""
    from fbqat_hub.export.htp.compiler import provider_options

    denoiser = _denoiser(certificate)
    sections = {**denoiser, **certificate["graphs"]}
    readme = (_RUNTIME / "README.md.in").read_text(encoding="utf-8")
    for key in ("title", "soc", "htp_arch"):
        readme = readme.replace(f"@{key}@", str(certificate["asked"][key]))
    readme = readme.replace("@sdk@", certificate["read_back"]["qnn_sdk_build"])
    (folder / "README.md").write_text(readme, encoding="utf-8")
    manifest = {
        "format_version": FORMAT_VERSION,
        "target": certificate["asked"],
        "qnn_sdk_build": certificate["read_back"]["qnn_sdk_build"],
        "provider_options": provider_options(target),
        "graphs": {
            name: {"context": f"{name}.onnx", "binary": f"{name}.bin", **section["tensors"]}
            for name, section in sections.items()
        },
        "denoiser": describe_chain({name: section["tensors"] for name, section in denoiser.items()}),
        "sampler": dict(settings),
        "prompts": list(prompts),
        "text": list(text),
        "files": listing(folder),
        "ran_on": certificate["ran_on"],
        "never_ran_on": certificate["never_ran_on"],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
