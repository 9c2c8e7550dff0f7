"""Metrics against closed forms and an independent float64 numpy implementation."""

import math

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

from fbqat_hub.evaluation.metrics import frechet_distance, psnr, sqnr_db, ssim


def pair(noise: float, size: int = 24, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(count, 3, size, size + 5, generator=generator)
    return a, (a + noise * torch.randn(a.shape, generator=generator)).clamp(0, 1)


def numpy_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004 eq. 13 on one [H, W] channel, window by window, written without torch."""
    places = np.arange(11) - 5
    window = np.exp(-(places[:, None] ** 2 + places[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def mean(x: np.ndarray) -> np.ndarray:
        return np.einsum("ijkl,kl->ij", sliding_window_view(x, (11, 11)), window)

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    return float(((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean())


def test_psnr_matches_its_formula_per_image() -> None:
    a, b = pair(0.1)
    expected = [
        10 * math.log10(1 / np.mean((x - y) ** 2)) for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True)
    ]
    torch.testing.assert_close(psnr(a, b), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    assert torch.isinf(psnr(a, a)).all()


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.5])
def test_ssim_matches_numpy(noise: float) -> None:
    a, b = pair(noise)
    expected = [
        np.mean([numpy_ssim(x[c], y[c]) for c in range(3)])
        for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True)
    ]
    torch.testing.assert_close(ssim(a, b), torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_ssim_is_symmetric_falls_with_noise_and_is_one_for_equal_pictures() -> None:
    scores = [ssim(*pair(noise)).mean().item() for noise in (0.0, 0.05, 0.1, 0.3)]
    assert scores[0] == 1.0
    assert scores == sorted(scores, reverse=True)
    a, b = pair(0.1)
    torch.testing.assert_close(ssim(a, b), ssim(b, a))


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        (torch.zeros(1, 3, 16, 16), torch.zeros(2, 3, 16, 16), "one shape"),
        (torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16), "one shape"),
        (torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), 255.0), "second batch.*255"),
        (torch.full((1, 3, 16, 16), -1.0), torch.zeros(1, 3, 16, 16), "first batch.*-1"),
        (torch.full((1, 3, 16, 16), torch.nan), torch.zeros(1, 3, 16, 16), "first batch.*nan"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "uint8"),
    ],
)
def test_wrong_pictures_are_refused(metric, a: torch.Tensor, b: torch.Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        metric(a, b)


def test_ssim_refuses_pictures_smaller_than_its_window() -> None:
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ssim(torch.zeros(1, 3, 10, 32), torch.zeros(1, 3, 10, 32))


def with_moments(mean: torch.Tensor, covariance: torch.Tensor, count: int = 200) -> torch.Tensor:
    """Features whose sample mean and sample covariance are exactly these."""
    raw = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    raw -= raw.mean(dim=0)
    whitened = raw @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(raw.T))).T
    return whitened @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form() -> None:
    mean_a, mean_b = torch.tensor([0.0, 1.0, -2.0]).double(), torch.tensor([0.5, 1.0, 3.0]).double()
    sd_a, sd_b = torch.tensor([1.0, 0.2, 3.0]).double(), torch.tensor([2.0, 0.2, 0.01]).double()
    a, b = with_moments(mean_a, sd_a.square().diag()), with_moments(mean_b, sd_b.square().diag(), 300)
    expected = ((mean_a - mean_b).square() + (sd_a - sd_b).square()).sum().item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_two_dimensions_is_the_closed_form() -> None:
    a = torch.tensor([[2.0, 0.7], [0.7, 1.0]]).double()
    b = torch.tensor([[1.0, -0.4], [-0.4, 3.0]]).double()
    # For 2 x 2: tr((AB)^1/2) = sqrt(tr(AB) + 2 sqrt(det(AB))), with no matrix root taken.
    product = a @ b
    root_trace = (product.trace() + 2 * torch.linalg.det(product).sqrt()).sqrt()
    expected = (a.trace() + b.trace() - 2 * root_trace).item()
    zero = torch.zeros(2).double()
    assert frechet_distance(with_moments(zero, a), with_moments(zero, b, 300)) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_is_zero_for_equal_sets_symmetric_and_real_for_few_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(10, 64, generator=generator), 1.5 * torch.randn(12, 64, generator=generator)  # singular: 10 < 64
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert frechet_distance(a, a + 1) == pytest.approx(64, rel=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        (torch.zeros(4, 3), torch.zeros(4, 2), "one width"),
        (torch.zeros(4), torch.zeros(4), "one width"),
        (torch.zeros(1, 3), torch.zeros(4, 3), "at least 2 rows"),
        (torch.zeros(4, 3), torch.full((4, 3), torch.inf), "features_b.*not finite"),
    ],
)
def test_wrong_features_are_refused(a: torch.Tensor, b: torch.Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        frechet_distance(a, b)


def test_sqnr_of_uniform_rounding_is_six_decibels_a_bit() -> None:
    signal = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    coarse, fine = (sqnr_db([signal], [(signal * 2**bits).round() / 2**bits]) for bits in (6, 7))
    assert fine - coarse == pytest.approx(20 * math.log10(2), abs=0.05)


def test_sqnr_is_of_all_tensors_together() -> None:
    """10 log10((9 + 16 + 0) / (0 + 0.25 + 0)); arrays and tensors alike."""
    reference = [torch.tensor([3.0, 4.0]), np.array([0.0])]
    assert sqnr_db(reference, [np.array([3.0, 4.5]), torch.zeros(1)]) == pytest.approx(20)
    assert sqnr_db(reference, reference) == math.inf
    assert sqnr_db(reference, [torch.tensor([3.0, math.nan]), torch.zeros(1)]) == -math.inf
    assert sqnr_db([torch.zeros(1)], [torch.ones(1)]) == -math.inf
    with pytest.raises(ValueError, match="one shape"):
        sqnr_db(reference, [torch.zeros(1), torch.zeros(1)])
    with pytest.raises(ValueError, match="at least one number"):
        sqnr_db([], [])
