"""Embeddings of many images: each process embeds its share, and a run that was stopped goes on."""

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

_ROWS = 2**13  # made unit length at a time


def embed_shared(
    embedder: Embedder,
    source: ImageSource,
    parallel: Parallel,
    folder: Path | None = None,
    batch_size: int = 64,
    flip: bool = False,
) -> Embeddings:
    """Embed every image of ``source`` in order, shared among processes.

    Args:
        embedder: what embeds.
        source: the images. A loader, which cannot be read in any order, is embedded by every process.
        parallel: this process among others.
        folder: where each process keeps its embeddings, to go on from; None keeps nothing.
        batch_size: images a forward pass.
        flip: add the embedding of the mirrored image.

    Returns:
        float32 [images, dimensions], L2-normalized, the same in all processes.

    Raises:
        ConfigError: embeddings of a loader are to be kept, or the folder holds those of another model or other images.
        ExportError: the folder cannot be written to.
        ImagesError: there are no images, or they cannot be read.
        QFaceError: the model cannot read them, or does not give one finite vector an image.
    """
    if not isinstance(source, IndexedImages):
        if folder is not None:
            raise ConfigError("a loader cannot go on where it stopped: leave run_dir out, or pass a folder of images")
        return embed(embedder, source, batch_size, flip)
    several = 1 < parallel.world_size <= len(source)
    own = Subset(source, range(parallel.rank, len(source), parallel.world_size)) if several else source
    if folder is None:
        rows = embed(embedder, own, batch_size, flip)
    else:
        name = f"embeddings-{parallel.rank}-of-{parallel.world_size}"
        rows = _unit_copy(embed_to_file(embedder, own, folder / name, batch_size, flip))
    return _gathered(rows, len(source), parallel) if several else rows


def _unit_copy(embeddings: Embeddings) -> Embeddings:
    """``embeddings``, mapped from a file, in memory and L2-normalized."""
    rows = np.empty(embeddings.shape, np.float32)
    for start in range(0, len(rows), _ROWS):
        rows[start : start + _ROWS] = unit_rows(embeddings[start : start + _ROWS])
    return rows


def _gathered(own: Embeddings, images: int, parallel: Parallel) -> Embeddings:
    """The rows of all processes, of which each has every ``world_size``-th."""
    most = -(-images // parallel.world_size)  # the last processes may have one less
    padded = np.resize(own, (most, own.shape[1]))
    parts = parallel.gather(torch.from_numpy(padded).to(parallel.device)).cpu().numpy()
    return parts.reshape(parallel.world_size, most, -1).swapaxes(0, 1).reshape(-1, own.shape[1])[:images]
