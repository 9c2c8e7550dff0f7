"""fbqat_hub: 4-bit diffusion models by fractional-bit quantization-aware training (FB-QAT).

Importing this package registers ``quant_method: fbqat`` in diffusers, so that
``DiffusionPipeline.from_pretrained`` loads packed checkpoints. It does nothing else, and imports neither torch nor
diffusers before they are needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fbqat_hub.registration import register as _register
from fbqat_hub.version import __version__

if TYPE_CHECKING:
    from fbqat_hub.config import FBQATConfig
    from fbqat_hub.integrations.optimum import FBQATQuantizer as FBQATQuantizer
    from fbqat_hub.quantization.kernels.memory import set_memory

_register()

__all__ = ["FBQATConfig", "__version__", "set_memory"]  # FBQATQuantizer needs optimum, which may not be there


def __getattr__(name: str) -> Any:
    if name == "FBQATConfig":
        from fbqat_hub.config import FBQATConfig

        return FBQATConfig
    if name == "set_memory":
        from fbqat_hub.quantization.kernels.memory import set_memory

        return set_memory
    if name == "FBQATQuantizer":
        try:
            from fbqat_hub.integrations.optimum import FBQATQuantizer
        except ImportError as error:
            from fbqat_hub.extras import missing

            raise missing(error, "FBQATQuantizer") from error

        return FBQATQuantizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
