"""What the float model's own sampler asks of the denoiser for some prompts, one block in memory at a time.

GPTQ needs inputs that the model meets in use. With prompts alone these are the latents that its sampler passes through.
The pictures of all prompts are made together: each sampler stops where the denoiser calls a block, and a block is read
once a step for all of them. Each picture starts from a noise of its own, and is not decoded.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from greenlet import getcurrent
from torch import nn

from fbqat_hub.components import read_index
from fbqat_hub.families import Family
from fbqat_hub.integrations.streamed import StreamedDenoiser
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.progress import Progress
from fbqat_hub.quantization.blocks import BlockWalk, check_calls, moved_tensors, outputs_of
from fbqat_hub.training.seeding import generator
from fbqat_hub.training.trajectories import kept_steps
from fbqat_hub.weights import stored_dtype

# Of a sampler that takes more: its first pictures are rough, and what goes into the denoiser is as in use.
_STEPS = 8


def open_sampler(folder: Any, denoiser: nn.Module, variant: str | None = None) -> Any:
    """The pipeline of a float folder around a denoiser that is at hand.

    Other models that are stored in float16, in which some overflow, are in float32, the rest as they are stored.
    """
    parts: dict[str, Any] = {"transformer": denoiser}
    for name, part in read_index(folder)[1].items():
        if part.is_model and name != "transformer":
            half = stored_dtype(part.weights(variant).files) == torch.float16
            parts[name] = part.load(torch.float32 if half else None, variant)
    return load_pipeline(folder, None, variant, **parts)


def sampled_inputs(
    pipeline: Any,
    family: Family,
    denoiser: StreamedDenoiser,
    prompts: Sequence[str],
    call: Mapping[str, Any],
    samples: int,
    *,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Keyword arguments of the denoiser's forward, with floats in float32, on the CPU.

    The pictures are of the first ``samples`` prompts. Of fewer prompts several steps of each picture are kept, at
    random places in equal parts of the sampler's steps; where the sampler guides by a second call, both calls.

    Args:
        pipeline: float, with ``denoiser.model`` as its transformer. Its text encoders are gone afterwards.
        prompts: at least one.
        call: arguments of the pipeline call. Without ``num_inference_steps`` it is 8, or the call's own default if
            that is less.

    Raises:
        ValueError: inputs of a block that are not finite, or as `BlockWalk`.
    """
    steps = call.get("num_inference_steps", min(_STEPS, family.sampler_steps(call)))
    used = list(prompts)[:samples]
    parts = math.ceil(samples / len(used))
    parameters = inspect.signature(denoiser.model.forward)
    found: list[list[dict[str, Any]]] = [[] for _ in used]
    running: dict[Any, tuple[int, Any, set[int]]] = {}
    with Progress("sample", steps, "step", shown=progress) as bar:

        def sample(index: int) -> None:
            random = generator("calibration picture", used[index], index)
            kept = set(kept_steps(steps, parts, random))
            own = _own(pipeline)
            running[getcurrent()] = index, own, kept
            own(prompt=used[index], generator=random, output_type="latent", **{**call, "num_inference_steps": steps})

        def record(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
            positional, named = moved_tensors((positional, named), dtype=torch.float32)
            index, own, kept = running[getcurrent()]
            step = getattr(own.scheduler, "step_index", None) or 0
            if step in kept:
                found[index].append(dict(parameters.bind(*positional, **named).arguments))
            if not index and step > bar_at[0]:
                bar.update(step - bar_at[0])
                bar_at[0] = step
            return positional, named

        bar_at = [0]
        hook = denoiser.model.register_forward_pre_hook(record, with_kwargs=True)
        try:
            with BlockWalk(denoiser.model, denoiser.names, range(len(used)), run=sample) as walk:
                _empty_text_encoders(pipeline)
                while walk.calls:
                    for name in denoiser.names:
                        check_calls(name, walk.calls)
                        block = denoiser.block(name).to(device)
                        walk.advance(outputs_of(block, walk.calls, device))
                        del block
        finally:
            hook.remove()
        bar.update(steps - bar_at[0])
    return [inputs for of_prompt in found for inputs in of_prompt]


def _own(pipeline: Any) -> Any:
    """The pipeline for one of several calls that run by turns: what a call changes is its own."""
    own = copy.copy(pipeline)
    own.scheduler = copy.deepcopy(pipeline.scheduler)
    cpu = torch.device("cpu")  # a pipeline takes the device of its models, which are on the meta device
    own.__class__ = type(type(own).__name__, (type(own),), {"_execution_device": cpu, "device": cpu})
    own.set_progress_bar_config(disable=True)
    return own


def _empty_text_encoders(pipeline: Any) -> None:
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and name.startswith("text_encoder"):
            part.to("meta")
