"""Text encoders and decoders at their checkpoints' width as W8A16 graphs on the HTP. Random weights.

python -m benchmarks.htp_parts --part dc-ae --output runs/dc-ae   # -> benchmarks/results/htp.json
python -m benchmarks.htp_parts --part kl-16-tile --compile-only --output runs/kl-16   # not emulated, which takes hours
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, Gemma2Config, Gemma2Model, T5Config, T5EncoderModel

from benchmarks.convert_true_size import T5_XXL
from benchmarks.htp_true_size import RESULTS, PeakMemory
from fbqat_hub.evaluation.results import Record, write_records
from fbqat_hub.export.bundle.float_part import QuantizedPart, compile_part, quantize_part
from fbqat_hub.export.bundle.text_bundle import quantize_encoder
from fbqat_hub.export.bundle.text_encoder import wrap_text_encoder
from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.folder import staging
from fbqat_hub.export.htp import certificate
from fbqat_hub.export.htp.graph import STEPS, compile_binary
from fbqat_hub.export.htp.targets import target_for
from fbqat_hub.export.onnx.float_graph import as_feed
from fbqat_hub.export.progress import Progress
from fbqat_hub.families import get_family

# Rows of the token table, which stays on the host.
VOCABULARY = 1000
# Inputs to calibrate on; one more is held out.
CALIBRATION = 8


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a pipeline around its denoiser.

    Attributes:
        family: of the results.
        shape: what is exported, for the tables.
        build: so many layers of it -> the module; of an autoencoder always the whole decoder.
        layers, of: how many are exported, of how many.
        size: tokens of a text encoder; side of an autoencoder's latents.
        channels: of the latents; 0 of a text encoder.
        masked: whether the pipeline tells the encoder the padding.
    """

    family: str
    shape: str
    build: Callable[[int], nn.Module]
    layers: int
    of: int
    size: int
    channels: int = 0
    masked: bool = False

    def sections(self, name: str, folder: Path, bar: Progress) -> dict[str, dict[str, Any]]:
        """The graphs of the part, of random weights, into `folder`; their sections of the certificate, in order."""
        torch.manual_seed(0)
        module, target = self.build(self.layers).eval(), target_for("sm8750")
        *calibration, held_out = self.items()
        kind = self.build.__name__
        if not self.channels:
            encoder = wrap_text_encoder(name, module, self.size, self.masked, folder)
            part = quantize_encoder(encoder, kind, calibration, [held_out], folder, bar)
        else:
            wrapper = get_family(self.family).decoder_graph(module)
            with torch.no_grad():
                expected = [wrapper.module(*wrapper.host_inputs(held_out).values())[0]]
            graph, rewrites = quantize_part(name, wrapper, calibration, expected, folder, bar)
            given = [as_feed(wrapper.host_inputs(held_out))]
            part = QuantizedPart(model_class=kind, graphs=[graph], rewrites=[rewrites], held_out=given)
            del wrapper
        del module
        return compile_part(part, folder, target, bar)

    def compiled(self, name: str, folder: Path, bar: Progress) -> dict[str, Any]:
        """What compiling the decoder alone takes, its ranges from two inputs: `compile_seconds`, `cost`."""
        torch.manual_seed(0)
        wrapper = get_family(self.family).decoder_graph(self.build(self.layers).eval())
        graph, _ = quantize_part(name, wrapper, self.items()[:2], [], folder, bar)
        del wrapper
        scratch = folder / "scratch"
        scratch.mkdir()
        with bar.step(f"{name}: compile"):
            began = time.perf_counter()
            made = compile_binary(graph.path, folder / f"{name}.onnx", target_for("sm8750"), scratch, graph.stored_bits)
        if not made["coverage"]["all_on_qnn"]:
            raise ExportError(f"{name} is not all on QNN: {made['coverage']}")
        return {"compile_seconds": round(time.perf_counter() - began, 1), "cost": made["cost"]}

    def items(self) -> list[dict[str, Tensor]]:
        """Random inputs; of a text encoder from a quarter to all of the tokens are no padding."""
        generator = torch.Generator().manual_seed(1)
        count = CALIBRATION + 1
        if self.channels:
            shape = (1, self.channels, self.size, self.size)
            return [{"latents": torch.randn(shape, generator=generator)} for _ in range(count)]
        lengths = torch.linspace(self.size // 4, self.size, count).long().tolist()
        return [
            {
                "input_ids": torch.randint(VOCABULARY, (1, self.size), generator=generator),
                "attention_mask": (torch.arange(self.size) < length)[None].long(),
            }
            for length in lengths
        ]

    def whole(self) -> int:
        """Parameters of all layers, without the token table."""
        with torch.device("meta"):
            module = self.build(self.of)
        part: Any = module.decoder if self.channels else module
        return sum(each.numel() for each in part.parameters() if each.shape[0] != VOCABULARY)


#: google/gemma-2-2b, but for the number of layers and the token table.
GEMMA_2_2B = {
    "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "query_pre_attn_scalar": 256, "sliding_window": 4096,
}  # fmt: skip
#: Autoencoders of Stable Diffusion, whatever their channels.
KL = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
#: mit-han-lab/dc-ae-f32c32-sana.
DC_AE = {
    "latent_channels": 32, "scaling_factor": 0.41407,
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024), "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024), "decoder_layers_per_block": (3,) * 6,
    "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)), "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu", "upsample_block_type": "interpolate", "downsample_block_type": "Conv",
}  # fmt: skip


def gemma2(layers: int) -> nn.Module:
    """google/gemma-2-2b."""
    return Gemma2Model(Gemma2Config(**GEMMA_2_2B, vocab_size=VOCABULARY, num_hidden_layers=layers))


def t5(layers: int) -> nn.Module:
    """The encoder of google/t5-v1_1-xxl."""
    return T5EncoderModel(T5Config(**{**T5_XXL, "vocab_size": VOCABULARY, "num_layers": layers}))


def clip(layers: int) -> nn.Module:
    """The text model of openai/clip-vit-large-patch14."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY, hidden_size=768, intermediate_size=3072, num_hidden_layers=layers,
            num_attention_heads=12, max_position_embeddings=77, eos_token_id=2,
        )
    )  # fmt: skip


def dc_ae(_: int) -> nn.Module:
    """mit-han-lab/dc-ae-f32c32-sana, with an encoder of nothing."""
    small = {
        "encoder_block_types": "ResBlock", "encoder_block_out_channels": (8,) * 6,
        "encoder_layers_per_block": (1,) * 6, "encoder_qkv_multiscales": ((),) * 6,
    }  # fmt: skip
    return AutoencoderDC(**DC_AE | small)


def kl(_: int) -> nn.Module:
    """The autoencoder of 16 channels of FLUX.1 and SD3.5."""
    return AutoencoderKL(
        **KL, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip


PARTS = {
    "gemma-2-2b": Part(
        family="sana", shape="2 of 26 layers, 300 tokens", build=gemma2, layers=2, of=26, size=300, masked=True
    ),
    "t5-xxl": Part(
        family="pixart-sigma", shape="1 of 24 layers, 300 tokens", build=t5, layers=1, of=24, size=300, masked=True
    ),
    "clip-l": Part(family="sd3", shape="all 12 layers, 77 tokens", build=clip, layers=12, of=12, size=77),
    "dc-ae": Part(family="sana", shape="the decoder, 128 px", build=dc_ae, layers=1, of=1, size=4, channels=32),
    "kl-16": Part(family="flux", shape="the decoder, 64 px", build=kl, layers=1, of=1, size=8, channels=16),
    "kl-16-tile": Part(family="flux", shape="the decoder, 128 px", build=kl, layers=1, of=1, size=16, channels=16),
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--output", type=Path, required=True, help="new folder for the export")
    parser.add_argument("--compile-only", action="store_true", help="of a decoder: quantize and compile, run nothing")
    parser.add_argument("--dry-run", action="store_true", help="leave benchmarks/results as it is")
    options = parser.parse_args()
    part, memory = PARTS[options.part], PeakMemory()
    if options.compile_only and not part.channels:
        parser.error("--compile-only is for decoders")
    memory.start()
    began = time.perf_counter()
    common: dict[str, Any] = {"suite": "htp", "family": part.family, "method": "ptq-maxabs", "seed": 0, "n": 1}
    if options.compile_only:
        with staging(options.output) as folder, Progress(4, shown=True) as bar:
            extra = part.compiled(options.part, folder, bar)
        extra |= {"part": options.part, "shape": part.shape, "parameters_of_all_layers": part.whole()}
        print(json.dumps(extra | {"peak_rss_mib": memory.mib}, indent=2))
        if not options.dry_run:
            write_records(RESULTS, [Record(**common, extra=extra, metric="peak_rss_mib", value=memory.mib)])
        return
    with staging(options.output) as folder, Progress(3 + len(STEPS), shown=True) as bar:
        sections = part.sections(options.part, folder, bar)
        section = certificate.joined(sections) | {"model": next(iter(sections.values()))["model"]}
        certificate.write(folder, target_for("sm8750"), section, bar.seconds)
    parity = section["parity"]
    extra = {
        "part": options.part,
        "shape": part.shape,
        "graphs": len(sections),
        "parameters_of_all_layers": part.whole(),
        "export_seconds": round(time.perf_counter() - began, 1),
        "compile_seconds": section["compiler"]["seconds"],
        "cost": section["cost"],
        "emulator_vs_cpu_qdq_db": parity["emulator_vs_cpu_qdq"]["sqnr_db"],
    }
    print(json.dumps(extra | {"peak_rss_mib": memory.mib, "parity": parity}, indent=2))
    if options.dry_run:
        return
    sqnr = parity["emulator_vs_torch_packed"]["sqnr_db"]
    records = [
        Record(**common, extra=extra, metric="peak_rss_mib", value=memory.mib),
        Record(**common, extra=extra, metric="sqnr_db", value=sqnr),
    ]
    print(f"saved {write_records(RESULTS, records).name}")


if __name__ == "__main__":
    main()
