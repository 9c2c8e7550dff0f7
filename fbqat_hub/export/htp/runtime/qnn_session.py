"""A session of ONNX Runtime with every node on QNN. Needs numpy and onnxruntime-qnn only; travels with every bundle."""

from __future__ import annotations

from typing import Any

#: QNN's execution provider, as ONNX Runtime calls it.
PROVIDER = "QNNExecutionProvider"


def devices() -> list[Any]:
    """QNN's devices on this machine, the first of which is used; none before the first session."""
    import onnxruntime

    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER]


def qnn_session(model: str, provider_options: dict[str, str], entries: dict[str, str] | None = None) -> Any:
    """An `onnxruntime.InferenceSession` on QNN's HTP backend, or an exception; never a CPU fallback.

    `providers=["QNNExecutionProvider"]` would silently run on the CPU: QNN is a plug-in, so its library is
    registered and its devices are picked by name.

    Args:
        model: path of an ONNX file: a QDQ graph to compile, or one with an EPContext node to load.
        provider_options: of the QNN execution provider; an unknown one is ignored by it without a word.
        entries: of the session's configuration.
    """
    import onnxruntime
    import onnxruntime_qnn

    if not devices():
        onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    if not devices():
        raise RuntimeError("the QNN execution provider registered no device on this machine")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    backend = {"backend_path": onnxruntime_qnn.get_qnn_htp_path()}
    options.add_provider_for_devices(devices()[:1], backend | provider_options)
    made = onnxruntime.InferenceSession(model, sess_options=options)
    made.disable_fallback()  # `run` would otherwise retry elsewhere on failure and hide the first error
    return made
