"""Random numbers that depend on what they are for, and on nothing that ran before."""

from __future__ import annotations

import hashlib

import torch


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator for a key such as (seed, "train", step); different keys give unrelated streams.

    torch's CPU generator takes the low 32 bits of a seed and drops the rest, so the key is hashed into 32 bits.

    >>> generator(0, "train", 5).initial_seed() == generator(0, "train", 6).initial_seed()
    False
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
