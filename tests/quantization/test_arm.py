"""The C kernel for ARM against the reference, to the bit: cross-compiled and emulated, where both can be had.

On Debian: ``apt install gcc-aarch64-linux-gnu qemu-user-static``.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fbqat_hub.quantization import ActivationScheme, PackedLinear
from fbqat_hub.quantization.kernels import native
from tests.quantization.test_kernels import SHAPES, layer_of, reference

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64-static")
pytestmark = pytest.mark.skipif(
    COMPILER is None or EMULATOR is None, reason="needs gcc-aarch64-linux-gnu and qemu-user-static"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``run_packed_linear.c`` for ARM."""
    source, flags = native.SOURCES["aarch64"]
    made = tmp_path_factory.mktemp("arm") / "run_packed_linear"
    main = Path(__file__).with_name("run_packed_linear.c")
    options = ["-O3", "-static", "-fopenmp", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", *flags]
    subprocess.run([COMPILER, *options, f"-I{source.parent}", "-o", made, main], check=True)
    return made


@pytest.mark.parametrize("dtype", list(native.DTYPES), ids=str)
@pytest.mark.parametrize("activation_range", ["per_token", "static"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_arm_is_the_reference(
    program: Path, bits: int, shape: tuple[int, int, int], activation_range: str, dtype: torch.dtype
) -> None:
    tokens, in_features, out_features = shape
    for bias in (True, False):
        layer = layer_of(in_features, out_features, ActivationScheme(range=activation_range), bias=bias, bits=bits)
        x = (3 * torch.randn(tokens, in_features)).to(dtype)
        x[0] = 0
        x[-1, 0] = 900  # beyond the static range
        found = computed(program, layer, x)
        expected = reference(layer, x)
        if in_features * bits < 8000:  # where the reference's fp32 sums are exact
            assert torch.equal(found, expected)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_arm_takes_groups(program: Path, bits: int) -> None:
    layer, x = layer_of(384, 33, ActivationScheme(), bits=bits), torch.randn(9, 384)
    layer.weight_scale = torch.rand(33, 12) * 0.02 + 1e-3
    found, expected = computed(program, layer, x), reference(layer, x.double())
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6 * float(expected.abs().max()))


def test_a_nan_does_not_vanish(program: Path) -> None:
    layer = layer_of(40, 16, ActivationScheme(range="static"))
    x = torch.randn(3, 40)
    x[1, 4] = torch.nan
    y = computed(program, layer, x)
    assert y[1].isnan().all()
    assert torch.equal(y[::2], reference(layer, x)[::2])


def computed(program: Path, layer: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    """The layer's output of x: [tokens, in], by the emulated program."""
    static = layer.input_scale is not None
    zero_point = int(layer.input_zero_point) if static else 128
    wide = layer.weight_packed.dtype == torch.int8
    counts = [*x.shape, len(layer.weight_packed), native.DTYPES[x.dtype], not static, zero_point, wide]
    counts.append(layer.weight_scale.numel() // len(layer.weight_packed))
    scale = layer.input_scale.repeat(len(x)) if static else torch.zeros(len(x))
    operands = [torch.tensor([*counts, layer.bias is not None]), x, scale, layer.weight_packed, layer.weight_scale]
    operands += [] if layer.bias is None else [layer.bias]
    given = b"".join(bytes(each.detach().contiguous().view(torch.uint8).flatten().tolist()) for each in operands)
    done = subprocess.run([EMULATOR, program], input=given, capture_output=True, check=True)
    return torch.frombuffer(bytearray(done.stdout), dtype=x.dtype).view(len(x), -1)
