"""Embedding of many images, shared among processes, with resumption of interrupted runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from qface.data.images import ImageSource, IndexedImages
from qface.data.subset import Subset
from qface.errors import ConfigError
from qface.evaluation.embedding import Embedder, Embeddings, embed, unit_rows
from qface.evaluation.embedding_store import embed_to_file
from qface.parallel import Parallel

__all__ = ["embed_shared"]

_ROWS = 2**13  # rows normalized at a time


def embed_shared(
    embedder: Embedder,
    source: ImageSource,
    parallel: Parallel,
    folder: Path | None = None,
    batch_size: int = 64,
    flip: bool = False,
) -> Embeddings:
    """Embed all images of ``source`` in order, shared among processes.

    Args:
        embedder: the model.
        source: the images. Each process embeds all images of a loader, which has no random access.
        parallel: the processes.
        folder: folder for the embeddings of each process, to resume from; None saves nothing.
        batch_size: images per forward pass.
        flip: add the embedding of the mirrored image.

    Returns:
        float32 [images, dimensions], L2-normalized, equal in all processes.

    Raises:
        ConfigError: a folder is given for a loader, or it holds embeddings of another model or other images.
        ExportError: the folder is not writable.
        ImagesError: there are no images, or they cannot be read.
        QFaceError: the model does not accept the images, or does not return one finite, nonzero vector per image.
    """
    if not isinstance(source, IndexedImages):
        if folder is not None:
            raise ConfigError("a loader cannot resume: leave out run_dir, or pass a folder of images")
        return embed(embedder, source, batch_size, flip)
    several = 1 < parallel.world_size <= len(source)
    own = Subset(source, range(parallel.rank, len(source), parallel.world_size)) if several else source
    if folder is None:
        rows = embed(embedder, own, batch_size, flip)
    else:
        name = f"embeddings-{parallel.rank}-of-{parallel.world_size}"
        rows = _unit_copy(embed_to_file(embedder, own, folder / name, batch_size, flip))
    return _gather_rows(rows, len(source), parallel) if several else rows


def _unit_copy(embeddings: Embeddings) -> Embeddings:
    """Copy memory-mapped ``embeddings`` to memory, L2-normalized."""
    rows = np.empty(embeddings.shape, np.float32)
    for start in range(0, len(rows), _ROWS):
        rows[start : start + _ROWS] = unit_rows(embeddings[start : start + _ROWS])
    return rows


def _gather_rows(own: Embeddings, images: int, parallel: Parallel) -> Embeddings:
    """Interleave the rows of all processes; each has every ``world_size``-th row."""
    most = -(-images // parallel.world_size)  # the last processes may have one row less
    padded = np.resize(own, (most, own.shape[1]))
    parts = parallel.gather(torch.from_numpy(padded).to(parallel.device)).cpu().numpy()
    return parts.reshape(parallel.world_size, most, -1).swapaxes(0, 1).reshape(-1, own.shape[1])[:images]
