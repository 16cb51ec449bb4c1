"""1:N identification: who of those enrolled is on an image, and whether anybody is.

Of a folder, one image of each person who has several is enrolled, drawn by a seed. The other images of these people are
mated probes, and the images of people who have one image are non-mated probes, of people whom nobody enrolled.
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
from qface.evaluation.bootstrap import CONFIDENCE, Draws, Interval, WeighedPairs, descending
from qface.evaluation.embedding import Embeddings, Model, as_embedder, embed
from qface.evaluation.pair_scores import OwnedScores, Scores
from qface.evaluation.verification import ranks_of
from qface.progress import shows_progress
from qface.results import Result

__all__ = ["FPIRS", "IdentificationResult", "ProbeScores", "Protocol", "evaluate_identification", "probe_scores"]

FPIRS = ("1e-1", "1e-2", "1e-3")
"""The false-positive identification rates that are reported, as exact decimals."""

_RANKS = (1, 5)
_PROBES = 2048  # compared with the gallery at a time


@dataclass(frozen=True, eq=False)
class Protocol:
    """Enrolled images and probes; numbers of images, int64 [any] each.

    Args:
        gallery: one image of each person who is enrolled.
        mated: probes of these people.
        non_mated: probes of other people.
    """

    gallery: npt.NDArray[np.int64]
    mated: npt.NDArray[np.int64]
    non_mated: npt.NDArray[np.int64]

    @classmethod
    def of(cls, labels: npt.ArrayLike, seed: int = 0) -> Protocol:
        """Enroll one image, drawn at random, of each person who has several.

        Args:
            labels: [images], the identities.
            seed: of the draw.

        Raises:
            ConfigError: ``seed`` is out of its range.
            ImagesError: fewer than two people have several images.

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
            raise ImagesError("identification needs two people with two images each, or more: pass more images")
        shuffled = np.random.default_rng(seed).permutation(np.flatnonzero(several))
        gallery = np.sort(shuffled[np.unique(people[shuffled], return_index=True)[1]])
        return cls(gallery, np.setdiff1d(np.flatnonzero(several), gallery), np.flatnonzero(~several))


@dataclass(frozen=True, eq=False)
class ProbeScores:
    """Comparison of each probe with the gallery.

    Args:
        mate: float32 [mated probes], the cosine with the person's own entry.
        rank: int64 [mated probes], 1 where no other entry is as similar or more.
        highest: float32 [non-mated probes], the greatest cosine with any entry.
    """

    mate: Scores
    rank: npt.NDArray[np.int64]
    highest: Scores


@dataclass(frozen=True, repr=False)
class IdentificationResult(Result):
    """Figures of :func:`evaluate_identification`; shares are fractions, 0..1.

    Args:
        rank_1: share of mated probes that are most similar to their own entry (closed set).
        rank_5: share of those whose own entry is among the five most similar.
        tpir_at_fpir: true-positive identification rate at each false-positive identification rate (open set): the share
            of mated probes whose own entry ranks first and is above the threshold that the given share of non-mated
            probes is above with some entry. None where fewer than 10 of these are.
        thresholds: the cosines above which somebody is found, for the same rates.
        enrolled: people in the gallery, by one image each.
        mated_probes: images of these people.
        non_mated_probes: images of others.
        seed: of the draw of enrolled images.
        runtime: what computed the embeddings, such as ``"torch cpu"``.
        preprocessing: what the model reads and who says so, in words.
        bootstrap: replicates that intervals come from; 0 for none.
        rank_intervals: 95 % confidence intervals by ``"rank_1"`` and ``"rank_5"``, over people; the gallery stays.
        tpir_intervals: likewise of ``tpir_at_fpir``.

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
        """Plain Python values, ready for JSON."""
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
    """Measure how well ``model`` finds people among those enrolled, by the protocol of this module.

    Does not change ``model``.

    Args:
        model: a module, the path of its file, ``package.module:factory``, or an Embedder.
        images: a folder of 112x112 crops with one subfolder a person, or other labeled images.
        identities: of a folder, which people; see :func:`qface.data.identities.select_identities`.
        seed: of the images that are enrolled, and of replicates.
        bootstrap: replicates for 95 % confidence intervals, over people; 0 computes none.
        flip: add the embedding of the mirrored image before normalizing.
        batch_size: images a forward pass.
        progress: show the stages on stderr.

    Raises:
        ConfigError: ``seed`` or ``bootstrap`` is out of its range.
        ImagesError: the images cannot be read, carry no labels, or fewer than two people have several.
        CheckpointError: the model file cannot be read.
        QFaceError: the model gives no finite embeddings.

    Example:
        >>> qface.evaluate_identification("student.onnx", "faces/").enrolled
        12
    """
    check_whole(0, bootstrap=bootstrap)
    source = as_image_source(images, identities)
    labels = labels_of(source)
    if labels is None:
        raise ImagesError("identification needs to know who is who: pass a folder with one subfolder a person")
    protocol = Protocol.of(labels, seed)
    embedder = as_embedder(model)
    scores = probe_scores(embed(embedder, source, batch_size, flip), labels, protocol)
    pairs = _weighed(scores, labels, protocol)
    measured = [fpir for fpir, rank in ranks_of(FPIRS, len(scores.highest)).items() if rank is not None]
    once = np.ones(int(labels.max()) + 2, np.int64)
    rates = dict(zip(measured, map(float, pairs.tprs(once, measured)), strict=True))
    found = dict(zip(measured, map(float, pairs.thresholds_at(once, measured)), strict=True))
    draws = Draws(int(labels.max()) + 1, bootstrap, seed, CONFIDENCE, fixed=1) if bootstrap else None
    rank_intervals, tpir_intervals = _intervals(scores, pairs, labels[protocol.mated], draws, measured)
    return IdentificationResult(
        rank_1=float(np.mean(scores.rank <= 1)),
        rank_5=float(np.mean(scores.rank <= 5)),
        tpir_at_fpir={fpir: rates.get(fpir) for fpir in FPIRS},
        thresholds={fpir: found.get(fpir) for fpir in FPIRS},
        enrolled=len(protocol.gallery),
        mated_probes=len(protocol.mated),
        non_mated_probes=len(protocol.non_mated),
        seed=seed,
        runtime=str(getattr(embedder, "runtime", type(embedder).__name__)),
        preprocessing=embedder.preprocessing.describe(),
        bootstrap=bootstrap,
        rank_intervals=rank_intervals,
        tpir_intervals=tpir_intervals,
    )


def probe_scores(embeddings: Embeddings, labels: npt.ArrayLike, protocol: Protocol) -> ProbeScores:
    """Compare all probes with the gallery, some at a time.

    Args:
        embeddings: float32 [images, dimensions], L2-normalized.
        labels: [images], the identities.
        protocol: who is enrolled.

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


def _weighed(scores: ProbeScores, labels: Labels, protocol: Protocol) -> WeighedPairs:
    """Probes with the weights of their people; the unit after the last person always counts once."""
    once = int(labels.max()) + 1
    found = np.where(scores.rank == 1, scores.mate, np.float32(-np.inf))
    mated, strangers = labels[protocol.mated], labels[protocol.non_mated]
    return WeighedPairs(
        descending([OwnedScores(found, mated, mated)]),
        descending([OwnedScores(scores.highest, strangers, np.full(len(strangers), once))]),
        lambda weights: int(weights[strangers].sum()),
    )


def _intervals(
    scores: ProbeScores, pairs: WeighedPairs, owners: Labels, draws: Draws | None, fpirs: Sequence[str]
) -> tuple[dict[str, Interval | None], dict[str, Interval | None]]:
    """Those of rank-k rates and of TPIR; empty without replicates."""
    if draws is None:
        return {}, {}

    def hits(weights: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        counts = weights[owners]
        shares = [counts[scores.rank <= rank].sum() / max(counts.sum(), 1) for rank in _RANKS]
        return np.array(shares if counts.any() else [np.nan] * len(_RANKS))

    ranks = draws.each(hits)
    tpirs = draws.each(lambda weights: pairs.tprs(weights, fpirs))
    of_rates: dict[str, Interval | None] = dict.fromkeys(FPIRS)
    return (
        {f"rank_{rank}": draws.interval(ranks[:, at]) for at, rank in enumerate(_RANKS)},
        of_rates | {fpir: draws.interval(tpirs[:, at]) for at, fpir in enumerate(fpirs)},
    )
