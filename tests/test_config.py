"""FBQATConfig: what it writes, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fbqat_hub import FBQATConfig, __version__
from fbqat_hub.config import FORMAT_VERSION
from fbqat_hub.quantization import ActivationScheme, WeightScheme

FORMAT = (Path(__file__).resolve().parents[1] / "docs" / "format.md").read_text()
KEYS = {
    "activation_bits", "activation_range", "fbqat_version", "format_version", "group_size", "module_overrides",
    "modules_to_not_convert", "quant_method", "weight_bits", "weight_clip", "weight_granularity",
}  # fmt: skip


def test_default_is_w4a8_of_format_1() -> None:
    config = FBQATConfig()
    assert config.weight_scheme() == WeightScheme(bits=4, granularity="per_channel", clip="mse")
    assert config.activation_scheme() == ActivationScheme(bits=8, range="per_token")
    assert (config.format_version, config.fbqat_version) == (1, __version__)


def test_written_out_whole_as_plain_data_and_read_back() -> None:
    config = FBQATConfig(
        weight_granularity="per_group",
        group_size=32,
        activation_range="static",
        modules_to_not_convert=["b.*", "a"],
        module_overrides={"proj_out": {"bits": 16}},
    )
    written = json.loads(json.dumps(config.to_diff_dict()))
    assert set(written) == KEYS
    assert written["quant_method"] == "fbqat"
    assert written["modules_to_not_convert"] == ["a", "b.*"]
    assert FBQATConfig.from_dict(written).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight_bitz": 4}, r"'weight_bitz' \(did you mean 'weight_bits'\?\)"),
        ({"weight_bits": 2}, "weight_bits is 2; codes of 3 to 8 bits are stored"),
        ({"weight_bits": 9}, "weight_bits is 9"),
        ({"weight_bits": True}, "weight_bits is True"),
        ({"weight_bits": 4.5}, "weight_bits is 4.5"),
        ({"weight_granularity": "per_row"}, "'per_row'; allowed: 'per_tensor'"),
        ({"group_size": 32}, "group_size goes with"),
        ({"weight_granularity": "per_group", "group_size": "32"}, "group_size is '32'"),
        ({"weight_granularity": "per_group", "group_size": 3}, "group_size is 3"),
        ({"weight_narrow": True}, "weight_narrow is set, .* this version has no such grid"),
        ({"weight_clip": "best"}, "weight clip is 'best'"),
        ({"activation_bits": 4}, "activation bits is 4"),
        ({"activation_range": "per_channel"}, "activation range is 'per_channel'"),
        ({"modules_to_not_convert": "proj_out"}, "modules_to_not_convert is 'proj_out'; it must be a list"),
        ({"module_overrides": {"proj_out": 16}}, "module_overrides is"),
        ({"module_overrides": {1: {"bits": 16}}}, "module_overrides is"),
        (
            {"module_overrides": {"proj_out": {"bit": 16}}},
            r"module_overrides\['proj_out'\]: 'bit' \(did you mean 'bits'",
        ),
        ({"module_overrides": {"proj_out": {"bits": 12}}}, "activation bits is 12"),
        ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes'"),
        ({"format_version": 0}, "format_version is 0"),
        ({"format_version": "1"}, "format_version is '1'"),
        ({"format_version": 3, "colour": "red"}, "has format_version 3, .* which reads up to 2. Update with: pip"),
        ({"format_version": 2}, "format_version is 2, and weight_bits_by_module is None: format 2 has it, not empty"),
        ({"format_version": 1, "weight_bits_by_module": {"a": 8}}, "format_version is 1, .* format 1 does not have it"),
        ({"weight_bits_by_module": {"a": 9}}, r"weight_bits_by_module\['a'\] is 9; codes of 3 to 8"),
        ({"weight_bits_by_module": {"a": "8"}}, r"weight_bits_by_module\['a'\] is '8'"),
        ({"weight_bits_by_module": ["a"]}, r"weight_bits_by_module is \['a'\]; it must be like"),
        ({"weight_bits_by_module": {1: 8}}, "weight_bits_by_module is"),
        ({"average_bits": 3.9}, "average_bits is 3.9; it must be a number from 4 to 8"),
        ({"average_bits": 8.5}, "average_bits is 8.5"),
        ({"average_bits": float("nan")}, "average_bits is nan"),
        ({"average_bits": "4.5"}, "average_bits is '4.5'"),
        ({"average_bits": 4.5, "weight_bits": 8}, "average_bits is 4.5; .* with weight_bits 4"),
        (
            {"average_bits": 4.5, "weight_bits_by_module": {"a": 8}},
            "average_bits is 4.5; .* without weight_bits_by_mod",
        ),
    ],
)
def test_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FBQATConfig(**given)


@pytest.mark.parametrize(
    ("given", "needs"),
    [
        ({}, False),
        ({"activation_range": "static"}, True),
        ({"module_overrides": {"proj_out": {"range": "static"}}}, True),
        ({"module_overrides": {"proj_out": {"bits": 16}}}, False),
    ],
)
def test_needs_calibration(given: dict[str, Any], needs: bool) -> None:
    assert FBQATConfig(**given).needs_calibration is needs


def test_a_config_of_an_older_version_is_read() -> None:
    """Versions that had a narrow grid wrote the key even where they did not use it."""
    older = {**FBQATConfig(group_size=None).to_dict(), "weight_narrow": False}
    assert set(FBQATConfig.from_dict(older).to_dict()) == KEYS


def test_widths_by_module_are_format_2_and_one_width_is_format_1() -> None:
    config = FBQATConfig(weight_bits_by_module={"b": 8, "a": 6})
    assert config.format_version == 2
    written = json.loads(json.dumps(config.to_diff_dict()))
    assert FBQATConfig.from_dict(written).to_dict() == config.to_dict() == {**written, "format_version": 2}
    named = FBQATConfig(average_bits=4.5).with_widths({"b": 8, "a": 4, "c": 6})
    assert list(named.weight_bits_by_module.items()) == [("b", 8), ("c", 6)]
    assert (named.format_version, named.average_bits) == (2, None)
    uniform = named.with_widths({"a": 4, "b": 4})
    assert set(uniform.to_dict()) == KEYS
    assert uniform.format_version == 1


def test_keys_are_those_of_the_document() -> None:
    table = FORMAT.split("## quantization_config")[1].split("##")[0]
    keys = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert keys - {"weight_bits_by_module"} == KEYS == set(FBQATConfig().to_dict())
    assert keys == set(FBQATConfig(weight_bits_by_module={"a": 8}).to_dict())
    assert f"| `format_version` | `1`, or `{FORMAT_VERSION}` where" in table
