"""Quantize with ``onnxruntime.quantization.quantize_static`` to QDQ: uint8 activations, int8 weights per channel."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process
from task import Array, Task, latency_ratio

STRIDE = 32
"""Images after which the calibration frees its memory: it keeps every activation of each image until then."""


class Reader(quantization.CalibrationDataReader):
    """Calibration images one by one."""

    def __init__(self, name: str, images: Array) -> None:
        self._name, self._images = name, images
        self.set_range(0, len(images))

    def __len__(self) -> int:
        return len(self._images)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Restrict the next images to this range."""
        self._remaining = iter(self._images[start_index:end_index])

    def get_next(self) -> dict[str, Any] | None:
        """Return the input of the next run, or None after the last image."""
        image = next(self._remaining, None)
        return None if image is None else {self._name: image[None]}


def main() -> None:
    """Quantize, embed and time."""
    logging.disable(logging.WARNING)
    task = Task()
    with task.timing():
        file = quantize(task)
    embed, teacher, image = embedder(file), embedder(task.teacher), task.calibration[:1]
    ratio = latency_ratio(lambda: embed(image), lambda: teacher(image), task.settings["runs"])
    task.finish(embed, {"onnxruntime": onnxruntime.__version__}, files=[file], latency_ratio=ratio)


def quantize(task: Task) -> Path:
    """Write the quantized network and return its path."""
    prepared, file = task.folder / "prepared.onnx", task.folder / "model.onnx"
    quant_pre_process(str(task.teacher), str(prepared))
    name = onnxruntime.InferenceSession(str(prepared)).get_inputs()[0].name
    quantization.quantize_static(
        str(prepared),
        str(file),
        Reader(name, task.calibration),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        calibrate_method=quantization.CalibrationMethod[task.settings["calibrate_method"]],
        extra_options={"CalibStridedMinMax": math.gcd(STRIDE, len(task.calibration))},
    )
    prepared.unlink()
    return file


def embedder(file: Path) -> Callable[[Array], Array]:
    """Return a file as a function from images to embeddings, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def embed(images: Array) -> Array:
        return np.asarray(session.run(None, {name: images})[0])

    return embed


if __name__ == "__main__":
    main()
