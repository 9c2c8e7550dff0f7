"""What is asked of an export, refused before any work: first what needs no model, then what needs nothing but it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.folder import check_new
from fbqat_hub.export.htp.requirements import require_htp
from fbqat_hub.export.htp.targets import Target, targets_of
from fbqat_hub.export.onnx.float_graph import packed_layers
from fbqat_hub.export.onnx.precision import check_patterns
from fbqat_hub.families import Family, family_of, family_of_denoiser


def check_asked(output_dir: str | os.PathLike[str], soc: str | Sequence[str], **counts: int | None) -> list[Target]:
    """The targets, where everything that was asked for can be.

    Args:
        output_dir: must not exist, or be empty.
        soc: a key of `TARGETS`, or several.
        counts: by name, what must be a whole number of at least 1, or None where it may be left open.

    Raises:
        ExportError: the first that cannot be, with what is allowed.
        HTPUnavailableError: a needed package cannot be imported; says what to install.
    """
    targets = targets_of(soc)
    for name, value in counts.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ExportError(f"{name} is {value!r}; give 1 or more")
    check_new(output_dir)
    require_htp()
    return targets


def check_prompts(prompts: Sequence[str], pictures: int) -> None:
    """ExportError unless these are texts, and enough for so many pictures."""
    if isinstance(prompts, str) or not all(isinstance(each, str) for each in prompts):
        raise ExportError(f"prompts is {prompts!r:.80}; give a list of texts")
    if pictures > len(prompts):
        raise ExportError(f"pictures is {pictures}; give 1 to {len(prompts)}, as many as there are prompts")


def check_samples(target_db: float | None, samples: int) -> None:
    """ExportError where so few inputs of the denoiser cannot both set ranges and choose bits for ``target_db``."""
    if target_db is not None and samples < 2:
        raise ExportError(
            f"samples is {samples}; precision auto chooses bits on inputs that set no ranges, so give 2 or more"
        )


def check_tuning(steps: int, graphs: int) -> None:
    """ExportError unless the graph can be tuned for so many steps; 0 is none.

    Args:
        graphs: into how many the model is to be split.
    """
    if type(steps) is not int or steps < 0:
        raise ExportError(f"tune is {steps!r}; give a number of steps, e.g. 100, or 0 for none")
    if steps and graphs != 1:
        raise ExportError(f"tune is {steps} and graphs is {graphs}; only a model in one graph can be tuned")


def check_model(denoiser: Any, a16: Sequence[str] = (), graphs: int = 1) -> Family:
    """The family of a packed denoiser that can be exported.

    Args:
        a16: fnmatch patterns of its layers.
        graphs: into how many it is to be split.

    Raises:
        ValueError: a class without a family, or an option that its graph does not have.
        ExportError: no packed layer, one that has no graph, a pattern that matches nothing, or fewer blocks than
            graphs.
    """
    family = family_of_denoiser(type(denoiser).__name__)
    family.check_graph(denoiser)
    packed_layers(denoiser)
    check_patterns(denoiser, a16)
    blocks = len(family.blocks(denoiser))
    if graphs > blocks:
        raise ExportError(f"{graphs} graphs were asked for; the model has {blocks} blocks, so give 1 to {blocks}")
    return family


def check_bundle(
    pipeline: Any, a16: Sequence[str] = (), graphs: int = 1, call: Mapping[str, Any] | None = None
) -> Family:
    """The family of a pipeline that can be bundled for a phone.

    Args:
        call: arguments of the pipeline call.

    Raises:
        ValueError, ExportError: as `check_model` of its transformer; a pipeline of a family that has no bundle, or
            guidance that the runner does not compute.
    """
    check_model(pipeline.transformer, a16, graphs)
    family = family_of(type(pipeline).__name__)
    if family.without_bundle:
        raise ExportError(
            f"a {family.title} cannot be bundled: {family.without_bundle}. Its transformer alone can be exported: "
            "fbqat_hub.export.export_htp"
        )
    call = call or {}
    if call.get("num_images_per_prompt") not in (None, 1):
        raise ExportError(
            f"the call has num_images_per_prompt {call['num_images_per_prompt']}, and a bundle's runner makes one "
            "picture of a prompt; leave it out"
        )
    guides = call.get("true_cfg_scale", 1) > 1 and call.get("negative_prompt") is not None
    if guides or call.get("skip_guidance_layers"):
        raise ExportError(
            f"the call has {'true_cfg_scale' if guides else 'skip_guidance_layers'}, and a bundle's runner guides by "
            "guidance_scale alone; leave it out of the recipe's generation"
        )
    return family
