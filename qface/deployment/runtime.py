"""ONNX files as functions from images to embeddings.

x86 processors without VNNI add two uint8 x int8 products in 16 bits; this saturates with 8-bit weights, but not with 7
bits or fewer. Files with 8-bit weights record that in their metadata and run in onnxruntime's exact mode on those
processors. On others that mode changes no result, and takes twice the time with AVX-512 VNNI.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qface.deployment.inputs import FLOAT_INPUT, UINT8_INPUT
from qface.deployment.int8_saturation import int8_saturates
from qface.errors import CheckpointError, ConfigError, QFaceError, one_line
from qface.files import as_path
from qface.models.onnx_import.image_input import ImageInput, described_input, find_image_input
from qface.models.onnx_import.onnx_file import check_onnx, read_onnx, telling_damage
from qface.network_output import as_rows
from qface.onnxruntime_import import import_onnxruntime
from qface.preprocessing import PreprocessingOverride, written_preprocessing

__all__ = ["WEIGHT_BITS", "OnnxEmbedder", "cpu_session", "providers_for"]

WEIGHT_BITS = "weight_bits"  # metadata key for the maximum bits of convolution and linear weights

_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_INPUTS = {
    "tensor(float)": (FLOAT_INPUT, torch.float32),
    "tensor(float16)": (FLOAT_INPUT, torch.float16),
    "tensor(double)": (FLOAT_INPUT, torch.float64),
    "tensor(uint8)": (UINT8_INPUT, torch.uint8),
}
_OWN_KEYS = {"qface", "preprocessing", "input"}  # with these keys, the metadata describe the input completely
_ERROR = 3


class OnnxEmbedder:
    """A face-recognition network in an ONNX file, run by onnxruntime.

    Args:
        path: path of the file; its metadata may hold a :class:`Preprocessing` as JSON under ``preprocessing``. If not,
            it is inferred from the graph as in :func:`qface.load`.
        providers: onnxruntime's execution providers in order of preference. None: CUDA if it is available, else the
            CPU.
        threads: threads within an operator (intra-op). None: onnxruntime's default.
        preprocessing: preprocessing of the graph's input, or some fields of it, for files without a correct one.

    Attributes:
        path: path of the file.
        preprocessing: preprocessing of the network, including a normalization in the graph, as in :func:`qface.load`.
        input: input type, a :data:`qface.choices.InputType`: normalized floats, or RGB bytes.
        target: target of :func:`qface.export`; ``"cpu"`` if the file does not record one.
        provider: execution provider in use.
        runtime: runtime and provider in words, for reports.

    Raises:
        CheckpointError: the file is missing, damaged, or not a network from images to embeddings.
        UnsupportedLayerError: none of its outputs, or more than one, can be the embedding.
        ConfigError: the installed onnxruntime does not have a provider, or a preprocessing field is invalid.
    """

    def __init__(
        self,
        path: str | Path,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        preprocessing: PreprocessingOverride | None = None,
    ) -> None:
        self.path = as_path(path)
        check_onnx(self.path)  # onnxruntime itself does not check a file for damage
        self._session = _open(self.path, providers, threads)
        with telling_damage(self.path):
            self._name, self.input, dtype, self._batch = _image_input(self.path, self._session)
        metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        if not preprocessing and _OWN_KEYS.issubset(metadata):
            written = written_preprocessing(metadata["preprocessing"], self.path)
            self._graph_input: ImageInput = described_input(written, dtype)
            self._output: str = self._session.get_outputs()[0].name
        else:
            file = read_onnx(self.path)
            with telling_damage(self.path):
                self._graph_input, self._output = find_image_input(file, preprocessing), file.output
        self.preprocessing = self._graph_input.preprocessing
        self.target = metadata.get("target", "cpu")
        self.provider: str = self._session.get_providers()[0]
        self.runtime = f"onnxruntime {self.provider}"
        self._check_size()

    def __call__(self, batch: Tensor) -> Tensor:
        """Embed ``batch`` to float32 [N, D] on the CPU.

        A network with a fixed batch size gets batches of that size; the last one is padded with zeros.

        Args:
            batch: [N, 3, height, width], floats normalized with ``preprocessing``, or RGB bytes. Converted to the
                graph's input type; floats are rounded if that is uint8.

        Raises:
            QFaceError: the network does not accept images of this size.
        """
        images = self._to_graph_input(batch.detach().cpu())
        if self._batch is None:
            return self._run(images)
        pieces = torch.split(images, self._batch)
        return torch.cat([self._run(_pad_batch(piece, self._batch))[: len(piece)] for piece in pieces])

    def _to_graph_input(self, images: Tensor) -> Tensor:
        floats = self.preprocessing.normalize(images) if images.dtype == torch.uint8 else images.float()
        return self._graph_input.to_graph(floats)

    def _run(self, images: Tensor) -> Tensor:
        try:
            outputs = self._session.run([self._output], {self._name: images.contiguous().numpy()})
        except Exception as error:  # onnxruntime's errors share no base class
            raise QFaceError(f"{self.path} cannot embed images {list(images.shape)}: {one_line(error)}") from error
        return as_rows(torch.from_numpy(outputs[0]).float())

    def _check_size(self) -> None:
        shape = self._session.get_inputs()[0].shape
        wanted = tuple(shape[1:3] if self._graph_input.channels_last else shape[2:])
        given = self.preprocessing.size
        if any(isinstance(w, int) and 0 < w != g for w, g in zip(wanted, given, strict=True)):
            raise CheckpointError(
                f"the input of {self.path} is {wanted[0]}x{wanted[1]}, but its preprocessing has the size "
                f"{given[0]}x{given[1]}: write the right preprocessing into the file's metadata"
            )


def _open(path: Path, providers: Sequence[str] | None, threads: int | None) -> Any:
    """Open an ``onnxruntime.InferenceSession``."""
    options = _options()
    if threads is not None:
        options.intra_op_num_threads = threads
    chosen = _default_providers() if providers is None else _check_providers(providers)
    try:
        return _exact_session(path, options, chosen)
    except Exception as error:
        raise CheckpointError(
            f"onnxruntime cannot open {path}: {one_line(error)}; restore the file or export it again"
        ) from error


def providers_for(target: str) -> list[str] | None:
    """Return the execution providers for verifying a file, as :class:`OnnxEmbedder` takes them.

    Args:
        target: target of the file; ``"cuda"`` gives None, which prefers CUDA, all others the CPU.

    Example:
        >>> providers_for("float32")
        ['CPUExecutionProvider']
    """
    return None if target == "cuda" else [_CPU]


def cpu_session(model: bytes) -> Any:
    """Open an ``onnxruntime.InferenceSession`` for a serialized model on the CPU, with default settings."""
    return _exact_session(model, _options(), [_CPU])


def _options() -> Any:
    options = import_onnxruntime().SessionOptions()
    options.log_severity_level = _ERROR
    return options


def _exact_session(model: Path | bytes, options: Any, providers: list[str]) -> Any:
    """Open a session, in exact mode if the metadata record 8-bit weights and this processor needs it."""
    session = import_onnxruntime().InferenceSession(model, options, providers=providers)
    if session.get_modelmeta().custom_metadata_map.get(WEIGHT_BITS) != "8" or not int8_saturates():
        return session
    options.add_session_config_entry("session.x64quantprecision", "1")
    return import_onnxruntime().InferenceSession(model, options, providers=providers)


def _check_providers(providers: Sequence[str]) -> list[str]:
    """Return ``providers`` after a check, because onnxruntime silently replaces unknown ones by the CPU."""
    available = import_onnxruntime().get_available_providers()
    for provider in providers:
        if provider not in available:
            raise ConfigError(f"onnxruntime has no {provider} on this machine; use one of {', '.join(available)}")
    return list(providers)


def _default_providers() -> list[str]:
    has_cuda = _CUDA in import_onnxruntime().get_available_providers() and _has_nvidia_gpu()
    return [_CUDA, _CPU] if has_cuda else [_CPU]


@cache
def _has_nvidia_gpu() -> bool:
    """True if the NVIDIA driver finds a GPU; onnxruntime lists its CUDA provider also where there is none."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def _image_input(path: Path, session: Any) -> tuple[str, str, torch.dtype, int | None]:
    """Return the name, kind, dtype and fixed batch size (None if dynamic) of the only input."""
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type not in _INPUTS or len(inputs[0].shape) != 4:
        found = ", ".join(f"{node.name}: {node.type} {node.shape}" for node in inputs)
        raise CheckpointError(
            f"{path} must have one float or uint8 input [batch, 3, height, width], got ({found}): pass another file"
        )
    batch = inputs[0].shape[0]
    kind, dtype = _INPUTS[inputs[0].type]
    return inputs[0].name, kind, dtype, batch if isinstance(batch, int) and batch > 0 else None


def _pad_batch(piece: Tensor, length: int) -> Tensor:
    return F.pad(piece, (0, 0) * (piece.ndim - 1) + (0, length - len(piece)))
