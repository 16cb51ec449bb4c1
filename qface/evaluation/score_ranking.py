"""Scores of given ranks among all pairs, in as few passes as it takes; a run that was stopped goes on."""

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

_SAVED_EVERY = 60.0  # seconds


class CountStore:
    """The file in which one process keeps its counts; :func:`count_store` opens it.

    Args:
        folder: it exists.
        scores: what is counted.
        ranks: what it is counted for.
    """

    def __init__(self, folder: Path, scores: PairScores, ranks: Mapping[str, int]) -> None:
        self._path = folder / "counts.npz"
        self._identity = f"{scores.digest()} {sorted(ranks.items())} {scores.tile_size}"
        self._saved = time.monotonic()

    def load(self) -> tuple[int, ScoreCounts] | None:
        """The number of tiles that are counted, and their counts; None where there are none.

        Raises:
            ConfigError: they are of other embeddings, labels or rates, or damaged.
        """
        if not self._path.exists():
            return None
        try:
            with np.load(self._path) as saved:
                counts = ScoreCounts(Watch(tuple(map(int, saved["bins"])), float(saved["floor"])))
                counts.upper[:], counts.lower[:] = saved["upper"], saved["lower"]
                identity, done = str(saved["identity"]), int(saved["done"])
        except Exception as error:  # damaged bytes may make numpy raise anything
            raise ConfigError(f"{self._path} is damaged: delete it, or choose another folder") from error
        if identity != self._identity:
            raise ConfigError(f"{self._path} holds counts of other embeddings or rates: choose another folder")
        return done, counts

    def save(self, done: int, counts: ScoreCounts) -> None:
        """Keep ``counts`` of the first ``done`` tiles.

        Raises:
            ExportError: they cannot be written.
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
        """True a minute after the last saving."""
        return time.monotonic() - self._saved > _SAVED_EVERY


@contextmanager
def count_store(
    run_dir: Path, scores: PairScores, ranks: Mapping[str, int], parallel: Parallel
) -> Iterator[CountStore]:
    """The file of this process's counts in ``run_dir``, which other runs are kept out of until the end of the block.

    Args:
        run_dir: it is made where it is missing.
        scores: what is counted.
        ranks: what it is counted for.
        parallel: this process among others, of which each has a folder of its own.

    Raises:
        ConfigError: another run is in the folder.
        ExportError: it cannot be made.
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
    """The impostor scores of ``ranks`` in descending order, and how many genuine scores are larger.

    Args:
        scores: of all pairs.
        ranks: by a name each, all below ``impostors``.
        impostors: number of impostor pairs.
        parallel: the processes that share the tiles.
        store: where counts are kept.

    Raises:
        ConfigError: the store is of other scores.
        ExportError: counts cannot be written.
    """
    wanted = list(ranks.values())
    kept = None if store is None else _same_everywhere(store.load(), parallel)
    done, counts = kept or (0, ScoreCounts(watch_for_sample(scores, wanted, impostors)))
    while wanted:
        _count(scores, counts, done, parallel, store)
        total = _summed(counts, parallel)
        bins = total.bins_of(wanted)
        if bins is not None and bins <= set(counts.watch.bins):
            return total.ranked(ranks)
        done, counts = 0, ScoreCounts(Watch() if bins is None else Watch.of(bins))
    return {}


def equal_error_of(scores: PairScores, genuine: int, impostors: int, parallel: Parallel) -> float:
    """The equal error rate over all pairs, in two passes.

    Args:
        scores: of all pairs.
        genuine: number of genuine pairs.
        impostors: number of impostor pairs.
        parallel: the processes that share the tiles.
    """
    watch = Watch()
    for _ in range(2):
        counts = ScoreCounts(watch)
        for tile in itertools.islice(scores.tiles(), parallel.rank, None, parallel.world_size):
            counts.add(*scores.of(tile, watch.floor))
        total = _summed(counts, parallel)
        watch = Watch.of({total.equal_error_bin(genuine, impostors)})
    return total.equal_error(genuine, impostors)


def _same_everywhere(kept: tuple[int, ScoreCounts] | None, parallel: Parallel) -> tuple[int, ScoreCounts] | None:
    """``kept``, if all processes were stopped in the same pass, else None."""
    words = torch.zeros(parallel.world_size, dtype=torch.int64)
    words[parallel.rank] = 0 if kept is None else 1 + zlib.crc32(repr(kept[1].watch).encode())
    return kept if len(set(parallel.sum(words).tolist())) == 1 else None


def _count(scores: PairScores, counts: ScoreCounts, done: int, parallel: Parallel, store: CountStore | None) -> None:
    """Add the scores of this process's tiles after the first ``done``."""
    own = list(itertools.islice(scores.tiles(), parallel.rank, None, parallel.world_size))
    for number, tile in enumerate(track(own[done:], "compare"), start=done + 1):
        counts.add(*scores.of(tile, counts.watch.floor))
        if store is not None and (store.is_due or number == len(own)):
            store.save(number, counts)


def _summed(counts: ScoreCounts, parallel: Parallel) -> ScoreCounts:
    """The counts of all processes."""
    if parallel.world_size == 1:
        return counts
    total = ScoreCounts(counts.watch)
    for own, sums in ((counts.upper, total.upper), (counts.lower, total.lower)):
        sums[:] = parallel.sum(torch.from_numpy(own)).numpy()
    return total
