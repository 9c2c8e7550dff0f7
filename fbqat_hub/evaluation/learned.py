"""Metrics that need a published network: each by its own library, with its own weights, imported when it is used.

| metric | library | weights |
|---|---|---|
| FID | clean-fid: resizing and Inception (Parmar et al. 2022) | inception-2015-12-05.pt |
| CLIP-FID | transformers: CLIP ViT-B/32 image embeddings, as in clean-fid | openai/clip-vit-base-patch32 |
| CLIP score | transformers: CLIP ViT-L/14 (Hessel et al. 2021, times 100) | openai/clip-vit-large-patch14 |
| CLIP-IQA | piq (Wang et al. 2023) | piq's CLIP RN50 |
| LPIPS | lpips: AlexNet, version 0.1 (Zhang et al. 2018) | torchvision's AlexNet |
| ImageReward | image-reward (Xu et al. 2023), in an interpreter of its own | ImageReward-v1.0 |

The weights are downloaded by the libraries at first use. ``pip install 'fbqat-hub[metrics]'`` installs the libraries
but image-reward, which does not import beside transformers 5: see `image_rewards`.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fbqat_hub.evaluation.folders import batches, pairs
from fbqat_hub.extras import missing

CLIP_FID_MODEL = "openai/clip-vit-base-patch32"
CLIP_SCORE_MODEL = "openai/clip-vit-large-patch14"
# metric -> the modules that it needs, and which of them is imported here
LIBRARIES = {"fid": ("cleanfid.features", "cleanfid.fid"), "lpips": ("lpips",), "clip_iqa": ("piq",)}
_TITLES = {"fid": "FID", "lpips": "LPIPS", "clip_iqa": "CLIP-IQA"}
# Names the Python that has image-reward.
REWARD_PYTHON = "FBQAT_IMAGE_REWARD_PYTHON"


@torch.no_grad()
def inception_features(files: Sequence[Path], device: str = "cpu", batch_size: int = 32) -> Tensor:
    """Inception features by the clean-fid protocol: bicubic resizing to 299 x 299 in float, no quantization.

    Returns:
        float32 [N, 2048].

    Raises:
        ImportError: clean-fid is not installed.
        OSError: its weights cannot be had.
    """
    features, fid = library("fid")
    with _weights("FID", "nvlabs-fi-cdn.nvidia.com"):
        model = features.build_feature_extractor("clean", device=torch.device(device), use_dataparallel=False)
    rows = fid.get_files_features(
        [str(file) for file in files],
        model,
        num_workers=0,
        batch_size=batch_size,
        device=torch.device(device),
        mode="clean",
        description="Inception",
    )
    return torch.from_numpy(rows)


@torch.no_grad()
def clip_features(files: Sequence[Path], device: str = "cpu", batch_size: int = 32) -> Tensor:
    """CLIP's image embeddings, not normalized: float32 [N, 512].

    Raises:
        OSError: the weights cannot be had.
    """
    model, processor = _clip(CLIP_FID_MODEL, "CLIP-FID", device)
    rows = []
    for batch in batches(files, batch_size):
        seen = model.vision_model(pixel_values=_pixels(processor, batch, device)).pooler_output
        rows.append(model.visual_projection(seen).float().cpu())
    return torch.cat(rows)


@torch.no_grad()
def clip_scores(
    files: Sequence[Path], prompts: Sequence[str], device: str = "cpu", batch_size: int = 32
) -> list[float]:
    """100 max(cos(picture, prompt), 0) for each picture; prompts are cut at CLIP's 77 tokens.

    Raises:
        OSError: the weights cannot be had.
    """
    model, processor = _clip(CLIP_SCORE_MODEL, "CLIP score", device)
    most = model.config.text_config.max_position_embeddings
    scores: list[float] = []
    for batch in batches(files, batch_size):
        texts = list(prompts[len(scores) : len(scores) + len(batch)])
        tokens = processor.tokenizer(texts, padding=True, truncation=True, max_length=most, return_tensors="pt")
        out = model(**tokens.to(device), pixel_values=_pixels(processor, batch, device))
        scores += (100 * (out.image_embeds * out.text_embeds).sum(dim=-1)).clamp(min=0).tolist()
    return scores


@torch.no_grad()
def clip_iqa_scores(files: Sequence[Path], device: str = "cpu", batch_size: int = 32) -> list[float]:
    """CLIP-IQA, "Good photo." against "Bad photo.", in [0, 1] for each picture.

    Raises:
        ImportError: piq is not installed.
        OSError: its weights cannot be had.
    """
    (piq,) = library("clip_iqa")
    with _weights("CLIP-IQA", "github.com/photosynthesis-team/piq"):
        model = piq.CLIPIQA(data_range=1.0).to(device)
    scores: list[float] = []
    for batch in batches(files, batch_size):
        scores += model(batch.to(device)).flatten().tolist()
    return scores


@torch.no_grad()
def lpips_distances(
    files: Sequence[Path], references: Sequence[Path], device: str = "cpu", batch_size: int = 32
) -> list[float]:
    """LPIPS of each picture to its reference, on AlexNet, version 0.1.

    Raises:
        ImportError: lpips is not installed.
        OSError: AlexNet's weights cannot be had.
        ValueError: a pair of two sizes.
    """
    (lpips,) = library("lpips")
    with _weights("LPIPS", "download.pytorch.org"):
        model = lpips.LPIPS(net="alex", version="0.1", verbose=False).to(device)
    distances: list[float] = []
    for a, b in pairs(files, references, batch_size):
        distances += model(a.to(device), b.to(device), normalize=True).flatten().tolist()
    return distances


def image_rewards(files: Sequence[Path], prompts: Sequence[str], device: str = "cpu") -> list[float]:
    """ImageReward-v1.0 of each picture for its prompt.

    image-reward 1.5 needs transformers 4, so it runs in the Python that ``FBQAT_IMAGE_REWARD_PYTHON`` names, in which
    only image-reward and what it needs are installed (docs/evaluation.md has the lines).

    Raises:
        ImportError: that Python cannot be run or does not have image-reward.
        OSError: its weights cannot be had.
    """
    python = os.environ.get(REWARD_PYTHON, sys.executable)
    asked = json.dumps([[prompt, str(file)] for file, prompt in zip(files, prompts, strict=True)])
    worker = Path(__file__).with_name("image_reward_worker.py")
    # Isolated from this package's import path, so that the worker's libraries are the other Python's.
    try:
        run = subprocess.run([python, str(worker), device], input=asked, stdout=subprocess.PIPE, text=True, check=False)
    except OSError as error:
        raise ImportError(f"ImageReward: {python}, which {REWARD_PYTHON} names, cannot be run ({error}).") from error
    answer = json.loads(run.stdout.strip().splitlines()[-1]) if run.stdout.strip() else {}
    if "scores" in answer:
        return [float(score) for score in answer["scores"]]
    reason = answer.get("error", f"it ended with status {run.returncode}")
    if answer.get("at") == "import":
        raise ImportError(
            f"ImageReward needs image-reward, which {python} cannot import ({reason}). It does not import beside "
            f"transformers 5: install it in an environment of its own and name that Python in {REWARD_PYTHON} "
            "(docs/evaluation.md, ImageReward)."
        )
    raise OSError(
        f"ImageReward: {python} gave no scores ({reason}). Its weights come from huggingface.co at first use."
    )


def library(metric: str) -> list[Any]:
    """The modules of a metric of `LIBRARIES`.

    Raises:
        ImportError: one cannot be imported; says what installs it.
    """
    try:
        return [importlib.import_module(module) for module in LIBRARIES[metric]]
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
        module = LIBRARIES[metric][0].partition(".")[0]
        raise missing(ImportError(str(error), name=module), _TITLES[metric]) from error


@contextmanager
def _weights(metric: str, source: str) -> Iterator[None]:
    """Unreachable weights, said in one line; what the libraries raise then are all kinds of OSError."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{metric} cannot get its weights from {source} ({' '.join(str(error).split())[:200]}). They are "
            "downloaded once, at first use: go online for it, or leave the metric out with --metrics."
        ) from error


def _clip(name: str, metric: str, device: str) -> tuple[Any, Any]:
    from transformers import AutoProcessor, CLIPModel

    with _weights(metric, f"huggingface.co/{name}"):
        # PIL resizes as the original CLIP does.
        return CLIPModel.from_pretrained(name).eval().to(device), AutoProcessor.from_pretrained(name, backend="pil")


def _pixels(processor: Any, batch: Tensor, device: str) -> Tensor:
    levels = (batch * 255).round().to(torch.uint8)
    return processor.image_processor(images=list(levels), return_tensors="pt")["pixel_values"].to(device)
