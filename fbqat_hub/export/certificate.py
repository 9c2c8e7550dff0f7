"""The certificate: what was asked, what was checked, what was measured, in one JSON beside the binary."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.parity import compare
from fbqat_hub.export.targets import Target
from fbqat_hub.version import __version__

FORMAT_VERSION = 1

#: Emulator against the exact CPU reference of the same QDQ graph, over all held-out inputs. Both do the same integer
#: arithmetic up to rounding, which later layers amplify: 37-40 dB on a tiny Sana of random weights, 22-28 dB on a
#: trained one (outliers), 24 dB on a random one of 28 blocks at A8 throughout; a wrong graph split leaves 2 dB. This
#: gate catches gross faults of the binary as it ships; single wrong ops are the business of `op_parity`.
MIN_SQNR_EMULATOR_CPU_DB = 15.0
#: Emulator against the packed torch model. Static ranges and 8-bit results cost something here that is no fault, so
#: this gate only catches a wrong graph (a mask lost, a range never set), which the other gates cannot see.
MIN_SQNR_EMULATOR_TORCH_DB = 10.0


def sha256(path: Path) -> str:
    """SHA-256 of a file, hex. A context binary with a flipped byte loads without complaint: compare this."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_tensors(model: onnx.ModelProto) -> dict[str, list[dict[str, Any]]]:
    """The graph's inputs and outputs: float32 at the boundary, quantized right behind it with scale and offset.

    `offset` is QNN's own sign: real = scale * (q + offset), so offset = -zero_point.
    """
    graph = model.graph
    constants = {item.name: item for item in graph.initializer}

    def describe(value: onnx.ValueInfoProto, quantize: onnx.NodeProto) -> dict[str, Any]:
        zero_point = numpy_helper.to_array(constants[quantize.input[2]])
        return {
            "name": value.name,
            "shape": [dimension.dim_value for dimension in value.type.tensor_type.shape.dim],
            "dtype": onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower(),
            "quantized_dtype": str(zero_point.dtype),
            "scale": float(numpy_helper.to_array(constants[quantize.input[1]])),
            "offset": -int(zero_point),
        }

    reads = {node.input[0]: node for node in graph.node if node.op_type == "QuantizeLinear"}
    makes = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    return {
        "inputs": [describe(value, reads[value.name]) for value in graph.input],
        "outputs": [describe(value, makes[value.name]) for value in graph.output],
    }


def parity(
    emulator: Sequence[np.ndarray], cpu: Sequence[np.ndarray], torch_packed: Sequence[np.ndarray]
) -> dict[str, Any]:
    """The three comparisons of the held-out outputs; the first of each name is compared with the second."""
    return {
        "held_out_inputs": len(emulator),
        "emulator_vs_cpu_qdq": compare(cpu, emulator) | {"threshold_db": MIN_SQNR_EMULATOR_CPU_DB},
        "emulator_vs_torch_packed": compare(torch_packed, emulator) | {"threshold_db": MIN_SQNR_EMULATOR_TORCH_DB},
        "cpu_qdq_vs_torch_packed": compare(torch_packed, cpu),
    }


def gate(measured: dict[str, Any]) -> None:
    """Refuse a graph that does not compute the model.

    Raises:
        ExportError: an SQNR of `parity` is under its threshold.
    """
    advice = {
        "emulator_vs_cpu_qdq": "the compiled graph does not compute its own QDQ graph: an op is silently wrong on the "
        "HTP (see the table of known ones in fbqat_hub/export/rewrite.py), or an activation needs 16 bits",
        "emulator_vs_torch_packed": "the exported graph does not compute the packed model: calibrate on more and on "
        "typical inputs, or keep the layers with outliers at activation_bits=16",
    }
    for name, advised in advice.items():
        value, threshold = measured[name]["sqnr_db"], measured[name]["threshold_db"]
        if not value >= threshold:
            raise ExportError(
                f"{name.replace('_', ' ')}: SQNR is {value:.2f} dB, at least {threshold:.0f} dB is needed; {advised}"
            )


def asked(target: Target) -> dict[str, Any]:
    """What was asked of the compiler. The emulator runs a context of any target, so running proves nothing of it."""
    return {
        "soc": target.name,
        "title": target.title,
        "soc_model": target.soc_model,
        "htp_arch": f"v{target.htp_arch}",
        "vtcm_mb": target.vtcm_mb,
        "graph_finalization_optimization_mode": 3,
        "performance_mode": "burst",
    }


def versions() -> dict[str, str]:
    """Of everything that had a part in the result."""
    from onnxruntime_qnn import build_and_package_info

    packages = ("torch", "diffusers", "onnx", "onnxscript", "onnxruntime", "onnxruntime-qnn")
    return {
        "fbqat_hub": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "qnn_sdk": str(getattr(build_and_package_info, "qnn_version", "unknown")),
    }


def provenance() -> dict[str, Any]:
    """Where the measurements were made, and where not."""
    return {
        "ran_on": "x86 emulator",
        "never_ran_on": "a phone",
        "machine": f"{platform.system()} {platform.machine()}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
