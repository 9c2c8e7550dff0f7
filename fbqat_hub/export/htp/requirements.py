"""The packages that compile for the HTP and emulate it, and what to say where they are missing."""

from __future__ import annotations

import importlib

from fbqat_hub.export.errors import ExportError

#: The versions everything in this package was measured with (a certificate repeats them under `versions`).
HTP_REQUIREMENTS = ("onnx==1.23.2", "onnxscript==0.7.2", "onnxruntime-qnn==2.7.0")


class HTPUnavailableError(ExportError):
    """A package the HTP export needs is not installed (or has no build for this platform)."""

    def __init__(self, missing: str, reason: str = "") -> None:
        """Args: missing: the import name that failed; reason: the loader's own words, if any."""
        wanted = " ".join(f"'{requirement}'" for requirement in HTP_REQUIREMENTS)
        detail = f" ({reason})" if reason else ""
        super().__init__(
            f"the HTP export needs the Python package {missing!r}, which cannot be imported{detail}. "
            f"Install it with: pip install {wanted}  (onnxruntime-qnn has builds for Linux x86-64 and Windows only; "
            "everything else in fbqat_hub works without it)"
        )
        self.missing = missing


def require_htp() -> None:
    """Check that every package the HTP export needs can be imported.

    Raises:
        HTPUnavailableError: the first that cannot, and what to install.
    """
    for name in ("onnx", "onnxscript", "onnxruntime", "onnxruntime_qnn"):
        try:
            importlib.import_module(name)
        except (ImportError, OSError) as error:  # OSError: a library of the wheel does not load on this machine
            raise HTPUnavailableError(name, str(error)) from error


def htp_available() -> bool:
    """True where `require_htp` passes."""
    try:
        require_htp()
    except HTPUnavailableError:
        return False
    return True
