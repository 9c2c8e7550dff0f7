"""docs/format.md is true: its example decodes by its own rules, and the package agrees with it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file, save_file
from torch import nn

from fbqat_hub import FBQATConfig
from fbqat_hub.quantization import ActivationScheme, FakeQuantizedLinear, PackedLinear, WeightScheme, unpack_int4
from fbqat_hub.quantization.kernels.reference import dequantize_weight
from fbqat_hub.quantization.packing import pack

DOCUMENT = (Path(__file__).resolve().parents[1] / "docs" / "format.md").read_text()


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


@pytest.fixture(scope="module")
def two_widths() -> dict[str, Any]:
    return json.loads(re.findall(r"```json\n(.*?)```", DOCUMENT, re.DOTALL)[1])


def test_two_widths_decode_without_our_code(two_widths: dict[str, Any]) -> None:
    config, tensors = two_widths["quantization_config"], two_widths["tensors"]
    for name, weights in two_widths["weights"].items():
        bits = config["weight_bits_by_module"].get(name, config["weight_bits"])
        stored = tensors[f"{name}.weight_packed"]
        assert stored["dtype"] == ("uint8" if bits <= 4 else "int8")
        if bits <= 4:
            codes = decode_rows(stored["bytes"], 3)
        else:
            codes = [[byte - 256 if byte > 127 else byte for byte in (int(b, 16) for b in r)] for r in stored["bytes"]]
        scales = tensors[f"{name}.weight_scale"]
        assert [[code * scale for code in row] for row, scale in zip(codes, scales, strict=True)] == weights


class _TwoLayers(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2, bias=False), nn.Linear(3, 1, bias=False)


def test_we_read_and_write_two_widths(two_widths: dict[str, Any], tmp_path: Path) -> None:
    tensors = {}
    for name, value in two_widths["tensors"].items():
        if name.endswith("weight_scale"):
            tensors[name] = torch.tensor(value)
        else:
            rows = torch.tensor([[int(byte, 16) for byte in row] for row in value["bytes"]], dtype=torch.uint8)
            tensors[name] = rows.view(getattr(torch, value["dtype"]))
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    config = FBQATConfig(weight_bits_by_module={"b": 8}).to_dict()
    assert two_widths["quantization_config"].items() <= config.items()
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "_TwoLayers", "quantization_config": config}))
    model = _TwoLayers.from_pretrained(tmp_path)
    for name, weights in two_widths["weights"].items():
        assert model.get_submodule(name).dequantize().tolist() == weights
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "diffusion_pytorch_model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], value) and again[name].dtype == value.dtype for name, value in tensors.items())


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


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("weight_scale", torch.tensor([math.nan] * 3), "has scales that are not finite and above 0"),
        ("weight_scale", torch.tensor([0.1, -0.1, 0.1]), "has scales that are not finite and above 0"),
        ("weight_scale", torch.ones(3, dtype=torch.float16), "is torch.float16; docs/format.md has torch.float32"),
        ("weight_scale", torch.ones(1), r"has shape \(1,\); this model needs \(3,\)"),
        ("weight_packed", torch.full((3, 4), 99, dtype=torch.int8), "codes run from 99 to 99; 5 bits hold"),
        ("input_zero_point", torch.tensor(-1, dtype=torch.int32), "is -1; with 8-bit activations it must be from 0"),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_refuses_what_the_format_does_not_have(
    tensor: str, value: torch.Tensor, message: str, assign: bool
) -> None:
    model = torch.nn.Sequential(PackedLinear(4, 3, weight_bits=5, activation_scheme=ActivationScheme(range="static")))
    for buffer in model.buffers():
        buffer.fill_(1)
    model[0].weight_packed.data.zero_()
    stored = {name: each.clone() for name, each in model.state_dict().items()}
    model.load_state_dict(stored, assign=assign)
    with pytest.raises(RuntimeError, match=rf"0\.{tensor}:? .*{message}"):
        model.load_state_dict({**stored, f"0.{tensor}": value}, assign=assign)
    assert all(torch.equal(each, stored[name]) for name, each in model.state_dict().items())


def test_three_bits_are_stored_in_four_which_can_hold_more() -> None:
    model = torch.nn.Sequential(PackedLinear(4, 3, weight_bits=3))
    stored = {**model.state_dict(), "0.weight_scale": torch.ones(3)}
    model.load_state_dict({**stored, "0.weight_packed": torch.full((3, 2), 0x3C, dtype=torch.uint8)})  # 3 and -4
    with pytest.raises(RuntimeError, match=r"0\.weight_packed: codes run from 4 to 4; 3 bits hold -4 to 3"):
        model.load_state_dict({**stored, "0.weight_packed": torch.full((3, 2), 0x44, dtype=torch.uint8)})


def test_an_odd_row_has_no_code_beyond_its_inputs() -> None:
    model = torch.nn.Sequential(PackedLinear(3, 2))
    stored = {**model.state_dict(), "0.weight_scale": torch.ones(2), "0.bias": torch.zeros(2)}
    model.load_state_dict({**stored, "0.weight_packed": torch.tensor([[0xC7, 0x02]] * 2, dtype=torch.uint8)})
    with pytest.raises(RuntimeError, match=r"0\.weight_packed has a code beyond its 3 inputs; the file is damaged"):
        model.load_state_dict({**stored, "0.weight_packed": torch.tensor([[0xC7, 0x12]] * 2, dtype=torch.uint8)})
