"""Embed with the onnxruntime that this Python finds."""

from __future__ import annotations

import onnxruntime
from exchange import Model, serve


def open_model(path: str, shape: list[int]) -> Model:
    """A session on the CPU that does not saturate, as qface opens files."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    if session.get_modelmeta().custom_metadata_map.get("weight_bits") == "8":
        options.add_session_config_entry("session.x64quantprecision", "1")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image})[0]


serve(open_model, onnxruntime.__version__)
