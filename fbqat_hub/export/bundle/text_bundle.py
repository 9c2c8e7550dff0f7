"""A pipeline's text encoders in a bundle: graphs, tokenizers, tables, and the proof that they make the same inputs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fbqat_hub.evaluation.metrics import sqnr_db
from fbqat_hub.export.bundle.float_part import QuantizedPart, compile_part, quantize_part
from fbqat_hub.export.bundle.runtime.text import denoiser_inputs, tokenize
from fbqat_hub.export.bundle.text_encoder import COMPONENTS, ENCODER_MASK_BIAS, TextEncoder, wrap_text_encoder
from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.htp.targets import Target
from fbqat_hub.export.onnx.float_graph import as_feed
from fbqat_hub.export.progress import Progress
from fbqat_hub.families.graph import Item

#: The denoiser's inputs of a text as the host and float encoders make them, against the pipeline's: SQNR in dB. Half
#: precision alone leaves 60.
MIN_TEXT_DB = 50.0

#: A text that shows what a pipeline does to its prompts before it tokenizes them.
PROBE = " A Red HEART "

Recorded = Mapping[str, Sequence[tuple[np.ndarray, bool]]]
Sections = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class QuantizedText:
    """What a bundle for any target has of its text encoders; nothing of any of them if one cannot be exported.

    Attributes:
        parts: an encoder each.
        files: tokenizers, and tables of token embeddings.
        described: the manifest's `text`, an entry an encoder.
        masks: of the last encoder's tokens, of each prompt.
        left_out: why there is nothing.
    """

    parts: list[QuantizedPart] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    described: list[dict[str, Any]] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    left_out: str | None = None


def quantize_text(
    pipeline: Any,
    recorded: Recorded,
    texts: Sequence[str],
    prompts: Sequence[str],
    instruction: str,
    folder: Path,
    bar: Progress,
    release: bool = False,
) -> QuantizedText:
    """All text encoders of `pipeline` as QDQ graphs with their tokenizers, in `folder`.

    Args:
        recorded: what each was given while the pipeline encoded `PROBE` (`text_encoder.recorded_tokens`).
        texts: to calibrate on.
        prompts: to compare on.
        instruction: what the pipeline puts before a prompt (`Family.instruction`), or nothing.
        release: take each encoder out of the pipeline when its graphs are made.
    """
    scratch = folder / "text"
    scratch.mkdir()
    found = QuantizedText()
    try:
        encoders: list[TextEncoder] = []
        for name, rows in recorded.items():
            path = scratch / f"{COMPONENTS[name]}.json"
            _write_tokenizer(getattr(pipeline, COMPONENTS[name]), path, len(rows[0][0]))
            lower, masked = _as_the_pipeline_does(name, path, rows, instruction)
            encoder = wrap_text_encoder(name, getattr(pipeline, name), len(rows[0][0]), masked, scratch)
            encoders.append(encoder)
            found.files.extend((path, encoder.table))
            found.described.append(
                {
                    "encoder": name,
                    "graphs": list(encoder.stages),
                    "tokenizer": path.name,
                    "table": encoder.table.name,
                    "lower": lower,
                    "instruction": instruction,
                    "kept": None,
                    "bias": encoder.bias,
                    "mask_bias": ENCODER_MASK_BIAS,
                    "end": encoder.end,
                }
            )
            if release:
                getattr(pipeline, name).set_input_embeddings(nn.Embedding(1, 1))
        for described in found.described:
            encoder = encoders.pop(0)
            kind = type(getattr(pipeline, encoder.name)).__name__
            calibration = [_item(scratch, described, text) for text in texts]
            held_out = [_item(scratch, described, prompt) for prompt in prompts]
            found.parts.append(quantize_encoder(encoder, kind, calibration, held_out, scratch, bar))
            found.masks[:] = [item["attention_mask"].numpy() for item in held_out]
            if release:
                setattr(pipeline, encoder.name, None)
    except ExportError as error:
        shutil.rmtree(scratch)
        found = QuantizedText(left_out=str(error))
    return found


def compile_text(
    text: QuantizedText, folder: Path, target: Target, bar: Progress, quick: bool
) -> tuple[QuantizedText, Sections]:
    """All encoders of `text` in `folder`, compiled for `target`, and their sections of the certificate by graph.

    Where one cannot be compiled there is nothing of any of them: the text returned says why. `quick` is as
    `compile_part` has it.
    """
    scratch = folder / "text"
    scratch.mkdir()
    sections: Sections = {}
    try:
        for part in text.parts:
            sections |= compile_part(part, scratch, target, bar, quick=quick)
        for path in text.files:
            shutil.copyfile(path, scratch / path.name)
        for path in scratch.iterdir():
            path.rename(folder / path.name)
    except ExportError as error:
        text, sections = QuantizedText(left_out=str(error)), {}
    shutil.rmtree(scratch)
    return text, sections


def quantize_encoder(
    encoder: TextEncoder,
    model_class: str,
    calibration: Sequence[Item],
    held_out: Sequence[Item],
    folder: Path,
    bar: Progress,
) -> QuantizedPart:
    """The QDQ graphs of `encoder`, in `folder`, one after the other.

    Each is calibrated on what the float layers before it make. `compile_part` compares each for what the emulator made
    of them: the last one's parity is that of the whole encoder. Only the layers of one graph are in memory beside the
    encoder.
    """
    exact, seen = ([encoder.host_inputs(item) for item in items] for items in (held_out, calibration))
    given = [as_feed(values) for values in exact]
    graphs, rewrites = [], []
    for name, (first, last) in encoder.stages.items():
        stage = encoder.stage(first, last)
        expected = [stage.run(values) for values in exact]
        for values in seen:
            stage.run(values)
        layers = stage.pack()
        graph, made = quantize_part(name, stage.wrapper(), seen, expected, folder, bar, layers)
        graphs.append(graph)
        rewrites.append(made)
    return QuantizedPart(model_class=model_class, graphs=graphs, rewrites=rewrites, held_out=given)


def _write_tokenizer(tokenizer: Any, path: Path, tokens: int) -> None:
    """The tokenizer as one file that cuts and pads to `tokens`, as the pipeline does."""
    from tokenizers import Tokenizer

    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ExportError(f"{type(tokenizer).__name__} has no tokenizer.json: load the fast tokenizer")
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(tokens)
    backend.enable_padding(
        length=tokens,
        pad_id=tokenizer.pad_token_id,
        pad_token=tokenizer.pad_token,
        direction=tokenizer.padding_side,
    )
    backend.save(str(path))


def _as_the_pipeline_does(
    name: str, path: Path, rows: Sequence[tuple[np.ndarray, bool]], instruction: str
) -> tuple[bool, bool]:
    """Whether the pipeline writes `PROBE` in lower case, and whether it tells the encoder the padding."""
    for lower in (False, True):
        ids, _ = tokenize(path, PROBE, lower, instruction)
        for row, masked in rows:
            if np.array_equal(row, ids):
                return lower, masked
    raise ExportError(
        f"{name}: the pipeline changes its prompts before it tokenizes them, in a way that the runner does not know"
    )


def _item(folder: Path, described: Mapping[str, Any], text: str) -> Item:
    ids, mask = tokenize(folder / described["tokenizer"], text, described["lower"], described["instruction"])
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def check_text(
    text: QuantizedText, generated: Sequence[tuple[str, Mapping[str, Tensor]]], mask_bias: float | None
) -> QuantizedText:
    """`text`, if tokenizers, graphs in float and `denoiser_inputs` give what the pipeline's denoiser got; else nothing
    of it, and why.

    Args:
        generated: the prompts that it was made with, and the graph inputs that the denoiser got of them.
        mask_bias: of the denoiser (`host.host_parts`).
    """
    for index, (prompt, wanted) in enumerate(generated if text.parts else ()):
        for described in text.described:
            if described["instruction"]:
                described["kept"] = wanted["encoder_hidden_states"].shape[1]
        outputs = [part.graphs[-1].expected[index]["tokens"] for part in text.parts]
        made = denoiser_inputs(text.described, outputs, text.masks[index], mask_bias)
        for name, value in made.items():
            expected = wanted[name].float().numpy()
            reached = sqnr_db([expected], [value]) if expected.shape == value.shape else float("-inf")
            if not reached >= MIN_TEXT_DB:
                return QuantizedText(
                    left_out=f"{name} of {prompt!r} made on the host is at {reached:.1f} dB to the pipeline's, at "
                    f"least {MIN_TEXT_DB:g} dB is needed; does the pipeline do something else with its texts?"
                )
    return text
