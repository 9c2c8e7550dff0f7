"""peft: LoRA on packed layers. ``register`` makes peft choose the layers of this file; importing peft calls it.

The base stays packed. ``merge`` (``fuse_lora``) gives it the adapter as one low-rank pair in float beside the codes,
and ``unmerge`` takes the pair away: codes and scales are never touched (docs/decisions.md). peft's other methods (LoKr,
LoHa, ...) compute beside a packed layer as well; their merge writes into the weight, which the layer refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.layer import Conv2d, Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge, onload_layer
from torch import Tensor, nn

from fbqat_hub.integrations.wrapping import around
from fbqat_hub.quantization.logical import READ_ONLY
from fbqat_hub.quantization.packed import PackedLayer, PackedPointwiseConv2d
from fbqat_hub.weights import is_finite


def register() -> None:
    """Make peft's LoRA know packed layers. Safe to call again.

    peft asks a list of dispatchers that it looks up by name at each call; the last of them is wrapped.
    ``LoraConfig._register_custom_module`` would serve only the configurations that a user makes, not diffusers' own.
    """
    around(BaseTuner, "merge_adapter", _merge_adapter)
    around(BaseTuner, "_unload_and_optionally_merge", _unload)
    original = lora_model.dispatch_default
    if getattr(original, "knows_packed", False):
        return

    def dispatch_default(
        target: nn.Module, adapter_name: str, config: Any, parameter_name: str | None = None, **kwargs: Any
    ) -> nn.Module | None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, PackedLayer):
            made: nn.Module | None = original(
                target, adapter_name, config=config, parameter_name=parameter_name, **kwargs
            )
            return made
        if parameter_name is not None:
            raise ValueError(
                f"target_parameters asks for {parameter_name!r} of a packed layer, which has codes and scales; name "
                "the layer in target_modules."
            )
        kind = PackedLoraConv2d if isinstance(base, PackedPointwiseConv2d) else PackedLoraLinear
        return kind(target, adapter_name, config=config, **kwargs)

    dispatch_default.knows_packed = True  # type: ignore[attr-defined]
    lora_model.dispatch_default = dispatch_default


def check_merge(models: Iterable[nn.Module], adapter_names: list[str] | None, safe_merge: bool) -> None:
    """What ``merge`` of a layer would refuse, before the first of them is merged.

    Args:
        models: nothing is checked if none has packed layers.
        adapter_names: the active ones if None.
        safe_merge: refuse values that are not finite, in layers that were left in float too.

    Raises:
        ValueError: names the adapter.
    """
    modules = [module for model in models for module in model.modules()]
    if not any(isinstance(module, PackedLayer) for module in modules):
        return
    for layer in modules:
        if not isinstance(layer, BaseTunerLayer):
            continue
        held = layer._all_available_adapter_names()
        names = [name for name in check_adapters_to_merge(layer, adapter_names) if name in held]
        with onload_layer(layer):
            for name in names:
                if isinstance(layer, _PackedLora):
                    layer.check_pair(name, safe_merge)
                elif isinstance(layer.get_base_layer(), PackedLayer):
                    raise ValueError(f"adapter {name!r} cannot be fused ({type(layer).__name__}): {READ_ONLY}")
                elif isinstance(layer, LoraLayer) and safe_merge:
                    _refuse_broken(layer, name)


def _merge_adapter(
    original: Callable[..., None], tuner: Any, adapter_names: list[str] | None = None, safe_merge: bool = False
) -> None:
    check_merge([tuner.model], adapter_names, safe_merge)
    original(tuner, adapter_names, safe_merge)


def _unload(
    original: Callable[..., Any],
    tuner: Any,
    merge: bool = True,
    progressbar: bool = False,
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
) -> Any:
    if merge:
        check_merge([tuner.model], adapter_names, safe_merge)
    return original(tuner, merge, progressbar, safe_merge, adapter_names)


def _refuse_broken(layer: Any, name: str) -> None:
    for part in (layer.lora_A, layer.lora_B):
        if name in part and not is_finite(part[name].weight.detach()):
            raise ValueError(f"adapter {name!r} has values that are not finite; it is broken. Nothing was fused.")


class _PackedLora(LoraLayer):
    """Merging beside the codes; the rest is peft's own."""

    base_layer: PackedLayer

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fuse adapters.

        Raises:
            ValueError: an adapter that is no low-rank pair alone (DoRA, ``lora_bias``), or, with ``safe_merge``, one
                with values that are not finite. Nothing is fused then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or () if name in self.lora_A]
        for name in names:
            self.check_pair(name, safe_merge)
        pairs = [self._pair(name) for name in names]
        if not pairs:
            return
        base = self.base_layer
        if not self.merged:  # what was fused before this layer was there stays
            self._rank_before = 0 if base.delta_down is None else len(base.delta_down)
        downs = [down for down, _ in pairs] if base.delta_down is None else [base.delta_down, *(d for d, _ in pairs)]
        ups = [up for _, up in pairs] if base.delta_up is None else [base.delta_up, *(up for _, up in pairs)]
        base.delta_down, base.delta_up = torch.cat(downs), torch.cat(ups, dim=1)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Take away what ``merge`` fused. Codes, scales and outputs are then what they were, to the bit."""
        if not self.merged:
            return
        base, rank = self.base_layer, self._rank_before
        assert base.delta_down is not None
        assert base.delta_up is not None
        base.delta_down = base.delta_down[:rank].clone() if rank else None
        base.delta_up = base.delta_up[:, :rank].clone() if rank else None
        self.merged_adapters.clear()

    def check_pair(self, name: str, finite: bool) -> None:
        """Raise ValueError for an adapter that ``merge`` does not take; ``finite``: also for NaN and infinity."""
        if name in self.lora_variant or self.lora_bias.get(name):
            what = type(self.lora_variant[name]).__name__ if name in self.lora_variant else "lora_bias"
            raise ValueError(
                f"adapter {name!r} ({what}) changes more than a low-rank pair, and cannot be fused into a packed "
                "layer; use it unfused, which gives the same picture."
            )
        if finite:
            _refuse_broken(self, name)

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        """[rank, in] and [out, rank], the scaling in the second."""
        down, up = (part[name].weight.detach().flatten(1) for part in (self.lora_A, self.lora_B))
        return down.clone(), up * self.scaling[name]


class PackedLoraLinear(_PackedLora, Linear):
    """LoRA beside a packed linear layer."""


class PackedLoraConv2d(_PackedLora, Conv2d):
    """LoRA beside a packed 1x1 convolution; its own two layers are such convolutions in float, as peft has them."""

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # peft makes the two layers by the class of the base, which is packed; so those of a linear layer are reshaped
        LoraLayer.update_layer(self, adapter_name, *args, **kwargs)
        for part in (self.lora_A, self.lora_B):
            linear = part[adapter_name]
            layer = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=False, device="meta")
            weight = linear.weight
            layer.weight = nn.Parameter(weight.detach()[:, :, None, None], requires_grad=weight.requires_grad)
            layer.bias = linear.bias
            part[adapter_name] = layer
