"""An exported file run by OpenVINO, which is optional (extra ``qface[bench]``)."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qface.deployment.runtime import OnnxEmbedder
from qface.errors import CheckpointError, DependencyError, QFaceError, one_line
from qface.preprocessing import PreprocessingOverride

__all__ = ["OpenVinoEmbedder"]


class OpenVinoEmbedder(OnnxEmbedder):
    """A face-recognition network in an ONNX file, run by OpenVINO on the CPU.

    What is not computed with integers is computed in float32, also where the processor has bf16.

    Args:
        path: as of :class:`OnnxEmbedder`; onnxruntime reads its interface.
        threads: by default OpenVINO's choice.
        preprocessing: as of :class:`OnnxEmbedder`.

    Raises:
        DependencyError: OpenVINO is not installed.
        CheckpointError: OpenVINO cannot open the file; or as of :class:`OnnxEmbedder`.
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
        except RuntimeError as error:  # as which OpenVINO's own come
            raise QFaceError(f"{self.path} cannot embed images {list(images.shape)}: {one_line(error)}") from error
        # Copied, because OpenVINO overwrites its result in the next call.
        return torch.tensor(outputs[self._compiled.output(self._output)]).float()


def _openvino() -> Any:
    try:
        return import_module("openvino")
    except ImportError as error:
        raise DependencyError("running a file with OpenVINO needs it: pip install 'qface[bench]'") from error


def _compile(openvino: Any, path: Path, threads: int | None) -> Any:
    """An ``openvino.CompiledModel``."""
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    try:
        return openvino.Core().compile_model(str(path), "CPU", options)
    except RuntimeError as error:
        raise CheckpointError(f"OpenVINO cannot open {path}: {one_line(error)}") from error
