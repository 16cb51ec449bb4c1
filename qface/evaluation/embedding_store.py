"""Embeddings in a file, appended while they are computed, so that an interrupted run can resume."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from qface.data.content_digest import digest_of_images
from qface.data.images import IndexedImages
from qface.data.subset import Subset
from qface.errors import ConfigError, ExportError, ImagesError
from qface.evaluation.embedding import Embedder, Embeddings, embedding_batches
from qface.files import alone_in, replacing
from qface.limits import read_json

__all__ = ["embed_to_file"]

_SAME_MODEL = 1e-2
"""Maximum distance between embeddings of the same model and image on two machines, relative to their norm. Measured:
0.003 for a file that computes in fp16 on one of them."""


def embed_to_file(embedder: Embedder, source: IndexedImages, folder: Path, batch_size: int, flip: bool) -> Embeddings:
    """Embed ``source`` to a file in ``folder``, or resume from the embeddings that are there.

    To resume, the digest of all images must match, and three of the embeddings are recomputed to check the model.

    Args:
        embedder: the model.
        source: the images.
        folder: folder of ``embeddings.f32`` and ``embeddings.json``; created if missing.
        batch_size: images per forward pass.
        flip: add the embedding of the mirrored image.

    Returns:
        float32 [images, dimensions], not normalized, memory-mapped.

    Raises:
        ConfigError: the folder holds embeddings of another model or other images, or another run is writing to it.
        ExportError: the folder is not writable.
        ImagesError: there are no images, or they cannot be read.
        QFaceError: the model does not return one finite, nonzero vector per image. Errors of the model itself
            propagate.
    """
    if len(source) == 0:
        raise ImagesError("there are no images to embed; pass at least one")
    with _file_errors_as_export_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        return _complete(embedder, source, folder, batch_size, flip)


@contextmanager
def _file_errors_as_export_errors(folder: Path) -> Iterator[None]:
    """Convert file errors to ExportError; not for calls of the model, which may raise the same types."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ExportError(f"{folder} cannot hold embeddings ({error}): choose another folder") from error


def _complete(embedder: Embedder, source: IndexedImages, folder: Path, batch_size: int, flip: bool) -> Embeddings:
    dimensions, images = _embed_some(embedder, source, [0], flip).shape[1], digest_of_images(source)
    with _file_errors_as_export_errors(folder):
        file = _open_file(folder, {"images": images, "dimensions": dimensions, "flip": flip})
        rows = _truncate_to_rows(file, 4 * dimensions)
    if rows:
        _check_model(embedder, source, flip, _memory_map(file, rows, dimensions), folder)
    _append(file, embedding_batches(embedder, source, batch_size, flip, start=rows))
    return _memory_map(file, len(source), dimensions)


def _append(file: Path, batches: Iterable[Embeddings]) -> None:
    for batch in batches:
        with _file_errors_as_export_errors(file.parent), file.open("ab") as output:
            output.write(batch.astype("<f4").tobytes())
            output.flush()
            os.fsync(output.fileno())  # otherwise rows in the middle could be missing after a power failure


def _memory_map(file: Path, rows: int, dimensions: int) -> Embeddings:
    with _file_errors_as_export_errors(file.parent):
        return np.memmap(file, np.dtype("<f4"), "r", shape=(rows, dimensions))


def _open_file(folder: Path, header: dict[str, Any]) -> Path:
    """Return the file of embeddings, created if missing; raise if its header differs."""
    file, description = folder / "embeddings.f32", folder / "embeddings.json"
    if not description.exists():
        file.write_bytes(b"")
        with replacing(description) as temporary:
            temporary.write_text(json.dumps(header), encoding="utf-8")
    elif read_json(description, "the record") != header:
        raise ConfigError(f"{folder} holds embeddings of other images or settings: choose another folder")
    return file


def _truncate_to_rows(file: Path, width: int) -> int:
    """Remove an incomplete last row and return the number of rows of ``width`` bytes."""
    rows = file.stat().st_size // width
    with file.open("r+b") as content:
        content.truncate(rows * width)
    return rows


def _check_model(embedder: Embedder, source: IndexedImages, flip: bool, there: Embeddings, folder: Path) -> None:
    """Recompute the first, middle and last stored row, and raise if one differs."""
    if len(there) <= len(source):
        indices = sorted({0, len(there) // 2, len(there) - 1})
        now = _embed_some(embedder, source, indices, flip)
        distances = np.linalg.norm(there[indices] - now, axis=1) / np.linalg.norm(now, axis=1)
        if (distances <= _SAME_MODEL).all():
            return
    raise ConfigError(f"{folder} holds embeddings of another model or of other images: choose another folder")


def _embed_some(embedder: Embedder, source: IndexedImages, indices: list[int], flip: bool) -> Embeddings:
    return np.concatenate(list(embedding_batches(embedder, Subset(source, indices), len(indices), flip)))
