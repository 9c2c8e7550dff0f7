"""Registers this package in other libraries when those are imported, and not before.

Importing diffusers takes seconds, so ``import fbqat_hub`` must not do it. diffusers has no entry point for quantizers:
its tables are changed as soon as the module that holds them has been executed. Where a module of this package is what
imports diffusers, that waits until the module is whole, for the quantizer may need it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_DIFFUSERS_MODELS = "fbqat_hub.integrations.diffusers_models"
_DIFFUSERS_ADAPTERS = "fbqat_hub.integrations.diffusers_adapters"
# another library's module -> our module and its function that has to be called once that one has been executed
REGISTRARS = {
    "diffusers.quantizers.auto": ("fbqat_hub.integrations.diffusers", "register"),
    "diffusers.models.modeling_utils": (_DIFFUSERS_MODELS, "register_models"),
    "diffusers.models.attention": (_DIFFUSERS_MODELS, "register_attention"),
    "diffusers.models.attention_processor": (_DIFFUSERS_MODELS, "register_attention_processor"),
    "diffusers.models.transformers.transformer_sd3": (_DIFFUSERS_MODELS, "register_sd3"),
    "diffusers.pipelines.pipeline_utils": (_DIFFUSERS_MODELS, "register_pipelines"),
    "diffusers.loaders.single_file_model": ("fbqat_hub.integrations.diffusers", "register_single_file"),
    "diffusers.loaders.peft": (_DIFFUSERS_ADAPTERS, "register_adapters"),
    "diffusers.loaders.lora_pipeline": (_DIFFUSERS_ADAPTERS, "register_lora_pipelines"),
    "transformers.quantizers": ("fbqat_hub.integrations.transformers", "register"),
    "peft.tuners.lora.model": ("fbqat_hub.integrations.peft", "register"),
}

_OWN = "fbqat_hub."
_registered: set[str] = set()


def register(executed: str = "") -> None:
    """Register in each library that is imported already; in the others when they will be. Safe to call again.

    Args:
        executed: name of the module that was executed just now, though its import has not ended yet.
    """
    if not any(isinstance(finder, _Registration) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Registration())
    for table, (registrar, function) in REGISTRARS.items():
        if table in _registered or table not in sys.modules or _unfinished(table, executed):
            continue
        _registered.add(table)
        getattr(importlib.import_module(registrar), function)()


def _unfinished(table: str, executed: str) -> bool:
    """True while the table's module, or one of this package, is being executed."""
    return any(
        getattr(getattr(module, "__spec__", None), "_initializing", False)
        for name, module in list(sys.modules.items())
        if name != executed and (name == table or name.startswith(_OWN))
    )


class _Registration(MetaPathFinder):
    """Finds modules as the other finders do, and has ``register`` called when one that matters was executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        waiting = REGISTRARS.keys() - _registered
        if not waiting or not (fullname in waiting or fullname.startswith(_OWN)):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for each in others if (found := each.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            _register_after(spec.loader)
        return spec


def _register_after(loader: Loader) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        register(module.__name__)

    loader.exec_module = exec_module  # type: ignore[method-assign]
