"""Quantize with NNCF to an OpenVINO model of 8 bits."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from task import Array, Task, latency_ratio

os.environ.setdefault("NNCF_CI", "1")  # turns off telemetry
import nncf
import openvino

OPTIONS = {
    "PERFORMANCE_HINT": "LATENCY",
    "INFERENCE_PRECISION_HINT": "f32",
    "INFERENCE_NUM_THREADS": 1,
    "ENABLE_CPU_PINNING": False,
}


def main() -> None:
    """Quantize, embed and time."""
    nncf.set_log_level(logging.ERROR)
    task = Task()
    with task.timing():
        model = quantize(task)
        file = task.folder / "model.xml"
        openvino.save_model(model, file)
    image = task.calibration[:1]
    one, teacher = embedder(file, image.shape), embedder(task.teacher, image.shape)
    ratio = latency_ratio(lambda: one(image), lambda: teacher(image), task.settings["runs"])
    files = [file, file.with_suffix(".bin")]
    versions = {"nncf": nncf.__version__, "openvino": openvino.__version__.split("-")[0]}
    task.finish(one, versions, batch_size=1, files=files, latency_ratio=ratio)


def quantize(task: Task) -> Any:
    """Return the quantized OpenVINO model."""
    images = [image[None] for image in task.calibration]
    return nncf.quantize(
        openvino.Core().read_model(task.teacher),
        nncf.Dataset(images),
        preset=nncf.QuantizationPreset(task.settings["preset"]),
        fast_bias_correction=task.settings["fast_bias_correction"],
        subset_size=len(images),
    )


def embedder(file: Path, shape: tuple[int, ...]) -> Callable[[Array], Array]:
    """Return a file as a function from images of this shape to embeddings, on one thread."""
    core = openvino.Core()
    model = core.read_model(file)
    model.reshape(list(shape))
    request = core.compile_model(model, "CPU", OPTIONS).create_infer_request()

    def embed(images: Array) -> Array:
        return np.array(request.infer([images])[0])  # a copy: OpenVINO overwrites its result

    return embed


if __name__ == "__main__":
    main()
