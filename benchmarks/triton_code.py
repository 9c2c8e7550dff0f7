"""What Triton's compiler makes of the int8 product for NVIDIA's cards, counted without a card.

    python -m benchmarks.triton_code    # -> benchmarks/results/triton-code.json; then python -m benchmarks.tables

Each tile is compiled to the card's machine code. Counted are the instructions of its loop and how many of them are
products of the tensor cores, with the nibbles masked four at a time (PTX) and as Triton's own operations do it. Needs
triton, and TRITON_INTERPRET not set.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.markdown import markdown

RESULTS = Path(__file__).parent / "results" / "triton-code.json"
COMMAND = "python -m benchmarks.triton_code"
CAPABILITIES = {80: "A100", 89: "Ada (RTX 40)", 90: "Hopper (H100)", 120: "Blackwell (RTX 50)"}
_TYPES = {
    "codes": "*i8", "scales": "*fp32", "weight_scale": "*fp32", "bias": "*bf16", "zero_point": "*i32", "y": "*bf16",
    "tokens": "i32", "token_bucket": "i32", "outputs": "i32", "width": "i32", "half": "i32", "inputs": "i32",
    "x": "*bf16", "input_scale": "*fp32", "input_zero_point": "*i32", "x_stride": "i32",
}  # fmt: skip
# whose divisibility by 16 a launch does not ask for
_FREE = {"tokens", "token_bucket"}


def compiled(
    capability: int, config: Any, *, split: bool, ptx: bool, aligned: bool = True, range_: str = "per_token"
) -> Any:
    """The second kernel for a card and a tile: bf16, a bias; sizes that the tile divides, or none that 16 does."""
    from fbqat_hub.quantization.kernels import triton_kernels

    constants = {"SPLIT": split, "RANGE": range_, "BIAS": True, "PTX": ptx, "EVEN": aligned, **config.kwargs}
    types = {**_TYPES, "weight": "*u8" if split else "*i8"}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return _compile(triton_kernels._multiply, capability, types, constants, options, aligned=aligned)


def compiled_quantize(capability: int, inputs: int, *, split: bool, aligned: bool = True, range_: str) -> Any:
    """The first kernel for a card, for up to so many bf16 inputs, a power of two."""
    from fbqat_hub.quantization.kernels import triton_kernels

    constants = {"SPLIT": split, "RANGE": range_, "BLOCK": inputs}
    options = {"num_warps": triton_kernels.warps_of(inputs)}
    return _compile(triton_kernels._quantize, capability, _TYPES, constants, options, aligned=aligned)


def _compile(
    kernel: Any, capability: int, types: dict[str, str], constants: dict[str, Any], options: Any, *, aligned: bool
) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    while not hasattr(kernel, "params"):
        kernel = kernel.fn
    names = [parameter.name for parameter in kernel.params]
    types = {**types, **dict.fromkeys(constants, "constexpr")}
    divided = [at for at, name in enumerate(names) if name not in {*constants, *_FREE} and (aligned or name == "half")]
    source = ASTSource(
        kernel,
        {name: types[name] for name in names},
        {(at,): constants[name] for at, name in enumerate(names) if name in constants},
        {(at,): [["tt.divisibility", 16]] for at in divided},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def check_every_path(capability: int) -> int:
    """Compile both kernels for each range, storage and alignment, and check that nothing spills; returns how many."""
    from fbqat_hub.quantization.kernels import triton_kernels

    made = []
    for range_, split, aligned in itertools.product(
        ("per_token", "per_tensor", "static"), (True, False), (True, False)
    ):
        paths = {"split": split, "aligned": aligned, "range_": range_}
        made.append(compiled(capability, triton_kernels.CONFIGS[3], ptx=True, **paths))
        made.append(compiled_quantize(capability, 4096, **paths))
        assert "div.rn.f32" in made[-1].asm["ptx"]
        assert not aligned or "ld.global.v4" in made[-1].asm["ptx"].replace(".b32", "")
    assert not any(".local" in each.asm["ptx"] for each in made)
    return len(made)


def counted(capability: int, index: int, *, split: bool, ptx: bool) -> dict[str, Any]:
    """One row: of the loop, its instructions and those that are int8 products; of a thread, registers and stack."""
    import triton

    from fbqat_hub.quantization.kernels import triton_kernels

    config = triton_kernels.CONFIGS[index]
    made = compiled(capability, config, split=split, ptx=ptx)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        code, usage = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        )
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)([^;\n]*);", code)
    instructions = [(int(place, 16), name.split(".")[0], rest) for place, name, rest in found]
    bodies = [
        [name for at, name, _ in instructions if int(target[1], 16) <= at <= place]
        for place, name, rest in instructions
        if name == "BRA" and (target := re.search(r"0x([0-9a-f]+)", rest)) and int(target[1], 16) < place
    ]
    loop = max(bodies, key=lambda body: sum(name in ("IMMA", "IGMMA") for name in body))
    registers, stack = (int(number) for number in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    return {
        "capability": capability,
        "tile": list(config.kwargs.values()),
        "bits": 4 if split else 8,
        "ptx": ptx,
        "instructions": len(loop),
        "products": sum(name in ("IMMA", "IGMMA") for name in loop),
        "registers": registers,
        "stack": stack,
        "shared": made.metadata.shared,
        "rounds_to_nearest": "cvt.rn.bf16" in made.asm["ptx"],
    }


def triton_code_table() -> str:
    """Instructions of the loop for a tile, card by card."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows: dict[tuple[int, str], dict[tuple[int, bool], str]] = {}
    for row in found["rows"]:
        place = (row["capability"], " x ".join(map(str, row["tile"])))
        rows.setdefault(place, {})[row["bits"], row["ptx"]] = f"{row['instructions']} for {row['products']}"
    columns = {(4, True): "4 bits", (4, False): "4 bits, masks not in PTX", (8, True): "8 bits"}
    cells = [
        (f"{capability / 10:.1f}, {CAPABILITIES[capability]}", tile, *(of[column] for column in columns))
        for (capability, tile), of in rows.items()
    ]
    return (
        f"{markdown(('card', 'tile (tokens x outputs x bytes)', *columns.values()), cells)}\n\n"
        f"Instructions in a turn of the loop, for how many products of the tensor cores. triton "
        f"{found['versions']['triton']}. By `{found['command']}`."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capabilities", nargs="+", type=int, choices=CAPABILITIES, default=list(CAPABILITIES))
    parser.add_argument("--tiles", nargs="+", type=int, default=[4, 7], help="places in triton_kernels.CONFIGS")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()

    from fbqat_hub.evaluation.results import versions
    from fbqat_hub.files import whole

    rows = [
        counted(capability, index, split=split, ptx=ptx)
        for capability in options.capabilities
        for index in options.tiles
        for split, ptx in ((True, True), (True, False), (False, True))
    ]
    with whole(options.output) as partial:
        record = {"command": COMMAND, "versions": versions("triton"), "rows": rows}
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"saved {options.output.name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
