"""Generate a picture from this bundle alone: numpy, Pillow, safetensors and onnxruntime-qnn; no torch, no diffusers.

python generate.py --prompt 0 --output picture.png
python generate.py --text "red heart" --seed 7         # a text of yours: needs tokenizers too
python generate.py --embeddings text.safetensors       # one that was encoded elsewhere
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

sys.dont_write_bytecode = True  # the folder stays what its manifest lists; the modules below lie beside this script

from qnn_session import qnn_session  # type: ignore[import-not-found]  # noqa: E402
from text import TEXT_INPUTS, denoiser_inputs, encoder_feed, tokenize  # type: ignore[import-not-found]  # noqa: E402
from tiles import as_pixels, decode_stages, decode_tiled  # type: ignore[import-not-found]  # noqa: E402


def read_manifest(folder: Path) -> dict[str, Any]:
    """The bundle's `manifest.json`; ValueError where it was damaged."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; copy the whole folder again") from None
    parts = ("denoiser", "files", "graphs", "prompts", "provider_options", "sampler", "text")
    lacking = [name for name in parts if not isinstance(manifest, dict) or name not in manifest]
    if lacking:
        raise ValueError(f"{path} is damaged: it lacks {lacking[0]}; copy the whole folder again")
    return manifest


def check_output(path: Path) -> None:
    """ValueError unless a picture can be saved there, before it is made."""
    known = Image.registered_extensions()
    if known.get(path.suffix.lower()) not in Image.SAVE or path.is_dir():
        raise ValueError(f"output is {path}; it must be a file that ends in .png, or as another kind of picture")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"output is {path}; {path.parent} is no folder that can be written to")


def check_files(folder: Path, manifest: dict[str, Any]) -> None:
    """ValueError unless every file is as it was made: a context binary with a flipped byte loads without complaint."""
    for name, described in manifest["files"].items():
        with (folder / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != described["sha256"]:
            raise ValueError(f"{name} is damaged: SHA-256 is {found}, the manifest has {described['sha256']}")


def open_graph(folder: Path, manifest: dict[str, Any], name: str) -> Any:
    """The session of one graph."""
    return qnn_session(str(folder / manifest["graphs"][name]["context"]), manifest["provider_options"])


def run_graphs(sessions: list[Any], values: dict[str, np.ndarray]) -> Any:
    """The last graph's output. The graphs run in order, fed by name from `values`; what each makes is added there."""
    for session in sessions:
        outputs = session.run(None, {item.name: values[item.name] for item in session.get_inputs()})
        values.update(zip((item.name for item in session.get_outputs()), outputs, strict=True))
    return outputs[0]


def stored_inputs(manifest: dict[str, Any], host: dict[str, np.ndarray], prompt: int) -> list[dict[str, np.ndarray]]:
    """The transformer's inputs of a prompt of the bundle, a branch each (without the prompt, with it)."""
    return [
        {name.split(".", 3)[3]: value for name, value in host.items() if name.startswith(f"prompt.{prompt}.{branch}.")}
        for branch in range(manifest["sampler"]["branches"])
    ]


def encode(folder: Path, manifest: dict[str, Any], text: str) -> dict[str, np.ndarray]:
    """The transformer's inputs of any text, from the text encoders on the HTP."""
    if not manifest["text"]:
        raise ValueError(
            f"this bundle has no text encoders: {manifest['text_left_out']}. Choose with --prompt, or give with "
            "--embeddings what fbqat_hub.export.save_embeddings made of the text on another computer"
        )
    outputs = []
    for each in manifest["text"]:
        ids, mask = tokenize(folder / each["tokenizer"], text, each["lower"], each["instruction"])
        with safe_open(folder / each["table"], "np") as file:
            values = encoder_feed(each, file.get_slice("embedding"), ids, mask)
        for name in each["graphs"]:  # one at a time in memory: all of a large encoder would not fit
            output = run_graphs([open_graph(folder, manifest, name)], values)
        outputs.append(output)
    return denoiser_inputs(manifest["text"], outputs, mask, manifest["sampler"]["mask_bias"])


def encoded_elsewhere(path: Path, stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The transformer's inputs of a text from a `save_embeddings` file, in the shapes of `stored`."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from None
    wanted = {name: value.shape for name, value in stored.items() if name in TEXT_INPUTS}
    shapes = {name: value.shape for name, value in found.items()}
    if shapes != wanted:
        raise ValueError(f"{path} holds {shapes}; this bundle takes {wanted}: save them with the bundle's pipeline")
    if broken := [name for name, value in found.items() if not np.isfinite(value).all()]:
        raise ValueError(f"{path}: {broken[0]} is not finite; save it again with the bundle's pipeline")
    return {name: value.astype(np.float32) for name, value in found.items()}


def sample(
    manifest: dict[str, Any], host: dict[str, np.ndarray], denoiser: list[Any], given: list[dict[str, Any]], noise: Any
) -> Any:
    """The latents after the last step. `sampler` [steps, 1 + steps] weighs the noise and all predictions so far."""
    settings = manifest["sampler"]
    terms, latents = [noise], noise
    for step, weights in enumerate(host["sampler"]):
        time = {"timestep_embedding": host["timestep_embedding"][step : step + 1]}
        outputs = [run_graphs(denoiser, {"hidden_states": latents, **time, **inputs}) for inputs in given]
        prediction = outputs[0]
        if len(outputs) == 2:  # without the prompt, with it
            prediction = outputs[0] + settings["guidance_scale"] * (outputs[1] - outputs[0])
        terms.append(prediction[:, : noise.shape[1]])  # channels behind it are a learned variance, which is not used
        used = zip(weights[: len(terms)], terms, strict=True)  # zeros follow
        latents = sum(weight * term for weight, term in used).astype(np.float32)
    return latents


def unpack_tokens(tokens: Any, grid: list[int]) -> Any:
    """Tokens [1, h/2 * w/2, 4 C] as latents [1, C, h, w]: each token is a square of 2 x 2."""
    height, width = grid
    squares = tokens.reshape(1, height // 2, width // 2, -1, 2, 2).transpose(0, 3, 1, 4, 2, 5)
    return np.ascontiguousarray(squares.reshape(1, -1, height, width))


def generate(
    folder: Path, prompt: int, seed: int | None = None, text: str | None = None, embeddings: Path | None = None
) -> Image.Image:
    """The picture of a prompt of the bundle, or of another text.

    Args:
        folder: the bundle.
        prompt: its place in the manifest's `prompts`.
        text: in place of the prompt's, with the prompt's first noise.
        seed: of another first noise; the bundle's own if None.
        embeddings: a file of a text encoded elsewhere, in the text's place.
    """
    manifest = read_manifest(folder)
    if not 0 <= prompt < len(manifest["prompts"]):
        raise ValueError(f"prompt {prompt}: the bundle has {len(manifest['prompts'])} prompts, counted from 0")
    if seed is not None and seed < 0:
        raise ValueError(f"seed is {seed}; give a whole number from 0 on")
    check_files(folder, manifest)
    host = load_file(folder / "host.safetensors")
    noise = host[f"noise.{prompt}"]
    if seed is not None:
        noise = np.random.default_rng(seed).standard_normal(noise.shape).astype(np.float32)
    given = stored_inputs(manifest, host, prompt)
    if text is not None:
        given[-1] |= encode(folder, manifest, text)  # what is no text, the guidance scale say, stays
    if embeddings is not None:
        given[-1] |= encoded_elsewhere(embeddings, given[-1])
    denoiser = [open_graph(folder, manifest, part["graph"]) for part in manifest["denoiser"]]
    latents = sample(manifest, host, denoiser, given, noise)
    if manifest["sampler"]["token_grid"]:
        latents = unpack_tokens(latents, manifest["sampler"]["token_grid"])
    return Image.fromarray(as_pixels(decode(folder, manifest, host, latents)))


def decode(folder: Path, manifest: dict[str, Any], host: dict[str, np.ndarray], latents: Any) -> Any:
    """The picture [3, H, W] of latents [1, C, h, w], in about [-1, 1]."""

    def opened(name: str) -> Any:
        session = open_graph(folder, manifest, name)
        return lambda values: session.run(None, values)[0]

    if manifest["decoder_stages"]:
        return decode_stages(opened, latents, manifest["decoder_stages"], host)
    run = opened("decoder")
    size = manifest["sampler"]["picture_size"]
    return decode_tiled(lambda part: run({"latents": part}), latents, manifest["decoder_tiles"], size)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=0, help="place of the prompt in manifest.json (default: 0)")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", help="generate this text, with that prompt's noise")
    text.add_argument("--embeddings", type=Path, help="safetensors of a text that was encoded elsewhere")
    parser.add_argument("--seed", type=int, help="start from another noise than the bundle's own")
    parser.add_argument("--output", type=Path, default=Path("picture.png"), help="default: picture.png")
    options = parser.parse_args()
    folder = Path(__file__).resolve().parent
    try:
        check_output(options.output)
        picture = generate(folder, options.prompt, options.seed, options.text, options.embeddings)
        picture.save(options.output)
    except ImportError as error:
        sys.exit(f"generate.py: error: {error}; README.md beside this file says what to install")
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"generate.py: error: {error}")
    print(f"saved {options.output}")


if __name__ == "__main__":
    main()
