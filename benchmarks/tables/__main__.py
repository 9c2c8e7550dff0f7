"""Write the tables of README.md and docs/ from benchmarks/results/, between their markers.

python -m benchmarks.tables            # rewrite
python -m benchmarks.tables --check    # exit 1 if a table is not what the results say
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable

from benchmarks.integration import ADAPTERS, OPERATIONS
from benchmarks.method.findings import CHOICES, JUDGED, OLDER
from benchmarks.rates import rates_table
from benchmarks.speed_gpu import speed_gpu_table
from benchmarks.tables import htp, integrations, lora, method, speed, training
from benchmarks.tables.results import ROOT
from benchmarks.triton_code import triton_code_table

FILES = (
    "README.md", "docs/method.md", "docs/htp.md", "docs/text-encoders.md", "docs/exits.md", "docs/integrations.md",
    "docs/lora.md", "docs/real-models.md", "docs/speed.md", "docs/speed-gpu.md", "training/README.md",
)  # fmt: skip

TABLES: dict[str, Callable[[], str]] = {
    "families": integrations.families_table,
    "demo": method.demo_table,
    "judge": method.judge_table,
    "findings": lambda: method.findings_table(JUDGED),
    "choices": lambda: method.findings_table(CHOICES),
    "older-findings": lambda: method.findings_table(OLDER),
    "half-bits": method.half_bits_table,
    "blockwise": method.blockwise_table,
    "rates": rates_table,
    "speed": speed.speed_table,
    "speed-cpu": speed.speed_cpu_table,
    "speed-peers": lambda: speed.speed_peers_table("speed-peers.json"),
    "speed-peers-avx2": lambda: speed.speed_peers_table("speed-peers-avx2.json"),
    "speed-profile": speed.speed_profile_table,
    "speed-layer": speed.speed_layer_table,
    "speed-shared": speed.speed_shared_table,
    "speed-loading": speed.speed_loading_table,
    "speed-gpu": speed_gpu_table,
    "triton-code": triton_code_table,
    "training-memory": training.training_memory_table,
    "training-step": training.training_step_table,
    "adam": training.adam_table,
    "convert": training.convert_table,
    "convert-widths": training.convert_widths_table,
    "text-encoders": integrations.text_encoders_table,
    "sdnq": integrations.sdnq_table,
    "operations": lambda: integrations.operations_table(OPERATIONS),
    "adapter-operations": lambda: integrations.operations_table(ADAPTERS),
    "fine-tune": lora.fine_tune_table,
    "adapter-memory": lora.adapter_memory_table,
    "true-size": htp.true_size_table,
    "htp-parts": htp.htp_parts_table,
    "htp-whole": htp.htp_whole_table,
    "htp-targets": htp.htp_targets_table,
    "htp-tiles": htp.htp_tiles_table,
    "htp-decoder": htp.htp_decoder_table,
    "htp": htp.htp_table,
    "htp-ops": htp.htp_ops_table,
    "htp-text": htp.htp_text_table,
    "htp-gain": htp.htp_gain_table,
    "htp-tuning": htp.htp_tuning_table,
}


def filled(text: str) -> str:
    """``text`` with every ``<!-- results:NAME -->`` block rewritten."""
    for name, written in TABLES.items():
        start, end = f"<!-- results:{name} -->", f"<!-- /results:{name} -->"
        if start in text:
            block = f"{start}\n{written()}\n{end}"
            text = re.sub(
                re.escape(start) + ".*?" + re.escape(end), lambda _, block=block: block, text, flags=re.DOTALL
            )
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for name in FILES:
        path = ROOT / name
        text = path.read_text()
        if filled(text) != text:
            stale.append(name)
            if not check:
                path.write_text(filled(text))
    print(f"{'stale' if check else 'rewritten'}: {', '.join(stale) or 'nothing'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
