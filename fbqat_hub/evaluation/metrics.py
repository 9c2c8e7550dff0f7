"""How close a student comes to its teacher: pure functions on tensors.

sqnr_db             outputs against others            dB, higher is better
psnr, ssim          paired pictures, one per image    dB / [-1, 1], higher is better
frechet_distance    two sets of features              >= 0, lower is better
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SSIM_WINDOW, _SSIM_SIGMA = 11, 1.5  # Wang et al. 2004, section III-C
_SSIM_K1, _SSIM_K2 = 0.01, 0.03


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair of pictures, ``10 log10(1 / mean((a - b)^2))``.

    Args:
        a: pictures, floating point [N, 3, H, W] in [0, 1].
        b: pictures of the same shape and range.

    Returns:
        float64 [N] in dB; ``inf`` where two pictures are equal.

    Raises:
        ValueError: shapes differ or are not [N, 3, H, W], not floating point, or values outside [0, 1].

    >>> grey = torch.full((1, 3, 8, 8), 0.5)
    >>> psnr(grey, grey + 0.1).round(decimals=4)         # 10 log10(1 / 0.1^2) = 20 dB
    tensor([20.], dtype=torch.float64)
    """
    a, b = _checked_pictures(a, b)
    return -10.0 * (a - b).square().mean(dim=(1, 2, 3)).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair of pictures.

    Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural
    similarity", 2004, eq. 13: an 11 x 11 Gaussian window (sigma 1.5), K1 = 0.01, K2 = 0.03, dynamic range 1.
    Computed on each of the RGB channels, at the places where the whole window lies inside the picture, and
    averaged over places and channels; the covariances are the window's own (divided by 1, not by n - 1).

    Args:
        a: pictures, floating point [N, 3, H, W] in [0, 1], H and W at least 11.
        b: pictures of the same shape and range.

    Returns:
        float64 [N] in [-1, 1]; exactly 1 where two pictures are equal.

    Raises:
        ValueError: as `psnr`, or a side shorter than 11 pixels.

    >>> picture = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> ssim(picture, picture)
    tensor([1., 1.], dtype=torch.float64)
    """
    a, b = _checked_pictures(a, b)
    if min(a.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(
            f"ssim needs pictures of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, got {tuple(a.shape)}. "
            "Compare larger pictures, or use psnr."
        )

    def blur(images: Tensor) -> Tensor:
        return _gaussian_valid(images)

    mean_a, mean_b = blur(a), blur(b)
    variance_a = blur(a * a) - mean_a * mean_a
    variance_b = blur(b * b) - mean_b * mean_b
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = _SSIM_K1**2, _SSIM_K2**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a * mean_a + mean_b * mean_b + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Fréchet distance between the Gaussians fitted to two sets of features.

    Dowson & Landau, "The Fréchet distance between multivariate normal distributions", 1982:

        d^2 = |mean_a - mean_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a^1/2 C_b C_a^1/2)^1/2)

    The last trace is the sum of the singular values of C_a^1/2 C_b^1/2, both roots taken by symmetric
    eigendecomposition: it is never complex, and sets smaller than D (singular covariances) are no trouble.
    The estimate is biased upwards for small sets (about D^2 / N for unit variances), so only distances from
    the same extractor and the same N compare.

    Args:
        features_a: [N, D] of any floating point dtype, N >= 2.
        features_b: [M, D], M >= 2.

    Returns:
        The squared distance (what FID reports), >= 0, in the features' squared unit; computed in float64.

    Raises:
        ValueError: not two matrices of one width, fewer than 2 rows, or values that are not finite.

    >>> a = torch.tensor([[-1.0], [1.0]])              # mean 0, variance 2
    >>> round(frechet_distance(a, a + 3.0), 12)        # only the mean moves: 3^2
    9.0
    """
    if features_a.ndim != 2 or features_b.ndim != 2 or features_a.shape[1] != features_b.shape[1]:
        raise ValueError(
            "frechet_distance needs features [N, D] and [M, D] of one width D, got "
            f"{tuple(features_a.shape)} and {tuple(features_b.shape)}. Use one extractor for both."
        )
    if min(len(features_a), len(features_b)) < 2:
        raise ValueError(
            f"frechet_distance needs at least 2 rows in each set, got {len(features_a)} and {len(features_b)}."
        )
    for name, features in (("features_a", features_a), ("features_b", features_b)):
        if not torch.isfinite(features).all():
            raise ValueError(f"{name} holds values that are not finite; the pictures or the extractor are broken.")
    mean_a, covariance_a = _mean_and_covariance(features_a)
    mean_b, covariance_b = _mean_and_covariance(features_b)
    cross = torch.linalg.svdvals(_symmetric_root(covariance_a) @ _symmetric_root(covariance_b)).sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return max(0.0, distance.item())


def sqnr_db(reference: Sequence[Tensor | np.ndarray], other: Sequence[Tensor | np.ndarray]) -> float:
    """Signal-to-quantization-noise ratio, ``10 log10(sum(reference^2) / sum((reference - other)^2))``.

    Args:
        reference: exact tensors or arrays, any shapes and real dtypes; the sums go over all of them together.
        other: their approximations, of the same shapes.

    Returns:
        The ratio in dB, computed in float64; ``inf`` where all are equal, ``-inf`` where an approximation is not
        finite, or the reference is zero and its approximation is not.

    Raises:
        ValueError: lengths or shapes differ, or nothing is compared.

    >>> round(sqnr_db([torch.tensor([1.0, -1.0])], [torch.tensor([1.1, -1.1])]), 4)
    20.0
    """
    signal = noise = 0.0
    count = 0
    for exact, approximate in zip(map(torch.as_tensor, reference), map(torch.as_tensor, other), strict=True):
        if exact.shape != approximate.shape:
            raise ValueError(
                f"sqnr_db compares tensors of one shape, got {tuple(exact.shape)} and {tuple(approximate.shape)}."
            )
        wide = exact.detach().to(torch.float64)
        signal += float(wide.square().sum())
        noise += float((wide - approximate.detach().to(torch.float64)).square().sum())
        count += exact.numel()
    if not count:
        raise ValueError("sqnr_db needs at least one number to compare, got none.")
    if not math.isfinite(noise):
        return -math.inf
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _checked_pictures(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3 or a.numel() == 0:
        raise ValueError(
            f"Two batches of pictures [N, 3, H, W] of one shape are needed, got {tuple(a.shape)} and {tuple(b.shape)}."
        )
    for name, images in (("first", a), ("second", b)):
        if not images.is_floating_point():
            raise ValueError(
                f"The {name} batch has dtype {images.dtype}; floating point in [0, 1] is needed: divide by 255."
            )
        low, high = images.min().item(), images.max().item()
        if not (low >= 0.0 and high <= 1.0):  # written so that NaN fails too
            raise ValueError(
                f"The {name} batch has values in [{low:.4g}, {high:.4g}]; [0, 1] is needed: rescale or clamp it."
            )
    return a.detach().to(torch.float64), b.detach().to(torch.float64)


def _gaussian_valid(images: Tensor) -> Tensor:
    """Gaussian-weighted mean of each full window: [N, C, H, W] -> [N, C, H - 10, W - 10]."""
    offsets = torch.arange(SSIM_WINDOW, dtype=images.dtype, device=images.device) - SSIM_WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * _SSIM_SIGMA**2))
    window = window / window.sum()
    channels = images.shape[1]
    rows = window.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    columns = window.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    images = torch.nn.functional.conv2d(images, rows, groups=channels)
    return torch.nn.functional.conv2d(images, columns, groups=channels)


def _mean_and_covariance(features: Tensor) -> tuple[Tensor, Tensor]:
    features = features.detach().to(torch.float64)
    mean = features.mean(dim=0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def _symmetric_root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
