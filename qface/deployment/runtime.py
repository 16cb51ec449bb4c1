"""An ONNX file as a function from images to embeddings.

x86 processors without VNNI add two products of bytes in 16 bits, where weights of 8 bits saturate; those of 7 or fewer
cannot. Such a file says that it has them, and is run in onnxruntime's mode that is exact, and slower, there. Other
processors ignore it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qface.deployment.inputs import FLOAT_INPUT, UINT8_INPUT
from qface.errors import CheckpointError, ConfigError, QFaceError, one_line
from qface.files import as_path
from qface.models.onnx_import.image_input import ImageInput, described_input, find_image_input
from qface.models.onnx_import.onnx_file import check_onnx, read_onnx, telling_damage
from qface.network_output import as_rows
from qface.onnxruntime_import import import_onnxruntime
from qface.preprocessing import PreprocessingOverride, written_preprocessing

__all__ = ["WEIGHT_BITS", "OnnxEmbedder", "cpu_session", "providers_for"]

WEIGHT_BITS = "weight_bits"  # the metadata's key for the most bits of weights that are multiplied

_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_INPUTS = {
    "tensor(float)": (FLOAT_INPUT, torch.float32),
    "tensor(float16)": (FLOAT_INPUT, torch.float16),
    "tensor(double)": (FLOAT_INPUT, torch.float64),
    "tensor(uint8)": (UINT8_INPUT, torch.uint8),
}
_OF_OURS = {"qface", "preprocessing", "input"}  # what the metadata of a file hold that says all about its input
_WARNING, _ERROR, _FATAL = 2, 3, 4


class OnnxEmbedder:
    """A face-recognition network in an ONNX file, run by onnxruntime.

    Args:
        path: the file; its metadata may hold the :class:`Preprocessing` as JSON under ``preprocessing``. Where they do
            not, its graph is looked at as :func:`qface.load` does.
        providers: onnxruntime's execution providers in order of preference; by default CUDA where it works,
            else the CPU.
        threads: threads inside an operation; by default onnxruntime's choice.
        preprocessing: what goes into the graph, or some fields of that, where the file does not say or says it wrongly.

    Attributes:
        path: the file.
        preprocessing: what the network reads after the normalization that is in the graph, as of :func:`qface.load`.
        input: what the file reads, one of :data:`qface.deployment.inputs.INPUTS`: normalized floats, or RGB bytes.
        target: what it is written for, as of :func:`qface.export`; ``"cpu"`` where the file does not tell.
        provider: the execution provider that is really used.
        runtime: the same in words, for reports.

    Raises:
        CheckpointError: the file is missing or damaged, or is no network from images to embeddings.
        UnsupportedLayerError: several of its outputs may be the embedding, or none.
        ConfigError: a provider is unknown to the installed onnxruntime, or a field of the preprocessing is wrong.
    """

    def __init__(
        self,
        path: str | Path,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        preprocessing: PreprocessingOverride | None = None,
    ) -> None:
        self.path = as_path(path)
        check_onnx(self.path)  # since onnxruntime computes whatever stands in a file
        self._session = _open(self.path, providers, threads)
        self._name, self.input, dtype, self._batch = _image_input(self.path, self._session)
        metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        if not preprocessing and _OF_OURS.issubset(metadata):
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

        A network with a fixed batch size gets pieces of that size, the last one filled up with zeros.

        Args:
            batch: [N, 3, height, width], floats that are normalized for ``preprocessing``, or RGB bytes of this size.
                Either becomes what the graph takes; for a graph that takes bytes, floats are rounded.

        Raises:
            QFaceError: the network does not take images of this size.
        """
        images = self._as_read(batch.detach().cpu())
        if self._batch is None:
            return self._run(images)
        pieces = torch.split(images, self._batch)
        return torch.cat([self._run(_filled(piece, self._batch))[: len(piece)] for piece in pieces])

    def _as_read(self, images: Tensor) -> Tensor:
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
        if any(isinstance(w, int) and w != g for w, g in zip(wanted, given, strict=True)):
            raise CheckpointError(
                f"{self.path} reads images of {wanted[0]}x{wanted[1]}, but its preprocessing gives "
                f"{given[0]}x{given[1]}: write the preprocessing into the file's metadata"
            )


def _open(path: Path, providers: Sequence[str] | None, threads: int | None) -> Any:
    """An ``onnxruntime.InferenceSession``."""
    options = _options()
    if threads is not None:
        options.intra_op_num_threads = threads
    chosen = _default_providers() if providers is None else _known(providers)
    try:
        # Whoever asks for a GPU by name should read why it does not work.
        with _silenced() if providers is None and _CUDA in chosen else nullcontext():
            return _exact_session(path, options, chosen)
    except Exception as error:
        raise CheckpointError(
            f"onnxruntime cannot open {path}: {one_line(error)}; restore the file or export it again"
        ) from error


def providers_for(target: str) -> list[str] | None:
    """Execution providers on which a file is compared, as :class:`OnnxEmbedder` takes them.

    Args:
        target: of the file; None, the default, is for files for GPUs only.

    Example:
        >>> providers_for("float32")
        ['CPUExecutionProvider']
    """
    return None if target == "cuda" else [_CPU]


def cpu_session(model: bytes) -> Any:
    """An ``onnxruntime.InferenceSession`` for a serialized model, on the CPU, optimized as for any user."""
    return _exact_session(model, _options(), [_CPU])


def _options() -> Any:
    options = import_onnxruntime().SessionOptions()
    options.log_severity_level = _ERROR
    return options


def _exact_session(model: Path | bytes, options: Any, providers: list[str]) -> Any:
    """One that does not saturate. What a file needs is known once it is open; few need another one."""
    session = import_onnxruntime().InferenceSession(model, options, providers=providers)
    if session.get_modelmeta().custom_metadata_map.get(WEIGHT_BITS) != "8":
        return session
    options.add_session_config_entry("session.x64quantprecision", "1")
    return import_onnxruntime().InferenceSession(model, options, providers=providers)


def _known(providers: Sequence[str]) -> list[str]:
    """``providers`` as they are; onnxruntime itself would replace an unknown one by the CPU."""
    available = import_onnxruntime().get_available_providers()
    for provider in providers:
        if provider not in available:
            raise ConfigError(f"onnxruntime has no {provider} here: use one of {', '.join(available)}")
    return list(providers)


def _default_providers() -> list[str]:
    # Listed means compiled in, not usable: the session itself falls back to the CPU.
    return [_CUDA, _CPU] if _CUDA in import_onnxruntime().get_available_providers() else [_CPU]


@contextmanager
def _silenced() -> Iterator[None]:
    """Hide the complaints about a missing GPU; they go to the process-wide logger, which has no getter."""
    import_onnxruntime().set_default_logger_severity(_FATAL)
    try:
        yield
    finally:
        import_onnxruntime().set_default_logger_severity(_WARNING)


def _image_input(path: Path, session: Any) -> tuple[str, str, torch.dtype, int | None]:
    """Name of the only input, what it reads, its type, and its batch size where that is fixed."""
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type not in _INPUTS or len(inputs[0].shape) != 4:
        found = ", ".join(f"{node.name}: {node.type} {node.shape}" for node in inputs)
        raise CheckpointError(
            f"{path} reads ({found}): pass a network with one float or uint8 input [batch, 3, height, width]"
        )
    batch = inputs[0].shape[0]
    kind, dtype = _INPUTS[inputs[0].type]
    return inputs[0].name, kind, dtype, batch if isinstance(batch, int) else None


def _filled(piece: Tensor, length: int) -> Tensor:
    return F.pad(piece, (0, 0) * (piece.ndim - 1) + (0, length - len(piece)))
