"""One call from a packed transformer to a context binary with its certificate."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fbqat_hub.export.errors import ExportError, require_htp
from fbqat_hub.export.float_graph import GraphWrapper, as_feed, packed_layers, trace
from fbqat_hub.export.precision import Precision
from fbqat_hub.export.sana import sana_wrapper
from fbqat_hub.export.targets import Target, target_for

#: Transformer class -> how its graph is wrapped.
WRAPPERS = {"SanaTransformer2DModel": sana_wrapper}
_STEPS = ("trace", "calibrate", "quantize", "reference", "compile", "emulate", "probe", "certify")


class _Progress:
    """A bar over the steps, and the seconds each took."""

    def __init__(self, shown: bool) -> None:
        from tqdm.auto import tqdm

        self.bar = tqdm(total=len(_STEPS), disable=not shown, desc="export", unit="step")
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.bar.set_postfix_str(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
        self.bar.update()


def _check_items(kind: str, items: Sequence[Mapping[str, Tensor]]) -> None:
    if not items:
        raise ExportError(f"{kind} is empty: give at least one item (keyword arguments of the transformer's forward)")
    for index, item in enumerate(items):
        for name, tensor in item.items():
            if not isinstance(tensor, Tensor):
                raise ExportError(f"{kind}[{index}][{name!r}] is {type(tensor).__name__}, not a tensor")
            expected = items[0][name].shape if name in items[0] else None
            if tensor.shape != expected or tensor.shape[0] != 1:
                raise ExportError(
                    f"{kind}[{index}][{name!r}] has shape {tuple(tensor.shape)}; the graph is static, of batch 1, and "
                    f"every item needs the shape of the first ({None if expected is None else tuple(expected)})"
                )
            if not torch.isfinite(tensor).all():
                raise ExportError(f"{kind}[{index}][{name!r}] has values that are not finite")
        if item.keys() != items[0].keys():
            raise ExportError(f"{kind}[{index}] has the keys {sorted(item)}, the first item {sorted(items[0])}")


def _wrapper_for(transformer: nn.Module) -> GraphWrapper:
    name = type(transformer).__name__
    if name not in WRAPPERS:
        raise ExportError(f"no HTP export for {name}; there is one for: {', '.join(sorted(WRAPPERS))}")
    return WRAPPERS[name](transformer)


def _torch_outputs(transformer: nn.Module, items: Sequence[Mapping[str, Tensor]]) -> list[np.ndarray]:
    """The packed model's own output for each item, float32 [1, channels, height, width]."""
    device = next(transformer.parameters()).device
    training = transformer.training
    transformer.eval()
    try:
        with torch.no_grad():
            outputs = [
                transformer(**{name: tensor.to(device) for name, tensor in item.items()}, return_dict=False)[0]
                for item in items
            ]
    finally:
        transformer.train(training)
    return [output.float().cpu().numpy() for output in outputs]


def export_htp(
    transformer: nn.Module,
    calibration: Sequence[Mapping[str, Tensor]],
    held_out: Sequence[Mapping[str, Tensor]],
    output_dir: str | os.PathLike[str],
    *,
    soc: str = "sm8750",
    name: str = "transformer",
    precision: Precision | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Export a packed transformer to a QNN HTP context binary, and prove on the x86 emulator that it computes it.

    Makes a folder with `model.qdq.onnx` (QDQ with the model's own 4-bit codes and scales), `<name>.bin` (the context
    binary), `<name>.onnx` (the EPContext node that loads it in ONNX Runtime) and `certificate.json`.

    Args:
        transformer: a packed `SanaTransformer2DModel`; not changed.
        calibration: keyword arguments of its forward, each a tensor of batch 1, all items of the same shapes
            (`hidden_states` [1, C, H, W], `encoder_hidden_states` [1, tokens, D], `timestep` [1],
            `encoder_attention_mask` [1, tokens] of 0 and 1). They set the activation ranges that training did not;
            a layer's own static `input_scale` is used exactly.
        held_out: other items of the same kind, on which the certificate is measured.
        output_dir: must not exist, or be empty. Appears only when everything passed.
        soc: a key of `fbqat_hub.export.targets.TARGETS`.
        name: of the binary.
        precision: which ops compute at how many activation bits; the default is W4A8 with 16 bits between the
            layers, in the last layer and on the timestep's path.
        progress: show a bar.

    Returns:
        The certificate, as written to `certificate.json`.

    Raises:
        HTPUnavailableError: a needed package cannot be imported; says what to install.
        ExportError: bad input, a failed step, a failed audit or a gate not met; nothing is left at `output_dir`.
    """
    require_htp()
    target = target_for(soc)
    _check_items("calibration", calibration)
    _check_items("held_out", held_out)
    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ExportError(f"the output folder {output} exists and is not empty; remove it or name another")
    bar = _Progress(progress)
    folder = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        certificate = _build(
            transformer, calibration, held_out, folder, target=target, name=name, precision=precision, progress=bar
        )
        folder.chmod(0o755)  # mkdtemp's folders are private
        folder.rename(output)
    except OSError as error:
        raise ExportError(f"could not write the export to {output}: {error}") from error
    finally:
        bar.bar.close()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    return certificate


def _build(
    transformer: nn.Module,
    calibration: Sequence[Mapping[str, Tensor]],
    held_out: Sequence[Mapping[str, Tensor]],
    folder: Path,
    *,
    target: Target,
    name: str,
    precision: Precision | None,
    progress: _Progress,
) -> dict[str, Any]:
    """All steps, into `folder`; see `export_htp`."""
    import onnx

    from fbqat_hub.export import audit, certificate, htp, op_parity
    from fbqat_hub.export.calibration import calibrate
    from fbqat_hub.export.qdq import insert_qdq
    from fbqat_hub.export.reference import exact_session, run_all
    from fbqat_hub.export.rewrite import rewrite

    precision = precision or Precision()
    scratch = folder / "scratch"
    scratch.mkdir()
    with progress.step("trace"):
        layers = packed_layers(transformer)
        wrapper = _wrapper_for(transformer)
        graph = trace(wrapper, calibration[0], layers)
        rewrites = rewrite(graph.model)
    with progress.step("calibrate"):
        ranges = calibrate(graph.model, [as_feed(wrapper.host_inputs(item)) for item in calibration])
    with progress.step("quantize"):
        qdq = insert_qdq(graph, ranges, precision)
        audited = audit.audit_qdq(qdq, layers)
        onnx.save(qdq, folder / "model.qdq.onnx")
    feeds = [as_feed(wrapper.host_inputs(item)) for item in held_out]
    with progress.step("reference"):
        cpu = run_all(exact_session(qdq), feeds)
        torch_packed = _torch_outputs(transformer, held_out)
    context = folder / f"{name}.onnx"
    with progress.step("compile"):
        compiled = htp.compile_context(folder / "model.qdq.onnx", context, target, scratch)
        binary = htp.rename_binary(context)
        read_back = audit.audit_context(onnx.load(context), target)
        audited_compiled = audit.audit_compiled(scratch / "qnn_graph", list(layers))
    with progress.step("emulate"):
        emulated, ran = htp.emulate(context, feeds, target, scratch)
    with progress.step("probe"):
        onnx.save(op_parity.probe_graph(qdq), scratch / "probe.onnx")
        errors = op_parity.op_errors(qdq, feeds[0], htp.run_probe(scratch / "probe.onnx", feeds[0], target, scratch))
    with progress.step("certify"):
        op_parity.gate_ops(errors)
        measured = certificate.parity(emulated, cpu, torch_packed)
        certificate.gate(measured)
        shutil.rmtree(scratch)
        files = [folder / "model.qdq.onnx", binary, context]
    result = {
        "format_version": certificate.FORMAT_VERSION,
        "asked": certificate.asked(target),
        "read_back": read_back,
        "model": {"class": type(transformer).__name__, "packed_layers": len(layers), **vars(precision)},
        "tensors": certificate.describe_tensors(qdq),
        "coverage": {"all_on_qnn": True, "nodes_on_qnn": audited_compiled["nodes"], "nodes_elsewhere": 0},
        "audit": {"qdq": audited, "compiled": audited_compiled, "rewrites": rewrites},
        "calibration_inputs": len(calibration),
        "parity": measured,
        "op_parity": op_parity.summarize(errors),
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": certificate.sha256(path)} for path in files},
        "seconds": progress.seconds
        | {
            "compiler": round(compiled["load_seconds"], 3),
            "emulator_load": round(ran["load_seconds"], 3),
            "emulator_run": round(ran["run_seconds"], 3),
        },
        "peak_rss_mib": {
            "compile": round(compiled["peak_rss_mib"], 1),
            "emulate": round(ran["peak_rss_mib"], 1),
            "this_process": round(htp.peak_rss_mib(), 1),
        },
        "versions": certificate.versions(),
        **certificate.provenance(),
    }
    text = json.dumps(result, indent=2)
    (folder / "certificate.json").write_text(text + "\n", encoding="utf-8")
    written: dict[str, Any] = json.loads(text)
    return written
