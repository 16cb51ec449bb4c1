"""Scores of given ranks among all pairs, in as few passes as possible; interrupted runs can resume."""

from __future__ import annotations

import itertools
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from qface.errors import ConfigError
from qface.evaluation.pair_scores import PairScores
from qface.evaluation.score_counts import RankedScore, ScoreCounts, Watch, watch_for_sample
from qface.files import alone_in, make_folder, replacing
from qface.parallel import Parallel
from qface.progress import track

__all__ = ["CountStore", "count_store", "equal_error_of", "ranked_scores"]

_SAVED_EVERY = 60.0  # seconds between two saves


class CountStore:
    """File with the counts of one process; opened by :func:`count_store`.

    Args:
        folder: existing folder for the file.
        scores: scores of all pairs.
        ranks: ranks of the wanted scores, by name.
    """

    def __init__(self, folder: Path, scores: PairScores, ranks: Mapping[str, int]) -> None:
        self._path = folder / "counts.npz"
        self._identity = f"{scores.digest()} {sorted(ranks.items())} {scores.tile_size}"
        self._saved = time.monotonic()

    def load(self) -> tuple[int, ScoreCounts] | None:
        """Return the number of counted tiles and their counts; None if nothing was saved.

        Raises:
            ConfigError: the file is damaged, or belongs to other embeddings, labels or rates.
        """
        if not self._path.exists():
            return None
        try:
            with np.load(self._path) as saved:
                counts = ScoreCounts(Watch(tuple(map(int, saved["bins"])), float(saved["floor"])))
                counts.upper[:], counts.lower[:] = saved["upper"], saved["lower"]
                identity, done = str(saved["identity"]), int(saved["done"])
        except Exception as error:  # numpy may raise any type for damaged bytes
            raise ConfigError(f"{self._path} is damaged: delete it, or choose another folder") from error
        if identity != self._identity:
            raise ConfigError(f"{self._path} holds counts of other embeddings or rates: choose another folder")
        return done, counts

    def save(self, done: int, counts: ScoreCounts) -> None:
        """Save the counts of the first ``done`` tiles.

        Args:
            done: number of tiles.
            counts: their counts.

        Raises:
            ExportError: the file cannot be written.
        """
        with replacing(self._path) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                identity=self._identity,
                done=done,
                bins=np.array(counts.watch.bins, np.int64),
                floor=counts.watch.floor,
                upper=counts.upper,
                lower=counts.lower,
            )
        self._saved = time.monotonic()

    @property
    def is_due(self) -> bool:
        """True if the last save was more than a minute ago."""
        return time.monotonic() - self._saved > _SAVED_EVERY


@contextmanager
def count_store(
    run_dir: Path, scores: PairScores, ranks: Mapping[str, int], parallel: Parallel
) -> Iterator[CountStore]:
    """Open the counts of this process in ``run_dir`` and lock them for the duration of the block.

    Args:
        run_dir: folder of the run, created if missing.
        scores: scores of all pairs.
        ranks: ranks of the wanted scores, by name.
        parallel: the processes; each has its own subfolder.

    Raises:
        ConfigError: another run is using the folder.
        ExportError: the folder cannot be created.
    """
    folder = run_dir / f"scores-{parallel.rank}-of-{parallel.world_size}"
    make_folder(folder)
    with alone_in(folder):
        yield CountStore(folder, scores, ranks)


def ranked_scores(
    scores: PairScores,
    ranks: Mapping[str, int],
    impostors: int,
    parallel: Parallel,
    store: CountStore | None = None,
) -> dict[str, RankedScore]:
    """Find the impostor scores of given ranks in descending order.

    Args:
        scores: scores of all pairs.
        ranks: ranks by name, all below ``impostors``.
        impostors: number of impostor pairs.
        parallel: the processes that share the tiles.
        store: file for the counts; None saves nothing.

    Returns:
        Score of each rank with the number of larger genuine scores.

    Raises:
        ConfigError: the store belongs to other scores.
        ExportError: counts cannot be written.
    """
    wanted = list(ranks.values())
    kept = None if store is None else _same_everywhere(store.load(), parallel)
    done, counts = kept or (0, ScoreCounts(watch_for_sample(scores, wanted, impostors)))
    while wanted:
        _count(scores, counts, done, parallel, store)
        total = _sum_over_processes(counts, parallel)
        bins = total.bins_of(wanted)
        if bins is not None and bins <= set(counts.watch.bins):
            return total.ranked(ranks)
        done, counts = 0, ScoreCounts(Watch() if bins is None else Watch.of(bins))
    return {}


def equal_error_of(scores: PairScores, genuine: int, impostors: int, parallel: Parallel) -> float:
    """Compute the equal error rate over all pairs, in two passes.

    Args:
        scores: scores of all pairs.
        genuine: number of genuine pairs.
        impostors: number of impostor pairs.
        parallel: the processes that share the tiles.
    """
    watch = Watch()
    for _ in range(2):
        counts = ScoreCounts(watch)
        for tile in itertools.islice(scores.tiles(), parallel.rank, None, parallel.world_size):
            counts.add(*scores.of(tile, watch.floor))
        total = _sum_over_processes(counts, parallel)
        watch = Watch.of({total.equal_error_bin(genuine, impostors)})
    return total.equal_error(genuine, impostors)


def _same_everywhere(kept: tuple[int, ScoreCounts] | None, parallel: Parallel) -> tuple[int, ScoreCounts] | None:
    """Return ``kept`` if all processes were interrupted in the same pass, else None."""
    words = torch.zeros(parallel.world_size, dtype=torch.int64)
    words[parallel.rank] = 0 if kept is None else 1 + zlib.crc32(repr(kept[1].watch).encode())
    return kept if len(set(parallel.sum(words).tolist())) == 1 else None


def _count(scores: PairScores, counts: ScoreCounts, done: int, parallel: Parallel, store: CountStore | None) -> None:
    """Count the scores of this process's tiles after the first ``done``."""
    own = list(itertools.islice(scores.tiles(), parallel.rank, None, parallel.world_size))
    for number, tile in enumerate(track(own[done:], "compare"), start=done + 1):
        counts.add(*scores.of(tile, counts.watch.floor))
        if store is not None and (store.is_due or number == len(own)):
            store.save(number, counts)


def _sum_over_processes(counts: ScoreCounts, parallel: Parallel) -> ScoreCounts:
    """Sum the counts over all processes."""
    if parallel.world_size == 1:
        return counts
    total = ScoreCounts(counts.watch)
    for own, sums in ((counts.upper, total.upper), (counts.lower, total.lower)):
        sums[:] = parallel.sum(torch.from_numpy(own)).numpy()
    return total
