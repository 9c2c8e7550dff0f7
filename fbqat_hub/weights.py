"""Weight files (safetensors): what their headers say, whether their numbers are finite, and copies of them.

A file is copied in pieces of 16 MiB, and read and written tensor by tensor, so that memory does not grow with it.
Nothing is mapped: pages of a mapped file count as the process's own.
"""

from __future__ import annotations

import functools
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

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


_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# safetensors' own order of tensors in a file: by dtype, widest first, then by name.
_ORDER = [
    torch.uint64, torch.int64, torch.float64, torch.float32, torch.uint32, torch.int32, torch.bfloat16, torch.float16,
    torch.uint16, torch.int16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


class StoredTensor(NamedTuple):
    """Where a tensor is in its file: dtype, the first byte and the one after the last; and its shape."""

    dtype: torch.dtype
    begin: int
    end: int
    shape: tuple[int, ...]


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
        tensors[name] = StoredTensor(_DTYPES[kind], place, end, tuple(shape))
        place = end
    return tensors


def read_tensor(path: Path, stored: StoredTensor) -> Tensor:
    """One tensor of a file, as ``read_header`` says where it is, in memory of its own.

    Raises:
        ValueError: the file is shorter.
    """
    values = torch.empty(stored.shape, dtype=stored.dtype)
    with path.open("rb", buffering=0) as file:
        file.seek(stored.begin)
        _fill(file, _bytes_of(values))
    return values


class TensorFile:
    """A safetensors file that is written tensor by tensor, in any order; a context manager.

    The bytes are those of ``safetensors.torch.save_file`` for the same tensors and metadata.

    Args:
        path: of the new file.
        tensors: name -> dtype and shape of all that it will hold.

    Raises:
        ValueError: at the end, a tensor that was not written.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, Iterable[int]]]) -> None:
        self._path = path
        ordered = sorted(tensors, key=lambda name: (_ORDER.index(tensors[name][0]), name.encode()))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._places: dict[str, StoredTensor] = {}
        end = 0
        for name in ordered:
            dtype, shape = tensors[name][0], tuple(tensors[name][1])
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            self._places[name] = StoredTensor(dtype, begin, end, shape)
            header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._left = set(ordered)
        self._file = path.open("wb", buffering=0)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, values: Tensor) -> None:
        """Write a tensor of the dtype and shape that were announced."""
        place = self._places[name]
        assert (values.dtype, tuple(values.shape)) == (place.dtype, place.shape), name
        self._file.seek(self._start + place.begin)
        left = _bytes_of(values.detach().cpu().contiguous())
        while left:
            left = left[self._file.write(left) :]
        self._left.discard(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._file.close()
        if kind is None and self._left:
            raise ValueError(f"{self._path} lacks {', '.join(sorted(self._left)[:3])}, which were not written.")


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


def copy_finite(path: Path, target: Path, done: Callable[[int], None] | None = None) -> None:
    """Copy a safetensors file byte for byte, and refuse NaN and infinity on the way.

    Args:
        done: is told of bytes as they are written.

    Raises:
        ValueError: as ``check_finite``; part of ``target`` is then written.
    """
    with target.open("wb") as file:
        _read(path, file, done)


def _read(path: Path, target: BinaryIO | None, done: Callable[[int], None] | None = None) -> None:
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
                if done:
                    done(len(piece))


def _pieces(file: io.FileIO, length: int, buffer: bytearray) -> Iterator[memoryview]:
    """The next ``length`` bytes of a file, each piece at the start of ``buffer`` and gone with the next one."""
    while length:
        piece = memoryview(buffer)[: min(length, len(buffer))]
        _fill(file, piece)
        length -= len(piece)
        yield piece


def _bytes_of(values: Tensor) -> memoryview:
    array: Any = values.view(-1).view(torch.uint8).numpy() if values.numel() else b""
    return memoryview(array)


def _fill(file: io.FileIO, left: memoryview) -> None:
    while left:  # an unbuffered read may give less than it is asked for
        more = file.readinto(left)
        if not more:
            raise ValueError(f"{file.name} is damaged or cut short. Download or convert it again.")
        left = left[more:]
