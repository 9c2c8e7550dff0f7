"""One call from a packed transformer to a context binary with its certificate."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fbqat_hub.export.errors import ExportError, require_htp
from fbqat_hub.export.htp.graph import STEPS, GraphSource, Progress, compile_graph, trace_graph
from fbqat_hub.export.htp.targets import Target, target_for
from fbqat_hub.export.onnx.float_graph import Feed, GraphWrapper, as_feed, block_outputs, packed_layers, runnable
from fbqat_hub.export.onnx.precision import LOWEST, Precision
from fbqat_hub.export.onnx.wrappers import POSITIONS, Item, blocks_of, wrap
from fbqat_hub.files import listing

#: Calibration inputs that are kept apart for `allocate`.
ALLOCATION_INPUTS = 4


def check_items(kind: str, items: Sequence[Item]) -> None:
    """ExportError unless all items are finite tensors of batch 1 with the keys and shapes of the first."""
    if not items:
        raise ExportError(f"{kind} is empty: give at least one item (keyword arguments of the transformer's forward)")
    for index, item in enumerate(items):
        for name, tensor in item.items():
            if not isinstance(tensor, Tensor):
                raise ExportError(f"{kind}[{index}][{name!r}] is {type(tensor).__name__}, not a tensor")
            expected = items[0][name].shape if name in items[0] else None
            if tensor.shape != expected or (name not in POSITIONS and tensor.shape[0] != 1):
                raise ExportError(
                    f"{kind}[{index}][{name!r}] has shape {tuple(tensor.shape)}; the graph is static, of batch 1, and "
                    f"every item needs the shape of the first ({None if expected is None else tuple(expected)})"
                )
            if not torch.isfinite(tensor).all():
                raise ExportError(f"{kind}[{index}][{name!r}] has values that are not finite")
        if item.keys() != items[0].keys():
            raise ExportError(f"{kind}[{index}] has the keys {sorted(item)}, the first item {sorted(items[0])}")


def torch_outputs(transformer: nn.Module, items: Sequence[Item], blocks: tuple[str, ...]) -> list[Feed]:
    """What the packed model itself computes for each item: `sample` and its blocks' outputs, float32."""
    device = next(transformer.parameters()).device
    training = transformer.training
    transformer.eval()
    outputs = []
    try:
        with torch.no_grad():
            for item in items:
                with block_outputs(transformer, blocks) as found:
                    sample = transformer(**{k: v.to(device) for k, v in item.items()}, return_dict=False)[0]
                outputs.append(as_feed({"sample": sample, **found}))
    finally:
        transformer.train(training)
    return outputs


@contextmanager
def staging(output_dir: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to build in, which gets the name `output_dir` when the block ends without an error.

    Where a step fails after something was written, that is kept in `<output_dir>.unfinished`, and the error says so.

    Raises:
        ExportError: `output_dir` has content, or cannot be written.
    """
    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ExportError(f"the output folder {output} exists and is not empty; remove it or name another")
    unfinished = output.with_name(f"{output.name}.unfinished")
    folder = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        yield folder
        folder.chmod(0o755)  # mkdtemp's folders are private
        folder.rename(output)
        shutil.rmtree(unfinished, ignore_errors=True)
    except ExportError as error:
        if folder is None or not any(folder.iterdir()):
            raise
        shutil.rmtree(unfinished, ignore_errors=True)
        folder.rename(unfinished)
        raise ExportError(
            f"{error}. What was made so far is in {unfinished}; cure it and repeat the command"
        ) from error
    except OSError as error:
        raise ExportError(f"could not write the export to {output}: {error}") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def export_htp(
    transformer: nn.Module,
    calibration: Sequence[Item],
    held_out: Sequence[Item],
    output_dir: str | os.PathLike[str],
    *,
    soc: str = "sm8750",
    precision: Precision | None = None,
    target_db: float | None = None,
    graphs: int = 1,
    probe_blocks: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Export a packed transformer to a QNN HTP context binary, and prove on the x86 emulator that it computes it.

    Makes a folder with `transformer.qdq.onnx` (QDQ with the model's own 4-bit codes and scales), `transformer.bin`
    (the context binary), `transformer.onnx` (the EPContext node that loads it in ONNX Runtime), `certificate.json`
    and `certificate.md`.

    Args:
        transformer: a packed transformer of one of the four families; not changed.
        calibration: keyword arguments of its forward, each a tensor of batch 1, all items of the same shapes. They
            set the activation ranges that training did not; a layer's own static `input_scale` is used exactly.
        held_out: other items of the same kind, at several timesteps, on which the certificate is measured.
        output_dir: must not exist, or be empty. Appears only when everything passed.
        soc: a key of `fbqat_hub.export.htp.targets.TARGETS`.
        precision: which ops compute at how many activation bits; the default is W4A8 with 16 bits between the
            layers, in the last layer and on the timestep's path.
        target_db: start from 16 bits everywhere and give 8 where that saves most for its noise, while the exact CPU
            reference keeps this SQNR to torch (`allocation.allocate`; `precision` then gives the weights' storage and
            the layers that stay at 16 in any case).
        graphs: into how many graphs to split the model along its blocks, `transformer_0` and so on, run in order.
            The certificate's `parity` is then that of the whole chain on the emulator against torch (against the CPU
            reference: of the last graph); `parts` has each graph's own.
        probe_blocks: see `compile_graph`.
        progress: show a bar.

    Returns:
        The certificate, as written to `certificate.json`.

    Raises:
        HTPUnavailableError: a needed package cannot be imported; says what to install.
        ExportError: bad input, a failed step, a failed audit or a gate not met; nothing is left at `output_dir`.
    """
    require_htp()
    if probe_blocks is not None and probe_blocks < 1:
        raise ExportError(f"probe_blocks is {probe_blocks}; give 1 or more, or None for all blocks")
    target = target_for(soc)
    check_items("calibration", calibration)
    check_items("held_out", held_out)
    bar = Progress(2 + graphs * len(STEPS), progress)
    try:
        with staging(output_dir) as folder:
            section, _ = build_transformer(
                transformer,
                calibration,
                held_out,
                folder,
                target,
                precision or Precision(),
                bar,
                target_db=target_db,
                graphs=graphs,
                probe_blocks=probe_blocks,
            )
            return write_certificate(folder, target, section, bar)
    finally:
        bar.bar.close()


def build_transformer(
    transformer: nn.Module,
    calibration: Sequence[Item],
    held_out: Sequence[Item],
    folder: Path,
    target: Target,
    precision: Precision,
    progress: Progress,
    *,
    target_db: float | None = None,
    graphs: int = 1,
    probe_blocks: int | None = None,
) -> tuple[dict[str, Any], GraphWrapper]:
    """The transformer's graph, into `folder`; its part of the certificate, gated, and its wrapper."""
    from fbqat_hub.export.htp import certificate
    from fbqat_hub.export.onnx.allocation import allocate
    from fbqat_hub.export.onnx.calibration import calibrate
    from fbqat_hub.export.onnx.clipping import clipped_ranges, tensors_at_8_bits
    from fbqat_hub.export.onnx.qdq import relu_ranges
    from fbqat_hub.export.onnx.split import join_sections, split_graph

    with progress.step("transformer: trace"):
        layers = packed_layers(transformer)
        wrapper = wrap(transformer, calibration[0])
        graph, rewrites = trace_graph(wrapper, calibration[0], layers)
        parts = {"transformer": graph}
        if graphs != 1:
            parts = {f"transformer_{index}": part for index, part in enumerate(split_graph(graph, graphs))}
    feeds = [as_feed(wrapper.host_inputs(item)) for item in calibration]
    # what precision is chosen on must not have set the ranges: a range fits the inputs it was taken from too well
    apart = range(0, len(calibration), max(2, len(calibration) // ALLOCATION_INPUTS))[:ALLOCATION_INPUTS]
    chosen_on = apart if target_db is not None else range(0)
    with progress.step("transformer: calibrate"):
        seen = [feed for index, feed in enumerate(feeds) if index not in chosen_on]
        ranges = calibrate(runnable(graph), seen)
        at_8_bits = tensors_at_8_bits(graph, precision if target_db is None else LOWEST)
        clipped = clipped_ranges(runnable(graph), seen, relu_ranges(graph.model, ranges), at_8_bits)
    report = None
    if target_db is not None:
        with progress.step("transformer: allocate"):
            some = [calibration[index] for index in chosen_on]
            precision, report = allocate(
                graph,
                ranges,
                [feeds[index] for index in chosen_on],
                [each["sample"] for each in torch_outputs(transformer, some, ())],
                start=precision,
                clipped=clipped,
                target_db=target_db,
            )
    held = [as_feed(wrapper.host_inputs(item)) for item in held_out]
    expected = torch_outputs(transformer, held_out, blocks_of(transformer))
    sections = {}
    for name, part in parts.items():
        source = GraphSource(
            name=name,
            graph=part,
            layers={part.module_names[key]: layer for key, layer in part.layers.items()},
            ranges=ranges,
            clipped=clipped,
            held_out=[{value.name: feed[value.name] for value in part.model.graph.input} for feed in held],
            expected=expected,
        )
        sections[name], emulated = compile_graph(source, folder, target, precision, progress, probe_blocks=probe_blocks)
        for feed, outputs in zip(held, emulated, strict=True):
            feed.update(outputs)  # the next part runs on what the emulator made of this one
    section = sections[name] if graphs == 1 else join_sections(sections)
    section["model"] = {"class": type(transformer).__name__, "packed_layers": len(layers)}
    section["allocation"] = report
    section["calibration_inputs"] = len(calibration)
    section["audit"]["rewrites"] = rewrites
    section["parity"]["timesteps"] = [round(float(item["timestep"].reshape(-1)[0]), 4) for item in held_out]
    section["parity"]["thresholds_db"] = certificate.thresholds()
    certificate.gate(section["parity"])
    return section, wrapper


def write_certificate(folder: Path, target: Target, sections: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """`certificate.json` and `certificate.md` of everything in `folder`; returns the former's content."""
    from fbqat_hub.export.htp import certificate
    from fbqat_hub.export.htp.runtime.qnn_session import peak_rss_mib

    result = {
        "format_version": certificate.FORMAT_VERSION,
        "asked": certificate.asked(target),
        **sections,
        # a context binary with a flipped byte loads without complaint: compare the hash
        "files": listing(folder),
        "seconds": progress.seconds,
        "peak_rss_mib": round(peak_rss_mib(), 1),
        "versions": certificate.versions(),
        **certificate.provenance(),
    }
    text = json.dumps(result, indent=2)
    (folder / "certificate.json").write_text(text + "\n", encoding="utf-8")
    written: dict[str, Any] = json.loads(text)
    (folder / "certificate.md").write_text(certificate.markdown(written), encoding="utf-8")
    return written
