"""The feature extractor that ships with the package, so that a Fréchet distance needs no download.

`OpenMojiFeatures` is a small convolutional network trained to tell emoji apart under shifts, flips, colour
changes, noise and blur. It is **not** Inception: a distance on its features is recorded with
``extractor: "openmoji-cnn-1"`` and compares only with distances that carry the same name.

    picture 3 x 64 x 64 -> 32 x 32 x 32 -> 64 x 16 x 16 -> 96 x 8 x 8 -> 128 x 8 x 8 -> 64 x 8 x 8 -> mean -> 64

The weights are remade by ``python -m fbqat_hub.training.features``.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

EXTRACTOR = "openmoji-cnn-1"
WEIGHTS = Path(__file__).with_name("openmoji_features.safetensors")
DIMENSIONS = 64
_SIDE = 64


class OpenMojiFeatures(nn.Module):
    """64 features of a picture, scaled so that their mean variance over the OpenMoji training set is 1.

    The tensors of its state dict, also of the shipped file (there float16, here float32):

    | tensor | shape | meaning |
    |---|---|---|
    | `convolutions.{0..4}.weight`, `.bias` | [out, in, 3, 3], [out] | widths as above, strides 2, 2, 2, 1, 1 |
    | `norms.{0..4}.weight`, `.bias` | [out], [out] | group normalisation, 8 groups |
    | `scale` | [] | factor on the averaged features |
    """

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        widths, strides = (3, 32, 64, 96, 128, DIMENSIONS), (2, 2, 2, 1, 1)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inner, outer, 3, stride, 1)
            for (inner, outer), stride in zip(pairwise(widths), strides, strict=True)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths[1:])
        self.register_buffer("scale", torch.ones(()))

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> OpenMojiFeatures:
        """The trained extractor in float32, in eval mode, without gradients.

        Raises:
            FileNotFoundError: no weights at ``path``.
            RuntimeError: missing, extra or misshaped tensors, each named.
        """
        from safetensors.torch import load_file

        if not path.is_file():
            raise FileNotFoundError(f"{path.name} is missing. Remake it: python -m fbqat_hub.training.features")
        model = cls()
        model.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
        return model.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Features of pictures.

        Args:
            images: floating point [N, 3, H, W] in [0, 1]; other sizes than 64 x 64 are resized (antialiased).

        Returns:
            [N, 64] in the model's dtype.

        Raises:
            ValueError: any other shape, or not floating point.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                "OpenMojiFeatures needs floating point pictures [N, 3, H, W] in [0, 1], "
                f"got {images.dtype} {tuple(images.shape)}."
            )
        if images.shape[-2:] != (_SIDE, _SIDE):
            images = nn.functional.interpolate(
                images, (_SIDE, _SIDE), mode="bilinear", antialias=True, align_corners=False
            )
        hidden = images.to(self.scale.dtype) * 2 - 1
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            hidden = nn.functional.silu(norm(convolution(hidden)))
        return hidden.mean(dim=(2, 3)) * self.scale


@torch.no_grad()
def extract(model: nn.Module, images: Tensor, batch_size: int = 64) -> Tensor:
    """Features of any number of pictures, a batch at a time: [N, 3, H, W] -> [N, D], on the CPU.

    Raises:
        ValueError: an empty set of pictures.
    """
    if len(images) == 0:
        raise ValueError("No pictures to extract features from: the set is empty.")
    return torch.cat([model(batch).cpu() for batch in images.split(batch_size)])


def training_figures(path: Path = WEIGHTS) -> dict[str, Any]:
    """How the shipped weights were made (data, licence, command, versions, figures), read from the file itself."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["fbqat_hub"])
