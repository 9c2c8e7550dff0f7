"""PIL pictures as tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def pixels(images: list[Any]) -> Tensor:
    """RGB pictures of one size as a uint8 tensor [N, 3, H, W]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()
