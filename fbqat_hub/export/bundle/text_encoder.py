"""Text encoders as graphs the HTP can run: Gemma 2, T5's encoder and CLIP's text model. No transformers import.

Tokens become embeddings on the host (a table of a quarter million rows is no work for the HTP), and so do masks. What
differs from transformers' forward, none of it in exact arithmetic beyond float rounding: RMS norms and the tanh form of
GELU are one op each, keys and values shared by query heads are stored once a head, positions are constants.

An encoder that is too large for one graph (`MOST_WEIGHTS`) becomes several of consecutive layers, run in order. They
are built one at a time, from copies of their own layers.
"""

from __future__ import annotations

import copy
import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fbqat_hub.export.bundle.pipeline import remembering
from fbqat_hub.export.bundle.runtime.text import encoder_feed
from fbqat_hub.export.errors import ExportError
from fbqat_hub.families.graph import GraphWrapper, Item, TwinModule, float_twin
from fbqat_hub.quantization import ActivationScheme, WeightScheme, convert, prepare, set_bit_width
from fbqat_hub.quantization.convert import named_layers
from fbqat_hub.quantization.packed import PackedLayer

#: Text encoder -> its tokenizer, as diffusers' pipelines name them.
COMPONENTS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}

#: Added to a text encoder's attention score of a token that is not to be seen. Its scores go further apart than a
#: denoiser's (`families.graph.MASK_BIAS`): Gemma's up to 50 from 0.
ENCODER_MASK_BIAS = -100.0

#: Weights that one graph of a text encoder holds at most (whole layers, at least one): building one then takes 8 GB at
#: most. Measured: 0.64 GB and 27 bytes per weight, within 0.05 GB for 85, 166 and 205 million weights
#: (`benchmarks.htp_parts`: CLIP-L, two layers of Gemma-2-2B, one of T5-XXL).
MOST_WEIGHTS = 270_000_000


#: Tokens of which embeddings are looked up at a time.
_TOKENS = 8192


class StoredEmbeddings(nn.Module):
    """Token embeddings in the precision that they are stored in, as an encoder in float32 reads them.

    They are no parameters, so that the encoder's dtype is float32.
    """

    def __init__(self, embed: Any) -> None:
        super().__init__()
        self._embed = [embed]
        self.num_embeddings, self.embedding_dim = embed.num_embeddings, embed.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        """Tokens [...] -> [..., embedding_dim], float32."""
        (embed,) = self._embed
        used, places = ids.unique(return_inverse=True)
        few = copy.copy(embed)
        few._parameters = {"weight": nn.Parameter(embed.weight[used].float(), requires_grad=False)}
        made: Tensor = few(places)
        return made


def compute_in_float32(encoder: Any) -> Any:
    """A packed text encoder, changed in place, that computes in float32; its token embeddings stay as they are stored.

    The table is the largest part of some encoders: 2.4 GB of Gemma-2-2B's in float32.
    """
    encoder.set_input_embeddings(StoredEmbeddings(encoder.get_input_embeddings()))
    return nn.Module.float(encoder)  # transformers' own refuses a quantized one


class TextStage(TwinModule):
    """Consecutive layers of a text encoder, copied in float32, or packed as they are.

    Values go in and out by name: a stage reads the hidden state that the stage before it made, and what the host gives.

    Args:
        encoder: the whole encoder.
        first, last: its layers `first` to `last - 1` are here.
        around: what else the stage holds, by name, in its `twin`.
        inputs: what the host gives besides token embeddings.
    """

    def __init__(
        self, encoder: Any, first: int, last: int, around: Mapping[str, nn.Module], inputs: Sequence[str]
    ) -> None:
        layers = self.layers_of(encoder)
        twin = copy.deepcopy(nn.ModuleDict({"layers": layers[first:last], **around}))
        module: Any
        for module in twin.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation = "eager"
        _one_op_norms_and_gelus(twin)
        super().__init__(nn.Module.to(twin, device="cpu", dtype=torch.float32).eval())
        self.is_last = last == len(layers)
        self.inputs = ("token_embeddings" if first == 0 else f"hidden_{first}", *inputs)
        self.output_name = "tokens" if self.is_last else f"hidden_{last}"

    @staticmethod
    @abstractmethod
    def layers_of(encoder: Any) -> nn.ModuleList:
        """All layers of the encoder."""

    def given(self, values: Item) -> dict[str, Tensor]:
        """The inputs, of all values so far."""
        return {name: values[name] for name in self.inputs}

    def run(self, values: dict[str, Tensor]) -> Tensor:
        """The output, which is also added to `values`."""
        with torch.no_grad():
            values[self.output_name] = self.compute(*self.given(values).values())
        return values[self.output_name]

    def pack(self) -> dict[str, PackedLayer]:
        """Pack the linear layers at 8 bits, unless the encoder came packed; the packed layers by name."""
        if next(named_layers(self.twin, PackedLayer), None) is None:
            prepare(self.twin, WeightScheme(bits=8), ActivationScheme(bits=32))
            set_bit_width(self.twin, 8)
            convert(self.twin)
        return dict(named_layers(self.twin, PackedLayer))

    def wrapper(self) -> GraphWrapper:
        """For tracing."""
        traced = copy.deepcopy(self, {id(self.twin): float_twin(self.twin)})
        return GraphWrapper(module=traced.eval(), host_inputs=self.given, output_name=self.output_name)


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """One text encoder of a pipeline, for the shape and use its pipeline makes of it.

    Attributes:
        name: of the component.
        stages: graph -> the number of its first layer and of the first that is not in it, in order.
        stage: makes the stage of two such numbers, a copy of those layers alone.
        host_inputs: `input_ids` and `attention_mask` -> what `runtime.text.encoder_feed` makes of them.
        table: safetensors file of the token embeddings, `embedding` [vocabulary, D]: float16, or float32 if they do not
            fit.
        bias, end: as in the manifest: None, "padding" or "causal"; None, the end token's id, or "highest".
    """

    name: str
    stages: Mapping[str, tuple[int, int]]
    stage: Callable[[int, int], TextStage]
    host_inputs: Callable[[Item], dict[str, Tensor]]
    table: Path
    bias: str | None
    end: int | str | None


class _Gemma2(TextStage):
    def __init__(self, encoder: Any, tokens: int, first: int, last: int, inputs: Sequence[str]) -> None:
        around = {"norm": encoder.norm} if last == len(encoder.layers) else {}
        super().__init__(encoder, first, last, around, inputs)
        rotary = nn.Module.to(copy.deepcopy(encoder.rotary_emb), device="cpu", dtype=torch.float32)
        cosine, sine = rotary(torch.zeros(1), torch.arange(tokens)[None])
        self.register_buffer("cosine", cosine)
        self.register_buffer("sine", sine)
        twin: Any = self.twin
        for layer in twin["layers"]:
            _repeat_shared_heads(layer.self_attn)

    @staticmethod
    def layers_of(encoder: Any) -> nn.ModuleList:
        layers: nn.ModuleList = encoder.layers
        return layers

    def compute(self, *inputs: Tensor) -> Tensor:
        hidden, bias = inputs
        twin: Any = self.twin
        for layer in twin["layers"]:
            hidden = layer(hidden, attention_mask=bias, position_embeddings=(self.cosine, self.sine))
        return cast(Tensor, twin["norm"](hidden)) if self.is_last else hidden


class _T5(TextStage):
    def __init__(self, encoder: Any, tokens: int, first: int, last: int, inputs: Sequence[str]) -> None:
        stack = encoder.encoder
        around = {"norm": stack.final_layer_norm} if last == len(stack.block) else {}
        super().__init__(encoder, first, last, around, inputs)
        positions = stack.block[0].layer[0].SelfAttention.compute_bias(tokens, tokens)
        self.register_buffer("positions", positions.float().cpu())

    @staticmethod
    def layers_of(encoder: Any) -> nn.ModuleList:
        layers: nn.ModuleList = encoder.encoder.block
        return layers

    def compute(self, *inputs: Tensor) -> Tensor:
        twin: Any = self.twin
        hidden, bias = inputs[0], cast(Tensor, self.positions)
        if len(inputs) > 1:
            bias = bias + inputs[1]
        for block in twin["layers"]:
            hidden = block.layer[-1](block.layer[0](hidden, position_bias=bias)[0])
        return cast(Tensor, twin["norm"](hidden)) if self.is_last else hidden


class _CLIP(TextStage):
    """At the end: the last layer but one's tokens, where it projects, then the text's one vector as another token."""

    def __init__(self, encoder: Any, tokens: int, first: int, last: int, inputs: Sequence[str]) -> None:
        model = getattr(encoder, "text_model", encoder)
        around = {}
        if last == len(model.encoder.layers):
            around["norm"] = model.final_layer_norm
            if hasattr(encoder, "text_projection"):
                around["projection"] = encoder.text_projection
        super().__init__(encoder, first, last, around, inputs)
        self.is_first = first == 0
        positions = model.embeddings.position_embedding.weight[:tokens].detach().float().cpu()
        self.register_buffer("positions", positions.clone()[None])
        self.register_buffer("bias", ENCODER_MASK_BIAS * (1 - torch.ones(1, 1, tokens, tokens).tril()))

    @staticmethod
    def layers_of(encoder: Any) -> nn.ModuleList:
        layers: nn.ModuleList = getattr(encoder, "text_model", encoder).encoder.layers
        return layers

    def compute(self, *inputs: Tensor) -> Tensor:
        twin: Any = self.twin
        hidden = inputs[0] + cast(Tensor, self.positions) if self.is_first else inputs[0]
        before = hidden
        for layer in twin["layers"]:
            before, hidden = hidden, layer(hidden, self.bias)
        if not self.is_last:
            return hidden
        # the hidden state is the first operand: the HTP keeps the second at 8 bits, which hold 0 and 1 exactly
        pooled = (twin["norm"](hidden).transpose(1, 2) @ inputs[1]).transpose(1, 2)
        return torch.cat([before, twin["projection"](pooled)], dim=1) if "projection" in twin else pooled


def _one_op_norms_and_gelus(module: nn.Module) -> None:
    """RMS norms and tanh GELUs that transformers spells out, as the torch modules that export as one op."""
    child: Any
    for name, child in module.named_children():
        kind = type(child).__name__
        if kind in ("Gemma2RMSNorm", "T5LayerNorm"):
            gemma = kind == "Gemma2RMSNorm"
            norm = nn.RMSNorm(child.weight.shape[0], eps=child.eps if gemma else child.variance_epsilon)
            norm.weight = nn.Parameter(child.weight.detach() + (1 if gemma else 0), requires_grad=False)
            setattr(module, name, norm)
        elif kind in ("NewGELUActivation", "GELUTanh"):
            setattr(module, name, nn.GELU(approximate="tanh"))
        else:
            _one_op_norms_and_gelus(child)


def _repeat_shared_heads(attention: Any) -> None:
    """Store keys and values once a query head: repeating them in the graph would need 5-D tensors."""
    groups = attention.num_key_value_groups

    def repeated(rows: Tensor) -> Tensor:
        heads = rows.unflatten(0, (-1, attention.head_dim))
        return heads.repeat_interleave(groups, dim=0).flatten(0, 1)

    for layer in (attention.k_proj, attention.v_proj):
        if layer.bias is not None:
            raise ExportError("a Gemma 2 with attention_bias cannot be exported")
        name = "weight_packed" if isinstance(layer, PackedLayer) else "weight"
        setattr(layer, name, nn.Parameter(repeated(getattr(layer, name)), requires_grad=False))
        if isinstance(layer, PackedLayer):
            layer.weight_scale = repeated(layer.weight_scale)
        layer.out_features *= groups
    attention.num_key_value_groups = 1


#: Encoder class -> its `TextStage`, made of the encoder, how many tokens, the first and last layer, names of inputs.
GRAPHS: dict[str, Any] = {
    "Gemma2Model": _Gemma2,
    "T5EncoderModel": _T5,
    "CLIPTextModel": _CLIP,
    "CLIPTextModelWithProjection": _CLIP,
}


def _layer_weights(layer: nn.Module) -> int:
    """How many weights a layer has, packed or not."""
    packed = list(dict(named_layers(layer, PackedLayer)).values())
    inside = {id(parameter) for each in packed for parameter in each.parameters()}
    rest = sum(each.numel() for each in layer.parameters() if id(each) not in inside)
    return rest + sum(each.in_features * each.out_features for each in packed)


def _stages(name: str, layers: Sequence[nn.Module]) -> dict[str, tuple[int, int]]:
    """`TextEncoder.stages`, as few as `MOST_WEIGHTS` allows, of about as many layers; one alone has the name itself."""
    graphs = math.ceil(len(layers) / max(1, MOST_WEIGHTS // max(map(_layer_weights, layers))))
    if graphs == 1:
        return {name: (0, len(layers))}
    edges = [len(layers) * place // graphs for place in range(graphs + 1)]
    return {f"{name}-{place}": edge for place, edge in enumerate(itertools.pairwise(edges))}


def graphs_of(encoder: Any) -> int:
    """In how many graphs a text encoder is exported; 1 of a class that has none."""
    kind = GRAPHS.get(type(encoder).__name__)
    return len(_stages("", list(kind.layers_of(encoder)))) if kind else 1


def wrap_text_encoder(name: str, encoder: Any, tokens: int, masked: bool, folder: Path) -> TextEncoder:
    """The graphs of one of a pipeline's text encoders; `encoder` itself is not changed.

    Args:
        name: of the component.
        tokens: how many, padding included.
        masked: whether the pipeline tells the encoder the padding.
        folder: for the table.

    Raises:
        ExportError: a class or an option that has no graph.
    """
    kind = type(encoder).__name__
    if kind not in GRAPHS:
        raise ExportError(f"no HTP export for the text encoder {kind}; there is one for: {', '.join(sorted(GRAPHS))}")
    end: int | str | None = None
    if kind.startswith("CLIP"):
        config = encoder.config
        if masked or (kind.endswith("WithProjection") and config.projection_dim != config.hidden_size):
            raise ExportError(f"{kind} with a mask, or a projection to another width, cannot be exported")
        end = "highest" if config.eos_token_id == 2 else int(config.eos_token_id)  # as transformers pools
    bias = "causal" if kind == "Gemma2Model" else "padding" if masked else None
    if kind == "Gemma2Model" and tokens > encoder.config.sliding_window:
        window = encoder.config.sliding_window
        raise ExportError(f"{tokens} tokens are more than the sliding window of {window}")
    layers = GRAPHS[kind].layers_of(encoder)
    table = _write_table(encoder.get_input_embeddings(), folder / f"embedding.{name}.safetensors")
    described = {"bias": bias, "mask_bias": ENCODER_MASK_BIAS, "end": end}

    def host_inputs(item: Item) -> dict[str, Tensor]:
        ids, mask = (item[key].reshape(-1).numpy() for key in ("input_ids", "attention_mask"))
        with safe_open(table, "np") as file:
            feed = encoder_feed(described, file.get_slice("embedding"), ids, mask)
        return {key: torch.from_numpy(value) for key, value in feed.items()}

    def stage(first: int, last: int) -> TextStage:
        told = ["encoder_bias"] if bias else []
        if end is not None and last == len(layers):
            told.append("end")
        with torch.no_grad():
            return GRAPHS[kind](encoder, tokens, first, last, told).eval()

    return TextEncoder(
        name=name,
        stages=_stages(name, list(layers)),
        stage=stage,
        host_inputs=host_inputs,
        table=table,
        bias=bias,
        end=end,
    )


@torch.no_grad()
def _write_table(embed: Any, path: Path) -> Path:
    """What an embedding layer makes of each token, in a file as `TextEncoder.table`; a part at a time is in memory."""
    device = next(embed.parameters(), torch.zeros(0)).device
    parts = torch.arange(embed.num_embeddings, device=device).split(_TOKENS)
    largest = max(float(embed(part).abs().amax()) for part in parts)
    dtype = torch.float16 if largest <= torch.finfo(torch.float16).max else torch.float32
    table = torch.empty(embed.num_embeddings, embed.embedding_dim, dtype=dtype)
    for part in parts:
        table[part.cpu()] = embed(part).cpu().to(dtype)
    save_file({"embedding": table}, path)
    return path


@contextmanager
def recorded_tokens(pipeline: Any) -> Iterator[dict[str, list[tuple[np.ndarray, bool]]]]:
    """Within the block, what each text encoder of `pipeline` is given: rows of token ids, and whether with a mask.

    Each computes the same text once: what a guided pipeline encodes beside every prompt, say.
    """
    found: dict[str, list[tuple[np.ndarray, bool]]] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(_module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            ids = positional[0] if positional else keywords["input_ids"]
            masked = keywords.get("attention_mask") is not None
            found.setdefault(name, []).extend((row, masked) for row in ids.cpu().numpy())

        return keep

    with ExitStack() as stack:
        for name in COMPONENTS:
            if getattr(pipeline, name, None) is not None:
                module = getattr(pipeline, name)
                stack.callback(module.register_forward_pre_hook(hook(name), with_kwargs=True).remove)
                stack.enter_context(remembering(module, "forward"))
        yield found
