"""gradio: a page with pictures of a teacher and of its quantized student, side by side, from one prompt and seed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from PIL import Image

from fbqat_hub.extras import missing
from fbqat_hub.generation import changed_call, generate_pictures
from fbqat_hub.inputs import MAX_SEED, checked_device, seeds
from fbqat_hub.pictures import as_image
from fbqat_hub.pipelines import check_source, load_pipeline
from fbqat_hub.untrusted import read_yaml

_LONGEST_PROMPT = 1000
_MOST_STEPS = 50
_SHOWN = 320  # pixels a side on the page, at least about so many


@dataclass(frozen=True)
class Pair:
    """A packed pipeline and what it was made from.

    Attributes:
        title: as the menu shows it.
        student, teacher: folders or Hub ids.
        generation: arguments of the pipeline call, from the student's recipe.
        prompts: examples.
    """

    title: str
    student: str
    teacher: str
    generation: Mapping[str, Any]
    prompts: Sequence[str]


@dataclass(frozen=True)
class Generated:
    """What one pipeline generated.

    Attributes:
        image: of the size that the recipe asks for.
        seconds: of the call, text encoder and decoder included.
        mebibytes: of the denoiser's tensors, without what a kernel keeps beside them.
    """

    image: Image.Image
    seconds: float
    mebibytes: float


def open_pair(source: str, resolve: Callable[[str], str] = str) -> Pair:
    """The pair of a run's folder or a repository: its ``recipe.yaml`` names the teacher and how to generate.

    Args:
        source: folder or Hub id of a packed pipeline.
        resolve: the teacher's folder or Hub id by the name that the recipe gives it.

    Raises:
        FileNotFoundError: no such folder, or no recipe in it.
        ValueError: no pipeline, or a broken recipe.
    """
    check_source(source)
    folder = Path(source)
    path = folder / "recipe.yaml" if folder.is_dir() else Path(hf_hub_download(source, "recipe.yaml"))
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; it names the teacher. Give a folder that fbqat train or convert left."
        )
    recipe = read_yaml(path)
    if not isinstance(recipe, dict) or not all(isinstance(recipe.get(key), str) for key in ("name", "teacher")):
        raise ValueError(f"{path} lacks name or teacher; give a folder that fbqat train or convert left.")
    if recipe.get("lora"):
        raise ValueError(
            f"{source} was made with the adapter {recipe['lora']}, which this page does not load into the original. "
            "Merge it into a copy of the original, and convert that."
        )
    generation = dict(recipe.get("generation") or {})
    return Pair(recipe["name"], source, resolve(recipe["teacher"]), generation, list(recipe.get("prompts") or ()))


def generate_pair(
    pair: Pair, prompt: str, seed: int, steps: int, device: str | None = None
) -> tuple[Generated, Generated]:
    """What teacher and student make of the same prompt, seed and number of steps.

    Args:
        device: where networks run; a GPU if there is one and None is given.

    Raises:
        ValueError: an empty or too long prompt, a seed or number of steps out of range, or a device that is not there.
    """
    if not prompt.strip() or len(prompt) > _LONGEST_PROMPT:
        raise ValueError(f"the prompt has {len(prompt.strip())} characters; write 1 to {_LONGEST_PROMPT}.")
    seeds(seed, 1)
    if not 1 <= steps <= _MOST_STEPS:
        raise ValueError(f"{steps} steps were asked for; choose 1 to {_MOST_STEPS}.")
    call, on = pair.generation, checked_device(device)
    warm = json.dumps(dict(call))
    teacher, student = _pipeline(pair.teacher, on, warm), _pipeline(pair.student, on, warm)
    return _generate(teacher, prompt, seed, call, steps), _generate(student, prompt, seed, call, steps)


def app(pairs: Sequence[Pair], device: str | None = None) -> Any:
    """The page, a ``gradio.Blocks``; ``.launch()`` serves it.

    Args:
        device: as `generate_pair`.

    Raises:
        ImportError: gradio is not installed.
        ValueError: no pairs, two of one title, or a device that is not there.
    """
    try:
        import gradio  # an extra, and `open_pair` and `generate_pair` do without it
    except ImportError as error:
        raise missing(error, "the page") from error
    device = checked_device(device)

    by_title = {pair.title: pair for pair in pairs}
    if not pairs or len(by_title) < len(pairs):
        raise ValueError(
            f"models are {', '.join(pair.title for pair in pairs) or 'none'}; give one or more, once each."
        )

    def compare(title: str, prompt: str, seed: float, steps: float) -> tuple[Image.Image, str, Image.Image, str]:
        try:
            both = generate_pair(by_title[title], prompt, int(seed or 0), int(steps), device)
        except ValueError as error:
            raise gradio.Error(str(error)) from error
        teacher, student = both
        return _enlarged(teacher.image), _caption(teacher), _enlarged(student.image), _caption(student)

    def choose(title: str) -> tuple[str, Any]:
        pair = by_title[title]
        return next(iter(pair.prompts), ""), _steps(pair)

    first = pairs[0]
    with gradio.Blocks(title="fbqat_hub: teacher and quantized", analytics_enabled=False) as page:
        gradio.Markdown("# Teacher beside quantized\nBoth from the same prompt and seed.")
        title = gradio.Dropdown(list(by_title), value=first.title, label="model")
        prompt = gradio.Textbox(next(iter(first.prompts), ""), label="prompt", max_length=_LONGEST_PROMPT)
        with gradio.Row():
            seed = gradio.Number(0, label="seed", precision=0, minimum=0, maximum=MAX_SEED)
            steps = gradio.Slider(1, _MOST_STEPS, value=_steps(first), step=1, label="steps")
        button = gradio.Button("Generate both", variant="primary")
        outputs: list[Any] = []
        with gradio.Row():
            for label in ("teacher", "quantized"):
                with gradio.Column():
                    outputs += [
                        gradio.Image(label=label, type="pil", format="png", height=_SHOWN + 40),
                        gradio.Markdown(),
                    ]
        title.change(choose, [title], [prompt, steps])
        gradio.on([button.click, prompt.submit], compare, [title, prompt, seed, steps], outputs)
    return page


def _generate(pipeline: Any, prompt: str, seed: int, call: Mapping[str, Any], steps: int) -> Generated:
    changes = {"num_images_per_prompt": 1, "num_inference_steps": steps}
    arguments = changed_call(type(pipeline).__name__, call, changes)
    began = time.perf_counter()
    (picture,) = generate_pictures(pipeline, [prompt], arguments, [seed])
    seconds = time.perf_counter() - began
    size = sum(tensor.nbytes for tensor in pipeline.transformer.state_dict().values())
    return Generated(as_image(picture), seconds, size / 2**20)


@lru_cache(maxsize=4)
def _pipeline(source: str, device: str, warm: str) -> Any:
    """Loaded, and one step run with the arguments ``warm`` (JSON): a first call is slower than those after it."""
    pipeline = load_pipeline(source, torch.float32).to(device)
    _generate(pipeline, "warm", 0, json.loads(warm), 1)
    return pipeline


def _steps(pair: Pair) -> int:
    return min(int(pair.generation.get("num_inference_steps", 20)), _MOST_STEPS)


def _enlarged(image: Image.Image) -> Image.Image:
    """A small picture by a whole factor, each pixel as a square."""
    factor = max(1, _SHOWN // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _caption(generated: Generated) -> str:
    return f"weights of the denoiser: {generated.mebibytes:.2f} MiB; generated in {generated.seconds:.2f} s"
