"""What each method is: one object, complete. ``FBQAT``, the first one, is the default.

A recipe names its method. What it leaves out of the fields here is taken from the method's object when the recipe is
loaded, and is written out in the recipe that a run saves: a later version of this file changes no run that was made.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from fbqat_hub.checked import Amount, Count, Options, Texts, Whole, checked

# Where a run of training starts: at the nearest codes, or at GPTQ's (arXiv 2210.17323).
Initialization = Annotated[Literal["nearest", "gptq"], Field(description="nearest or gptq")]
Weighting = Annotated[Literal["none", "sampler"], Field(description="none or sampler")]
Width = Annotated[float, Field(strict=True, ge=2, le=16, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
PRESETS = ("constant", "paper", "integer", "simple")


@checked("recipe.quantization")
class Quantization:
    """What is stored, and how the scale of a weight is found.

    Attributes:
        weight_bits: of the stored codes. 3 is for experiments.
        average_bits: bits per weight on average, scales not counted: 8 for the layers that matter most to the output, 4
            for the others (`fbqat_hub.training.widths`). None: every layer has ``weight_bits``.
        group_size: inputs that share a scale, an even number; None for one scale per output channel, which is what the
            CPU kernel and the HTP take.
        weight_clip: "max_abs" (of the weight, at each forward), "mse" (least squared error) or "learned" (starts at
            "mse", then trained: LSQ, arXiv 1902.08153).
        activation_bits: 8 or 16; 32 leaves activations in float.
        activation_range: "per_token" or "per_tensor" (dynamic), or "static" (calibrated, what a phone needs).
        modules_to_not_convert: fnmatch patterns of modules that stay in float.
        module_overrides: pattern -> {"bits": 16} and/or {"range": ...} for activations; None is the family's own.
    """

    weight_bits: Annotated[int, Field(strict=True, ge=3, le=8, description="a whole number from 3 to 8")] = 4
    average_bits: Annotated[
        Annotated[float, Field(strict=True, ge=4, le=8)] | None, Field(description="a number from 4 to 8, or null")
    ] = None
    group_size: Annotated[
        Annotated[int, Field(strict=True, ge=2, multiple_of=2)] | None,
        Field(description="an even number of at least 2, or null"),
    ] = None
    weight_clip: Annotated[Literal["max_abs", "mse", "learned"], Field(description="max_abs, mse or learned")] = (
        "max_abs"
    )
    activation_bits: Annotated[Literal[8, 16, 32], Field(description="8, 16 or 32")] = 8
    activation_range: Annotated[
        Literal["per_token", "per_tensor", "static"], Field(description="per_token, per_tensor or static")
    ] = "per_token"
    modules_to_not_convert: Texts = Field(default_factory=list)
    module_overrides: Annotated[
        dict[str, Options] | None, Field(description="a mapping such as {proj_out: {bits: 16}}, or null")
    ] = None


@checked("recipe.gptq")
class GPTQ:
    """GPTQ initialisation.

    Attributes:
        samples: of the training split, that the inputs' second moments are taken over.
        damping: added to their diagonal, as a share of its mean.
        margin: how far inside its bin a weight is put, in steps of the grid.
    """

    samples: Count = 100
    damping: Annotated[Amount, Field(gt=0, le=1, description="a number above 0, at most 1")] = 0.01
    margin: Annotated[Amount, Field(le=0.5, description="a number from 0 to 0.5")] = 0.05


@checked("recipe.schedule")
class Schedule:
    """Bit width over training.

    Attributes:
        stages: (bit width, share of training) in order, the last one at the stored width. Or the name of such a list:
            "constant" (the stored width throughout), "paper" (8, 7, 6, 5.5, 5, 4.75, 4.5, 4.25, 4), "integer" (8, 7, 6,
            5, 4) or "simple" (16, 8, 4); a loaded recipe has the list.
    """

    stages: Annotated[
        list[tuple[Width, Share]] | Literal["constant", "paper", "integer", "simple"],
        Field(
            description="constant, paper, integer, simple, or a list of [bit width from 2 to 16, share of training "
            "above 0], e.g. [[8, 1], [4, 3]]"
        ),
    ] = "constant"


@checked("recipe.optimizer")
class Optimizer:
    """Adam, and the rule of its learning rates; the peak rate itself is the recipe's ``learning_rate``.

    Attributes:
        learning_rate_unit: "relative": a layer's weight and bias have the rate times the root mean square of the
            teacher's weight and sqrt(128 / the model's width) (`adam.relative_unit`), so that one rate suits any model.
            "absolute": the rate is that of all.
        learning_rate_schedule: "cosine" (to 0) or "constant", after the warm-up.
        warmup_steps: of a linear warm-up.
        clip_learning_rate: rate of the logarithm of learned clips, as a multiple of ``learning_rate``.
        weight_decay: of weights and biases, not of clips and scales.
        max_grad_norm: to which gradients are clipped; 0 leaves them.
        ewgs: strength of element-wise gradient scaling (arXiv 2104.00903); 0 is off.
        moment_bits: of Adam's two moments, 32, or 8 for a quarter of their memory, by torchao (arXiv 2110.02861).
    """

    learning_rate_unit: Annotated[Literal["relative", "absolute"], Field(description="relative or absolute")] = (
        "relative"
    )
    learning_rate_schedule: Annotated[Literal["cosine", "constant"], Field(description="cosine or constant")] = "cosine"
    warmup_steps: Whole = 20
    clip_learning_rate: Amount = 0.2
    weight_decay: Amount = 0.0
    max_grad_norm: Amount = 0.0
    ewgs: Amount = 0.0
    moment_bits: Annotated[Literal[8, 32], Field(description="8 or 32")] = 32


@checked("method")
class Method:
    """A method's whole definition; each field is the recipe's of the same name.

    Attributes:
        trains: False of a method that only quantizes.
        initialization: the codes that training starts from.
        gptq: how GPTQ finds them.
        quantization: the grid that is stored, and its clip.
        schedule: the widths on the way there.
        train_layers: a group of the family's layers; the others are quantized and frozen.
        loss_weighting: "none", or "sampler": an error counts by what the sampler makes of it at its timestep.
        optimizer: Adam and its rates.
    """

    trains: bool = True
    initialization: Initialization = "nearest"
    gptq: GPTQ = GPTQ()
    quantization: Quantization = Quantization()
    schedule: Schedule = Schedule()
    train_layers: str = "blocks"
    loss_weighting: Weighting = "none"
    optimizer: Optimizer = Optimizer()

    def fields(self) -> dict[str, Any]:
        """What a recipe takes over: all but ``trains``."""
        return {name: value for name, value in vars(self).items() if name != "trains"}


# This project's default. Every value stands here, for this is what it is.
FBQAT = Method(
    # Start: GPTQ's codes.
    initialization="gptq",
    gptq=GPTQ(samples=100, damping=0.01, margin=0.05),
    # Grid: 4 bits, one scale per output channel with a learned clip; INT8 activations per token.
    quantization=Quantization(
        weight_bits=4, group_size=None, weight_clip="learned", activation_bits=8, activation_range="per_token"
    ),
    # Widths: the 4-bit grid throughout.
    schedule=Schedule(stages="constant"),
    # Layers: those of the blocks.
    train_layers="blocks",
    # Loss: squared error, each sample by what the sampler makes of an error at its timestep.
    loss_weighting="sampler",
    # Adam: warm-up, then a cosine to 0; rates relative to the weights they move, and clips at a fifth of that.
    optimizer=Optimizer(
        learning_rate_unit="relative",
        learning_rate_schedule="cosine",
        warmup_steps=20,
        clip_learning_rate=0.2,
        weight_decay=0.0,
        max_grad_norm=0.0,
        ewgs=0.0,
        moment_bits=32,
    ),
)

# 4 bits from the start, max-abs scale: the vQAT of arXiv 2510.14823.
_VQAT = Method()
_MSE = Quantization(weight_clip="mse")

METHODS: dict[str, Method] = {
    "fbqat": FBQAT,
    "ptq-maxabs": replace(_VQAT, trains=False),
    "ptq-mse": replace(_VQAT, trains=False, quantization=_MSE),
    "ptq-gptq": replace(_VQAT, trains=False, quantization=_MSE, initialization="gptq"),
    "vqat": _VQAT,
    # vQAT with the scale learned, started from the clip of least squared error: LSQ, the strongest baseline
    "lsq-qat": replace(_VQAT, quantization=Quantization(weight_clip="learned")),
    "integer": replace(_VQAT, schedule=Schedule(stages="integer")),
    "simple": replace(_VQAT, schedule=Schedule(stages="simple")),
    # arXiv 2510.14823 as published: its widths, all layers, a constant rate. (Its rates, 1e-7 and 1e-6, are absolute.)
    "fbqat-paper": replace(
        _VQAT,
        schedule=Schedule(stages="paper"),
        train_layers="all",
        optimizer=Optimizer(learning_rate_schedule="constant", warmup_steps=0),
    ),
}
