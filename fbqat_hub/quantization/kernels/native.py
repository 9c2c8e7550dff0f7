"""The packed matmul in C, compiled where it is first used: ``x86.c`` (AVX2, AVX-VNNI, AVX-512 VNNI), ``arm.c`` (NEON).

Triton and ``torch.compile`` do the same: the source ships, the machine's own C compiler (``$CC``, else ``cc``) makes a
shared library of it, once, in the cache folder (``$FBQAT_CACHE``, else ``~/.cache/fbqat_hub``). Its threads are
torch's: the library is linked to no OpenMP of its own and takes the one that torch has loaded. Without a compiler, or
with ``FBQAT_COMPILE=0``, ``load`` gives None, and other kernels do the work. It multiplies with the best instructions
of the processor, or with those that ``FBQAT_INSTRUCTIONS`` names, one of ``INSTRUCTIONS``.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fbqat_hub.cache_dir import default_cache_dir
from fbqat_hub.processor import instruction_sets
from fbqat_hub.quantization.activation import TINY_ACTIVATION, largest_magnitude
from fbqat_hub.quantization.scheme import ActivationScheme

_FOLDER = Path(__file__).parent
_COMMON = _FOLDER / "packed_linear.h"
# of a machine, as ``platform.machine`` names it: the source, and what of the processor it is compiled for
SOURCES: dict[str, tuple[Path, tuple[str, ...]]] = {
    "x86_64": (_FOLDER / "x86.c", ("-mavx2", "-mf16c")),
    "aarch64": (_FOLDER / "arm.c", ("-march=armv8.2-a+dotprod",)),
}
# -nodefaultlibs leaves out an OpenMP runtime beside torch's; no fused multiply-add, for the reference has none
_FLAGS = ("-O3", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=off", "-nodefaultlibs")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# whole tiles: tokens, of which x86.c without VNNI reads 6, outputs that are expanded together, inputs at a time
ROWS, PANEL, STEP = 6, 16, 32
# what multiplies, those of x86.c in its order, the slowest first: and what a processor must have for it
INSTRUCTIONS: dict[str, frozenset[str]] = {
    "avx2": frozenset({"avx2", "f16c"}),
    "avx-vnni": frozenset({"avx2", "f16c", "avx_vnni"}),
    "avx512-vnni": frozenset({"avx2", "f16c", "avx512f", "avx512bw", "avx512_vnni"}),
    "neon-dot": frozenset({"asimddp"}),
}
# products, or values to quantize, below which a second thread costs more than it saves
_SMALL = 2**18
_POINTER, _WHOLE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ARGUMENTS = {
    "fbqat_quantize": [
        _POINTER, _WHOLE, _WHOLE, _WHOLE, _INT,  # x, stride, tokens, in, dtype
        _INT, _POINTER, _INT,  # per_token, scale, zero_point
        _POINTER, _INT, _INT,  # codes, interleaved, threads
    ],
    "fbqat_multiply": [
        _POINTER, _WHOLE, _WHOLE,  # codes, tokens, in
        _POINTER, _INT,  # scale, zero_point
        _POINTER, _WHOLE, _WHOLE, _INT,  # weight, weight_stride, out, wide
        _POINTER, _WHOLE, _POINTER,  # weight_scale, groups, bias
        _POINTER, _POINTER, _INT, _INT, _INT,  # work, y, dtype, instructions, threads
    ],
}  # fmt: skip
logger = logging.getLogger(__name__)


class Functions(NamedTuple):
    """Those of the library, and the place in ``INSTRUCTIONS`` of what ``multiply`` is to use."""

    quantize: Callable[..., None]
    multiply: Callable[..., None]
    instructions: int


@cache
def load() -> Functions | None:
    """The C functions, compiled if this machine has not yet; None where they cannot be had."""
    if platform.system() != "Linux" or not instructions_here() or os.environ.get("FBQAT_COMPILE") == "0":
        return None
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        if platform.machine() == "x86_64":
            logger.info("the C kernel cannot be made here, and oneDNN's is taken: %s", error)
        else:
            logger.warning(
                "the C kernel cannot be made here, and packed layers are slower than float ones; install a C compiler "
                "(GCC 11 or newer), or set CC: %s",
                error,
            )
        return None
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return Functions(library.fbqat_quantize, library.fbqat_multiply, _instructions())


def instructions_here() -> list[str]:
    """Those of ``INSTRUCTIONS`` that this processor has, the slowest first."""
    if platform.machine() not in SOURCES:
        return []
    return [name for name, needed in INSTRUCTIONS.items() if needed <= instruction_sets()]


def _instructions() -> int:
    """The place in ``INSTRUCTIONS`` of those to multiply with."""
    asked, here = os.environ.get("FBQAT_INSTRUCTIONS"), instructions_here()
    if asked and asked not in here:
        raise ValueError(f"FBQAT_INSTRUCTIONS is {asked!r}; allowed on this processor: {', '.join(map(repr, here))}.")
    return list(INSTRUCTIONS).index(asked or here[-1])


def _compiled() -> Path:
    """The shared library of this source, flags and compiler."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise OSError("there is no C compiler; install one, or set CC.")
    source, chosen = SOURCES[platform.machine()]
    flags = (*_FLAGS, *chosen)
    of = hashlib.sha256(repr((source.read_bytes(), _COMMON.read_bytes(), flags, os.path.realpath(compiler))).encode())
    library = default_cache_dir() / "kernels" / f"{source.stem}-{of.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as work:  # renamed when whole: others may look for it
            made = Path(work, library.name)
            subprocess.run(
                [compiler, *flags, "-o", made, source, "-lc"], check=True, capture_output=True, text=True, timeout=120
            )
            os.replace(made, library)
    return library


def quantize(
    tokens: Tensor,
    scheme: ActivationScheme,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, int]:
    """uint8 codes, scale and zero_point of a layer's input; the codes of ``quantize_activation``, 128 added if dynamic.

    Args:
        tokens: [tokens, in] of a dtype in ``DTYPES``.
        interleaved: codes as ``fbqat_multiply`` reads them: in its order, with room for whole tiles, on ARM less 128.

    Returns:
        codes: [tokens, in]; if interleaved, both rounded up.
        scale: fp32 [tokens, 1], whatever the range; NaN of a token that has one.
    """
    functions = load()
    assert functions is not None
    tokens, zero_point = _rows_apart(tokens), 128
    scale = torch.empty(len(tokens), 1, dtype=torch.float32)
    if scheme.range == "per_tensor":
        scale.copy_(largest_magnitude(tokens, scheme).float().clamp_min_(TINY_ACTIVATION).div_(127))
    elif scheme.range == "static":
        assert input_scale is not None
        assert input_zero_point is not None
        scale.copy_(input_scale)
        zero_point = int(input_zero_point)
    rows, padded = tokens.shape
    if interleaved:
        rows, padded = -(-rows // ROWS) * ROWS, -(-padded // STEP) * STEP
    codes = torch.empty(rows, padded, dtype=torch.uint8)
    functions.quantize(
        tokens.data_ptr(), tokens.stride(0), *tokens.shape, DTYPES[tokens.dtype],
        scheme.range == "per_token", scale.data_ptr(), zero_point,
        codes.data_ptr(), interleaved, _threads(tokens.numel()),
    )  # fmt: skip
    return codes, scale, zero_point


def packed_linear_native(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scheme: ActivationScheme,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
) -> Tensor:
    """As ``packed_linear_reference``, for 8-bit activations and scales that ``takes``: [..., in] -> [..., out].

    With scales per channel equal to the reference to the bit where its fp32 sums are exact. With groups the sum of each
    is exact, and they are added in fp32. Nothing is kept: the weight is expanded in pieces that stay in the processor's
    cache. Call it only where ``load`` gives the functions.

    Raises:
        ValueError: operands of other shapes or dtypes, which the C code would read beyond their ends.
    """
    functions = load()
    assert functions is not None
    activation = (scheme, input_scale, input_zero_point)
    if x.dtype not in DTYPES:
        return packed_linear_native(x.float(), weight_packed, weight_scale, bias, *activation).to(x.dtype)
    in_features, out_features = x.shape[-1], weight_packed.shape[0]
    _check(in_features, weight_packed, weight_scale, bias)
    tokens = x.reshape(-1, in_features)
    codes, scale, zero_point = quantize(tokens, *activation, interleaved=True)
    threads = _threads(tokens.numel() * out_features)
    groups = weight_scale.shape[1] if weight_scale.dim() == 2 else 1
    work = torch.empty(threads * 2 * PANEL * (codes.shape[1] + 8 * groups), dtype=torch.int8)
    weight, weight_scale = _rows_apart(weight_packed), weight_scale.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    y = x.new_empty((*x.shape[:-1], out_features))
    functions.multiply(
        codes.data_ptr(), *tokens.shape, scale.data_ptr(), zero_point,
        weight.data_ptr(), weight.stride(0), out_features, weight.dtype == torch.int8,
        weight_scale.data_ptr(), groups, None if bias is None else bias.data_ptr(),
        work.data_ptr(), y.data_ptr(), DTYPES[x.dtype], functions.instructions, threads,
    )  # fmt: skip
    return y


def takes(weight_scale: Tensor, in_features: int) -> bool:
    """Whether the C code takes such scales: [out], or [out, groups] of a multiple of 32 inputs each."""
    if weight_scale.dim() == 1:
        return True
    groups = weight_scale.shape[1]
    return groups == 1 or in_features % (STEP * groups) == 0


def _check(in_features: int, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    out_features = len(weight_packed)
    width = {torch.uint8: (in_features + 1) // 2, torch.int8: in_features}.get(weight_packed.dtype)
    scales = weight_scale.dim() in (1, 2) and len(weight_scale) == out_features and takes(weight_scale, in_features)
    biases = bias is None or bias.shape == (out_features,)
    if weight_packed.shape != (out_features, width) or weight_scale.dtype != torch.float32 or not (scales and biases):
        raise ValueError(
            f"the packed weight is {weight_packed.dtype} {tuple(weight_packed.shape)}, its scales "
            f"{weight_scale.dtype} {tuple(weight_scale.shape)}; for {in_features} inputs the weight must be uint8 "
            f"[out, {(in_features + 1) // 2}] or int8 [out, {in_features}], its scales fp32 [out] or [out, groups] of "
            f"a multiple of {STEP} inputs, and a bias [out]."
        )


def _threads(work: int) -> int:
    return torch.get_num_threads() if work > _SMALL else 1


def _rows_apart(matrix: Tensor) -> Tensor:
    """The same with the values of a row side by side."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
