"""Text encoders as graphs the HTP can run: Gemma 2, T5's encoder and CLIP's text model. No transformers import.

Tokens become embeddings on the host (a table of a quarter million rows is no work for the HTP), and so do masks. What
differs from transformers' forward, none of it in exact arithmetic beyond float rounding: RMS norms and the tanh form of
GELU are one op each, keys and values shared by query heads are stored once a head, positions are constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fbqat_hub.export.bundle.runtime.text import encoder_feed
from fbqat_hub.export.errors import ExportError
from fbqat_hub.families.graph import GraphWrapper, TwinModule, float_twin

#: Text encoder -> its tokenizer, as diffusers' pipelines name them.
COMPONENTS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}

#: Added to a text encoder's attention score of a token that is not to be seen. Its scores go further apart than a
#: denoiser's (`families.graph.MASK_BIAS`): Gemma's up to 50 from 0.
ENCODER_MASK_BIAS = -100.0


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """One text encoder of a pipeline, for the shape and use its pipeline makes of it.

    Attributes:
        name: of the component, and of its graph.
        wrapper: its graph: the inputs of `runtime.text.encoder_feed` -> `tokens`, what `denoiser_inputs` takes.
        table: token embeddings [vocabulary, D], of the encoder's own dtype.
        bias, end: as in the manifest: None, "padding" or "causal"; None, the end token's id, or "highest".
    """

    name: str
    wrapper: GraphWrapper
    table: Tensor
    bias: str | None
    end: int | str | None


class _Gemma2(TwinModule):
    def __init__(self, twin: Any, tokens: int) -> None:
        super().__init__(twin)
        cosine, sine = twin.rotary_emb(torch.zeros(1), torch.arange(tokens)[None])
        self.register_buffer("cosine", cosine)
        self.register_buffer("sine", sine)

    def compute(self, *inputs: Tensor) -> Tensor:
        hidden, bias = inputs
        twin: Any = self.twin
        for layer in twin.layers:
            hidden = layer(hidden, attention_mask=bias, position_embeddings=(self.cosine, self.sine))
        output: Tensor = twin.norm(hidden)
        return output


class _T5(TwinModule):
    def __init__(self, twin: Any, tokens: int) -> None:
        super().__init__(twin)
        self.register_buffer("positions", twin.block[0].layer[0].SelfAttention.compute_bias(tokens, tokens))

    def compute(self, *inputs: Tensor) -> Tensor:
        twin: Any = self.twin
        hidden, bias = inputs[0], cast(Tensor, self.positions)
        if len(inputs) > 1:
            bias = bias + inputs[1]
        for block in twin.block:
            hidden = block.layer[-1](block.layer[0](hidden, position_bias=bias)[0])
        output: Tensor = twin.final_layer_norm(hidden)
        return output


class _CLIP(TwinModule):
    """The last layer but one's tokens, where `hidden`, then the text's one projected vector as another token."""

    def __init__(self, twin: Any, tokens: int, hidden: bool) -> None:
        super().__init__(twin)
        self.hidden = hidden
        model = getattr(twin, "text_model", twin)
        self.register_buffer("positions", model.embeddings.position_embedding.weight[:tokens].clone()[None])
        self.register_buffer("bias", ENCODER_MASK_BIAS * (1 - torch.ones(1, 1, tokens, tokens).tril()))

    def compute(self, *inputs: Tensor) -> Tensor:
        embeddings, end = inputs
        twin: Any = self.twin
        model = getattr(twin, "text_model", twin)
        hidden = before = embeddings + cast(Tensor, self.positions)
        for layer in model.encoder.layers:
            before, hidden = hidden, layer(hidden, self.bias)
        # the hidden state is the first operand: the HTP keeps the second at 8 bits, which hold 0 and 1 exactly
        pooled = (model.final_layer_norm(hidden).transpose(1, 2) @ end).transpose(1, 2)
        if hasattr(twin, "text_projection"):
            pooled = twin.text_projection(pooled)
        return torch.cat([before, pooled], dim=1) if self.hidden else pooled


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
    for layer in (attention.k_proj, attention.v_proj):
        heads = layer.weight.reshape(-1, attention.head_dim, layer.weight.shape[1])
        rows = heads.repeat_interleave(attention.num_key_value_groups, dim=0).flatten(0, 1)
        layer.weight = nn.Parameter(rows, requires_grad=False)
        if layer.bias is not None:
            raise ExportError("a Gemma 2 with attention_bias cannot be exported")
    attention.num_key_value_groups = 1


def _gemma2(twin: Any, tokens: int) -> TwinModule:
    if tokens > twin.config.sliding_window:
        raise ExportError(f"{tokens} tokens are more than the sliding window of {twin.config.sliding_window}")
    for layer in twin.layers:
        _repeat_shared_heads(layer.self_attn)
    return _Gemma2(twin, tokens)


#: Encoder class -> its graph, of its twin and the number of tokens.
GRAPHS: dict[str, Callable[[Any, int], TwinModule]] = {
    "Gemma2Model": _gemma2,
    "T5EncoderModel": lambda twin, tokens: _T5(twin.encoder, tokens),
    "CLIPTextModel": lambda twin, tokens: _CLIP(twin, tokens, hidden=False),
    "CLIPTextModelWithProjection": lambda twin, tokens: _CLIP(twin, tokens, hidden=True),
}


def wrap_text_encoder(name: str, encoder: Any, tokens: int, masked: bool) -> TextEncoder:
    """The graph of one of a pipeline's text encoders; `encoder` itself is not changed.

    Args:
        name: of the component.
        tokens: how many, padding included.
        masked: whether the pipeline tells the encoder the padding.

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
    with torch.no_grad():
        embed = encoder.get_input_embeddings()
        table = embed(torch.arange(embed.num_embeddings, device=embed.weight.device)).detach().cpu()
        twin: Any = float_twin(encoder)
        for module in twin.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation = "eager"
        _one_op_norms_and_gelus(twin)
        graph = GRAPHS[kind](twin, tokens)
    described = {"bias": bias, "mask_bias": ENCODER_MASK_BIAS, "end": end}
    values = table.float().numpy()

    def host_inputs(item: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ids, mask = (item[key].reshape(-1).numpy() for key in ("input_ids", "attention_mask"))
        return {key: torch.from_numpy(value) for key, value in encoder_feed(described, values, ids, mask).items()}

    return TextEncoder(
        name=name,
        wrapper=GraphWrapper(module=graph.eval(), host_inputs=host_inputs, output_name="tokens"),
        table=table.float() if table.dtype is torch.bfloat16 else table,
        bias=bias,
        end=end,
    )


@contextmanager
def recorded_tokens(pipeline: Any) -> Iterator[dict[str, list[tuple[np.ndarray, bool]]]]:
    """Within the block, what each text encoder of `pipeline` is given: rows of token ids, and whether with a mask."""
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
        yield found
