"""How far two lists of outputs are apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fbqat_hub.evaluation.metrics import sqnr_db


def cosine(reference: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    """Cosine of the angle between the two lists, each as one long vector.

    >>> cosine([np.array([1.0, 0.0])], [np.array([2.0, 0.0])])
    1.0
    """
    first = np.concatenate([item.reshape(-1) for item in reference]).astype(np.float64)
    second = np.concatenate([item.reshape(-1) for item in other]).astype(np.float64)
    return float(first @ second / max(float(np.linalg.norm(first) * np.linalg.norm(second)), 1e-300))


def compare(reference: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> dict[str, float | list[float]]:
    """SQNR and cosine of `other` against `reference`, all together and the SQNR of each item."""
    each = [round(sqnr_db([expected], [actual]), 3) for expected, actual in zip(reference, other, strict=True)]
    return {
        "sqnr_db": round(sqnr_db(reference, other), 3),
        "cosine": round(cosine(reference, other), 8),
        "lowest_sqnr_db": min(each),
        "sqnr_db_of_each": each,
    }
