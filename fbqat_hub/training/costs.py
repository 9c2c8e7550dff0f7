"""What a run costs, from its recipe and its teacher's configs alone: parameters, memory, disk."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fbqat_hub.families import get_family
from fbqat_hub.training.bases import Configs, build_on_meta, configs_of, parameters
from fbqat_hub.training.block_footprint import BlockMemory, block_memory
from fbqat_hub.training.captioned import captions_in
from fbqat_hub.training.dataset import SEEDS, folder_of, source_of
from fbqat_hub.training.fit import other_bytes, packed_size
from fbqat_hub.training.footprint import StepMemory, step_memory
from fbqat_hub.training.prompts import PROMPT_SETS, training_prompts
from fbqat_hub.training.recipe import Recipe
from fbqat_hub.training.states import STEPS
from fbqat_hub.training.student import check_layers

# Two checkpoints are kept while the third is written.
_CHECKPOINTS = 3
_HALF = 2
# Of the largest block there are at once: its weights, the buffer they came in and the next one's; its gradients, and
# the buffer they leave in. What is in no block stays whole, of teacher and student.
_WHOLE_BLOCKS, _WHOLE_OUTSIDE = 5, 2


@dataclass(frozen=True)
class Costs:
    """Of a run of ``recipe``.

    Attributes:
        parameters: component -> number.
        captions, pictures: of the data, or prompts and what the sampler makes of them; None where they cannot be
            counted without loading them.
        embeddings, latents: bytes on disk of a caption, at most, and of a picture.
        packed: bytes of the quantized denoiser.
        others: bytes of the other parts of the finished pipeline.
        devices: that share each batch, end to end.
    """

    recipe: Recipe
    parameters: Mapping[str, int]
    captions: int | None
    pictures: int | None
    embeddings: int
    latents: int
    packed: int
    others: int
    devices: int = 1

    @property
    def share(self) -> int:
        """Samples of a step on each device."""
        return -(-self.recipe.batch_size // self.devices)

    @property
    def at_once(self) -> int:
        """Samples that a device takes at a time."""
        return min(self.share, self.recipe.micro_batch_size or self.share)

    @functools.cached_property
    def memory(self) -> StepMemory:
        """Of an end-to-end step, on each device."""
        recipe = replace(self.recipe, batch_size=self.share, micro_batch_size=self.at_once)
        return step_memory(recipe, configs_of(recipe.teacher))

    @functools.cached_property
    def memory_of_one(self) -> StepMemory:
        """The same with a batch of one."""
        return step_memory(self.recipe, configs_of(self.recipe.teacher), 1)

    @functools.cached_property
    def _largest_and_outside(self) -> tuple[int, int]:
        """Parameters of the denoiser's largest block, and of what is in none."""
        denoiser = build_on_meta(configs_of(self.recipe.teacher)["transformer"])
        names = get_family(self.recipe.family).blocks(denoiser)
        blocks = [sum(each.numel() for each in denoiser.get_submodule(name).parameters()) for name in names]
        return max(blocks), sum(each.numel() for each in denoiser.parameters()) - sum(blocks)

    @functools.cached_property
    def shared_out(self) -> int:
        """Bytes of an end-to-end step on each of the devices that share out every layer (FSDP2), about."""
        memory, (largest, outside) = self.memory, self._largest_and_outside
        # gradients are as the masters, and what is not trained each of the two has for itself
        kept = memory.teacher + 2 * memory.student + 2 * memory.frozen + memory.optimizer
        whole = 4 * (_WHOLE_BLOCKS * largest + _WHOLE_OUTSIDE * outside)
        return -(-kept // self.devices) + whole + memory.activations

    @property
    def on_each(self) -> int:
        """The same, or those of the largest component: while data is encoded one is there at a time."""
        return max(self.shared_out, 4 * self._most_parameters)

    @functools.cached_property
    def starting(self) -> int:
        """Bytes of the host's memory that a process takes with FSDP2 until its first step, at most, about."""
        recipe, (largest, outside) = self.recipe, self._largest_and_outside
        samples = max(recipe.calibration.samples, recipe.gptq.samples)
        alone = replace(
            recipe,
            batch_size=1,
            micro_batch_size=None,
            mixed_precision="no",
            blockwise=replace(recipe.blockwise, samples=samples, tuning_steps=0),
        )
        inputs = block_memory(alone, configs_of(recipe.teacher)).kept
        return 4 * 2 * (largest + outside) + inputs + (self.codes if recipe.quantization.average_bits else 0)

    @property
    def output(self) -> int:
        """Bytes of the finished pipeline."""
        return self.packed + self.others

    @property
    def encoding(self) -> int:
        """Bytes of the whole pipeline in float32, which is on the device while the data is encoded."""
        return 4 * sum(self.parameters.values())

    @property
    def largest_part(self) -> int:
        """Bytes of the largest component, which alone is on the device while block-wise data is made, in the precision
        of training. The denoiser is there only to make pictures of prompts."""
        return number_bytes(self.recipe) * self._most_parameters

    @property
    def _most_parameters(self) -> int:
        """Of the components that encode."""
        sampled = "prompts" in self.recipe.dataset
        return max((count for name, count in self.parameters.items() if sampled or name != "transformer"), default=0)

    @functools.cached_property
    def blocks(self) -> BlockMemory:
        """Of block-wise training."""
        return block_memory(self.recipe, configs_of(self.recipe.teacher))

    @property
    def codes(self) -> int:
        """Bytes of the denoiser at 4 bits, in the host's memory while widths are chosen."""
        return self.parameters["transformer"] // 2

    @property
    def tuning(self) -> int:
        """Bytes of the last stage of block-wise training, on the device; 0 if there is none."""
        return self.blocks.tuning + self.packed if self.blocks.tuning else 0

    @property
    def download(self) -> int:
        """Bytes of the teacher, stored in half precision."""
        return _HALF * sum(self.parameters.values())

    @property
    def checkpoints(self) -> int:
        """Bytes of all that are there at once."""
        recipe = self.recipe
        if recipe.training == "blockwise":  # the finished blocks, and then those of the tuning
            saved = 0 < recipe.save_every < recipe.blockwise.tuning_steps
            return self.packed * (1 + (_CHECKPOINTS if saved else 0))
        one = self.memory.student + self.memory.frozen + self.memory.optimizer
        return _CHECKPOINTS * one if 0 < recipe.save_every < recipe.steps else 0

    def largest_micro_batch(self, budget: int) -> int:
        """The most samples at a time, a power of two or all of a device, with which a step takes at most so many bytes.

        0 if not even one does.
        """
        if self.memory.peak <= budget or self.at_once == 1:
            return self.at_once if self.memory.peak <= budget else 0
        one, two = (replace(self, recipe=replace(self.recipe, micro_batch_size=size)).memory.peak for size in (1, 2))
        if one > budget:
            return 0
        fits = 1 + int((budget - one) / (two - one)) if two > one else self.at_once
        return int(2 ** math.floor(math.log2(min(fits, self.at_once))))


def costs(recipe: Recipe) -> Costs:
    """What a run costs; no weights are needed, and of a teacher on the Hub only its configs.

    Raises:
        ValueError: a method that does not train, or as `check_layers`.
        HubError: a teacher that is not known here and cannot be looked up.
    """
    check_trains(recipe)
    configs, counts = configs_of(recipe.teacher), parameters(recipe.teacher)
    check_layers(recipe, build_on_meta(configs["transformer"]))
    embeddings, latents = cached_bytes(recipe, configs)
    captions = _captions(recipe.dataset)
    return Costs(
        recipe=recipe,
        parameters=counts,
        captions=captions,
        pictures=None if captions is None else captions * pictures_of_a_prompt(recipe),
        embeddings=embeddings,
        latents=latents,
        packed=packed_size(recipe).at(recipe.quantization.average_bits),
        others=other_bytes(recipe.teacher, recipe.text_encoders),
    )


def cached_bytes(recipe: Recipe, configs: Configs) -> tuple[int, int]:
    """What the cache keeps of a caption, at most, and of a picture."""
    family = get_family(recipe.family)
    whole = {name: build_on_meta(configs[name]).config for name in ("transformer", "vae")}
    shapes = family.conditioning_shapes(whole["transformer"], recipe.generation).values()
    width, kept = number_bytes(recipe), 1
    if "prompts" in recipe.dataset:
        kept = min(STEPS, family.sampler_steps(recipe.generation))
    return width * sum(map(math.prod, shapes)), kept * width * math.prod(family.latent_shape(whole, recipe.size))


def check_trains(recipe: Recipe) -> None:
    """Refuse a recipe whose method only quantizes."""
    if not recipe.steps:
        raise ValueError(f"method {recipe.method} does not train, so there is nothing to plan; take e.g. fbqat.")


def _captions(dataset: Mapping[str, Any]) -> int | None:
    source = PROMPT_SETS.get(source_of(dataset))
    if source:
        return min(source.rows, int(dataset.get("count") or source.rows))
    if "prompts" in dataset:
        return None if source_of(dataset) in PROMPT_SETS else sum(map(len, training_prompts(dataset).values()))
    folder: Path | None = folder_of(dataset)
    return captions_in(folder) if folder else None


def pictures_of_a_prompt(recipe: Recipe) -> int:
    """Pictures."""
    return int(recipe.dataset.get("seeds", SEEDS)) if "prompts" in recipe.dataset else 1


def number_bytes(recipe: Recipe) -> int:
    """Bytes of a number in the precision of training."""
    return _HALF if recipe.half else 4
