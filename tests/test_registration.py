"""`import fbqat_hub` is light, and diffusers knows the format whichever of the two is imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import subprocess_environment

KNOWN = "from diffusers.quantizers import auto; assert 'fbqat' in auto.AUTO_QUANTIZER_MAPPING, 'not registered'"


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=subprocess_environment(), capture_output=True, text=True, check=False
    )


def test_import_needs_neither_torch_nor_diffusers() -> None:
    heavy = ("torch", "diffusers", "transformers", "accelerate", "numpy", "huggingface_hub")
    done = run(f"import sys, fbqat_hub; print([name for name in {heavy!r} if name in sys.modules])")
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize(
    "code",
    [
        f"import fbqat_hub; {KNOWN}",
        f"{KNOWN.split(';')[0]}; import fbqat_hub; {KNOWN}",
        f"import fbqat_hub; fbqat_hub.FBQATConfig(); import fbqat_hub.registration as r; r.register(); {KNOWN}",
        f"import fbqat_hub; import diffusers; diffusers.SanaTransformer2DModel; {KNOWN}",
        f"import fbqat_hub.config; {KNOWN}",
        f"import fbqat_hub.integrations.diffusers; {KNOWN}",
    ],
    ids=["ours first", "diffusers first", "registered twice", "through a lazy class", "by config", "by the quantizer"],
)
def test_diffusers_knows_the_format(code: str) -> None:
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    import fbqat_hub

    with pytest.raises(AttributeError, match="no attribute 'FBQATConfi'"):
        fbqat_hub.FBQATConfi  # noqa: B018
