"""fbqat_hub: 4-bit diffusion models by fractional-bit quantization-aware training (FB-QAT).

Importing this package registers ``quant_method: fbqat`` in diffusers, so that
``DiffusionPipeline.from_pretrained`` loads packed checkpoints. It does nothing else.
"""

from fbqat_hub.config import FBQATConfig
from fbqat_hub.integrations.diffusers import register as _register_diffusers
from fbqat_hub.version import __version__

_register_diffusers()

__all__ = ["FBQATConfig", "__version__"]
