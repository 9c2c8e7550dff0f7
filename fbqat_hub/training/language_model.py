"""Quantization-aware training of a language model of transformers, e.g. Gemma-2 (arXiv 2510.14823, appendix B).

    python -m fbqat_hub.training.language_model google/gemma-2-2b-it --texts lines.txt --output gemma-w4a8

The method is that of the denoisers, by the same functions: the student starts at GPTQ's codes (or falls through the
published widths, --method fbqat-paper) and learns what the full-precision model predicts, here the distribution of the
next token: the loss is the Kullback-Leibler divergence of the two, as in LLM-QAT (arXiv 2305.17888). No labels are
needed. Every tenth line is held out, to measure before and after. An output head that is tied to the embedding stays in
float with it. What is saved, transformers loads once fbqat_hub is imported: docs/text-encoders.md.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from fbqat_hub.components import INDEX
from fbqat_hub.config import FBQATConfig
from fbqat_hub.files import whole
from fbqat_hub.inputs import check_new, checked_device, model_source, read_prompts
from fbqat_hub.integrations.transformers import attach, tied_layers
from fbqat_hub.pipelines import is_folder
from fbqat_hub.progress import Progress
from fbqat_hub.quantization import BitSchedule, FakeQuantizedLinear, convert, gptq_initialize, named_layers, prepare
from fbqat_hub.training.adam import optimizer_of
from fbqat_hub.training.loop import set_step
from fbqat_hub.training.method import METHODS, Method, Optimizer
from fbqat_hub.training.recipe import config_of
from fbqat_hub.training.seeding import generator

# One line of so many is held out.
HELD_OUT = 10
# What holds a tokenizer's vocabulary; without it transformers makes an empty one up.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")

Example = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How a student is trained.

    Attributes:
        method: its start, grid, widths and optimizer; ``METHODS`` has them.
        steps: updates, of ``batch_size`` lines each.
        learning_rate: its peak, relative to each layer's weights (`method.Optimizer`).
        seed: of the lines that each step takes.
    """

    method: Method = METHODS["fbqat"]
    steps: int = 400
    batch_size: int = 8
    learning_rate: float = 1.3e-3
    seed: int = 0

    @property
    def optimizer(self) -> Optimizer:
        """The method's."""
        return self.method.optimizer


def encode(tokenizer: Any, texts: Sequence[str], tokens: int) -> list[Example]:
    """``input_ids`` and ``attention_mask`` [1, at most ``tokens``] of each text that has a next token to predict."""
    found = [tokenizer(text, truncation=True, max_length=tokens, return_tensors="pt") for text in texts]
    return [
        {name: each[name] for name in ("input_ids", "attention_mask")} for each in found if each.input_ids.numel() > 1
    ]


def joined(examples: Sequence[Example]) -> Example:
    """A batch, padded on the right to the longest, where nothing attends to it and no loss is taken."""
    longest = max(each["input_ids"].shape[1] for each in examples)
    return {
        name: torch.cat([F.pad(each[name], (0, longest - each[name].shape[1])) for each in examples])
        for name in ("input_ids", "attention_mask")
    }


def divergence(student: nn.Module, teacher: nn.Module, batch: Example) -> Tensor:
    """Mean over tokens of KL(teacher, student) of the next token's distribution, in nats; a scalar, fp32."""
    with torch.no_grad():
        wanted = F.log_softmax(teacher(**batch).logits.float(), -1)
    given = F.log_softmax(student(**batch).logits.float(), -1)
    each = F.kl_div(given, wanted, log_target=True, reduction="none").sum(-1)
    mask = batch["attention_mask"].to(each.dtype)
    return (each * mask).sum() / mask.sum()


@torch.no_grad()
def held_out_divergence(student: nn.Module, teacher: nn.Module, examples: Sequence[Example]) -> float:
    """``divergence`` of each line alone, averaged."""
    return statistics.fmean(divergence(student, teacher, each).item() for each in examples)


def started(teacher: Any, method: Method, examples: Sequence[Example]) -> Any:
    """A student at the codes that its training starts from, its quantized layers trainable.

    Raises:
        ValueError: the method chooses widths, or calibrates static ranges, which needs a denoiser.
    """
    scheme = method.quantization
    if scheme.average_bits is not None or scheme.activation_range == "static":
        raise ValueError("average_bits and static ranges are for denoisers; leave them out for a language model.")
    config = _config(teacher, method)
    student = copy.deepcopy(teacher).requires_grad_(False)
    prepare(student, config.weight_scheme(), **config.layer_options())
    if method.initialization == "gptq":
        options = asdict(method.gptq)
        chosen = examples[: options.pop("samples")]
        gptq_initialize(student, lambda: chosen, **options)
    for _, layer in named_layers(student, FakeQuantizedLinear):
        layer.requires_grad_(True)
    return student


def _config(model: Any, method: Method) -> FBQATConfig:
    """What is written of a method: its grid; an output head that is tied to the embedding stays in float."""
    return config_of(method.quantization, left_out=tied_layers(model))


def distil(
    student: Any, teacher: nn.Module, examples: Sequence[Example], how: Distillation, *, shown: bool = True
) -> None:
    """Train a student (`started`) in place, to the end of its method's widths.

    Raises:
        FloatingPointError: the loss is not finite.
        ValueError: so few steps that none is at the method's last width.
    """
    scheme, stages = how.method.quantization, how.method.schedule.stages
    schedule = BitSchedule.preset(stages, scheme.weight_bits) if isinstance(stages, str) else BitSchedule(stages)
    schedule.check_steps(how.steps)
    optimizer = optimizer_of(how, student, teacher)
    with Progress("train", how.steps, "step", shown=shown) as bar:
        for step in range(how.steps):
            line = set_step(how, schedule, student, optimizer, step)
            chosen = torch.randint(len(examples), (how.batch_size,), generator=generator(how.seed, "lines", step))
            loss = divergence(student, teacher, joined([examples[index] for index in chosen]))
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"the loss is {loss.item()} at step {line.step}; lower --learning-rate.")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            bar.update(loss=f"{loss.item():.2e}", bits=f"{line.bit_width:g}")


def quantize(
    source: str,
    texts: Sequence[str],
    output: Path,
    how: Distillation,
    *,
    tokens: int = 256,
    device: str | None = None,
    revision: str | None = None,
    shown: bool = True,
) -> tuple[float, float]:
    """Train the W4A8 form of a causal language model, and save it with its tokenizer.

    Args:
        source: folder or Hub id of a float model with weights in safetensors.
        texts: lines to learn from; every tenth is held out.
        output: new or empty folder.
        tokens: the most of a line.
        device: of teacher and student, float32; a GPU if there is one and None is given.
        revision: of the Hub's repository.

    Returns:
        The held-out divergence before training and after, nats a token.

    Raises:
        FileExistsError: ``output`` has content.
        FileNotFoundError: ``source`` is neither a folder nor in the form of a Hub id.
        ValueError: too few texts, or a folder of something else, without a tokenizer, or of a quantized model.
        FloatingPointError: as `distil`.
    """
    check_new(output)
    if is_folder(source):
        _check_folder(Path(source))
    place = torch.device(checked_device(device))
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=revision)
    teacher: Any = transformers.AutoModelForCausalLM.from_pretrained(
        source, revision=revision, dtype=torch.float32, use_safetensors=True
    )
    teacher = teacher.to(place).eval().requires_grad_(False)
    examples = [{name: value.to(place) for name, value in each.items()} for each in encode(tokenizer, texts, tokens)]
    if len(examples) < HELD_OUT:
        raise ValueError(f"there are {len(examples)} lines of two tokens and more; give at least {HELD_OUT}.")
    held_out = examples[::HELD_OUT]
    examples = [each for number, each in enumerate(examples) if number % HELD_OUT]
    student = started(teacher, how.method, examples)
    before = held_out_divergence(student, teacher, held_out)
    distil(student, teacher, examples, how, shown=shown)
    after = held_out_divergence(student, teacher, held_out)
    convert(student)
    attach(student, _config(teacher, how.method))
    with whole(output) as partial:
        student.cpu().save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return before, after


def _check_folder(folder: Path) -> None:
    """Raise ValueError for a folder that is not that of a model with its tokenizer."""
    if (folder / INDEX).is_file():
        raise ValueError(f"{folder} is a diffusers pipeline; give the folder of a language model.")
    for what, names in (("config", ("config.json",)), ("tokenizer", _TOKENIZERS)):
        if not any((folder / name).is_file() for name in names):
            raise ValueError(f"{folder} has no {what}: none of {', '.join(names)}.")


def main(arguments: list[str] | None = None) -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(
        prog="python -m fbqat_hub.training.language_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Distillation()
    parser.add_argument("model", type=model_source, help="folder or Hub id of a causal language model")
    parser.add_argument("--texts", type=Path, required=True, metavar="FILE", help="text file, a sample on each line")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the packed model")
    trained = [name for name, method in METHODS.items() if method.trains]
    parser.add_argument("--method", choices=trained, default="fbqat", help="default: fbqat")
    parser.add_argument("--steps", type=int, default=default.steps, help=f"default: {default.steps}")
    parser.add_argument("--batch-size", type=int, default=default.batch_size, help=f"default: {default.batch_size}")
    parser.add_argument(
        "--learning-rate", type=float, default=default.learning_rate, help=f"default: {default.learning_rate:g}"
    )
    parser.add_argument("--tokens", type=int, default=256, help="the most of a line (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps or xpu (default: a GPU if any)")
    parser.add_argument("--revision", help="of the Hub's repository")
    options = parser.parse_args(arguments)
    for name, least in (("steps", 1), ("batch_size", 1), ("tokens", 2)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least {least}.")
    if not 0 < options.learning_rate < math.inf:
        parser.error(f"--learning-rate is {options.learning_rate}; it must be above 0.")
    how = Distillation(
        method=METHODS[options.method],
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )
    try:
        before, after = quantize(
            options.model,
            read_prompts(options.texts),
            options.output,
            how,
            tokens=options.tokens,
            device=options.device,
            revision=options.revision,
        )
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"{parser.prog}: error: {error}")
    print(
        f"saved {options.output}; held-out divergence {before:.4f} before training and {after:.4f} after, nats a token"
    )


if __name__ == "__main__":
    main()
