"""Embed with the OpenVINO that this Python finds, on the CPU."""

from __future__ import annotations

import openvino
from exchange import Model, serve

OPTIONS = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}


def open_model(path: str, shape: list[int]) -> Model:
    """The file, compiled for one image."""
    core = openvino.Core()
    model = core.read_model(path)
    model.reshape(shape)
    request = core.compile_model(model, "CPU", OPTIONS).create_infer_request()
    return lambda image: request.infer([image])[0].copy()


serve(open_model, openvino.__version__.split("-")[0])
