"""Registers this package's quantizers in other libraries when those are imported, and not before.

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

# module that holds a library's tables -> module of ours whose ``register()`` enters the quantizer there
REGISTRARS = {"diffusers.quantizers.auto": "fbqat_hub.integrations.diffusers"}

_OWN = "fbqat_hub."
_registered: set[str] = set()


def register(executed: str = "") -> None:
    """Register in each library that is imported already; in the others when they will be. Safe to call again.

    Args:
        executed: name of the module that was executed just now, though its import has not ended yet.
    """
    if not any(isinstance(finder, _Registration) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Registration())
    for table, registrar in REGISTRARS.items():
        if table in _registered or table not in sys.modules or _unfinished(table, executed):
            continue
        _registered.add(table)
        importlib.import_module(registrar).register()


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
