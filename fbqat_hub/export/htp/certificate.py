"""The certificate: what was asked, what was checked, what was measured, in one JSON beside the binary."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.htp import compiler
from fbqat_hub.export.htp.targets import Target
from fbqat_hub.export.onnx.parity import compare
from fbqat_hub.export.onnx.precision import VIEW_OPS
from fbqat_hub.export.onnx.rewrite import static_shapes
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


#: What a QuantizeLinear may stand behind that writes no new activation: graph inputs, conversions (counted where the
#: tensor was made) and views.
_WRITES_NOTHING = VIEW_OPS | {"QuantizeLinear", "DequantizeLinear"}


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


def cost(qdq: onnx.ModelProto) -> dict[str, int]:
    """What the graph asks of a device, counted and not timed: no latency can be measured without one.

    Returns:
        `macs` (multiply-accumulates of Gemm, Conv and MatMul), `macs_a16` (those that read 16-bit activations),
        `constant_bytes` (weights, biases, scales, tables as stored in the QDQ file), `activation_bytes` (what all ops
        but views write), `io_bytes` (quantized inputs and outputs).
    """
    inferred = onnx.shape_inference.infer_shapes(qdq)
    shapes = static_shapes(inferred)
    constants = {item.name: item for item in qdq.graph.initializer}
    producer = {name: node for node in qdq.graph.node for name in node.output}
    macs = wide = written = 0
    for node in qdq.graph.node:
        if node.op_type == "QuantizeLinear" and producer.get(node.input[0], node).op_type not in _WRITES_NOTHING:
            zero_point = constants[node.input[2]]
            written += int(np.prod(shapes[node.output[0]])) * numpy_helper.to_array(zero_point).itemsize
        if node.op_type not in ("Gemm", "Conv", "MatMul"):
            continue
        made, second = int(np.prod(shapes[node.output[0]])), shapes[node.input[1]]
        # the inner dimension: rows of the second matrix; of a transposed Gemm and a Conv everything but the outputs
        inner = second[-2] if node.op_type == "MatMul" else int(np.prod(second[1:]))
        macs += made * inner
        zero_point = constants[producer[node.input[0]].input[2]]
        wide += made * inner if zero_point.data_type == onnx.TensorProto.UINT16 else 0
    boundary = describe_tensors(qdq)
    return {
        "macs": macs,
        "macs_a16": wide,
        "constant_bytes": sum(len(item.raw_data) or numpy_helper.to_array(item).nbytes for item in constants.values()),
        "activation_bytes": written,
        "io_bytes": sum(
            int(np.prod(tensor["shape"])) * np.dtype(tensor["quantized_dtype"]).itemsize
            for tensor in [*boundary["inputs"], *boundary["outputs"]]
        ),
    }


def comparisons(
    emulator: Sequence[np.ndarray], cpu: Sequence[np.ndarray], torch_packed: Sequence[np.ndarray]
) -> dict[str, Any]:
    """One tensor over the held-out inputs, three ways; the first of each name is compared with the second."""
    return {
        "emulator_vs_cpu_qdq": compare(cpu, emulator),
        "emulator_vs_torch_packed": compare(torch_packed, emulator),
        "cpu_qdq_vs_torch_packed": compare(torch_packed, cpu),
    }


_ADVICE = {
    "emulator_vs_cpu_qdq": "the compiled graph does not compute its own QDQ graph: an op is silently wrong on the HTP "
    "(see the table of known ones in fbqat_hub/export/onnx/rewrite.py), or an activation needs 16 bits",
    "emulator_vs_torch_packed": "the exported graph does not compute the packed model: calibrate on more and on "
    "typical inputs, or give layers 16 bits (--precision auto, --a16 PATTERN)",
}


def thresholds() -> dict[str, float]:
    """What `gate` asks for, in dB."""
    return {
        "emulator_vs_cpu_qdq": MIN_SQNR_EMULATOR_CPU_DB,
        "emulator_vs_torch_packed": MIN_SQNR_EMULATOR_TORCH_DB,
    }


def gate(measured: dict[str, Any]) -> None:
    """Refuse a graph that does not compute the model.

    Raises:
        ExportError: an SQNR of `comparisons` is under its threshold.
    """
    for name, threshold in thresholds().items():
        value = measured[name]["sqnr_db"]
        if not value >= threshold:
            raise ExportError(
                f"{name.replace('_', ' ')}: SQNR is {value:.2f} dB, at least {threshold:.0f} dB is needed; "
                f"{_ADVICE[name]}"
            )


def asked(target: Target) -> dict[str, Any]:
    """What was asked of the compiler. The emulator runs a context of any target, so running proves nothing of it."""
    return {
        "soc": target.name,
        "title": target.title,
        "soc_model": target.soc_model,
        "htp_arch": f"v{target.htp_arch}",
        "vtcm_mb": target.vtcm_mb,
        "graph_finalization_optimization_mode": compiler.FINALIZATION_MODE,
        "performance_mode": compiler.PERFORMANCE_MODE,
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


def markdown(certificate: Mapping[str, Any]) -> str:
    """The certificate for a person: what was asked, how far the three computations are apart, by output and block."""
    asked, cost_of = certificate["asked"], certificate["cost"]
    lines = [
        "# Parity certificate",
        "",
        f"{certificate['model']['class']} for the {asked['title']} ({asked['soc']}, HTP {asked['htp_arch']}, "
        f"{asked['vtcm_mb']} MiB of VTCM), compiled by QNN {certificate['read_back']['qnn_sdk_build']}.",
        "",
        f"Ran on: {certificate['ran_on']}. Never ran on: {certificate['never_ran_on']}.",
        "",
        "SQNR in dB (cosine) over the held-out inputs; the second of each pair is the reference.",
        "",
        "| tensor | " + " | ".join(name.replace("_", " ") for name in _PAIRS) + " |",
        "|---|" + "---|" * len(_PAIRS),
        _row("**output**", certificate["parity"]),
        *(_row(name, compared) for name, compared in certificate["blocks"].items()),
        *(_row(f"**{name}**", part["parity"]) for name, part in certificate.get("graphs", {}).items()),
    ]
    if (probed := certificate["probed_blocks"])["probed"] < probed["of"]:
        lines += ["", f"Blocks and single ops were compared in the first {probed['probed']} of {probed['of']} blocks."]
    if timesteps := certificate["parity"].get("timesteps"):
        values = zip(*(certificate["parity"][name]["sqnr_db_of_each"] for name in _PAIRS), strict=True)
        rows = sorted(zip(timesteps, values, strict=True))
        lines += ["", "| timestep | " + " | ".join(name.replace("_", " ") for name in _PAIRS) + " |"]
        lines += ["|---|" + "---|" * len(_PAIRS)]
        lines += [f"| {time:g} | " + " | ".join(f"{value:.1f}" for value in each) + " |" for time, each in rows]
    if pictures := certificate.get("pictures"):
        lines += ["", "| picture, emulator in the loop against torch | PSNR (dB) |", "|---|---|"]
        lines += [f"| {item['prompt']} | {item['psnr_db']:.1f} |" for item in pictures["each"]]
    if allocation := certificate.get("allocation"):
        lines += [
            "",
            f"16 bits everywhere keep {allocation['all_at_16_db']:.1f} dB to torch; {allocation['target_db']:g} dB was "
            f"asked for, {allocation['reached_db']:.1f} dB reached with 16 bits for {allocation['share_at_16']:.0%} of "
            "the cost (share of activation bytes plus share of operations). Most noise for its cost first:",
            "",
            "| ops or layers | cost | alone at 8 bits (dB) | bits |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| `{each['name']}` | {each['cost']:.3f} | {each['alone_db']:.1f} | {each['bits']} |"
            for each in allocation["candidates"]
        ]
    if reason := certificate.get("text_left_out"):
        lines += ["", f"Text encoders are left out: {reason}"]
    lines += [
        "",
        _bits(certificate["precision"]),
        "",
        f"{cost_of['macs']:,} multiply-accumulates a forward, {cost_of['macs_a16']:,} of them on 16-bit activations; "
        f"{cost_of['constant_bytes']:,} bytes of constants, {cost_of['activation_bytes']:,} bytes of activations "
        f"written, {cost_of['binary_bytes']:,} bytes of binary, {cost_of['spill_fill_bytes']:,} bytes of spill/fill "
        "buffer. No latency is given: the emulator's time says nothing of a device's.",
    ]
    return "\n".join(lines) + "\n"


def _bits(precision: Mapping[str, Any]) -> str:
    """Which weights and activations have how many bits, in words."""
    names = ", ".join(f"`{name}`" for name in precision["a16_layers"])
    kinds = ", ".join(precision["a16_ops"]) or "none"
    return (
        f"Packed weights have {precision['weight_bits']} bits, the activations they are multiplied with "
        f"{precision['activation_bits']}; 16 in the layers {names}. Kinds of other ops at 16 bits: {kinds}."
    )


_PAIRS = ("emulator_vs_cpu_qdq", "emulator_vs_torch_packed", "cpu_qdq_vs_torch_packed")


def _row(name: str, compared: Mapping[str, Any]) -> str:
    cells = (f"{compared[pair]['sqnr_db']:.1f} ({compared[pair]['cosine']:.5f})" for pair in _PAIRS)
    return f"| {name} | " + " | ".join(cells) + " |"
