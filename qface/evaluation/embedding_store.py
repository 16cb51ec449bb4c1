"""Embeddings of many images in a file, written as they are computed, so that a run that was stopped goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from qface.data.images import IndexedImages
from qface.data.subset import Subset
from qface.errors import ConfigError, ExportError, ImagesError
from qface.evaluation.embedding import Embedder, Embeddings, embedding_batches
from qface.files import replacing

__all__ = ["embed_to_file"]

_SAME_MODEL = 1e-6  # 1 - cosine of two embeddings of one image by one model, on one machine or another


def embed_to_file(
    embedder: Embedder, source: IndexedImages, folder: Path, batch_size: int, flip: bool, progress: bool
) -> Embeddings:
    """The embeddings of ``source``, as the model gives them, in ``folder``; those that are there already are kept.

    Args:
        embedder: what embeds.
        source: the images.
        folder: where ``embeddings.f32`` and ``embeddings.json`` lie, or will; it is made.
        batch_size: images a forward pass.
        flip: add the embedding of the mirrored image.
        progress: show a bar on stderr.

    Returns:
        float32 [images, dimensions], not normalised, mapped from the file.

    Raises:
        ConfigError: the folder holds embeddings of another model or of other images.
        ExportError: the folder cannot be written to.
        ImagesError: there are no images, or they cannot be read.
    """
    if len(source) == 0:
        raise ImagesError("there are no images to embed: pass at least one")
    first = next(embedding_batches(embedder, Subset(source, [0]), 1, flip, progress=False))
    header = {"images": len(source), "dimensions": first.shape[1], "flip": flip}
    rows, file = _opened(folder, header, first)
    with file.open("ab") as output:
        for batch in embedding_batches(embedder, source, batch_size, flip, progress, start=rows):
            output.write(batch.astype("<f4").tobytes())
            output.flush()
    return np.memmap(file, np.dtype("<f4"), "r", shape=(len(source), first.shape[1]))


def _opened(folder: Path, header: dict[str, Any], first: Embeddings) -> tuple[int, Path]:
    """How many rows the file holds, cut to whole ones, and the file."""
    file, description = folder / "embeddings.f32", folder / "embeddings.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not description.exists():
            file.write_bytes(b"")
            with replacing(description) as temporary:
                temporary.write_text(json.dumps(header), encoding="utf-8")
            return 0, file
        width = 4 * int(header["dimensions"])
        if json.loads(description.read_text(encoding="utf-8")) != header:
            raise ConfigError(f"{folder} holds embeddings of other images or settings: choose another folder")
        rows = file.stat().st_size // width
        with file.open("r+b") as content:
            content.truncate(rows * width)  # a row may have been cut off when the process was stopped
        _check_model(folder, file, rows, first)
        return rows, file
    except (OSError, ValueError) as error:
        raise ExportError(f"{folder} cannot hold embeddings ({error}): choose another folder") from error


def _check_model(folder: Path, file: Path, rows: int, first: Embeddings) -> None:
    if not rows:
        return
    there = np.fromfile(file, "<f4", first.shape[1]).astype(np.float64)
    now = first[0].astype(np.float64)
    if 1 - there @ now / (np.linalg.norm(there) * np.linalg.norm(now)) > _SAME_MODEL:
        raise ConfigError(f"{folder} holds embeddings of another model: choose another folder")
