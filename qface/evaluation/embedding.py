"""Embedding of images by any kind of model; the model is not changed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from qface.checks import check_whole
from qface.data.images import ImageSource, IndexedImages, normalize
from qface.data.prefetch import prefetched
from qface.deployment.runtime import OnnxEmbedder
from qface.errors import ConfigError, ImagesError, QFaceError, one_line
from qface.kept_memory import memory_kept
from qface.memory_format import fastest_memory_format
from qface.models.resolve import NetworkLike, resolve_model
from qface.network_output import embedding_of
from qface.preprocessing import Preprocessing, PreprocessingOverride, dtype_of, preprocessing_of
from qface.progress import shows_progress, track
from qface.shared_context import shared_by_threads
from qface.training_mode import eval_mode

__all__ = ["Embedder", "Embeddings", "Model", "TorchEmbedder", "as_embedder", "embed", "embedding_batches", "unit_rows"]

Embeddings = npt.NDArray[np.float32]
"""Embeddings, float32 [images, dimensions]."""


@runtime_checkable
class Embedder(Protocol):
    """Interface of functions from normalized images to embeddings, with their preprocessing."""

    @property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing of the input images."""

    def __call__(self, batch: Tensor, /) -> Tensor:
        """Embed float32 [N, 3, height, width] to [N, D]."""


Model = NetworkLike | Embedder
"""Models that users may pass; :func:`as_embedder` converts each to an :class:`Embedder`."""


class TorchEmbedder:
    """Embedder of a module in eval mode on its device; mode and observers are restored after each call.

    Args:
        model: a float network or a student.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.preprocessing = preprocessing_of(model)
        self._memory_format: torch.memory_format | None = None  # known with the first images

    @property
    def device(self) -> torch.device:
        """Device of the parameters; the CPU for a module without any."""
        parameter = next(self.model.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    @property
    def runtime(self) -> str:
        """Framework and device in words, for reports."""
        return f"torch {self.device}"

    def __call__(self, batch: Tensor) -> Tensor:
        """Embed normalized images [N, 3, height, width] to [N, D], on the model's device and in its dtype."""
        with eval_mode(self.model), shared_by_threads(self.model, _observers_disabled), torch.inference_mode():
            images = batch.to(self.device, dtype_of(self.model))
            if self._memory_format is None:
                self._memory_format = fastest_memory_format(images[:1], self.model)
            output: Any = self.model(images.contiguous(memory_format=self._memory_format))
        return embedding_of(output)


@contextmanager
def _observers_disabled(model: nn.Module) -> Iterator[None]:
    """Disable observers, because torch's observers update in eval mode too."""
    observing: list[Any] = [module for module in model.modules() if _is_observing(module)]
    for module in observing:
        module.enable_observer(False)
    try:
        yield
    finally:
        for module in observing:
            module.enable_observer(True)


def _is_observing(module: Any) -> bool:
    # By torch.ao's attribute names, because only qface.quantization may import its classes.
    return hasattr(module, "enable_observer") and bool(module.observer_enabled)


def as_embedder(model: Model, preprocessing: PreprocessingOverride | None = None) -> Embedder:
    """Convert a module, a file or an :class:`Embedder` to an :class:`Embedder`.

    Args:
        model: a module, an Embedder, the path of an ``.onnx`` file for onnxruntime, or other text for
            :func:`qface.models.resolve.resolve_model`.
        preprocessing: for a file, preprocessing or some fields of it that replace those in the file.

    Raises:
        CheckpointError: the file cannot be read, or the text names an architecture without weights.
        ConfigError: ``model`` has another type.
    """
    if isinstance(model, nn.Module):
        return TorchEmbedder(model)
    if isinstance(model, (str, Path)):
        return _from_text(str(model), preprocessing)
    if isinstance(model, Embedder):
        return model
    raise ConfigError(
        "model must be a torch.nn.Module, the path of a file, package.module:factory, or an Embedder, got "
        f"{type(model).__name__}"
    )


def _from_text(text: str, preprocessing: PreprocessingOverride | None) -> Embedder:
    if text.lower().endswith(".onnx"):
        return OnnxEmbedder(text, preprocessing=preprocessing)
    return TorchEmbedder(resolve_model(text, preprocessing=preprocessing))


@shows_progress
def embed(
    model: Model, source: ImageSource, batch_size: int = 64, flip: bool = False, progress: bool = False
) -> Embeddings:
    """Embed all images of ``source`` in order.

    Args:
        model: model in any form that :func:`as_embedder` accepts.
        source: uint8 crops, or floats normalized for ``model``.
        batch_size: images per forward pass.
        flip: add the embedding of the mirrored image before normalization, as in ArcFace.
        progress: show progress on stderr.

    Returns:
        float32 [images, dimensions], L2-normalized.

    Raises:
        ConfigError: ``batch_size`` is below 1.
        ImagesError: there are no images, or they cannot be read.
        QFaceError: the model does not accept the images, or does not return one finite, nonzero vector per image.
    """
    rows = (unit_rows(batch) for batch in embedding_batches(as_embedder(model), source, batch_size, flip))
    first = next(rows, None)
    if first is None:
        raise ImagesError("there are no images to embed; pass at least one")
    if not isinstance(source, IndexedImages):
        return np.concatenate([first, *rows])
    embeddings, end = np.empty((len(source), first.shape[1]), np.float32), 0
    for batch in itertools.chain([first], rows):
        embeddings[end : end + len(batch)] = batch
        end += len(batch)
    return embeddings


def unit_rows(embeddings: Embeddings) -> Embeddings:
    """Divide each row of ``embeddings`` [images, dimensions] by its Euclidean norm."""
    return (embeddings / _lengths(embeddings)[:, None]).astype(np.float32)


def embedding_batches(
    embedder: Embedder, source: ImageSource, batch_size: int, flip: bool, start: int = 0
) -> Iterator[Embeddings]:
    """Yield the unnormalized embeddings of ``source`` in order, batch by batch.

    Args:
        embedder: the model.
        source: see :func:`embed`.
        batch_size: images per forward pass.
        flip: add the embedding of the mirrored image.
        start: index of the first image; must be 0 unless the source is an IndexedImages.

    Raises:
        ConfigError: ``batch_size`` is below 1.
        ImagesError: the images cannot be read.
        QFaceError: the model does not accept the images, or does not return one finite, nonzero vector per image.
    """
    check_whole(1, batch_size=batch_size)
    indexed = isinstance(source, IndexedImages)
    batches = source.batches(batch_size, start) if isinstance(source, IndexedImages) else source.batches(batch_size)
    total = math.ceil((len(source) - start) / batch_size) if isinstance(source, IndexedImages) else None
    views = (_views(batch, flip, embedder.preprocessing) for batch in batches)
    with memory_kept():
        for of_a_batch in track(prefetched(views) if indexed else views, "embed", total):
            embeddings = _embed_views(embedder, of_a_batch)
            _check_usable(embeddings, start)
            start += len(embeddings)
            yield embeddings


def _views(batch: Tensor, flip: bool, preprocessing: Preprocessing) -> list[Tensor]:
    """Normalize ``batch`` for the network, and also its mirrored images if ``flip``."""
    return [normalize(view, preprocessing) for view in ((batch, batch.flip(-1)) if flip else (batch,))]


def _embed_views(embedder: Embedder, views: list[Tensor]) -> Embeddings:
    embeddings = [_vectors(_call(embedder, view), len(view)) for view in views]
    return sum(embeddings[1:], start=embeddings[0])


def _call(embedder: Embedder, view: Tensor) -> object:
    try:
        return embedder(view)
    except RuntimeError as error:  # torch's messages have many lines
        raise QFaceError(f"the model cannot embed images {list(view.shape)}: {one_line(error, 300)}") from error


def _vectors(output: object, images: int) -> Embeddings:
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != images:
        found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise QFaceError(f"the model must return [{images}, dimensions] for {images} images, got {found}; wrap it")
    return output.detach().to("cpu", torch.float32).numpy()


def _check_usable(embeddings: Embeddings, start: int) -> None:
    """Raise if a row is zero or not finite; ``start`` is the image index of the first row."""
    lengths = _lengths(embeddings)
    unusable = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(unusable):
        image = start + unusable[0]
        raise QFaceError(f"the embedding of image {image} is zero or not finite: check the model's weights and scales")


def _lengths(embeddings: Embeddings) -> npt.NDArray[np.float64]:
    """Compute the norms of rows in float64, so that squares of large finite values do not overflow."""
    lengths: npt.NDArray[np.float64] = np.linalg.norm(embeddings.astype(np.float64), axis=1)
    return lengths
