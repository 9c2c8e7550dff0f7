"""docs/format.md is true: its example decodes by its own rules, and the package agrees with it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fbqat_hub.quantization import ActivationScheme, FakeQuantizedLinear, PackedLinear, WeightScheme, unpack_int4
from fbqat_hub.quantization.kernels.reference import dequantize_weight
from fbqat_hub.quantization.packing import pack

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text()


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return json.loads(re.findall(r"```json\n(.*?)```", DOCUMENT, re.DOTALL)[0])


def decode(byte: int) -> list[int]:
    """The two codes of a byte, from the document's picture and nothing else."""
    return [nibble - 16 if nibble > 7 else nibble for nibble in (byte & 15, byte >> 4)]


def decode_rows(rows: list[list[str]], in_features: int) -> list[list[int]]:
    return [[code for byte in row for code in decode(int(byte, 16))][:in_features] for row in rows]


@pytest.fixture
def layer(example: dict[str, Any]) -> FakeQuantizedLinear:
    linear = nn.Linear(3, 2)
    linear.weight.data, linear.bias.data = torch.tensor(example["weight"]), torch.tensor(example["bias"])
    return FakeQuantizedLinear(linear, WeightScheme(clip="max_abs"), ActivationScheme())


def test_example_decodes_without_our_code(example: dict[str, Any]) -> None:
    codes = decode_rows(example["weight_packed"], 3)
    assert codes == example["codes"]
    assert [max(map(abs, row)) / 7 for row in example["weight"]] == example["weight_scale"]
    for row, scale, wanted in zip(example["weight"], example["weight_scale"], codes, strict=True):
        assert [round(weight / scale) for weight in row] == wanted

    dynamic, static = example["dynamic"], example["static"]
    assert max(map(abs, example["x"])) / 127 == dynamic["scale"]
    assert [round(x / dynamic["scale"]) for x in example["x"]] == dynamic["codes"]
    assert [code - static["input_zero_point"] for code in static["codes"]] == dynamic["codes"]
    for row, scale, bias, y in zip(codes, example["weight_scale"], example["bias"], example["y"], strict=True):
        total = sum(x * weight for x, weight in zip(dynamic["codes"], row, strict=True))
        assert dynamic["scale"] * scale * total + bias == y  # powers of two: exact


def test_bytes_in_the_prose_are_those_of_the_example(example: dict[str, Any]) -> None:
    rows = re.search(r"row 0 is `(.*?)` and row 1 is `(.*?)`", DOCUMENT)
    assert rows is not None
    assert [row.split() for row in rows.groups()] == example["weight_packed"]


def test_table_of_nibbles_is_that_of_the_decoder() -> None:
    nibbles = re.search(r"^nibble +(.*)$", DOCUMENT, re.MULTILINE)
    codes = re.search(r"^code +(.*)$", DOCUMENT, re.MULTILINE)
    assert nibbles is not None
    assert codes is not None
    assert [decode(int(nibble, 16))[0] for nibble in nibbles[1].split()] == [int(code) for code in codes[1].split()]


def test_we_write_the_example(example: dict[str, Any], layer: FakeQuantizedLinear) -> None:
    packed = PackedLinear.from_fake_quantized(layer)
    assert [[f"{byte:02X}" for byte in row] for row in packed.weight_packed.tolist()] == example["weight_packed"]
    assert packed.weight_scale.tolist() == example["weight_scale"]
    assert packed(torch.tensor(example["x"])).tolist() == example["y"]


def test_static_range_of_the_example(example: dict[str, Any], layer: FakeQuantizedLinear) -> None:
    layer.activation_scheme = ActivationScheme(range="static")
    layer.set_input_range(example["static"]["input_scale"], example["static"]["input_zero_point"])
    assert PackedLinear.from_fake_quantized(layer)(torch.tensor(example["x"])).tolist() == example["y"]


def test_per_group_example() -> None:
    found = re.search(
        r"codes (.*?) with `group_size` 2 and scales (.*?) are the bytes `(.*?)`, the real weights (.*?)\.\n", DOCUMENT
    )
    assert found is not None
    codes, scales, packed, weights = (text.replace("−", "-").replace(",", "").split() for text in found.groups())
    assert decode_rows([packed], 4) == [list(map(int, codes))]

    stored = torch.tensor([[int(byte, 16) for byte in packed]], dtype=torch.uint8)
    scale = torch.tensor([list(map(float, scales))])
    assert unpack_int4(stored, 4).tolist() == [list(map(int, codes))]
    assert dequantize_weight(stored, scale, 4).tolist() == [list(map(float, weights))]


def test_a_row_of_one_code_a_byte() -> None:
    found = re.search(
        r"`weight_bits` 6: codes (.*?) with scale (.*?) are the bytes `(.*?)`, the real weights (.*?)\.\n", DOCUMENT
    )
    assert found is not None
    codes, scale, packed, weights = (text.replace("−", "-").replace(",", "").split() for text in found.groups())
    assert [byte - 256 if byte > 127 else byte for byte in (int(byte, 16) for byte in packed)] == list(map(int, codes))

    stored = torch.tensor([int(byte, 16) for byte in packed], dtype=torch.uint8).view(1, -1).view(torch.int8)
    assert pack(torch.tensor([list(map(int, codes))], dtype=torch.int8), 6).tolist() == stored.tolist()
    assert dequantize_weight(stored, torch.tensor([float(scale[0])]), 3).tolist() == [list(map(float, weights))]


@pytest.mark.parametrize("static", [False, True])
def test_tensors_are_those_of_the_table(static: bool) -> None:
    table = DOCUMENT.split("## Tensors of a quantized layer")[1].split("###")[0]
    names = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    layer = PackedLinear(3, 2, activation_scheme=ActivationScheme(range="static" if static else "per_token"))
    tensors = layer.state_dict()

    assert set(tensors) == names if static else names - {"input_scale", "input_zero_point"}
    for name, tensor in tensors.items():
        dtype = re.search(rf"^\| `{name}` \| (\w+)", table, re.MULTILINE)
        assert dtype is not None
        expected = {"uint8": torch.uint8, "fp32": torch.float32, "int32": torch.int32, "float": torch.float32}
        assert tensor.dtype == expected[dtype[1]], name
        if tensor.dim() == 0:
            assert "scalar" in table[dtype.end() :].split("|")[0], name
