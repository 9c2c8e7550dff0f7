"""Export of packed models to phones: ONNX QDQ, QNN HTP context binaries, parity certificates.

Importing this package imports neither onnx nor onnxruntime; `export_htp` does, and says what to install.
"""

from fbqat_hub.export.bundle.embeddings import save_embeddings
from fbqat_hub.export.errors import ExportError
from fbqat_hub.export.htp.export import export_htp
from fbqat_hub.export.htp.requirements import HTPUnavailableError, htp_available
from fbqat_hub.export.htp.targets import TARGETS, Target
from fbqat_hub.export.onnx.precision import PRESETS, Precision

__all__ = [
    "PRESETS",
    "TARGETS",
    "ExportError",
    "HTPUnavailableError",
    "Precision",
    "Target",
    "export_htp",
    "htp_available",
    "save_embeddings",
]
