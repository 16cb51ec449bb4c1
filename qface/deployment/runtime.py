"""An ONNX file as a function from images to embeddings.

x86 processors without VNNI add two products of bytes in 16 bits, where weights of 8 bits saturate; those of 7 or fewer
cannot. Such a file says that it has them, and is run in onnxruntime's mode that is exact, and slower, there. Other
processors ignore it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qface.deployment.inputs import FLOAT_INPUT, UINT8_INPUT
from qface.errors import CheckpointError, ConfigError, QFaceError, one_line
from qface.preprocessing import Preprocessing, written_preprocessing

__all__ = ["WEIGHT_BITS", "OnnxEmbedder", "cpu_session"]

WEIGHT_BITS = "weight_bits"  # the metadata's key for the most bits of weights that are multiplied

_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_INPUTS = {"tensor(float)": FLOAT_INPUT, "tensor(uint8)": UINT8_INPUT}
_WARNING, _ERROR, _FATAL = 2, 3, 4


class OnnxEmbedder:
    """A face-recognition network in an ONNX file, run by onnxruntime.

    Args:
        path: the file; its metadata may hold the :class:`Preprocessing` as JSON under ``preprocessing``.
        providers: onnxruntime's execution providers in order of preference; by default CUDA where it works,
            else the CPU.
        threads: threads inside an operation; by default onnxruntime's choice.

    Attributes:
        path: the file.
        preprocessing: what the network wants to see; the default where the file does not tell.
        input: what the file reads, one of :data:`qface.deployment.inputs.INPUTS`: normalized floats, or RGB bytes.
        target: the processor that it is written for, ``"cpu"`` where the file does not tell.
        provider: the execution provider that is really used.
        runtime: the same in words, for reports.

    Raises:
        CheckpointError: the file is missing or damaged, or is no network from images to embeddings.
        ConfigError: a provider is unknown to the installed onnxruntime.
    """

    def __init__(self, path: str | Path, providers: Sequence[str] | None = None, threads: int | None = None) -> None:
        self.path = Path(path)
        self._session = _open(self.path, providers, threads)
        self._name, self.input, self._batch = _image_input(self.path, self._session)
        metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        self.preprocessing = _preprocessing(self.path, metadata)
        self.target = metadata.get("target", "cpu")
        self.provider: str = self._session.get_providers()[0]
        self.runtime = f"onnxruntime {self.provider}"
        self._check_size()

    def __call__(self, batch: Tensor) -> Tensor:
        """Embed ``batch`` to float32 [N, D] on the CPU.

        A network with a fixed batch size gets pieces of that size, the last one filled up with zeros.

        Args:
            batch: [N, 3, height, width], normalized floats or RGB bytes of this size. Whichever the file does not read
                becomes what it reads: bytes are normalized, and floats are rounded to bytes.

        Raises:
            QFaceError: the network does not take images of this size.
        """
        images = self._as_read(batch.detach().cpu())
        if self._batch is None:
            return self._run(images)
        pieces = torch.split(images, self._batch)
        return torch.cat([self._run(_filled(piece, self._batch))[: len(piece)] for piece in pieces])

    def _as_read(self, images: Tensor) -> Tensor:
        if self.input == UINT8_INPUT:
            return images if images.dtype == torch.uint8 else self.preprocessing.to_bytes(images.float())
        return self.preprocessing.normalize(images) if images.dtype == torch.uint8 else images.float()

    def _run(self, images: Tensor) -> Tensor:
        try:
            outputs = self._session.run(None, {self._name: images.contiguous().numpy()})
        except Exception as error:  # onnxruntime's errors share no base class
            raise QFaceError(f"{self.path} cannot embed images {list(images.shape)}: {one_line(error)}") from error
        return torch.from_numpy(outputs[0]).float()

    def _check_size(self) -> None:
        wanted = tuple(self._session.get_inputs()[0].shape[2:])
        given = self.preprocessing.size
        if any(isinstance(w, int) and w != g for w, g in zip(wanted, given, strict=True)):
            raise CheckpointError(
                f"{self.path} reads images of {wanted[0]}x{wanted[1]}, but its preprocessing gives "
                f"{given[0]}x{given[1]}: write the preprocessing into the file's metadata"
            )


def _onnxruntime() -> Any:
    # Imported late, because it costs half a second; by name, because it carries no types.
    return import_module("onnxruntime")


def _open(path: Path, providers: Sequence[str] | None, threads: int | None) -> Any:
    """An ``onnxruntime.InferenceSession``."""
    if not os.path.isfile(path):
        raise CheckpointError(f"the model {path} does not exist: pass an ONNX file")
    options = _options()
    if threads is not None:
        options.intra_op_num_threads = threads
    chosen = _default_providers() if providers is None else _known(providers)
    try:
        # Whoever asks for a GPU by name should read why it does not work.
        with _silenced() if providers is None else nullcontext():
            return _exact_session(path, options, chosen)
    except Exception as error:
        raise CheckpointError(
            f"onnxruntime cannot open {path}: {one_line(error)}; restore the file or export it again"
        ) from error


def cpu_session(model: bytes) -> Any:
    """An ``onnxruntime.InferenceSession`` for a serialized model, on the CPU, optimized as for any user."""
    return _exact_session(model, _options(), [_CPU])


def _options() -> Any:
    options = _onnxruntime().SessionOptions()
    options.log_severity_level = _ERROR
    return options


def _exact_session(model: Path | bytes, options: Any, providers: list[str]) -> Any:
    """One that does not saturate. What a file needs is known once it is open; few need another one."""
    session = _onnxruntime().InferenceSession(model, options, providers=providers)
    if session.get_modelmeta().custom_metadata_map.get(WEIGHT_BITS) != "8":
        return session
    options.add_session_config_entry("session.x64quantprecision", "1")
    return _onnxruntime().InferenceSession(model, options, providers=providers)


def _known(providers: Sequence[str]) -> list[str]:
    """``providers`` as they are; onnxruntime itself would replace an unknown one by the CPU."""
    available = _onnxruntime().get_available_providers()
    for provider in providers:
        if provider not in available:
            raise ConfigError(f"onnxruntime has no {provider} here: use one of {', '.join(available)}")
    return list(providers)


def _default_providers() -> list[str]:
    # Listed means compiled in, not usable: the session itself falls back to the CPU.
    return [_CUDA, _CPU] if _CUDA in _onnxruntime().get_available_providers() else [_CPU]


@contextmanager
def _silenced() -> Iterator[None]:
    """Hide the complaints about a missing GPU; they go to the process-wide logger, which has no getter."""
    _onnxruntime().set_default_logger_severity(_FATAL)
    try:
        yield
    finally:
        _onnxruntime().set_default_logger_severity(_WARNING)


def _image_input(path: Path, session: Any) -> tuple[str, str, int | None]:
    """Name of the only input, what it reads, and its batch size where that is fixed."""
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type not in _INPUTS or len(inputs[0].shape) != 4:
        found = ", ".join(f"{node.name}: {node.type} {node.shape}" for node in inputs)
        raise CheckpointError(
            f"{path} reads ({found}): pass a network with one float or uint8 input [batch, 3, height, width]"
        )
    batch = inputs[0].shape[0]
    return inputs[0].name, _INPUTS[inputs[0].type], batch if isinstance(batch, int) else None


def _preprocessing(path: Path, metadata: dict[str, str]) -> Preprocessing:
    record = metadata.get("preprocessing")
    return Preprocessing() if record is None else written_preprocessing(record, path)


def _filled(piece: Tensor, length: int) -> Tensor:
    return F.pad(piece, (0, 0) * (piece.ndim - 1) + (0, length - len(piece)))
