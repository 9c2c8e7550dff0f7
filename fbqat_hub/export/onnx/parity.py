"""How far two lists of outputs are apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fbqat_hub.evaluation.metrics import sqnr_db

#: Of two equal outputs, since JSON has no infinity; two computations of float32 are never as near.
EQUAL_DB = 200.0


def cosine(reference: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    """Cosine of the angle between the two lists, each as one long vector.

    >>> cosine([np.array([1.0, 0.0])], [np.array([2.0, 0.0])])
    1.0
    """
    first = np.concatenate([item.reshape(-1) for item in reference]).astype(np.float64)
    second = np.concatenate([item.reshape(-1) for item in other]).astype(np.float64)
    return float(first @ second / max(float(np.linalg.norm(first) * np.linalg.norm(second)), 1e-300))


def compare(reference: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> dict[str, float | list[float]]:
    """SQNR and cosine of `other` against `reference`, all together and the SQNR of each item; within +-`EQUAL_DB`."""
    each = [_decibels([expected], [actual]) for expected, actual in zip(reference, other, strict=True)]
    return {
        "sqnr_db": _decibels(reference, other),
        "cosine": round(cosine(reference, other), 8),
        "lowest_sqnr_db": min(each),
        "sqnr_db_of_each": each,
    }


def _decibels(reference: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    return round(max(-EQUAL_DB, min(sqnr_db(reference, other), EQUAL_DB)), 3)
