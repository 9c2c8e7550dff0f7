"""Quantization without training: a float pipeline to a packed one, a tensor at a time, or a block at a time (GPTQ)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fbqat_hub.components import Component, read_index
from fbqat_hub.config import FBQATConfig
from fbqat_hub.families import Family, family_of
from fbqat_hub.generation import changed_call
from fbqat_hub.inputs import check_new, checked_device
from fbqat_hub.integrations.checkpoint import packed_layers, targets_of
from fbqat_hub.integrations.convert_files import Read, Save, checked_tensors, convert_files
from fbqat_hub.integrations.streamed import StreamedDenoiser
from fbqat_hub.integrations.transformers import text_encoder_writers
from fbqat_hub.pipelines import (
    PARTIAL,
    check_source,
    class_of,
    copy_parts,
    downloaded,
    load_pipeline,
    pinned,
    replacing,
)
from fbqat_hub.progress import Progress
from fbqat_hub.quantization.gptq_blocks import gptq_blocks
from fbqat_hub.quantization.sensitivity import nearest_errors
from fbqat_hub.quantization.sensitivity_blocks import block_sensitivity
from fbqat_hub.quantization.widths import WIDTHS, widths_of_average
from fbqat_hub.training.fit import Fit, PackedSize, average_that_fits, other_bytes
from fbqat_hub.training.generate import shipped_call
from fbqat_hub.training.lora_merge import Lora, Merge, pinned_adapter
from fbqat_hub.training.method import METHODS
from fbqat_hub.training.recipe import Recipe
from fbqat_hub.training.sampled import open_sampler, sampled_inputs
from fbqat_hub.training.teachers import resolve_teacher
from fbqat_hub.untrusted import read_json
from fbqat_hub.weights import stored_dtype

# Inputs of the denoiser that widths are chosen by, of those that were sampled; the standard error of a layer's score is
# about sqrt(2 / 32) of it, 25%.
SCORED = 32


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """GPTQ's codes for what the sampler asks of the denoiser (`fbqat_hub.training.sampled`).

    Attributes:
        prompts: of the pictures; a few dozen are enough.
        samples: inputs of the denoiser that are kept, and that memory holds at every block.
        device: where a block is run; a GPU if there is one and None is given.
    """

    prompts: Sequence[str]
    samples: int = METHODS["ptq-gptq"].gptq.samples
    device: str | None = None


def convert_pipeline(
    source: str,
    output: Path,
    settings: Mapping[str, Any] | None = None,
    variant: str | None = None,
    *,
    text_encoders: str | None = None,
    fit: Fit | None = None,
    gptq: Calibrated | None = None,
    lora: Lora | None = None,
    call: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Path:
    """Quantize the denoiser of a float pipeline to W4A8 as it is read, and save the whole pipeline.

    Memory does not grow with the denoiser: each weight is read, packed and written before the next, and the other parts
    are copied as files. Of a text encoder that is quantized the packed weights are in memory. All is checked before:
    each part by its class without its numbers, patterns against the denoiser's layers.

    For GPTQ memory holds the text encoders and the autoencoder, then a block in float32 and what goes into and comes
    out of it for all samples. Widths of an average are then chosen by their effect on the output
    (`quantization.sensitivity_blocks`), for which memory holds what goes into every block of one sample and the
    backward pass of one block; without GPTQ, by the weights alone.

    Args:
        source: folder or Hub id of a float pipeline.
        output: new or empty folder.
        settings: fields of ``FBQATConfig``, without ``weight_granularity``, which follows from ``group_size``.
        variant: of the source's weights, e.g. "fp16"; see ``Component.weights``.
        text_encoders: "w8a8", "w8", "w4a8" or "w4": their weights and activations (`integrations.transformers`); None
            copies them.
        fit: what the result is to fit; finds ``average_bits``.
        gptq: GPTQ's codes in place of the nearest ones; its clip is "mse".
        lora: an adapter that is merged into each weight in float32 before it is quantized.
        call: arguments of the pipeline call that GPTQ samples with and that the result's recipe keeps, beside those of
            ``Family.own_call`` and, for a teacher that ships, those of its recipe.
        progress: show a bar, or a line now and then.

    Raises:
        FileExistsError: ``output`` has content.
        ValueError: ``source`` is no whole pipeline, is of no supported family, is quantized already, or holds a tensor
            that is not finite; it does not fit at 4 bits; no prompts, or activations that are not finite, named with
            their block; or as `lora_merge.Merge`.
    """
    if gptq is not None and (settings or {}).get("weight_clip", "mse") != "mse":
        raise ValueError("GPTQ needs scales that stay: with --method gptq the clip is mse.")
    if gptq is not None and not gptq.prompts:
        raise ValueError("no prompts; give at least one to calibrate on.")
    device = checked_device(gptq.device) if gptq else "cpu"
    check_new(output, ignored=PARTIAL)
    teacher = resolve_teacher(source)
    check_source(teacher, variant)
    family = family_of(class_of(teacher))  # before the whole of it is downloaded
    options = {"module_overrides": family.activation_overrides, **(settings or {})}
    if options.get("group_size") is not None:
        options["weight_granularity"] = "per_group"
    config = FBQATConfig(**options)
    folder = downloaded(teacher, variant)
    denoiser = read_index(folder)[1]["transformer"]
    if "quantization_config" in read_json(denoiser.folder / "config.json"):
        raise ValueError(f"{source} is quantized already; give the full-precision pipeline.")
    pipeline = load_pipeline(folder, variant=variant, meta=True)
    packed_layers(pipeline.transformer, config)
    if fit:
        if config.average_bits is not None:
            raise ValueError("average_bits and fit are both given; fit finds the average, so leave one of them out.")
        size = PackedSize.of(pipeline.transformer, config, stored_dtype(denoiser.weights(variant).files))
        average = average_that_fits(fit, size, other_bytes(str(folder), text_encoders, variant), text_encoders)
        settings = {**(settings or {}), "average_bits": average}
        config = FBQATConfig(**options, average_bits=average)
    whole_call = changed_call(
        family.pipeline_class,
        {**family.own_call(pipeline), **shipped_call(Path(teacher), family)},
        call or {},
    )
    fields: dict[str, Any] = {
        "name": output.resolve().name,
        "family": family.name,
        "teacher": pinned(source, folder),
        "method": "ptq-gptq" if gptq else "ptq-maxabs" if options.get("weight_clip") == "max_abs" else "ptq-mse",
        "quantization": dict(settings or {}),
        "text_encoders": text_encoders,
        "generation": whole_call,
        "evaluation": {"inference_steps": family.sampler_steps(whole_call)},
    }
    if gptq:
        fields |= {"gptq": {"samples": gptq.samples}, "calibration_prompts": len(gptq.prompts[: gptq.samples])}
    if lora:
        fields |= {"lora": pinned_adapter(lora.adapter), "lora_scale": float(lora.scale)}
    recipe = Recipe(**fields)
    merge = Merge(pipeline, lora) if lora else None
    writers = text_encoder_writers(folder, text_encoders)
    parts = [part for part in read_index(folder)[1].values() if part.is_model]
    del pipeline
    sizes = [path.stat().st_size for part in parts for path in part.weights(variant).files]
    with replacing(output) as partial, Progress("convert", sum(sizes), "B", shown=progress) as bar:
        bar.stage("copy")
        copy_parts(folder, partial, variant, bar.update, instead=writers)
        bar.stage("quantize")
        pack = _GPTQ(folder, denoiser, family, recipe, variant, gptq, device, progress) if gptq else None
        if pack and config.average_bits is not None:
            config = pack.with_widths(config, checked_tensors(denoiser, variant, merge))
        convert_files(denoiser, config, partial / "transformer", variant, done=bar.update, change=merge, pack=pack)
        recipe.save(partial / "recipe.yaml")
    return output


@dataclass(frozen=True)
class _GPTQ:
    """What finds the codes, as `convert_files` takes it."""

    folder: Path
    denoiser: Component
    family: Family
    recipe: Recipe
    variant: str | None
    given: Calibrated
    device: str
    progress: bool
    _inputs: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, config: FBQATConfig, read: Read, save: Save) -> None:
        streamed = StreamedDenoiser(self.denoiser, self.family.blocks, read)
        inputs = self._sampled(streamed)
        with Progress("quantize blocks", len(streamed.names), "block", shown=self.progress) as bar:
            gptq_blocks(
                streamed.model,
                streamed.names,
                inputs,
                targets_of(streamed.model, config),
                config.weight_scheme(),
                load=streamed.block,
                save=save,
                done=bar.update,
                damping=self.recipe.gptq.damping,
                device=self.device,
            )

    def with_widths(self, config: FBQATConfig, read: Read) -> FBQATConfig:
        """The config with widths of its average, by the effect of nearest rounding on what the sampler asks for."""
        assert config.average_bits is not None
        streamed = StreamedDenoiser(self.denoiser, self.family.blocks, read)
        inputs = self._sampled(streamed)
        scored = spread(inputs, SCORED)
        chosen = targets_of(streamed.model, config)
        with Progress("choose widths", len(scored), "sample", shown=self.progress) as bar:
            scores = block_sensitivity(
                streamed.model,
                streamed.names,
                scored,
                chosen,
                nearest_errors(config.weight_scheme(), WIDTHS),
                self.family.predict,
                load=streamed.block,
                device=self.device,
                done=bar.update,
            )
        widths = widths_of_average(
            scores, {each.names[0]: each.layer.weight.numel() for each in chosen}, config.average_bits
        )
        return config.with_widths({name: widths[each.names[0]] for each in chosen for name in each.names})

    def _sampled(self, streamed: StreamedDenoiser) -> list[dict[str, Any]]:
        """Inputs of the denoiser, sampled once."""
        if not self._inputs:
            found = sampled_inputs(
                open_sampler(self.folder, streamed.model, self.variant),
                self.family,
                streamed,
                self.given.prompts,
                self.recipe.generation,
                self.given.samples,
                device=self.device,
                progress=self.progress,
            )
            self._inputs.extend(found)
        return self._inputs


def spread(inputs: Sequence[Any], count: int) -> list[Any]:
    """So many of them, at even distances; all, if there are fewer.

    >>> spread("abcdefg", 3), spread("ab", 3)
    (['a', 'c', 'e'], ['a', 'b'])
    """
    return [inputs[index * len(inputs) // count] for index in range(count)] if len(inputs) > count else list(inputs)
