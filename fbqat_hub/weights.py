"""Weight files (safetensors): what their headers say, whether their numbers are finite, and copies of them.

A file is read in pieces of 16 MiB, so that memory does not grow with it.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_PIECE = 2**24
# Of a format-1 checkpoint; they are fp32 whatever the rest is (docs/format.md).
_SCALES = ("weight_scale", "input_scale")
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
# Of a float8, its bits but the sign: the largest that stands for a finite number.
_LARGEST_FLOAT8 = {torch.float8_e4m3fn: 0x7E, torch.float8_e5m2: 0x7B}


class StoredTensor(NamedTuple):
    """Where a tensor is in its file: dtype, and the first byte and the one after the last."""

    dtype: torch.dtype
    begin: int
    end: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file in the order in which they lie there; no data is read.

    Raises:
        ValueError: the header does not fit the file's length, or a tensor has a dtype that torch does not compute with.
    """
    try:
        with safe_open(path, framework="pt") as file:  # compares the header with the file's length
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            kinds = {name: (each.get_dtype(), each.get_shape()) for name, each in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short ({error}). Download or convert it again.") from None
    with path.open("rb") as opened:
        place = 8 + int.from_bytes(opened.read(8), "little")
    tensors = {}
    for name, (kind, shape) in kinds.items():
        if kind not in _DTYPES:
            raise ValueError(f"{path}: {name} is stored as {kind}; {', '.join(_DTYPES)} can be read.")
        end = place + math.prod(shape) * _DTYPES[kind].itemsize
        tensors[name] = StoredTensor(_DTYPES[kind], place, end)
        place = end
    return tensors


def stored_dtype(files: Iterable[Path]) -> torch.dtype:
    """The narrowest dtype that holds every float tensor of these files as it is stored; float32 if there is none.

    Nothing computes in float8: those count as bfloat16, which holds all their values. Scales of packed layers do not
    count.
    """
    found = set()
    for path in files:
        for name, tensor in read_header(path).items():
            if tensor.dtype.is_floating_point and name.rpartition(".")[2] not in _SCALES:
                found.add(torch.bfloat16 if tensor.dtype.itemsize == 1 else tensor.dtype)
    return functools.reduce(torch.promote_types, found) if found else torch.float32


def is_finite(values: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; one pass, without a copy.

    >>> is_finite(torch.tensor([1.0, torch.inf])), is_finite(torch.tensor([448.0]).to(torch.float8_e4m3fn))
    (False, True)
    """
    if not values.dtype.is_floating_point or not values.numel():
        return True
    if values.dtype in _LARGEST_FLOAT8:  # torch has no minimum of these
        return int((values.view(torch.uint8) & 0x7F).max()) <= _LARGEST_FLOAT8[values.dtype]
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def check_values(values: Tensor, what: str) -> None:
    """Raise ValueError for a tensor, called ``what``, that is not finite."""
    if not is_finite(values):
        raise ValueError(
            f"{what} has values that are not finite (NaN or infinity): it is damaged, or its training went wrong. "
            "Download it again, or take another checkpoint."
        )


def check_finite(path: Path) -> None:
    """Read a safetensors file once and refuse NaN and infinity.

    Raises:
        ValueError: names the file and the tensor; or as ``read_header``.
    """
    _read(path, None)


def copy_finite(path: Path, target: Path) -> None:
    """Copy a safetensors file byte for byte, and refuse NaN and infinity on the way.

    Raises:
        ValueError: as ``check_finite``; part of ``target`` is then written.
    """
    with target.open("wb") as file:
        _read(path, file)


def _read(path: Path, target: BinaryIO | None) -> None:
    tensors = read_header(path)
    buffer = bytearray(_PIECE)
    with path.open("rb", buffering=0) as file:
        start = next(iter(tensors.values())).begin if tensors else path.stat().st_size
        for piece in _pieces(file, start, buffer):  # the header
            if target:
                target.write(piece)
        for name, tensor in tensors.items():
            if target is None and not tensor.dtype.is_floating_point:
                file.seek(tensor.end)
                continue
            for piece in _pieces(file, tensor.end - tensor.begin, buffer):
                count = len(piece) // tensor.dtype.itemsize
                check_values(torch.frombuffer(buffer, dtype=tensor.dtype, count=count), f"{path}: {name}")
                if target:
                    target.write(piece)


def _pieces(file: io.FileIO, length: int, buffer: bytearray) -> Iterator[memoryview]:
    """The next ``length`` bytes of a file, each piece at the start of ``buffer`` and gone with the next one."""
    while length:
        piece = memoryview(buffer)[: min(length, len(buffer))]
        got = 0
        while got < len(piece):  # an unbuffered read may give less than it is asked for
            more = file.readinto(piece[got:])
            if not more:
                raise ValueError(f"{file.name} is damaged or cut short. Download or convert it again.")
            got += more
        length -= got
        yield piece
