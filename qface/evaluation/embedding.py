"""Any model as a function from images to L2-normalized embeddings, without a lasting change to the model."""

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
from qface.memory_format import fastest_memory_format
from qface.models.resolve import NetworkLike, resolve_model
from qface.network_output import embedding_of
from qface.preprocessing import Preprocessing, PreprocessingOverride, dtype_of, preprocessing_of
from qface.progress import shows_progress, track
from qface.training_mode import eval_mode, shared_by_threads

__all__ = ["Embedder", "Embeddings", "Model", "TorchEmbedder", "as_embedder", "embed", "embedding_batches", "unit_rows"]

Embeddings = npt.NDArray[np.float32]
"""float32 [images, dimensions] with rows of length 1."""


@runtime_checkable
class Embedder(Protocol):
    """A function from normalized images to embeddings that knows how its images are normalized."""

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing that the network needs."""

    def __call__(self, batch: Tensor, /) -> Tensor:
        """Embed float32 [N, 3, height, width] to [N, D]."""


Model = NetworkLike | Embedder
"""Models that users may pass; :func:`as_embedder` turns each into an :class:`Embedder`."""


class TorchEmbedder:
    """A module in eval mode on its own device; modes and observers are put back after every call.

    Args:
        model: a float network, or a prepared one with fake quantization.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.preprocessing = preprocessing_of(model)
        self._memory_format: torch.memory_format | None = None  # known with the first images

    @property
    def device(self) -> torch.device:
        """The device of the parameters; the CPU for a module that has none."""
        parameter = next(self.model.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    @property
    def runtime(self) -> str:
        """Framework and device in words, for reports."""
        return f"torch {self.device}"

    def __call__(self, batch: Tensor) -> Tensor:
        """Embed ``batch``, normalized [N, 3, height, width], to [N, D], on the model's device and in its type."""
        with eval_mode(self.model), shared_by_threads(self.model, _unobserved), torch.inference_mode():
            images = batch.to(self.device, dtype_of(self.model))
            if self._memory_format is None:
                self._memory_format = fastest_memory_format(images[:1], self.model)
            output: Any = self.model(images.contiguous(memory_format=self._memory_format))
        return embedding_of(output)


@contextmanager
def _unobserved(model: nn.Module) -> Iterator[None]:
    """Observers off: torch's observers update in eval mode too."""
    observing: list[Any] = [module for module in model.modules() if _is_observing(module)]
    for module in observing:
        module.enable_observer(False)
    try:
        yield
    finally:
        for module in observing:
            module.enable_observer(True)


def _is_observing(module: Any) -> bool:
    # By torch.ao's names, not its classes: only qface.quantization knows those.
    return hasattr(module, "enable_observer") and bool(module.observer_enabled)


def as_embedder(model: Model, preprocessing: PreprocessingOverride | None = None) -> Embedder:
    """Turn a module, a file or an :class:`Embedder` into an :class:`Embedder`.

    A path that ends in ``.onnx`` goes to onnxruntime, any other text to
    :func:`qface.models.resolve.resolve_model`, which refuses a name without weights.

    Args:
        model: what embeds.
        preprocessing: of a file, what it reads, or some fields of that, in place of what is found.

    Raises:
        CheckpointError: a file cannot be read.
        ConfigError: ``model`` is something else.
    """
    if isinstance(model, nn.Module):
        return TorchEmbedder(model)
    if isinstance(model, (str, Path)):
        return _from_text(str(model), preprocessing)
    if isinstance(model, Embedder):
        return model
    raise ConfigError(
        "a model is a torch.nn.Module, the path of a file, package.module:factory, or an Embedder, not "
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
    """Embed every image of ``source`` in order.

    Args:
        model: see :func:`as_embedder`.
        source: crops, or floats that are already normalized for ``model``.
        batch_size: images a forward pass.
        flip: add the embedding of the mirrored image before normalizing, as ArcFace does.
        progress: show the stages on stderr.

    Returns:
        float32 [images, dimensions], L2-normalized rows.

    Raises:
        ConfigError: ``batch_size`` is below 1.
        ImagesError: there are no images, or they cannot be read.
        QFaceError: the model cannot read them, or does not give one finite vector an image.
    """
    rows = (unit_rows(batch) for batch in embedding_batches(as_embedder(model), source, batch_size, flip))
    first = next(rows, None)
    if first is None:
        raise ImagesError("there are no images to embed: pass at least one")
    if not isinstance(source, IndexedImages):
        return np.concatenate([first, *rows])
    embeddings, end = np.empty((len(source), first.shape[1]), np.float32), 0
    for batch in itertools.chain([first], rows):
        embeddings[end : end + len(batch)] = batch
        end += len(batch)
    return embeddings


def unit_rows(embeddings: Embeddings) -> Embeddings:
    """``embeddings`` [images, dimensions], each divided by its length."""
    return (embeddings / _lengths(embeddings)[:, None]).astype(np.float32)


def embedding_batches(
    embedder: Embedder, source: ImageSource, batch_size: int, flip: bool, start: int = 0
) -> Iterator[Embeddings]:
    """Embed the images of ``source`` in order, and yield the rows of a batch each, of any length.

    Args:
        embedder: what embeds.
        source: see :func:`embed`.
        batch_size: images a forward pass.
        flip: add the embedding of the mirrored image.
        start: leave out so many images; of a source that can be read in any order only.

    Raises:
        ConfigError: ``batch_size`` is below 1.
        ImagesError: the images cannot be read.
        QFaceError: the model cannot read them, or does not give one finite vector an image, other than zero.
    """
    check_whole(1, batch_size=batch_size)
    indexed = isinstance(source, IndexedImages)
    batches = source.batches(batch_size, start) if isinstance(source, IndexedImages) else source.batches(batch_size)
    total = math.ceil((len(source) - start) / batch_size) if isinstance(source, IndexedImages) else None
    views = (_views(batch, flip, embedder.preprocessing) for batch in batches)
    for of_a_batch in track(prefetched(views) if indexed else views, "embed", total):
        embeddings = _embed_views(embedder, of_a_batch)
        _check_usable(embeddings, start)
        start += len(embeddings)
        yield embeddings


def _views(batch: Tensor, flip: bool, preprocessing: Preprocessing) -> list[Tensor]:
    """``batch`` as the network reads it, and its mirror image where that is wanted too."""
    return [normalize(view, preprocessing) for view in ((batch, batch.flip(-1)) if flip else (batch,))]


def _embed_views(embedder: Embedder, views: list[Tensor]) -> Embeddings:
    embeddings = [_vectors(_called(embedder, view), len(view)) for view in views]
    return sum(embeddings[1:], start=embeddings[0])


def _called(embedder: Embedder, view: Tensor) -> object:
    try:
        return embedder(view)
    except RuntimeError as error:  # torch's own, which goes on for lines
        raise QFaceError(f"the model cannot embed images {list(view.shape)}: {one_line(error, 300)}") from error


def _vectors(output: object, images: int) -> Embeddings:
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != images:
        found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise QFaceError(f"the model gives {found} for {images} images: pass one that gives [{images}, dimensions]")
    return output.detach().to("cpu", torch.float32).numpy()


def _check_usable(embeddings: Embeddings, start: int) -> None:
    """Complain of a row that has no direction; ``start`` is the number of the first one's image."""
    lengths = _lengths(embeddings)
    unusable = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(unusable):
        image = start + unusable[0]
        raise QFaceError(
            f"the embedding of image {image} is not finite or is zero: check the model's weights and scales"
        )


def _lengths(embeddings: Embeddings) -> npt.NDArray[np.float64]:
    """Lengths of rows, in float64, so that large but finite values do not overflow when they are squared."""
    lengths: npt.NDArray[np.float64] = np.linalg.norm(embeddings.astype(np.float64), axis=1)
    return lengths
