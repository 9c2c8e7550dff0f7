"""Packing is exact for every code, every byte and every size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fbqat_hub.quantization import pack_int4, unpack_int4
from fbqat_hub.quantization.packing import pack, unpack


def int8(rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.int8)


@pytest.mark.parametrize("first", range(-8, 8))
def test_every_pair_of_codes_has_the_byte_of_the_picture(first: int) -> None:
    for second in range(-8, 8):
        packed = pack_int4(int8([first, second]))
        assert packed.dtype == torch.uint8
        assert packed.tolist() == [(first % 16) | (second % 16) << 4]


def test_every_byte_survives_unpack_and_pack() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pack_int4(unpack_int4(every, 512)), every)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_round_trip(data: st.DataObject) -> None:
    out_features, in_features = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    row = st.lists(st.integers(-8, 7), min_size=in_features, max_size=in_features)
    codes = int8(data.draw(st.lists(row, min_size=out_features, max_size=out_features)))
    packed = pack_int4(codes)

    assert packed.shape == (out_features, -(-in_features // 2))
    assert torch.equal(unpack_int4(packed, in_features), codes)
    if in_features % 2:
        assert int((packed[:, -1] >> 4).max()) == 0  # the nibble that stands for no input


def test_more_dimensions_and_views() -> None:
    codes = (torch.arange(2 * 3 * 5) % 16 - 8).to(torch.int8).view(2, 3, 5)
    assert torch.equal(unpack_int4(pack_int4(codes), 5), codes)
    transposed = codes.transpose(0, 2)  # not contiguous
    assert torch.equal(unpack_int4(pack_int4(transposed), 2), transposed)
    assert pack_int4(int8([]).view(3, 0)).shape == (3, 0)


@pytest.mark.parametrize("codes", [[8], [-9], [0, 127]])
def test_codes_that_do_not_fit_are_refused(codes: list[int]) -> None:
    with pytest.raises(ValueError, match="4 bits hold -8 to 7"):
        pack_int4(int8(codes))


def test_wrong_dtypes_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="must be int8"):
        pack_int4(torch.zeros(2, 2))
    packed = pack_int4(int8([[1, 2, 3]]))
    with pytest.raises(ValueError, match=r"for 5 inputs it must be uint8 \[\.\.\., 3\]"):
        unpack_int4(packed, 5)
    with pytest.raises(ValueError, match="uint8"):
        unpack_int4(packed.to(torch.int8), 3)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_of_every_width_survives(bits: int) -> None:
    """Up to 4 bits in nibbles, wider ones a byte each; codes that do not fit are refused."""
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int8).view(-1, 1).expand(-1, 3)
    packed = pack(codes, bits)
    assert (packed.dtype, packed.shape[1]) == ((torch.uint8, 2) if bits <= 4 else (torch.int8, 3))
    assert torch.equal(unpack(packed, 3), codes)
    if 4 < bits < 8:
        with pytest.raises(ValueError, match=rf"{bits} bits hold -{2 ** (bits - 1)} to {2 ** (bits - 1) - 1}"):
            pack(codes - 1, bits)
        with pytest.raises(ValueError, match=r"for 4 inputs \[\.\.\., 4\]"):
            unpack(packed, 4)
