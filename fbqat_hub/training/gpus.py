"""GPUs that a run is planned for."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Of a GPU's memory, for the driver's context and what the allocator loses.
RESERVE = 2**30


@dataclass(frozen=True)
class Gpus:
    """``count`` GPUs of ``bytes`` memory each."""

    count: int
    bytes: int

    @classmethod
    def parse(cls, text: str) -> Gpus:
        """
        >>> Gpus.parse("8x80GB")
        Gpus(count=8, bytes=85899345920)
        """
        found = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})GB", text, re.IGNORECASE)
        if not found:
            raise ValueError(f"{text!r} is not a number of GPUs and the memory of each; write e.g. 1x24GB or 8x80GB.")
        return cls(int(found[1]), int(found[2]) * 2**30)

    @property
    def budget(self) -> int:
        """Bytes of each that a run may take."""
        return self.bytes - RESERVE

    def __str__(self) -> str:
        return f"{self.count}x{self.bytes >> 30}GB"
