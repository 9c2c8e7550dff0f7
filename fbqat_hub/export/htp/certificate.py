"""The certificate: what was asked, what was checked, what was measured, in one JSON beside the binary."""

from __future__ import annotations

import itertools
import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fbqat_hub.evaluation.results import machine, now, peak_rss_mib, versions
from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.htp.compiler import FINALIZATION_MODE, PERFORMANCE_MODE
from fbqat_hub.export.htp.report import markdown
from fbqat_hub.export.htp.runtime.qnn_session import PROVIDER
from fbqat_hub.export.htp.targets import Target
from fbqat_hub.export.onnx.parity import compare
from fbqat_hub.files import listing

FORMAT_VERSION = 1

#: Emulator against the exact CPU reference of the same QDQ graph, over all held-out inputs. Both do the same integer
#: arithmetic up to rounding, which later layers amplify: 37-40 dB on a tiny Sana of random weights, 22-28 dB on a
#: trained one (outliers), 24 dB on a random one of 28 blocks at A8 throughout; a wrong graph split leaves 2 dB. This
#: gate catches gross faults of the binary as it ships; single wrong ops are the business of `op_parity`.
MIN_SQNR_EMULATOR_CPU_DB = 15.0
#: Emulator against the packed torch model. Static ranges and 8-bit results cost something here that is no fault, so
#: this gate only catches a wrong graph (a mask lost, a range never set), which the other gates cannot see.
MIN_SQNR_EMULATOR_TORCH_DB = 10.0


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

    Args:
        measured: of `comparisons`; of a graph that was not emulated, the CPU reference's to torch alone.

    Raises:
        ExportError: an SQNR of `comparisons` is under its threshold.
    """
    asked = thresholds()
    if not asked.keys() & measured.keys():
        asked = {"cpu_qdq_vs_torch_packed": MIN_SQNR_EMULATOR_TORCH_DB}
    for name, threshold in asked.items():
        value = measured[name]["sqnr_db"]
        if not value >= threshold:
            raise ExportError(
                f"{name.replace('_', ' ')}: SQNR is {value:.2f} dB, at least {threshold:.0f} dB is needed; "
                f"{_ADVICE.get(name, _ADVICE['emulator_vs_torch_packed'])}"
            )


def asked(target: Target) -> dict[str, Any]:
    """What was asked of the compiler. The emulator runs a context of any target, so running proves nothing of it."""
    return {
        "soc": target.name,
        "title": target.title,
        "soc_model": target.soc_model,
        "htp_arch": f"v{target.htp_arch}",
        "vtcm_mb": target.vtcm_mb,
        "graph_finalization_optimization_mode": FINALIZATION_MODE,
        "performance_mode": PERFORMANCE_MODE,
    }


def coverage(assigned: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Where the nodes of a QDQ graph went, by the compiling session's own account.

    Args:
        assigned: execution provider -> op -> how many nodes it was given (`compiler.compile_context`).

    Returns:
        `ops_on_qnn`, without the QuantizeLinear and DequantizeLinear around them, which ONNX Runtime copies, and after
        it joined transpositions; `nodes_elsewhere`, of any kind; `all_on_qnn`.
    """
    around = ("QuantizeLinear", "DequantizeLinear")
    on_qnn = sum(count for op, count in assigned.get(PROVIDER, {}).items() if op not in around)
    elsewhere = sum(sum(ops.values()) for provider, ops in assigned.items() if provider != PROVIDER)
    return {"all_on_qnn": on_qnn > 0 and not elsewhere, "ops_on_qnn": on_qnn, "nodes_elsewhere": elsewhere}


def ran_on(hardware: str) -> str:
    """What ran a context where ONNX Runtime says that QNN's device is `hardware` ("CPU", "NPU")."""
    if hardware != "CPU":
        return f"the {hardware} of this computer"
    machine = platform.machine()
    return f"{'x86' if machine.lower() in ('x86_64', 'amd64') else machine} emulator"


def joined(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The section of a whole chain of graphs, in order, from those of its graphs (`compile_graph`): its `parts`.

    Costs, nodes, layers and seconds are sums, memory and op errors the largest of all; `parity` is the last graph's,
    whose inputs the graphs before it made.
    """
    parts = list(sections.values())
    errors = [part["op_parity"] for part in parts]
    by_op: dict[str, float] = {}
    for name, error in itertools.chain(*(each["largest_by_op"].items() for each in errors)):
        by_op[name] = max(error, by_op.get(name, 0.0))
    worst = max(errors, key=lambda each: each["largest"]["error"])

    def total(field: str) -> dict[str, Any]:
        return {key: _total(key, [part[field][key] for part in parts]) for key in parts[0][field]}

    return {
        "read_back": parts[0]["read_back"],
        "precision": parts[0]["precision"]
        | {key: _added([part["precision"][key] for part in parts]) for key in ("code_bits", "layer_bits")},
        "tensors": {"inputs": parts[0]["tensors"]["inputs"], "outputs": parts[-1]["tensors"]["outputs"]},
        "coverage": total("coverage"),
        "audit": {},
        "cost": total("cost"),
        "parity": dict(parts[-1]["parity"]),
        "blocks": {name: block for part in parts for name, block in part["blocks"].items()},
        "op_parity": worst | {"ops": sum(each["ops"] for each in errors), "largest_by_op": dict(sorted(by_op.items()))},
        "probed_blocks": total("probed_blocks"),
        "compiler": total("compiler"),
        "emulator": total("emulator"),
        "parts": dict(sections),
    }


def _added(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """How many layers have which bits, of several graphs."""
    total = sum(map(Counter, counts), Counter[str]())
    return {bits: total[bits] for bits in sorted(total, key=int)}


def _total(key: str, values: Sequence[Any]) -> Any:
    """Of one figure of several graphs: what holds of all, the largest, or the sum."""
    if isinstance(values[0], bool):
        return all(values)
    if isinstance(values[0], str):
        return ", ".join(dict.fromkeys(values))
    known = [value for value in values if value is not None]
    return (max(known) if known else None) if key.startswith("peak") else sum(known)


def write(folder: Path, target: Target, section: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, Any]:
    """`certificate.json` and `certificate.md` of everything in `folder`; returns the former's content.

    Args:
        section: of the transformer, as `compile_graph` or `joined` makes it, with what the exporter added.
        seconds: what each step took.
    """
    from onnxruntime_qnn import build_and_package_info

    result = {
        "format_version": FORMAT_VERSION,
        "asked": asked(target),
        **section,
        # a context binary with a flipped byte loads without complaint: compare the hash
        "files": listing(folder),
        "seconds": dict(seconds),
        "peak_rss_mib": rounded(peak_rss_mib()),
        "versions": versions("onnx", "onnxscript")
        | {"qnn_sdk": str(getattr(build_and_package_info, "qnn_version", "unknown"))},
        "ran_on": ran_on(section["emulator"]["hardware"]),
        "never_ran_on": "a phone",
        "machine": machine(),
        "date": now(),
    }
    text = json.dumps(result, indent=2)
    (folder / "certificate.json").write_text(text + "\n", encoding="utf-8")
    written: dict[str, Any] = json.loads(text)
    (folder / "certificate.md").write_text(markdown(written), encoding="utf-8")
    return written


def rounded(value: float | None, digits: int = 1) -> float | None:
    """`value`, rounded; None where the system did not tell it."""
    return None if value is None else round(value, digits)
