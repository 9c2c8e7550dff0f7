"""What will fail late, said early: of a packed model before it is compiled, of a bundle, of a device's log."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.htp.targets import Target
from fbqat_hub.families import family_of_denoiser, find_family
from fbqat_hub.files import sha256
from fbqat_hub.quantization.convert import named_layers
from fbqat_hub.quantization.packed import PackedLayer
from fbqat_hub.untrusted import read_json

#: A context binary must stay under 2 GiB: the HTP addresses it with 31 bits (qualcomm/ai-hub-models#274).
MAX_GRAPH_BYTES = 2**31
#: Host memory of an export beside the interpreter and its libraries, in copies of one graph's float32 weights: 1.6 of
#: Sana-600M, 1.9 of FLUX's blocks, 3.0 of a block of SD3.5 with many tokens (benchmarks/results/htp.json).
_HOST_COPIES = 2
#: Packed weights from which a forward on the emulator takes a minute or more: 17 to 206 s of 37 to 590 million weights
#: (benchmarks/results/htp.json).
_SLOW_TO_EMULATE = 100_000_000


@dataclass(frozen=True)
class Finding:
    """One thing found: how bad it is, what it is, and what to do ("" where there is nothing to do)."""

    level: Literal["error", "warning", "ok"]
    what: str
    cure: str = ""


@dataclass(frozen=True)
class KnownError:
    """An error code of a device's log: how it looks there, what it means, what cured it, and where that was found."""

    pattern: str
    meaning: str
    cure: str
    source: str


KNOWN_ERRORS = (
    KnownError(
        r"[Ss]tub lib id mismatch|\b1008\b",
        "the Stub on the phone and the libraries of the app are of different SDK builds",
        "ship libQnnHtp.so, libQnnSystem.so, libQnnHtpV<arch>Stub.so and libQnnHtpV<arch>Skel.so of one SDK, the build "
        "in the manifest or newer, and put their folder first in LD_LIBRARY_PATH",
        "pytorch/executorch#8762",
    ),
    KnownError(
        r"\b14001\b",
        "the Hexagon Skel was not found or not loaded, so no device could be created",
        "put the matching libQnnHtpV<arch>Skel.so into a folder the app can read and set ADSP_LIBRARY_PATH to that one "
        "folder before QNN starts (a list with colons is taken as one name)",
        "qualcomm/ai-hub-apps#158, qualcomm/fastrpc#379",
    ),
    KnownError(
        r"\b5005\b",
        "the context could not be created with the VTCM it was compiled for",
        "compile with less VTCM (a Target with vtcm_mb=4), or free what other contexts hold",
        "qualcomm/ai-hub-models#289",
    ),
    KnownError(
        r"PrepareLib isn't loaded",
        "a context binary needs no preparation on the phone; this is a warning of the loader, not the failure",
        "look for the next error line",
        "pytorch/executorch#9084",
    ),
)


def diagnose_log(text: str) -> list[Finding]:
    """What the known error codes in a device's log mean."""
    found = [error for error in KNOWN_ERRORS if re.search(error.pattern, text)]
    if not found:
        return [Finding("warning", "no known error code in the log", "known: 1008, 5005, 14001, Stub lib id mismatch")]
    return [Finding("error", f"{error.meaning} ({error.source})", error.cure) for error in found]


def graph_bytes(transformer: nn.Module) -> int:
    """Bytes of constants of the transformer's graph: two 4-bit codes per byte, other weights 8 bits, biases int32."""
    packed = [layer for _, layer in named_layers(transformer, PackedLayer)]
    inside = {id(parameter) for layer in packed for parameter in layer.parameters()}
    four_bit = sum(layer.weight_packed.nbytes + 8 * layer.out_features for layer in packed)
    rest = sum(parameter.numel() for parameter in transformer.parameters() if id(parameter) not in inside)
    return int(four_bit + rest)


def diagnose_pipeline(pipeline: Any) -> list[Finding]:
    """What stands in the way of bundling a pipeline: what does of its transformer, and what the runner lacks."""
    findings = diagnose_model(pipeline.transformer)
    family = find_family(type(pipeline).__name__)
    if family and family.without_bundle:
        what = f"a {family.title} cannot be bundled: {family.without_bundle}"
        findings.append(Finding("error", what, "export its transformer alone: fbqat_hub.export.export_htp"))
    return findings


def diagnose_model(transformer: nn.Module) -> list[Finding]:
    """What stands in the way of exporting `transformer`, from its modules alone: nothing is traced."""
    name = type(transformer).__name__
    try:
        family = family_of_denoiser(name)
    except ValueError as error:
        return [Finding("error", str(error), "export a pipeline of one of these families")]
    layers = dict(named_layers(transformer, PackedLayer))
    if not layers:
        return [Finding("error", f"{name} has no packed layer", "quantize it first: fbqat convert, or fbqat train")]
    findings = []
    grouped = [key for key, layer in layers.items() if layer.weight_scale.ndim != 1]
    if grouped:
        findings.append(
            Finding(
                "error", f"{len(grouped)} layers have per-group scales, e.g. {grouped[0]}", "use per_channel scales"
            )
        )
    try:
        family.check_graph(transformer)
    except ValueError as error:
        findings.append(Finding("error", str(error)))
    missing = [key for key, layer in layers.items() if layer.input_scale is None]
    if missing:
        findings.append(
            Finding(
                "warning",
                f"{len(missing)} of {len(layers)} layers have no static activation range of their training",
                "the export calibrates them; better: a recipe with quantization: {activation_range: static}",
            )
        )
    size = graph_bytes(transformer)
    blocks = family.blocks(transformer)
    graphs = 1 if size < MAX_GRAPH_BYTES else math.ceil(size / (0.9 * MAX_GRAPH_BYTES))
    if graphs > 1:
        findings.append(
            Finding(
                "error",
                f"the graph needs {size / 2**30:.2f} GiB of constants; one context holds less than 2 GiB",
                f"split it into {graphs} graphs of up to {math.ceil(len(blocks) / graphs)} blocks: "
                f"fbqat export --graphs {graphs}",
            )
        )
    else:
        findings.append(Finding("ok", f"the graph needs {size / 2**20:.1f} MiB of constants, under the limit of 2 GiB"))
    weights = sum(4 * layer.in_features * layer.out_features for layer in layers.values()) / graphs
    needed = _HOST_COPIES * weights / 2**30 + 0.9
    findings.append(Finding("ok", f"the export will take about {needed:.1f} GiB of this computer's memory"))
    if weights * graphs > 4 * _SLOW_TO_EMULATE:
        findings.append(
            Finding(
                "warning",
                "a forward on the emulator takes minutes at this size, and a picture hours",
                "compare one forward only: fbqat export --quick",
            )
        )
    return findings


def diagnose_bundle(folder: Path, target: Target) -> list[Finding]:
    """Whether a bundle is whole, and for `target`.

    Raises:
        ExportError: the folder has no manifest.
        ValueError: the manifest is none of a bundle.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise ExportError(f"{folder} is no bundle: it has no manifest.json; fbqat export makes one")
    manifest = read_json(path)
    known = isinstance(manifest, dict) and _has(manifest.get("target"), "soc", "title") and "qnn_sdk_build" in manifest
    files = manifest.get("files") if known else None
    if not isinstance(files, dict) or not all(_has(each, "sha256", "bytes") for each in files.values()):
        raise ValueError(
            f"{path} is none of a bundle: it lacks files, target or qnn_sdk_build, or one of them is not as exported; "
            "export the run again."
        )
    findings = []
    for name, described in files.items():
        file = folder / name
        if not file.is_file():
            findings.append(Finding("error", f"{name} is missing", "copy the whole folder, or export again"))
        elif sha256(file) != described["sha256"]:
            cure = "copy or export it again: QNN loads a damaged binary without complaint"
            findings.append(Finding("error", f"{name} is damaged: its SHA-256 is not the manifest's", cure))
        elif name.endswith(".bin") and described["bytes"] >= MAX_GRAPH_BYTES:
            findings.append(
                Finding("error", f"{name} has {described['bytes']} bytes, 2 GiB or more", "split the graph")
            )
    asked = manifest["target"]
    if asked["soc"] != target.name:
        cure = f"export it again with --soc {target.name}: a context binary runs on the SoC it was compiled for"
        findings.append(Finding("error", f"the bundle is for {asked['title']} ({asked['soc']})", cure))
    if not findings:
        findings.append(Finding("ok", f"all {len(files)} files are as they were made, for {asked['title']}"))
    findings.append(
        Finding("ok", f"the phone needs the libraries of QNN {manifest['qnn_sdk_build']} or newer, all of one build")
    )
    return findings


def _has(described: Any, *keys: str) -> bool:
    return isinstance(described, dict) and set(keys) <= described.keys()
