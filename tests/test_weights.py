"""Weight files are read in pieces: headers, dtypes, numbers that are not finite, copies byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fbqat_hub import weights
from fbqat_hub.weights import TensorFile, check_finite, copy_finite, is_finite, read_header, read_tensor, stored_dtype

FLOATS = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2
]  # fmt: skip


def saved(folder: Path, **tensors: Tensor) -> Path:
    save_file(tensors, folder / "w.safetensors")
    return folder / "w.safetensors"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_is_finite(dtype: torch.dtype, size: int) -> None:
    values = torch.linspace(-400, 400, size).to(dtype)
    assert is_finite(values)
    assert is_finite(torch.zeros(0, dtype=dtype))
    for place in {0, size // 2, size - 1}:
        for bad in (torch.nan, torch.inf, -torch.inf):
            if dtype == torch.float8_e4m3fn:  # has no infinity
                bad = torch.nan
            broken = values.float()
            broken[place] = bad
            assert not is_finite(broken.to(dtype))


def test_every_code_of_float8() -> None:
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        for code in torch.arange(256, dtype=torch.uint8):
            value = code.reshape(1).view(dtype)
            assert is_finite(value) == bool(torch.isfinite(value.float()))


def test_header_says_where_each_tensor_is(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5).half(), "a": torch.arange(7), "c": torch.randn(2), "none": torch.zeros(0)}
    path = saved(tmp_path, **tensors)
    content = path.read_bytes()
    header = read_header(path)
    assert set(header) == set(tensors)
    for name, (dtype, begin, end, shape) in header.items():
        assert shape == tensors[name].shape
        assert dtype == tensors[name].dtype
        assert content[begin:end] == tensors[name].numpy().tobytes()


@pytest.mark.parametrize(
    ("dtypes", "holds_all"),
    [
        ([torch.float16], torch.float16),
        ([torch.bfloat16, torch.float32], torch.float32),
        ([torch.bfloat16, torch.float16], torch.float32),
        ([torch.float8_e4m3fn], torch.bfloat16),
        ([torch.float8_e4m3fn, torch.float16], torch.float32),
        ([torch.int8], torch.float32),
    ],
)
def test_stored_dtype(dtypes: list[torch.dtype], holds_all: torch.dtype, tmp_path: Path) -> None:
    tensors = {str(index): torch.ones(3).to(dtype) for index, dtype in enumerate(dtypes)}
    path = saved(tmp_path, **tensors, **{"layer.weight_scale": torch.ones(3)})
    assert stored_dtype([path]) == holds_all


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, a=torch.zeros(4, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"w\.safetensors: a is stored as C64; BOOL, .*, F64 can be read"):
        read_header(path)


@pytest.mark.parametrize("piece", [8, 24, 2**24])
def test_copies_are_byte_for_byte_and_checked_in_pieces(piece: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(weights, "_PIECE", piece)
    tensors = {"codes": torch.arange(33, dtype=torch.uint8), "w": torch.randn(50), "half": torch.randn(9).half()}
    path = saved(tmp_path, **tensors)
    check_finite(path)
    copy_finite(path, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == path.read_bytes()
    tensors["half"][8] = torch.nan
    path = saved(tmp_path, **tensors)
    for read in (lambda: check_finite(path), lambda: copy_finite(path, tmp_path / "copy")):
        with pytest.raises(ValueError, match=r"w\.safetensors: half has values that are not finite"):
            read()


def test_tensors_are_written_in_any_order_as_safetensors_writes_them(tmp_path: Path) -> None:
    tensors = {f'{number}."é': torch.ones(3, 5).to(dtype) for number, dtype in enumerate(weights._DTYPES.values())}
    tensors |= {"scalar": torch.tensor(1.5), "none": torch.zeros(0, 3), "A.b": torch.randn(4, 2).half()}
    expected, path = tmp_path / "expected.safetensors", tmp_path / "ours.safetensors"
    save_file(tensors, expected, metadata={"format": "pt"})
    with TensorFile(path, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}) as file:
        for name in sorted(tensors):
            file.write(name, tensors[name])
    assert path.read_bytes() == expected.read_bytes()
    for name, stored in read_header(path).items():
        assert read_tensor(path, stored).flatten().equal(tensors[name].flatten()), name


def test_a_tensor_that_was_not_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lacks b, which were not written"):  # noqa: SIM117
        with TensorFile(tmp_path / "half.safetensors", dict.fromkeys("ab", (torch.float32, (2,)))) as file:
            file.write("a", torch.zeros(2))
