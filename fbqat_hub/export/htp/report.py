"""The certificate for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PAIRS = ("emulator_vs_cpu_qdq", "emulator_vs_torch_packed", "cpu_qdq_vs_torch_packed")


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
        "| tensor | " + " | ".join(name.replace("_", " ") for name in PAIRS) + " |",
        "|---|" + "---|" * len(PAIRS),
        _row("**output**", certificate["parity"]),
        *(_row(name, compared) for name, compared in certificate["blocks"].items()),
        *(_row(f"**{name}**", part["parity"]) for name, part in certificate.get("graphs", {}).items()),
    ]
    coverage = certificate["coverage"]
    lines += [
        "",
        f"{coverage['ops_on_qnn']:,} ops are on QNN, {coverage['nodes_elsewhere']:,} nodes of the graph elsewhere.",
    ]
    if (probed := certificate["probed_blocks"])["probed"] < probed["of"]:
        lines += ["", f"Blocks and single ops were compared in the first {probed['probed']} of {probed['of']} blocks."]
    if unseen := [name for name, part in certificate.get("graphs", {}).items() if not part["op_parity"]]:
        lines += ["", f"No single ops were compared in {', '.join(f'`{name}`' for name in unseen)}."]
    if timesteps := certificate["parity"].get("timesteps"):
        values = zip(*(certificate["parity"][name]["sqnr_db_of_each"] for name in PAIRS), strict=True)
        rows = sorted(zip(timesteps, values, strict=True))
        lines += ["", "| timestep | " + " | ".join(name.replace("_", " ") for name in PAIRS) + " |"]
        lines += ["|---|" + "---|" * len(PAIRS)]
        lines += [f"| {time:g} | " + " | ".join(f"{value:.1f}" for value in each) + " |" for time, each in rows]
    if pictures := certificate.get("pictures"):
        lines += ["", "| picture, emulator in the loop against torch | PSNR (dB) |", "|---|---|"]
        lines += [f"| {item['prompt']} | {item['psnr_db']:.1f} |" for item in pictures["each"]]
    elif "pictures" in certificate:
        lines += ["", "No picture was generated on the emulator."]
    if tiles := certificate.get("decoder_tiles"):
        lines += ["", _tiles(tiles)]
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
    if tuning := certificate.get("tuning"):
        lines += ["", *_tuning(tuning, certificate["parity"])]
    if reason := certificate.get("text_left_out"):
        lines += ["", f"Text encoders are left out: {reason}"]
    lines += [
        "",
        *([_bits(certificate["precision"]), ""] if certificate["model"]["packed_layers"] else []),
        f"{cost_of['macs']:,} multiply-accumulates a forward, {cost_of['macs_a16']:,} of them on 16-bit activations; "
        f"{cost_of['constant_bytes']:,} bytes of constants, {cost_of['activation_bytes']:,} bytes of activations "
        f"written, {cost_of['binary_bytes']:,} bytes of binary, {cost_of['spill_fill_bytes']:,} bytes of spill/fill "
        "buffer. No latency is given: the emulator's time says nothing of a device's.",
    ]
    return "\n".join(lines) + "\n"


def _tiles(tiles: Mapping[str, Any]) -> str:
    """How a large picture is decoded."""
    (height, width), calls = tiles["size"], f"{tiles['count']} tiles"
    if "overlap" in tiles:
        overlap = " and ".join(str(each) for each in dict.fromkeys(tiles["overlap"]))
        how = f"{calls} of {width} x {height} pixels that overlap by {overlap}; `decoder` above is one of them"
    else:
        how = (
            f"{tiles['graphs']} graphs between its group norms, which the host computes over the whole picture, by "
            f"{calls} of about {width} x {height} pixels in all; the `decoder` graphs above are a tile each"
        )
    return f"A picture is decoded in {how}. In torch it has {tiles['psnr_db']:.1f} dB PSNR to the whole one."


def _tuning(tuning: Mapping[str, Any], parity: Mapping[str, Any]) -> list[str]:
    """What was trained before the graph was compiled, and what that did."""
    return [
        f"The graph was tuned: {tuning['steps']} steps of {tuning['batch']} samples, seed {tuning['seed']}, towards "
        f"the float teacher. Its squared distance on {tuning['loss_samples']} samples kept apart went from "
        f"{tuning['loss_before']:.3g} to {tuning['loss_after']:.3g}. Codes are the checkpoint's; "
        "the audit compares scales and ranges with the tuned ones. SQNR in dB of the output:",
        "",
        "| compared | with | dB |",
        "|---|---|---|",
        f"| emulator | torch, the tuned graph | {parity['emulator_vs_torch_tuned']['sqnr_db']:.1f} |",
        f"| emulator | the float teacher | {parity['emulator_vs_teacher']['sqnr_db']:.1f} |",
        f"| torch, the graph before | the float teacher | {tuning['untuned_vs_teacher']['sqnr_db']:.1f} |",
        f"| torch, the tuned graph | the float teacher | {tuning['tuned_vs_teacher']['sqnr_db']:.1f} |",
        f"| torch, the packed model | the float teacher | {tuning['torch_packed_vs_teacher']['sqnr_db']:.1f} |",
    ]


def _bits(precision: Mapping[str, Any]) -> str:
    """Which weights and activations have how many bits, in words."""
    stored = {4: "two per byte", 8: "one per byte"}
    codes = " and ".join(
        f"{bits}-bit codes ({count} layers), stored {stored[8 if int(bits) > 4 else precision['weight_bits']]}"
        for bits, count in precision["code_bits"].items()
    )
    activations = " and ".join(f"{bits} bits ({count} layers)" for bits, count in precision["layer_bits"].items())
    layers = ", ".join(f"`{name}`" for name in precision["a16_layers"]) or "none"
    kinds = ", ".join(precision["a16_ops"]) or "none"
    return (
        f"Packed weights are {codes}; the activations they are multiplied "
        f"with have {activations}. Layers at 16 in any case: {layers}. Kinds of other ops at 16: "
        f"{kinds}."
    )


def _row(name: str, compared: Mapping[str, Any]) -> str:
    found = (compared.get(pair) for pair in PAIRS)
    cells = (f"{pair['sqnr_db']:.1f} ({pair['cosine']:.5f})" if pair else "not emulated" for pair in found)
    return f"| {name} | " + " | ".join(cells) + " |"
