"""Every kernel against the reference: the integer part exactly, the scaling to float rounding."""

import copy
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fbqat_hub
from fbqat_hub.quantization import ActivationScheme, PackedLinear
from fbqat_hub.quantization.activation import fake_quantize_activation, quantize_activation
from fbqat_hub.quantization.kernels import cpu, gpu, native, packed_linear_reference
from fbqat_hub.quantization.packing import pack, pack_int4
from tests.conftest import subprocess_environment

needs_onednn = pytest.mark.skipif(not cpu._has_fast_products(), reason="oneDNN's kernel needs x86 with AVX2")
SHAPES = [(1, 1, 1), (1, 7, 3), (5, 33, 17), (256, 1152, 144), (2, 1153, 64), (9, 8000, 5)]


def layer_of(
    in_features: int, out_features: int, scheme: ActivationScheme, *, bias: bool = True, bits: int = 4
) -> PackedLinear:
    torch.manual_seed(in_features)
    layer = PackedLinear(in_features, out_features, weight_bits=bits, bias=bias, activation_scheme=scheme)
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (out_features, in_features), dtype=torch.int8)
    layer.weight_packed.data.copy_(pack(codes, bits))
    layer.weight_scale.copy_(torch.rand(out_features) * 0.02 + 1e-3)
    if layer.bias is not None:
        layer.bias.data.normal_()
    if layer.input_scale is not None and layer.input_zero_point is not None:
        layer.input_scale.fill_(0.02)
        layer.input_zero_point.fill_(113)
    return layer


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the C kernel cannot be compiled."""
    monkeypatch.setattr(cpu.native, "load", lambda: None)


@pytest.fixture
def compiled() -> None:
    if native.load() is None:
        pytest.skip("no C compiler, or a processor without its instructions")


@pytest.fixture(params=native.instructions_here())
def instructions(request: pytest.FixtureRequest, compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The C kernel with each of the instructions that it can multiply with."""
    functions = native.load()
    assert functions is not None
    limited = functions._replace(instructions=list(native.INSTRUCTIONS).index(request.param))
    monkeypatch.setattr(native, "load", lambda: limited)


def keeps_a_prepared_weight(layer: PackedLinear) -> bool:
    """Whether the layer's last forward left a prepared weight with its bytes."""
    kept = getattr(layer.weight_packed.untyped_storage(), "fbqat_prepared", {})
    return any(weight is not None for _, weight in kept.values())


def other_weight(layer: PackedLinear) -> torch.Tensor:
    return pack_int4(torch.full((layer.out_features, layer.in_features), -7, dtype=torch.int8))


def operands(layer: PackedLinear) -> tuple[Any, ...]:
    """What the kernels take after x."""
    activation = (layer.activation_scheme, layer.input_scale, layer.input_zero_point)
    return layer.weight_packed, layer.weight_scale, layer.bias, *activation


def reference(layer: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    return packed_linear_reference(x, *operands(layer))


@needs_onednn
@pytest.mark.parametrize("activation_range", ["per_token", "per_tensor", "static"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.usefixtures("onednn")
def test_onednn_equals_reference(shape: tuple[int, int, int], activation_range: str, bias: bool) -> None:
    tokens, in_features, out_features = shape
    layer = layer_of(in_features, out_features, ActivationScheme(range=activation_range), bias=bias)
    x = 3 * torch.randn(tokens, in_features)
    x[0, 0] = 0
    y = layer(x)
    assert keeps_a_prepared_weight(layer)
    # both scale the same integers; the order of two or three float roundings differs
    torch.testing.assert_close(y, reference(layer, x), rtol=1e-6, atol=1e-6 * float(y.abs().max()))


@needs_onednn
@pytest.mark.parametrize("extreme", [-8, 7])
@pytest.mark.usefixtures("onednn")
def test_onednn_is_exact_where_16_bit_sums_could_saturate(extreme: int) -> None:
    """Largest codes and activations of one sign: 2 x 255 x 8 fits 16 bits, so AVX2 sums stay exact."""
    layer = layer_of(8000, 4, ActivationScheme(range="static"), bias=False)
    layer.weight_packed.data.copy_(pack_int4(torch.full((4, 8000), extreme, dtype=torch.int8)))
    layer.weight_scale.fill_(1.0)
    layer.input_zero_point.fill_(0)
    x = torch.full((3, 8000), 255 * 0.02)
    codes, scale, _ = quantize_activation(x, layer.activation_scheme, layer.input_scale, layer.input_zero_point)
    assert codes.eq(255).all()
    assert torch.equal(layer(x), torch.full((3, 4), 255.0 * extreme * 8000) * scale)


@needs_onednn
@pytest.mark.parametrize("bits", [5, 7, 8])
@pytest.mark.parametrize("activation_range", ["per_token", "static"])
def test_wider_codes_equal_the_sum_in_float64(bits: int, activation_range: str) -> None:
    layer = layer_of(1153, 64, ActivationScheme(range=activation_range), bits=bits)
    x = 3 * torch.randn(7, 1153)
    codes, scale, zero_point = quantize_activation(
        x, layer.activation_scheme, layer.input_scale, layer.input_zero_point
    )
    whole = (codes - zero_point).double() @ layer.codes().double().t()
    expected = whole * layer.weight_scale.double() * scale.double() + layer.bias.double()
    for y in (layer(x), reference(layer, x)):
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6 * float(y.abs().max()))


@needs_onednn
@pytest.mark.parametrize("isa", ["", "AVX2"])
def test_wide_codes_are_exact_with_and_without_vnni(isa: str) -> None:
    """Largest codes and activations of one sign. Without VNNI 16-bit sums hold 7-bit codes; 8-bit ones, which they do
    not, run on the reference."""
    script = """
import torch
from fbqat_hub.quantization import ActivationScheme, PackedLinear
from fbqat_hub.quantization.kernels import cpu
for bits in (7, 8):
    scheme = ActivationScheme(range="static")
    layer = PackedLinear(64, 16, weight_bits=bits, bias=False, activation_scheme=scheme)
    layer.weight_packed.data.fill_(-(2 ** (bits - 1)))
    layer.weight_scale.fill_(1.0), layer.input_scale.fill_(1.0), layer.input_zero_point.fill_(0)
    y = layer(torch.full((3, 64), 255.0))
    assert (y == -(2 ** (bits - 1)) * 255 * 64).all(), (bits, y)
    print(bits, cpu.prepared(layer.weight_packed, 64) is not None)
"""
    limited = {"ONEDNN_MAX_CPU_ISA": isa, "ATEN_CPU_CAPABILITY": isa.lower()} if isa else {}
    limited["FBQAT_COMPILE"] = "0"
    done = subprocess.run(
        [sys.executable, "-c", script], env=subprocess_environment(**limited), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("7 True\n")
    if isa:
        assert done.stdout == "7 True\n8 False\n"


# the C kernel: equal to the reference to the bit where that one's sums are exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("activation_range", ["per_token", "per_tensor", "static"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.usefixtures("instructions")
def test_native_is_the_reference(
    bits: int, shape: tuple[int, int, int], activation_range: str, dtype: torch.dtype
) -> None:
    tokens, in_features, out_features = shape
    for bias in (True, False):
        layer = layer_of(in_features, out_features, ActivationScheme(range=activation_range), bias=bias, bits=bits)
        x = (3 * torch.randn(tokens, in_features)).to(dtype)
        x[0] = 0
        x[-1, 0] = 900  # beyond the static range
        found = native.packed_linear_native(x, *operands(layer))
        assert found.dtype == dtype
        assert torch.equal(found, reference(layer, x))


@pytest.mark.parametrize("bits", [5, 7, 8])
@pytest.mark.parametrize("activation_range", ["per_token", "static"])
@pytest.mark.parametrize("in_features", [1, 33, 500])
@pytest.mark.usefixtures("instructions")
def test_native_takes_wider_codes(bits: int, activation_range: str, in_features: int) -> None:
    layer = layer_of(in_features, 257, ActivationScheme(range=activation_range), bits=bits)
    half = 2 ** (bits - 1)
    every = torch.arange(-half, half).to(torch.int8)  # every code, at any place
    layer.weight_packed.data.copy_(every.repeat(257 * in_features // len(every) + 1)[: 257 * in_features].view(257, -1))
    x = 3 * torch.randn(7, in_features)
    assert torch.equal(native.packed_linear_native(x, *operands(layer)), reference(layer, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation_range", ["per_token", "static"])
@pytest.mark.parametrize("groups", [1, 2, 3, 12])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.usefixtures("instructions")
def test_native_takes_groups(bits: int, groups: int, activation_range: str, dtype: torch.dtype) -> None:
    for tokens, out_features in ((1, 1), (13, 33), (70, 48)):
        layer = layer_of(384, out_features, ActivationScheme(range=activation_range), bits=bits)
        layer.weight_scale = torch.rand(out_features, groups) * 0.02 + 1e-3
        x = (3 * torch.randn(tokens, 384)).to(dtype)
        found = native.packed_linear_native(x, *operands(layer))
        whole = packed_linear_reference(x.double(), *operands(layer))
        # one rounding a group, and that of bfloat16
        tolerance = 2e-6 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(found.double(), whole, rtol=tolerance, atol=tolerance * float(whole.abs().max()))
        if groups > 1:
            assert torch.equal(cpu.packed_linear_cpu(x, *operands(layer)), found)


@pytest.mark.usefixtures("compiled")
def test_groups_of_other_sizes_are_left_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(48, 8, ActivationScheme())
    layer.weight_scale = torch.rand(8, 3) + 0.1
    x = torch.randn(5, 48)
    assert not cpu.is_supported(layer.weight_scale, layer.activation_scheme, 48)
    assert torch.equal(cpu.packed_linear_cpu(x, *operands(layer)), reference(layer, x))
    with pytest.raises(ValueError, match=r"\[out, groups\] of a multiple of 32 inputs"):
        native.packed_linear_native(x, *operands(layer))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("lowest", [True, False])
@pytest.mark.usefixtures("instructions")
def test_native_is_exact_where_16_bit_sums_are_fullest(bits: int, lowest: bool) -> None:
    """Largest codes and activations of one sign, as many as 16 bits are asked to sum."""
    layer = layer_of(512, 4, ActivationScheme(range="static"), bias=False, bits=bits)
    extreme = -(2 ** (bits - 1)) if lowest else 2 ** (bits - 1) - 1
    layer.weight_packed.data.copy_(pack(torch.full((4, 512), extreme, dtype=torch.int8), bits))
    layer.weight_scale.fill_(1.0)
    layer.input_scale.fill_(1.0)
    layer.input_zero_point.fill_(0)
    found = native.packed_linear_native(torch.full((7, 512), 255.0), *operands(layer))
    assert torch.equal(found, torch.full((7, 4), 255.0 * extreme * 512))


@pytest.mark.usefixtures("instructions")
def test_native_takes_any_strides_and_ignores_what_pads_an_odd_row() -> None:
    layer = layer_of(33, 17, ActivationScheme())
    x = torch.randn(9, 2, 40, dtype=torch.bfloat16)
    clean = native.packed_linear_native(x[:, 1, :33], *operands(layer))
    assert torch.equal(clean, reference(layer, x[:, 1, :33]))
    across = torch.randn(33, 9).t()
    assert torch.equal(native.packed_linear_native(across, *operands(layer)), reference(layer, across))
    layer.weight_packed.data[:, -1] |= 0xF0
    assert torch.equal(native.packed_linear_native(x[:, 1, :33], *operands(layer)), clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation_range", ["per_token", "static"])
@pytest.mark.parametrize("kernel", ["native", "onednn", "int8_linear"])
def test_what_is_not_finite_does_not_vanish(
    kernel: str, activation_range: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A static range has codes for all numbers; a NaN must not become one of them."""
    layer = layer_of(40, 16, ActivationScheme(range=activation_range))
    x = torch.randn(3, 40, dtype=dtype)
    x[1, 4] = torch.nan
    if kernel == "native" and native.load() is None:
        pytest.skip("no C compiler, or a processor without its instructions")
    if kernel == "onednn":
        monkeypatch.setattr(cpu.native, "load", lambda: None)
    compute = {"native": native.packed_linear_native, "onednn": cpu.packed_linear_cpu, "int8_linear": gpu.int8_linear}
    y = compute[kernel](x, *operands(layer))
    assert y[1].isnan().all()
    torch.testing.assert_close(y[::2], reference(layer, x[::2]))


@needs_onednn
@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("activation_range", ["per_token", "per_tensor", "static"])
@pytest.mark.parametrize("kernel", ["native", "onednn", "gpu"])
def test_the_default_dtype_changes_nothing(
    kernel: str, activation_range: str, default: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The C code writes fp32 into what it is given."""
    if kernel == "native" and native.load() is None:
        pytest.skip("no C compiler, or a processor without its instructions")
    if kernel == "onednn":
        monkeypatch.setattr(cpu.native, "load", lambda: None)
    compute = gpu.packed_linear_gpu if kernel == "gpu" else cpu.packed_linear_cpu
    cpu._has_exact_sums.cache_clear()
    layer, x = layer_of(64, 8, ActivationScheme(range=activation_range)), torch.randn(100, 64)
    expected, given = compute(x, *operands(layer)), operands(layer)
    cpu._has_exact_sums.cache_clear()
    torch.set_default_dtype(default)
    try:
        found = compute(x, *given)
        assert gpu.multiplies_exactly(gpu.int8_linear, torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@needs_onednn
def test_sums_that_32_bits_do_not_hold_are_left_to_the_reference() -> None:
    layer = layer_of(cpu.MAX_INPUTS + 1, 8, ActivationScheme(), bits=8)
    layer.weight_packed.data.fill_(127)
    x = torch.full((2, layer.in_features), 127.0)
    assert torch.equal(cpu.packed_linear_cpu(x, *operands(layer)), reference(layer, x))
    wide = torch.zeros(1, gpu.MAX_INPUTS + 1)
    chosen = gpu.implementation(wide, layer.weight_packed, layer.weight_scale, layer.activation_scheme)
    assert chosen is gpu.dequantized_linear


@pytest.mark.parametrize(
    ("at", "wrong"),
    [
        (0, torch.zeros(17, 16, dtype=torch.uint8)),
        (0, torch.zeros(17, 32, dtype=torch.int8)),
        (0, torch.zeros(17, 33)),
        (1, torch.ones(16)),
        (1, torch.ones(17, dtype=torch.float64)),
        (2, torch.zeros(16)),
    ],
    ids=["short rows", "short wide rows", "float", "scales", "dtype of scales", "bias"],
)
@pytest.mark.usefixtures("compiled")
def test_native_refuses_what_it_would_read_beyond(at: int, wrong: torch.Tensor) -> None:
    given = list(operands(layer_of(33, 17, ActivationScheme())))
    given[at] = wrong
    with pytest.raises(ValueError, match="for 33 inputs the weight must be uint8"):
        native.packed_linear_native(torch.ones(2, 33), *given)


@pytest.mark.usefixtures("instructions")
def test_native_runs_in_several_threads() -> None:
    layer = layer_of(1152, 512, ActivationScheme())
    inputs = [torch.randn(64, 1152) for _ in range(6)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda x: native.packed_linear_native(x, *operands(layer)), inputs))
    assert all(torch.equal(y, reference(layer, x)) for x, y in zip(inputs, found, strict=True))


class Operators(TorchDispatchMode):
    """The operators of torch that run, views apart, and the bytes that they allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not func.is_view:
            self.names.append(func.name().partition(".")[0])
            self.bytes += 0 if func._schema.is_mutable else made.nbytes
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("compiled")
def test_native_allocates_its_output_and_one_byte_an_input(dtype: torch.dtype) -> None:
    """No float copy of x, no unpacked weight."""
    layer = layer_of(1152, 1152, ActivationScheme())
    x = torch.randn(252, 1152, dtype=dtype)
    with torch.no_grad(), Operators() as ran:
        y = native.packed_linear_native(x, *operands(layer))
    scales, work = 4 * 252, torch.get_num_threads() * 2 * 16 * (1152 + 8)
    assert ran.bytes == y.nbytes + x.numel() + scales + work


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation_range", ["per_token", "per_tensor", "static"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (7, 1152)])
@pytest.mark.usefixtures("compiled")
def test_both_quantizers_give_the_same(
    shape: tuple[int, int], activation_range: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = (3 * torch.randn(shape)).to(dtype)
    static = (
        (torch.tensor(0.02), torch.tensor(113, dtype=torch.int32)) if activation_range == "static" else (None, None)
    )
    scheme = ActivationScheme(range=activation_range)
    found = cpu._quantize(x, scheme, *static)
    monkeypatch.setattr(cpu.native, "load", lambda: None)
    expected = cpu._quantize(x, scheme, *static)
    assert found[0].shape == shape
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert found[2] == expected[2]


@needs_onednn
@pytest.mark.usefixtures("compiled")
def test_onednn_layer_is_one_product_and_one_pass_over_input_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_has_amx", lambda: True)
    monkeypatch.setattr(cpu, "_has_exact_sums", lambda: True)
    layer, x = layer_of(64, 8, ActivationScheme()), torch.randn(5, 64)
    layer(x)
    with torch.no_grad(), Operators() as ran:
        cpu.packed_linear_cpu(x, *operands(layer))
    assert ran.names == ["aten::sum", "aten::empty", "aten::empty", "onednn::qlinear_pointwise", "aten::addcmul"]


@pytest.mark.parametrize(
    ("variable", "value"),
    [("FBQAT_COMPILE", "0"), ("CC", "no-such-compiler"), ("CC", "false"), ("FBQAT_CACHE", "/proc/no")],
)
def test_without_a_compiler_there_is_no_native_kernel(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert native.load.__wrapped__() is None


def test_what_is_slow_without_a_compiler_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(native, "instruction_sets", lambda: frozenset({"asimddp"}))
    monkeypatch.setenv("CC", "no-such-compiler")
    assert native.load.__wrapped__() is None
    assert "slower than float ones; install a C compiler" in caplog.text


@pytest.mark.usefixtures("compiled")
def test_native_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FBQAT_CACHE", str(tmp_path))
    assert native.load.__wrapped__() is not None
    assert [file.suffix for file in tmp_path.glob("kernels/*")] == [".so"]
    monkeypatch.setattr(native.subprocess, "run", None)
    assert native.load.__wrapped__() is not None


@pytest.mark.usefixtures("compiled")
def test_the_instructions_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    here = native.instructions_here()
    monkeypatch.setenv("FBQAT_INSTRUCTIONS", here[0])
    assert list(native.INSTRUCTIONS)[native.load.__wrapped__().instructions] == here[0]
    monkeypatch.delenv("FBQAT_INSTRUCTIONS")
    assert list(native.INSTRUCTIONS)[native.load.__wrapped__().instructions] == here[-1]
    monkeypatch.setenv("FBQAT_INSTRUCTIONS", "sse9")
    with pytest.raises(ValueError, match=f"FBQAT_INSTRUCTIONS is 'sse9'; allowed on this processor: '{here[0]}'"):
        native.load.__wrapped__()


@needs_onednn
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("has_amx", [True, False])
def test_an_int8_copy_is_kept_only_where_it_is_faster(has_amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_has_amx", lambda: has_amx)
    layer = layer_of(64, 8, ActivationScheme())
    layer(torch.randn(5, 64))
    assert keeps_a_prepared_weight(layer) == has_amx


@needs_onednn
@pytest.mark.parametrize("is_compiled", [True, False])
def test_small_memory_keeps_nothing_unpacked(is_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(64, 8, ActivationScheme()), torch.randn(5, 64)
    monkeypatch.setattr(cpu, "_has_amx", lambda: True)  # where oneDNN is the faster one
    y = layer(x)
    assert keeps_a_prepared_weight(layer)
    if is_compiled and native.load() is None:
        pytest.skip("no C compiler")
    if not is_compiled:
        monkeypatch.setattr(cpu.native, "load", lambda: None)
    fbqat_hub.set_memory("small")
    try:
        torch.testing.assert_close(layer(x), y, rtol=1e-6, atol=1e-6)
        assert not keeps_a_prepared_weight(layer)
    finally:
        fbqat_hub.set_memory("fast")
    layer(x)
    assert keeps_a_prepared_weight(layer)


def test_memory_is_one_of_three() -> None:
    with pytest.raises(ValueError, match="memory is 'tiny'; allowed: 'small', 'fast', 'large'"):
        fbqat_hub.set_memory("tiny")


def changed_in_place(layer: PackedLinear) -> PackedLinear:
    with torch.no_grad():
        layer.weight_packed.copy_(other_weight(layer))
    return layer


def loaded(layer: PackedLinear, assign: bool = False) -> PackedLinear:
    layer.load_state_dict({**layer.state_dict(), "weight_packed": other_weight(layer)}, assign=assign)
    return layer


def swapped_by_data(layer: PackedLinear) -> PackedLinear:
    layer.weight_packed.data = other_weight(layer)
    return layer


def overwritten_by_data(layer: PackedLinear) -> PackedLinear:
    """As an offloader with a buffer of its own writes, and FSDP2: torch counts no version."""
    layer.weight_packed.data.copy_(other_weight(layer))
    return layer


def overwritten_by_numpy(layer: PackedLinear) -> PackedLinear:
    layer.weight_packed.numpy()[:] = other_weight(layer).numpy()
    return layer


def offloaded(layer: PackedLinear) -> PackedLinear:
    """accelerate's hook puts the weight in place at each forward, and takes it away after."""
    import accelerate

    layer(torch.ones(1, layer.in_features))
    accelerate.cpu_offload(layer, torch.device("cpu"), state_dict=loaded(copy.deepcopy(layer)).state_dict())
    return layer


def changed_after_a_copy(layer: PackedLinear) -> PackedLinear:
    return changed_in_place(copy.deepcopy(layer))


def changed_after_pickling(layer: PackedLinear) -> PackedLinear:
    return changed_in_place(pickle.loads(pickle.dumps(layer)))


def moved_and_changed(layer: PackedLinear) -> PackedLinear:
    layer = layer.to("meta").to_empty(device="cpu")
    fresh = layer_of(layer.in_features, layer.out_features, layer.activation_scheme)
    layer.load_state_dict({**fresh.state_dict(), "weight_packed": other_weight(layer)})
    return layer


@pytest.mark.parametrize(
    "change",
    [
        changed_in_place,
        loaded,
        lambda layer: loaded(layer, assign=True),
        swapped_by_data,
        overwritten_by_data,
        overwritten_by_numpy,
        offloaded,
        changed_after_a_copy,
        changed_after_pickling,
        moved_and_changed,
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.usefixtures("onednn")
def test_changed_weights_are_seen_by_the_next_forward(change: Callable[..., PackedLinear], mode: Any) -> None:
    layer = layer_of(32, 8, ActivationScheme())
    x = torch.randn(4, 32)
    with mode():
        before = layer(x)
        after = change(layer)(x)
    expected = reference(changed_in_place(layer_of(32, 8, ActivationScheme())), x)
    assert not torch.equal(before, expected)
    torch.testing.assert_close(after, expected)


@needs_onednn
@pytest.mark.usefixtures("onednn")
def test_a_weight_is_prepared_once_and_goes_with_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    prepack = cpu._prepack

    def counted(codes: torch.Tensor) -> cpu.PreparedWeight:
        weight = prepack(codes)
        made.append(weakref.ref(weight.codes))
        return weight

    monkeypatch.setattr(cpu, "_prepack", counted)
    layer = layer_of(32, 8, ActivationScheme())
    for tokens in (1, 4, 9):
        layer(torch.randn(tokens, 32))
    assert len(made) == 1
    layer.weight_packed.data = layer.weight_packed.data.clone()
    assert made[0]() is None


@pytest.mark.usefixtures("onednn")
def test_a_layer_that_has_run_can_be_copied_and_saved() -> None:
    layer = layer_of(32, 8, ActivationScheme())
    x = torch.randn(4, 32)
    y = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), y)
    assert set(layer.state_dict()) == {"weight_packed", "weight_scale", "bias"}


# the operator


@pytest.mark.parametrize("activation_range", ["per_token", "per_tensor", "static"])
@pytest.mark.parametrize("bias", [True, False])
def test_operator_is_one_that_torch_can_trace(activation_range: str, bias: bool) -> None:
    """Its schema, its fake kernel and its gradient, by torch's own check."""
    layer = layer_of(7, 6, ActivationScheme(range=activation_range), bias=bias)
    x = torch.randn(2, 5, 7, requires_grad=True)
    scheme = layer.activation_scheme
    arguments = (x, layer.weight_packed, layer.weight_scale, layer.bias, layer.input_scale, layer.input_zero_point)
    torch.library.opcheck(torch.ops.fbqat.packed_linear, (*arguments, scheme.bits, scheme.range))


def test_compiled_layer_trains_what_is_before_it() -> None:
    """One graph forward and backward, for any number of tokens."""
    layer, before = layer_of(16, 8, ActivationScheme(range="static")), torch.nn.Linear(16, 16)
    eager = torch.nn.Sequential(before, layer)
    torch._dynamo.reset()
    compiled = torch.compile(eager, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens, stance in ((5, "default"), (9, "fail_on_recompile")):
        x, gradients = torch.randn(tokens, 16), []
        for model in (eager, compiled):
            with torch.compiler.set_stance(stance):
                gradients.append(torch.autograd.grad(model(x).square().sum(), before.weight)[0])
        torch.testing.assert_close(*gradients)
        assert gradients[0].abs().max() > 0


# the GPU's arithmetic, on a CPU


def wide_scales(layer: PackedLinear, groups: int) -> PackedLinear:
    layer.weight_scale = torch.rand(layer.out_features, groups) * 0.02 + 1e-3
    return layer


@pytest.mark.parametrize("activation_range", ["per_token", "per_tensor", "static"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (16, 64, 24), (17, 1152, 144), (40, 2048, 16)])
@pytest.mark.parametrize("bits", [4, 8])
def test_gpu_int8_product_equals_the_reference(shape: tuple[int, int, int], activation_range: str, bits: int) -> None:
    tokens, in_features, out_features = shape
    layer = layer_of(in_features, out_features, ActivationScheme(range=activation_range), bits=bits)
    x = 3 * torch.randn(2, tokens, in_features)
    chosen = gpu.implementation(x, layer.weight_packed, layer.weight_scale, layer.activation_scheme)
    assert chosen is gpu.int8_linear
    x[0, 0] = 0
    found = gpu.packed_linear_gpu(x, *operands(layer))
    if in_features * (bits - 3) < 8192:  # the reference's sums are exact
        assert torch.equal(found, reference(layer, x))
    torch.testing.assert_close(found, reference(layer, x), rtol=1e-5, atol=1e-5 * float(found.abs().max()))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (layer_of(63, 8, ActivationScheme()), "63 inputs"),
        (layer_of(64, 9, ActivationScheme()), "9 outputs"),
        (layer_of(64, 8, ActivationScheme(bits=16)), "16-bit inputs"),
        (layer_of(64, 8, ActivationScheme(bits=32)), "float inputs"),
        (wide_scales(layer_of(64, 8, ActivationScheme()), 4), "scales per group"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_dequantizes_what_does_not_suit(
    layer: PackedLinear, reason: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the dtype of x, and never in fp32 if that is a half."""
    x = torch.randn(3, layer.in_features).to(dtype)
    products: list[torch.dtype] = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(gpu.F, "linear", lambda x, *others: products.append(x.dtype) or linear(x, *others))
    found, expected = gpu.packed_linear_gpu(x, *operands(layer)), reference(layer, x)
    assert products == [dtype]
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_gpu_takes_no_tokens() -> None:
    layer = layer_of(8, 8, ActivationScheme())
    assert gpu.packed_linear_gpu(torch.zeros(0, 8), *operands(layer)).shape == (0, 8)


# gradients and dtypes


@pytest.mark.parametrize("activation_range", ["per_token", "static"])
def test_gradient_of_the_input_is_that_of_the_fake_quantized_one(activation_range: str) -> None:
    layer = layer_of(16, 8, ActivationScheme(range=activation_range))
    x = (3 * torch.randn(4, 16)).requires_grad_()
    grad = torch.randn(4, 8)
    (found,) = torch.autograd.grad(layer(x), x, grad)
    fake = fake_quantize_activation(x, layer.activation_scheme, layer.input_scale, layer.input_zero_point)
    (expected,) = torch.autograd.grad(fake @ layer.dequantize().t(), x, grad)
    torch.testing.assert_close(found, expected)
    assert bool(found.eq(0).any()) == (activation_range == "static")  # some of x lies beyond the static range


@pytest.mark.parametrize("scheme", [ActivationScheme(bits=16), ActivationScheme(bits=32)])
def test_other_widths_run_on_the_reference(scheme: ActivationScheme) -> None:
    layer = layer_of(64, 8, scheme)
    x = torch.randn(5, 64)
    assert torch.equal(layer(x), reference(layer, x))
    assert not keeps_a_prepared_weight(layer)


def test_bfloat16_in_bfloat16_out() -> None:
    layer = layer_of(64, 8, ActivationScheme())
    assert layer(torch.randn(5, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_forward_mode_derivative_is_refused() -> None:
    layer, x = layer_of(16, 8, ActivationScheme()), torch.randn(3, 16)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():  # of something else
        assert torch.equal(layer(x), reference(layer, x))
