"""Exported files in OpenVINO, an optional dependency (extra ``qface[bench]``)."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qface.deployment.runtime import OnnxEmbedder
from qface.errors import CheckpointError, DependencyError, QFaceError, one_line
from qface.network_output import as_rows
from qface.preprocessing import PreprocessingOverride

__all__ = ["OpenVinoEmbedder"]


class OpenVinoEmbedder(OnnxEmbedder):
    """A face-recognition network in an ONNX file, run by OpenVINO on the CPU.

    Float operators compute in float32, also on processors with bf16.

    Args:
        path: path of the file; onnxruntime reads its inputs and outputs.
        threads: number of threads. None: OpenVINO's default.
        preprocessing: as in :class:`OnnxEmbedder`.

    Raises:
        DependencyError: OpenVINO is not installed.
        CheckpointError: OpenVINO cannot open the file, or as in :class:`OnnxEmbedder`.
    """

    def __init__(
        self, path: str | Path, threads: int | None = None, preprocessing: PreprocessingOverride | None = None
    ) -> None:
        openvino = _openvino()
        super().__init__(path, ["CPUExecutionProvider"], threads, preprocessing)
        self._compiled = _compile(openvino, self.path, threads)
        self.provider = "CPU"
        self.runtime = f"OpenVINO {openvino.__version__.split('-')[0]} CPU"

    def _run(self, images: Tensor) -> Tensor:
        try:
            outputs = self._compiled(images.contiguous().numpy())
        except RuntimeError as error:  # the only error type of OpenVINO
            raise QFaceError(f"{self.path} cannot embed images {list(images.shape)}: {one_line(error)}") from error
        # A copy, because OpenVINO overwrites its result in the next call.
        return as_rows(torch.tensor(outputs[self._compiled.output(self._output)]).float())


def _openvino() -> Any:
    try:
        return import_module("openvino")
    except ImportError as error:
        raise DependencyError("OpenVINO is not installed: pip install 'qface[bench]'") from error


def _compile(openvino: Any, path: Path, threads: int | None) -> Any:
    """Compile the file to an ``openvino.CompiledModel``."""
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    try:
        return openvino.Core().compile_model(str(path), "CPU", options)
    except RuntimeError as error:
        raise CheckpointError(
            f"OpenVINO cannot open {path} ({one_line(error)}); restore the file or export it again"
        ) from error
