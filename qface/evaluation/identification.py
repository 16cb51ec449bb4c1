"""1:N identification of probes in a gallery, closed set (rank-k) and open set (TPIR at FPIR).

The gallery holds one image, drawn by a seed, of each identity with several. Their other images are mated probes. Images
of identities with a single image are non-mated probes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qface.checks import check_seed, check_whole
from qface.data.images import Images, Labels, labels_of
from qface.data.sources import as_image_source
from qface.errors import ImagesError
from qface.evaluation.bootstrap import CONFIDENCE, Draws, Floats, Interval, WeighedPairs, descending
from qface.evaluation.embedding import Embeddings, Model, as_embedder, embed
from qface.evaluation.pair_scores import OwnedScores, Scores
from qface.evaluation.verification import MIN_FALSE_POSITIVES, ranks_of
from qface.progress import shows_progress
from qface.results import Result

__all__ = [
    "FPIRS",
    "IdentificationRates",
    "IdentificationResult",
    "ProbeScores",
    "Protocol",
    "Search",
    "draw_rates",
    "evaluate_identification",
    "probe_scores",
]

FPIRS = ("1e-1", "1e-2", "1e-3")
"""Reported false-positive identification rates, as exact decimals."""

_RANKS = {"rank_1": 1, "rank_5": 5}
_PROBES = 2048  # probes compared with the gallery at a time


@dataclass(frozen=True, eq=False)
class Protocol:
    """Split of images into gallery and probes; image indices, int64 [any] each.

    Args:
        gallery: one image of each enrolled identity.
        mated: probes of enrolled identities.
        non_mated: probes of other identities.
    """

    gallery: npt.NDArray[np.int64]
    mated: npt.NDArray[np.int64]
    non_mated: npt.NDArray[np.int64]

    @classmethod
    def of(cls, labels: npt.ArrayLike, seed: int = 0) -> Protocol:
        """Enroll one random image of each identity with several.

        Args:
            labels: [images], identity labels.
            seed: random seed.

        Raises:
            ConfigError: ``seed`` is out of range.
            ImagesError: fewer than two identities have several images.

        Example:
            >>> protocol = Protocol.of([0, 0, 1, 1, 1, 2])
            >>> len(protocol.gallery), len(protocol.mated), protocol.non_mated.tolist()
            (2, 3, [5])
        """
        check_seed(seed)
        people, images_of = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)[1:]
        people = people.reshape(-1)
        several = images_of[people] > 1
        if np.count_nonzero(images_of > 1) < 2:
            raise ImagesError("identification needs at least two identities with two images each: pass more images")
        shuffled = np.random.default_rng(seed).permutation(np.flatnonzero(several))
        gallery = np.sort(shuffled[np.unique(people[shuffled], return_index=True)[1]])
        return cls(gallery, np.setdiff1d(np.flatnonzero(several), gallery), np.flatnonzero(~several))


@dataclass(frozen=True, eq=False)
class ProbeScores:
    """Scores of the probes against the gallery.

    Args:
        mate: float32 [mated probes], cosine with the gallery image of the same identity.
        rank: int64 [mated probes], rank of that image, from 1; ties count against it.
        highest: float32 [non-mated probes], maximum cosine with any gallery image.
    """

    mate: Scores
    rank: npt.NDArray[np.int64]
    highest: Scores


@dataclass(frozen=True)
class IdentificationRates:
    """Rates of 1:N identification, as fractions 0..1, with 95 % confidence intervals over identities.

    Args:
        rank_1: rank-1 identification rate (closed set).
        rank_5: rank-5 identification rate (closed set).
        tpir_at_fpir: true-positive identification rate at each false-positive identification rate (open set); None if
            too few non-mated probes may exceed the threshold.
        rank_intervals: intervals of ``"rank_1"`` and ``"rank_5"``; empty without bootstrap.
        tpir_intervals: intervals of ``tpir_at_fpir``, likewise.
    """

    rank_1: float
    rank_5: float
    tpir_at_fpir: dict[str, float | None]
    rank_intervals: dict[str, Interval | None]
    tpir_intervals: dict[str, Interval | None]

    @classmethod
    def of(cls, drawn: Floats, draws: Draws | None) -> IdentificationRates:
        """Summarize rates.

        Args:
            drawn: [1 + replicates, rates], rates of :meth:`Search.rates`, with the original identities first.
            draws: the replicates; None without bootstrap.
        """
        names = [*_RANKS, *FPIRS]
        values = {name: None if np.isnan(rate) else float(rate) for name, rate in zip(names, drawn[0], strict=True)}
        intervals = {} if draws is None else dict(zip(names, map(draws.interval, drawn.T), strict=True))
        return cls(
            rank_1=float(drawn[0, 0]),
            rank_5=float(drawn[0, 1]),
            tpir_at_fpir={fpir: values[fpir] for fpir in FPIRS},
            rank_intervals={name: intervals[name] for name in _RANKS if intervals},
            tpir_intervals={fpir: intervals[fpir] for fpir in FPIRS if intervals},
        )


@dataclass(frozen=True, repr=False)
class IdentificationResult(Result):
    """Result of :func:`evaluate_identification`; rates are fractions 0..1.

    Args:
        rank_1: rank-1 identification rate (closed set).
        rank_5: rank-5 identification rate (closed set).
        tpir_at_fpir: true-positive identification rate at each false-positive identification rate (open set): fraction
            of mated probes whose mate ranks first and exceeds the threshold. FPIR is the fraction of non-mated probes
            with any cosine above the threshold. None if fewer than 10 non-mated probes may exceed it.
        thresholds: cosine above which a probe is identified, at the same rates.
        enrolled: number of identities in the gallery, with one image each.
        mated_probes: number of probes of enrolled identities.
        non_mated_probes: number of probes of other identities.
        seed: random seed of the gallery.
        runtime: runtime of the model, such as ``"torch cpu"``.
        preprocessing: preprocessing of the model and its source, in words.
        bootstrap: number of bootstrap replicates; 0 for no intervals.
        rank_intervals: 95 % confidence intervals of ``"rank_1"`` and ``"rank_5"`` over identities, for a fixed gallery.
        tpir_intervals: 95 % confidence intervals of ``tpir_at_fpir``, likewise.

    Example:
        >>> qface.evaluate_identification("student.onnx", "faces/").mated_probes
        60
    """

    rank_1: float
    rank_5: float
    tpir_at_fpir: dict[str, float | None]
    thresholds: dict[str, float | None]
    enrolled: int
    mated_probes: int
    non_mated_probes: int
    seed: int
    runtime: str
    preprocessing: str = ""
    bootstrap: int = 0
    rank_intervals: dict[str, Interval | None] = field(default_factory=dict)
    tpir_intervals: dict[str, Interval | None] = field(default_factory=dict)

    def _key_figures(self) -> Mapping[str, object]:
        return {"enrolled": self.enrolled, "rank_1": self.rank_1, "tpir_at_fpir": self.tpir_at_fpir}

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values, ready for JSON."""
        return asdict(self)


@shows_progress
def evaluate_identification(
    model: Model,
    images: Images,
    identities: str | Path | None = None,
    seed: int = 0,
    bootstrap: int = 0,
    flip: bool = False,
    batch_size: int = 64,
    progress: bool = False,
) -> IdentificationResult:
    """Measure 1:N identification: rank-k rates and TPIR at FPIR.

    One random image of each identity with several is enrolled; identities with one image are non-mated probes. Does not
    change ``model``.

    Args:
        model: a module, the path of its file, ``package.module:factory``, or an Embedder.
        images: a folder of 112x112 crops with one subfolder per identity, or other labeled images.
        identities: identities to use from a folder; see :func:`qface.data.identities.select_identities`.
        seed: random seed of the gallery and the bootstrap.
        bootstrap: number of replicates over identities for 95 % confidence intervals; 0 computes none.
        flip: add the embedding of the mirrored image before normalization.
        batch_size: images per forward pass.
        progress: show progress on stderr.

    Returns:
        Identification rates and thresholds, with the size of gallery and probes.

    Raises:
        ConfigError: ``seed`` or ``bootstrap`` is out of range.
        ImagesError: the images cannot be read, are unlabeled, or fewer than two identities have several.
        CheckpointError: the model file cannot be read.
        QFaceError: an embedding is not finite.

    Example:
        >>> qface.evaluate_identification("student.onnx", "faces/").enrolled
        12
    """
    check_whole(0, bootstrap=bootstrap)
    source = as_image_source(images, identities)
    labels = labels_of(source)
    if labels is None:
        raise ImagesError("identification needs labeled images: pass a folder with one subfolder per identity")
    protocol = Protocol.of(labels, seed)
    embedder = as_embedder(model)
    embeddings = embed(embedder, source, batch_size, flip)
    search = Search(probe_scores(embeddings, labels, protocol), labels, protocol, max_rank=1)
    people = int(labels.max()) + 1
    draws = Draws(people, bootstrap, seed, CONFIDENCE, fixed=1) if bootstrap else None
    rates = IdentificationRates.of(draw_rates([search], people, draws)[:, 0], draws)
    return IdentificationResult(
        rank_1=rates.rank_1,
        rank_5=rates.rank_5,
        tpir_at_fpir=rates.tpir_at_fpir,
        thresholds=search.thresholds,
        enrolled=len(protocol.gallery),
        mated_probes=len(protocol.mated),
        non_mated_probes=len(protocol.non_mated),
        seed=seed,
        runtime=str(getattr(embedder, "runtime", type(embedder).__name__)),
        preprocessing=embedder.preprocessing.describe(),
        bootstrap=bootstrap,
        rank_intervals=rates.rank_intervals,
        tpir_intervals=rates.tpir_intervals,
    )


def probe_scores(embeddings: Embeddings, labels: npt.ArrayLike, protocol: Protocol) -> ProbeScores:
    """Compare all probes with the gallery, in batches.

    Args:
        embeddings: float32 [images, dimensions], L2-normalized.
        labels: [images], identity labels.
        protocol: gallery and probes.

    Example:
        >>> faces = np.eye(3, dtype=np.float32)[[0, 0, 1, 1, 2]]
        >>> probe_scores(faces, [0, 0, 1, 1, 2], Protocol.of([0, 0, 1, 1, 2])).rank.tolist()
        [1, 1]
    """
    people = np.asarray(labels)
    gallery = embeddings[protocol.gallery]
    mates, ranks, highest = [np.empty(0, np.float32)], [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    for start in range(0, len(protocol.mated), _PROBES):
        probes = protocol.mated[start : start + _PROBES]
        scores = embeddings[probes] @ gallery.T
        own = people[probes, None] == people[None, protocol.gallery]
        mates.append(scores[own])
        ranks.append(np.count_nonzero((scores >= mates[-1][:, None]) & ~own, axis=1) + 1)
    for start in range(0, len(protocol.non_mated), _PROBES):
        highest.append((embeddings[protocol.non_mated[start : start + _PROBES]] @ gallery.T).max(axis=1))
    return ProbeScores(np.concatenate(mates), np.concatenate(ranks), np.concatenate(highest))


class Search:
    """Search of probes in a gallery, for weighted identities.

    Args:
        scores: scores of the probes.
        labels: [images], identities, numbered from 0.
        protocol: gallery and probes.
        max_rank: maximum rank at which a mated probe counts as identified in the open set. None: any rank.
        min_false_positives: minimum number of non-mated probes that an FPIR must accept to be measured.

    Attributes:
        thresholds: cosine above which a probe is identified, by FPIR; None for rates that are not measured.
    """

    def __init__(
        self,
        scores: ProbeScores,
        labels: Labels,
        protocol: Protocol,
        max_rank: int | None,
        min_false_positives: int = MIN_FALSE_POSITIVES,
    ) -> None:
        self._ranks, self._mated = scores.rank, labels[protocol.mated]
        self._pairs = _weighed(scores, labels, protocol, max_rank)
        ranks = ranks_of(FPIRS, len(scores.highest), min_false_positives)
        self._measured = [fpir for fpir, rank in ranks.items() if rank is not None]
        self._columns = [len(_RANKS) + FPIRS.index(fpir) for fpir in self._measured]
        once = np.ones(int(labels.max()) + 2, np.int64)
        found = dict(zip(self._measured, map(float, self._pairs.thresholds_at(once, self._measured)), strict=True))
        self.thresholds = {fpir: found.get(fpir) for fpir in FPIRS}

    def rates(self, weights: npt.NDArray[np.int64]) -> Floats:
        """Compute rank 1, rank 5, and TPIR at each of :data:`FPIRS`; NaN if not measured or without probes.

        Args:
            weights: weight of each identity, and a last 1 for the gallery.
        """
        counts = weights[self._mated]
        rates = np.full(len(_RANKS) + len(FPIRS), np.nan)
        if counts.any():
            hits = [counts[self._ranks <= rank].sum() for rank in _RANKS.values()]
            rates[: len(_RANKS)] = np.array(hits) / counts.sum()
        rates[self._columns] = self._pairs.tprs(weights, self._measured)
        return rates


def draw_rates(searches: Sequence[Search], identities: int, draws: Draws | None) -> Floats:
    """Compute the rates of searches with the original identities, and with those of each replicate.

    Args:
        searches: searches of images of the same identities.
        identities: number of identities.
        draws: the replicates, with one fixed unit; None computes the rates of the original identities only.

    Returns:
        [1 + replicates, searches, rates]; see :meth:`Search.rates`.
    """

    def rates(weights: npt.NDArray[np.int64]) -> Floats:
        return np.stack([search.rates(weights) for search in searches])

    return rates(np.ones(identities + 1, np.int64))[None] if draws is None else draws.each(rates)


def _weighed(scores: ProbeScores, labels: Labels, protocol: Protocol, max_rank: int | None) -> WeighedPairs:
    """Prepare weighted TPIR; the unit after the last identity stands for the gallery and has weight 1."""
    once = int(labels.max()) + 1
    found = scores.mate if max_rank is None else np.where(scores.rank <= max_rank, scores.mate, np.float32(-np.inf))
    mated, strangers = labels[protocol.mated], labels[protocol.non_mated]
    return WeighedPairs(
        descending([OwnedScores(found, mated, mated)]),
        descending([OwnedScores(scores.highest, strangers, np.full(len(strangers), once))]),
        lambda weights: int(weights[strangers].sum()),
    )
