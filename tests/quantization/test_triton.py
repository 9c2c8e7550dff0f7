"""Our Triton kernels against sums in float64 and the reference: on a card where there is one, else interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fbqat_hub
from fbqat_hub.quantization import ActivationScheme, PackedLinear
from fbqat_hub.quantization.activation import quantize_activation
from fbqat_hub.quantization.kernels import gpu
from fbqat_hub.quantization.packing import pack
from tests.conftest import ROOT, subprocess_environment
from tests.quantization.test_kernels import layer_of, operands, reference, wide_scales

pytest.importorskip("triton", reason="triton is not installed")
from fbqat_hub.quantization.kernels import triton_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANGES = ["per_token", "per_tensor", "static"]
# odd sizes, sizes of no tile and of several; in, out and tokens of one
SHAPES = [(1, 1, 1), (1, 7, 3), (5, 33, 17), (3, 64, 32), (17, 577, 144), (40, 384, 48), (2, 520, 300), (4, 32, 130)]
# in -> out of Sana 600M, Sana 1.5 1.6B, PixArt-Sigma, SD3.5 medium and FLUX.1 at true size, without near repeats
TRUE_WIDTHS = [
    (32, 1152), (1152, 32), (1152, 6912), (2304, 1152), (2880, 1152), (2240, 13440), (5600, 2240), (4096, 1152),
    (4608, 1152), (1536, 13824), (6144, 1536), (2048, 1536), (64, 3072), (3072, 64), (3072, 18432), (12288, 3072),
    (15360, 3072),
]  # fmt: skip
# in the fast tests one small tile and one of eight warps
TILES = [
    pytest.param(config, id="x".join(map(str, config.kwargs.values())), marks=[] if at in (0, 6) else pytest.mark.slow)
    for at, config in enumerate(triton_kernels.CONFIGS)
]


def linear(x: Tensor, layer: PackedLinear) -> Tensor:
    """By our kernels, on the device that tests have; back on the CPU."""
    moved = (value.to(DEVICE) if isinstance(value, Tensor) else value for value in operands(layer))
    return triton_kernels.triton_linear(x.to(DEVICE), *moved).cpu()


def exact(x: Tensor, layer: PackedLinear) -> Tensor:
    """The same codes multiplied and scaled in float64."""
    codes, scale, zero_point = quantize_activation(
        x, layer.activation_scheme, layer.input_scale, layer.input_zero_point
    )
    sums = (codes - zero_point).double() @ layer.codes().double().t()
    y = sums * layer.weight_scale.double() * scale.double()
    return y if layer.bias is None else y + layer.bias.double()


def check(x: Tensor, layer: PackedLinear) -> None:
    """Exact but for three or four roundings in float32, and that to the dtype of x."""
    found, wanted = linear(x, layer), exact(x, layer)
    assert found.dtype == x.dtype
    assert found.shape == wanted.shape
    largest = float(wanted.abs().max())
    # the interpreter cuts where a card rounds (cvt.rn, in the compiled code)
    cut = DEVICE == "cpu" and x.dtype == torch.bfloat16
    step = 4 * torch.finfo(torch.float32).eps + torch.finfo(x.dtype).eps / (1 if cut else 2)
    torch.testing.assert_close(found.double(), wanted, rtol=step, atol=largest * 4 * torch.finfo(torch.float32).eps)
    if (
        DEVICE == "cpu" and not cut and layer.in_features * 2**layer.weight_bits <= 2**17
    ):  # the reference's sums are exact
        assert torch.equal(found, reference(layer, x))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("activation_range", RANGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_sum_in_float64(shape: tuple[int, int, int], activation_range: str, bits: int) -> None:
    tokens, inputs, outputs = shape
    layer = layer_of(inputs, outputs, ActivationScheme(range=activation_range), bits=bits, bias=bool(tokens % 2))
    x = 3 * torch.randn(tokens, inputs)
    x[0, 0] = 0
    check(x, layer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("activation_range", RANGES)
def test_takes_and_gives_other_dtypes(dtype: torch.dtype, activation_range: str) -> None:
    layer = layer_of(130, 48, ActivationScheme(range=activation_range))
    layer.bias = torch.nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    check((3 * torch.randn(2, 3, 130)).to(dtype), layer)


@pytest.mark.parametrize(("code", "activation_range"), [(-8, "static"), (7, "per_token"), (0, "per_token")])
def test_edge_codes(code: int, activation_range: str) -> None:
    """The largest sums of one sign, at the most inputs whose int32 sums hold; and rows of zeros."""
    inputs = triton_kernels.MAX_INPUTS
    layer = layer_of(inputs, 4, ActivationScheme(range=activation_range), bias=False)
    layer.weight_packed.data.copy_(pack(torch.full((4, inputs), code, dtype=torch.int8), 4))
    if layer.input_zero_point is not None:
        layer.input_zero_point.fill_(0)
    x = torch.full((2, inputs), 100.0)
    check(x, layer)
    check(-x, layer)


@pytest.mark.parametrize("code", [-128, 127])
def test_edge_codes_of_8_bits(code: int) -> None:
    layer = layer_of(triton_kernels.MAX_INPUTS, 4, ActivationScheme(range="static"), bias=False, bits=8)
    layer.weight_packed.data.fill_(code)
    layer.input_zero_point.fill_(0)
    check(torch.full((1, triton_kernels.MAX_INPUTS), 100.0), layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_zeros_and_of_huge_numbers(dtype: torch.dtype) -> None:
    layer = layer_of(64, 32, ActivationScheme(), bias=False)
    x = torch.randn(6, 64).to(dtype)
    x[0] = 0
    x[1] = torch.finfo(dtype).tiny
    x[2] = x[2] * 1e-3
    x[3, ::2] = torch.finfo(dtype).max / 1e3  # what it is multiplied to still fits
    x[4] *= 0 if dtype == torch.float16 else 1e30
    check(x, layer)
    assert not linear(x, layer)[0].any()


@pytest.mark.parametrize("activation_range", ["per_token", "static"])
def test_what_is_not_finite_does_not_vanish(activation_range: str) -> None:
    layer = layer_of(64, 32, ActivationScheme(range=activation_range), bias=False)
    x = torch.randn(3, 64)
    x[0, 5], x[2, 7] = float("nan"), float("inf")
    y = linear(x, layer)
    assert not y[0].isfinite().any()
    if activation_range == "static":  # the largest code
        torch.testing.assert_close(y[2], reference(layer, x[2:])[0])
    else:
        assert not y[2].isfinite().any()
    torch.testing.assert_close(y[1], reference(layer, x[1:2])[0])


def test_a_bias_of_any_strides() -> None:
    layer = layer_of(64, 32, ActivationScheme())
    layer.bias = torch.nn.Parameter(torch.randn(64)[::2], requires_grad=False)
    x = torch.randn(5, 64)
    torch.testing.assert_close(linear(x, layer), reference(layer, x))


@pytest.mark.parametrize("split", [True, False], ids=["4 bits", "8 bits"])
@pytest.mark.parametrize("activation_range", ["per_token", "static"])
@pytest.mark.parametrize("config", TILES)
def test_every_tile_is_exact(config: Any, activation_range: str, split: bool) -> None:
    """Each size of tile, with whole and with cut ones, several in both directions."""
    multiply = triton_kernels._multiply
    sides = config.kwargs
    for inputs in (4 * sides["BLOCK_K"], 70):
        scheme = ActivationScheme(range=activation_range)
        layer = layer_of(inputs, sides["BLOCK_N"] + 3, scheme, bits=4 if split else 8)
        x = torch.randn(sides["BLOCK_M"] + 5, inputs)
        weight, scale, bias, _, input_scale, zero_point = (
            value.to(DEVICE) if isinstance(value, Tensor) else value for value in operands(layer)
        )
        codes, scales = triton_kernels.quantize(x.to(DEVICE), scheme, input_scale, zero_point, split=split)
        y = torch.full((len(x), layer.out_features), torch.nan, device=DEVICE)
        arguments = triton_kernels.multiply_arguments(codes, scales, weight, scale, bias, zero_point, y)
        multiply.fn[triton_kernels.tiles(*y.shape)](
            *arguments, SPLIT=split, RANGE=scheme.range, BIAS=True, PTX=triton_kernels.has_ptx(x), **config.all_kwargs()
        )
        torch.testing.assert_close(y.cpu().double(), exact(x, layer), rtol=1e-6, atol=1e-5)


def test_every_count_of_tokens_has_tiles() -> None:
    for tokens in (1, 2, 16, 32, 64, 128, 4096, 2**17):
        left = triton_kernels.suited(triton_kernels.CONFIGS, {"token_bucket": tokens})
        assert 2 <= len(left) <= 7
        assert min(config.kwargs["BLOCK_M"] for config in left) <= max(tokens, 16)


@pytest.mark.slow
@pytest.mark.parametrize("shape", TRUE_WIDTHS, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_layers_of_true_width(shape: tuple[int, int], bits: int) -> None:
    layer = layer_of(*shape, ActivationScheme(), bits=bits)
    check(torch.randn(1, 3, shape[0]).to(torch.bfloat16), layer)


def test_strides_of_the_input_are_kept_to() -> None:
    layer = layer_of(48, 16, ActivationScheme())
    wide = torch.randn(6, 96)
    for x in (wide[::2, :48], wide[:, ::2], wide[:, :48].expand(2, 6, 48), wide[:48, :6].t()[:, :1].expand(6, 48)):
        check(x, layer)


def test_two_launches_and_no_pass_of_torch_over_the_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Per token: what a layer costs is one kernel that quantizes and one that multiplies."""
    launches: list[str] = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(triton_kernels, name)

        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            launches.append(self.name)
            return self.kernel[grid]

    class Named(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made.append(str(func.overloadpacket))
            return func(*args, **(kwargs or {}))

    for name in ("_quantize", "_multiply"):
        monkeypatch.setattr(triton_kernels, name, Counted(name))
    made: list[str] = []
    layer = layer_of(64, 32, ActivationScheme()).to(DEVICE)
    x = torch.randn(2, 9, 64, dtype=torch.bfloat16, device=DEVICE)
    with Named():
        triton_kernels.triton_linear(x, *operands(layer))
    assert launches == ["_quantize", "_multiply"]
    # the interpreter copies what it is given
    of_torch = set(made) - {"aten.view", "aten.empty", "aten.new_empty", "aten.detach"}
    assert DEVICE == "cpu" or not of_torch


# which implementation a card takes


class _Kernels:
    MAX_INPUTS = 1024
    triton_linear = staticmethod(triton_kernels.triton_linear)


@pytest.mark.parametrize(
    ("kernels", "int8", "inputs", "expected"),
    [
        (_Kernels, True, 64, "triton_linear"),
        (_Kernels, True, 63, "triton_linear"),
        (_Kernels, True, 1032, "int8_linear"),
        (None, True, 64, "int8_linear"),
        (None, True, 63, "dequantized_linear"),
        (None, False, 64, "dequantized_linear"),
    ],
)
def test_the_first_that_a_card_and_a_layer_suit(
    kernels: Any, int8: bool, inputs: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "triton_kernels", lambda device: kernels)
    monkeypatch.setattr(gpu, "has_int8_products", lambda device: int8)
    layer, x = layer_of(inputs, 8, ActivationScheme()), torch.randn(2, inputs)
    chosen = gpu.implementation(x, layer.weight_packed, layer.weight_scale, layer.activation_scheme)
    assert chosen.__name__ == expected


@pytest.mark.parametrize(
    "layer",
    [layer_of(64, 8, ActivationScheme(bits=16)), wide_scales(layer_of(64, 8, ActivationScheme()), 4)],
    ids=["16-bit inputs", "scales per group"],
)
def test_other_layers_are_dequantized_on_every_card(layer: PackedLinear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "triton_kernels", lambda device: _Kernels)
    x = torch.randn(2, 64)
    chosen = gpu.implementation(x, layer.weight_packed, layer.weight_scale, layer.activation_scheme)
    assert chosen is gpu.dequantized_linear


@pytest.mark.parametrize("own_kernels", [True, False])
@pytest.mark.parametrize("activation_range", RANGES)
def test_large_memory_keeps_int8_codes_and_multiplies_the_same(
    own_kernels: bool, activation_range: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "triton_kernels", lambda device: triton_kernels if own_kernels else None)
    monkeypatch.setattr(gpu, "has_int8_products", lambda device: True)
    layer, x = layer_of(72, 24, ActivationScheme(range=activation_range)), torch.randn(3, 72)  # type: ignore[arg-type]
    wanted = gpu.packed_linear_gpu(x, *operands(layer))
    kept = layer.weight_packed.untyped_storage().__dict__
    made: list[Tensor] = []

    def counted(*of: Any) -> Tensor:
        made.append(codes_of(*of))
        return made[-1]

    codes_of = gpu._codes
    monkeypatch.setattr(gpu, "_codes", counted)
    assert not kept.get("fbqat_prepared")
    fbqat_hub.set_memory("large")
    try:
        for _ in range(2):
            assert torch.equal(gpu.packed_linear_gpu(x, *operands(layer)), wanted)
        ((_, codes),) = kept["fbqat_prepared"].values()
        assert torch.equal(codes, layer.codes())
        assert len(made) == 1
    finally:
        fbqat_hub.set_memory("fast")
    gpu.packed_linear_gpu(x, *operands(layer))
    assert not kept.get("fbqat_prepared")


def test_large_memory_is_of_what_int8_products_take() -> None:
    layer = wide_scales(layer_of(64, 8, ActivationScheme()), 4)
    fbqat_hub.set_memory("large")
    try:
        gpu.packed_linear_gpu(torch.randn(2, 64), *operands(layer))
    finally:
        fbqat_hub.set_memory("fast")
    assert not layer.weight_packed.untyped_storage().__dict__.get("fbqat_prepared")


@pytest.mark.parametrize(
    ("capability", "arch", "int8", "triton"),
    [
        ((7, 0), None, False, False),
        ((7, 5), None, True, False),
        ((8, 0), None, True, True),
        ((12, 0), None, True, True),
        ((9, 4), "gfx942:sramecc+", True, True),
        ((10, 3), "gfx1030", False, False),
    ],
)
def test_cards(
    capability: tuple[int, int], arch: str | None, int8: bool, triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", arch and "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("P", (), {"gcnArchName": arch}))
    monkeypatch.setattr(gpu, "multiplies_exactly", lambda linear, device: True)
    card = torch.device("cuda", 0)
    assert gpu.has_int8_products.__wrapped__(card) == int8
    monkeypatch.setattr(gpu, "has_int8_products", gpu.has_int8_products.__wrapped__)
    assert (gpu.triton_kernels.__wrapped__(card) is not None) == triton


def test_the_first_use_on_a_card_compares_and_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))

    def fails(*_: Any) -> Tensor:
        raise RuntimeError("Failed to find C compiler")

    card = torch.device("cuda", 0)
    for linear, reason in (
        (lambda x, *rest: torch.zeros(5, 40), "came out wrong"),
        (fails, "RuntimeError: Failed to find C compiler"),
    ):
        monkeypatch.setattr(triton_kernels, "triton_linear", linear)
        monkeypatch.setattr(gpu, "multiplies_exactly", lambda linear, device: linear(None).any())
        with pytest.warns(UserWarning, match=reason):
            assert gpu.triton_kernels.__wrapped__(card) is None


def test_the_comparison_passes_where_the_kernels_are_right() -> None:
    assert gpu.multiplies_exactly(triton_kernels.triton_linear, torch.device(DEVICE))
    assert not gpu.multiplies_exactly(lambda x, *_: torch.zeros(5, 40), torch.device("cpu"))


# what the compiler makes of them, without a card


def check_compiled(capability: int, tiles: list[int], folder: Path) -> None:
    """Int8 products of tensor cores, few instructions beside them, sums in registers, and room in shared memory."""
    environment = subprocess_environment(
        TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(folder), PYTHONPATH=os.pathsep.join(filter(None, sys.path))
    )
    arguments = ["--capabilities", str(capability), "--tiles", *map(str, tiles), "--output", str(folder / "code.json")]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.triton_code", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((folder / "code.json").read_text())["rows"]
    assert len(rows) == 3 * len(tiles)
    for row in rows:
        assert row["products"] >= 4, row
        if row["ptx"]:
            assert row["stack"] == 0, row
            # bytes taken one by one are 200 more; a product of 9.0 is not to be compared
            assert capability == 90 or row["instructions"] < 5 * row["products"] + 80, row
        assert row["shared"] <= {80: 166912, 90: 232448}.get(capability, 101376), row
        assert row["rounds_to_nearest"], row


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_path_compiles(capability: int, tmp_path: Path) -> None:
    environment = subprocess_environment(
        TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=os.pathsep.join(filter(None, sys.path))
    )
    script = f"from benchmarks.triton_code import check_every_path; print(check_every_path({capability}))"
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "24", done.stderr[-2000:]


def test_compiles_to_int8_tensor_cores(tmp_path: Path) -> None:
    check_compiled(89, [4], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90, 120])
def test_every_tile_compiles_for_a_card(capability: int, tmp_path: Path) -> None:
    check_compiled(capability, list(range(len(triton_kernels.CONFIGS))), tmp_path)
