"""`manifest.json`, by which a bundle's runner and a phone's app find everything, and the bundle's README."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fbqat_hub.export.htp.targets import Target
from fbqat_hub.files import listing

FORMAT_VERSION = 1
_README = Path(__file__).parent / "runtime" / "README.md.in"


def denoiser_sections(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """The transformer's graphs by name, in order, from its section of the certificate."""
    parts: Mapping[str, Any] = section.get("parts", {"transformer": section})
    return parts


def write_manifest(
    folder: Path,
    certificate: Mapping[str, Any],
    settings: Mapping[str, Any],
    stages: Sequence[Mapping[str, Any]] | None,
    prompts: Sequence[str],
    text: Sequence[Mapping[str, Any]],
    target: Target,
) -> None:
    """`manifest.json` and `README.md` of everything else in `folder`.

    Args:
        settings: the sampler's (`host.host_parts`).
        stages: of a decoder that is cut at its group norms (`runtime.tiles.stage_map`).
        prompts: those whose inputs and noise are in the bundle.
        text: an entry for each text encoder (`text_bundle.build_text`); its `graphs` run in order, each fed by name.
    """
    from fbqat_hub.export.htp.compiler import provider_options
    from fbqat_hub.export.onnx.split import describe_chain

    readme = _README.read_text(encoding="utf-8")
    for key in ("title", "soc", "htp_arch"):
        readme = readme.replace(f"@{key}@", str(certificate["asked"][key]))
    readme = readme.replace("@sdk@", certificate["read_back"]["qnn_sdk_build"])
    (folder / "README.md").write_text(readme, encoding="utf-8")
    denoiser, tiles = denoiser_sections(certificate), certificate["decoder_tiles"]
    manifest = {
        "format_version": FORMAT_VERSION,
        "target": certificate["asked"],
        "qnn_sdk_build": certificate["read_back"]["qnn_sdk_build"],
        "provider_options": provider_options(target),
        "graphs": {
            name: {"context": f"{name}.onnx", "binary": f"{name}.bin", **section["tensors"]}
            for name, section in {**denoiser, **certificate["graphs"]}.items()
        },
        "denoiser": describe_chain({name: section["tensors"] for name, section in denoiser.items()}),
        "sampler": dict(settings),
        "decoder_tiles": {name: tiles[name] for name in ("size", "overlap")} if tiles and not stages else None,
        "decoder_stages": stages,
        "prompts": list(prompts),
        "text": list(text),
        "tuning": certificate["tuning"],
        "text_left_out": certificate["text_left_out"],
        "files": listing(folder),
        "ran_on": certificate["ran_on"],
        "never_ran_on": certificate["never_ran_on"],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
