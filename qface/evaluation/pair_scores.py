"""Cosines of all pairs of images, computed in tiles, so that memory does not grow with their number."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qface.errors import QFaceError

__all__ = ["OwnedScores", "PairScores", "Scores", "Tile"]

Scores = npt.NDArray[np.float32]
Tile = tuple[int, int]
"""Row and column index of a tile; each spans :attr:`PairScores.tile_size` images."""

_TILE_SIZE = 2048  # 16 MiB of scores, a quarter of a second on one core
_TILE_SIZE_CUDA = 8192


@dataclass(frozen=True, eq=False)
class OwnedScores:
    """Scores with the identities of both images.

    Args:
        scores: float32 [any].
        first: identity of each first image, [any], numbered from 0 in the order of labels.
        second: identity of each second image, likewise.
    """

    scores: Scores
    first: npt.NDArray[np.integer[Any]]
    second: npt.NDArray[np.integer[Any]]


class PairScores:
    """Cosines of all pairs i < j of images, or of probes with a gallery of the same images.

    Images are sorted by identity, so that tiles far from the diagonal hold impostor pairs only.

    Args:
        probes: float32 [images, dimensions], L2-normalized, in memory or memory-mapped.
        labels: [images], identity labels.
        gallery: embeddings of the same images by another model; all ordered pairs i != j of probe and gallery are then
            compared. None: all pairs i < j of probes.
        device: device of the matrix products.

    Attributes:
        tile_size: number of images per side of a tile.

    Raises:
        QFaceError: the embeddings do not match the labels or each other, or are not finite.

    Example:
        >>> scores = PairScores(np.eye(3, dtype=np.float32), [0, 0, 1])
        >>> [kind.tolist() for tile in scores.tiles() for kind in scores.of(tile)]
        [[0.0], [0.0, 0.0]]
    """

    def __init__(
        self,
        probes: Scores,
        labels: npt.ArrayLike,
        gallery: Scores | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        people = np.unique(np.asarray(labels), return_inverse=True)[1].reshape(-1)
        _check_embeddings(probes, people, gallery)
        order = np.argsort(people, kind="stable")
        self._order = None if np.array_equal(order, np.arange(len(order))) else order
        self._people = people[order]
        self._probes, self._gallery = probes, gallery
        self._device = torch.device(device)
        self._row: tuple[int, Any] = (-1, None)
        self.tile_size = _TILE_SIZE_CUDA if self._device.type == "cuda" else _TILE_SIZE

    @property
    def ordered(self) -> bool:
        """True if (i, j) and (j, i) are two pairs."""
        return self._gallery is not None

    def tiles(self) -> Iterator[Tile]:
        """Yield all tiles, row by row."""
        count = -(-len(self._people) // self.tile_size)
        for row in range(count):
            for column in range(0 if self.ordered else row, count):
                yield row, column

    def of(self, tile: Tile, floor: float = -np.inf) -> tuple[Scores, Scores]:
        """Compute the scores of a tile above ``floor``.

        Args:
            tile: one of :meth:`tiles`.
            floor: exclusive minimum of the scores.

        Returns:
            Genuine scores and impostor scores, float32 [any] each.
        """
        row, column = tile
        scores = self._embeddings_of_row(row) @ self._embeddings(self._column_embeddings, column).T
        above = scores > floor
        rows, columns = self._indices(row), self._indices(column)
        if not self._share_people(row, column):
            return np.empty(0, np.float32), _on_cpu(scores[above])
        same = self._array(self._people[rows, None] == self._people[None, columns])
        counted = self._array(rows[:, None] != columns if self.ordered else rows[:, None] < columns)
        above &= counted
        return _on_cpu(scores[above & same]), _on_cpu(scores[above & ~same])

    def with_people(self, tile: Tile, floor: float = -np.inf) -> tuple[OwnedScores, OwnedScores]:
        """Compute the genuine scores of a tile, and its impostor scores above ``floor``, with identities.

        Args:
            tile: one of :meth:`tiles`.
            floor: exclusive minimum of the impostor scores.
        """
        row, column = tile
        scores = _on_cpu(self._embeddings_of_row(row) @ self._embeddings(self._column_embeddings, column).T)
        rows, columns = self._indices(row), self._indices(column)
        same = self._people[rows, None] == self._people[None, columns]
        counted = rows[:, None] != columns if self.ordered else rows[:, None] < columns

        def owned(chosen: npt.NDArray[np.bool_]) -> OwnedScores:
            at = np.nonzero(chosen)
            people = self._people.astype(np.int32)
            return OwnedScores(scores[at], people[rows[at[0]]], people[columns[at[1]]])

        return owned(counted & same), owned(counted & ~same & (scores > floor))

    def sample(self, rng: np.random.Generator, rows: int, columns: int) -> Scores:
        """Compute the impostor scores of ``rows`` random probes and ``columns`` random gallery images."""
        first = np.sort(rng.choice(len(self._people), min(rows, len(self._people)), replace=False))
        second = np.sort(rng.choice(len(self._people), min(columns, len(self._people)), replace=False))
        scores = self._read(self._probes, first) @ self._read(self._column_embeddings, second).T
        different: Scores = scores[self._people[first, None] != self._people[None, second]]
        return different

    def digest(self) -> str:
        """Return a hash of embeddings, labels and device type."""
        digest = hashlib.sha256(f"{self._device.type} {self._probes.shape} {self.ordered}".encode())
        digest.update(self._people.tobytes())
        if self._order is not None:
            digest.update(self._order.tobytes())
        for embeddings in (self._probes,) if self._gallery is None else (self._probes, self._gallery):
            for start in _starts(embeddings):
                digest.update(embeddings[start : start + _TILE_SIZE].tobytes())
        return digest.hexdigest()[:32]

    @property
    def _column_embeddings(self) -> Scores:
        return self._probes if self._gallery is None else self._gallery

    def _indices(self, part: int) -> npt.NDArray[np.intp]:
        return np.arange(part * self.tile_size, min((part + 1) * self.tile_size, len(self._people)))

    def _share_people(self, row: int, column: int) -> bool:
        """True if row and column of a tile have a common identity; images are sorted by identity."""
        rows, columns = self._people[self._indices(row)], self._people[self._indices(column)]
        return bool(rows[0] <= columns[-1] and columns[0] <= rows[-1])

    def _embeddings_of_row(self, row: int) -> Any:
        """Return the embeddings of a row, cached for all its tiles."""
        if self._row[0] != row:
            self._row = (row, self._embeddings(self._probes, row))
        return self._row[1]

    def _embeddings(self, embeddings: Scores, part: int) -> Any:
        return self._array(self._read(embeddings, self._indices(part)))

    def _read(self, embeddings: Scores, indices: npt.NDArray[np.intp]) -> Scores:
        found: Scores = embeddings[indices if self._order is None else self._order[indices]]
        return found

    def _array(self, values: npt.NDArray[Any]) -> Any:
        """Return ``values`` as a numpy array on the CPU, else as a torch tensor; both have all operators used."""
        return values if self._device.type == "cpu" else torch.from_numpy(values).to(self._device)


def _on_cpu(values: Any) -> Scores:
    return values.cpu().numpy() if isinstance(values, torch.Tensor) else values


def _check_embeddings(probes: Scores, people: npt.NDArray[np.intp], gallery: Scores | None) -> None:
    for name, embeddings in [("probes", probes)] + ([] if gallery is None else [("gallery", gallery)]):
        if embeddings.ndim != 2 or people.shape != (len(embeddings),):
            raise QFaceError(
                f"{name} {list(embeddings.shape)} do not match labels {list(people.shape)}: "
                "pass one row and one label per image"
            )
        if not all(np.isfinite(embeddings[start : start + _TILE_SIZE]).all() for start in _starts(embeddings)):
            raise QFaceError(f"the embeddings of the {name} are not finite: check the model's weights and scales")
    if gallery is not None and gallery.shape[1] != probes.shape[1]:
        raise QFaceError(
            f"probes have {probes.shape[1]} dimensions and the gallery {gallery.shape[1]}: "
            "compare models with a common embedding space"
        )


def _starts(embeddings: Scores) -> range:
    return range(0, len(embeddings), _TILE_SIZE)
