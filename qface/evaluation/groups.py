"""Error rates of groups of identities, such as demographic groups, at one common threshold.

As in NIST's FRVT reports on demographics, both images of an impostor pair of a group are from that group. The threshold
gives the wanted false-positive rate over all impostor pairs of all identities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qface.checks import check_whole
from qface.data.folders import ImageFolder
from qface.data.groups import Grouping, read_groups
from qface.data.images import Images, Labels, labels_of
from qface.data.sources import as_image_source
from qface.errors import ImagesError
from qface.evaluation.bootstrap import CONFIDENCE, Draws, Interval, WeighedPairs, each_draw, images_of
from qface.evaluation.embedding import Embeddings, Model, as_embedder, embed
from qface.evaluation.pair_scores import OwnedScores, PairScores
from qface.evaluation.verification import count_pairs, impostors_needed, tpr_at_fpr, unmeasured
from qface.progress import shows_progress
from qface.results import Result

__all__ = [
    "GENUINE_NEEDED",
    "Estimate",
    "Gap",
    "Group",
    "GroupRates",
    "GroupsResult",
    "ModelGroups",
    "evaluate_groups",
    "measure_groups",
]

GENUINE_NEEDED = 100
"""Minimum number of genuine pairs for a false non-match rate; with fewer, one pair exceeds a percentage point."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """Measured value with its confidence interval.

    Args:
        value: measured value; None if there are too few pairs.
        interval: 95 % confidence interval by bootstrap over identities; None without bootstrap, or if a replicate
            divides by a false match rate of 0.
    """

    value: float | None
    interval: Interval | None


@dataclass(frozen=True)
class Group:
    """Size of a group.

    Args:
        name: name of the group.
        people: number of identities.
        images: number of images.
        genuine_pairs: number of genuine pairs.
        impostor_pairs: number of impostor pairs within the group.
    """

    name: str
    people: int
    images: int
    genuine_pairs: int
    impostor_pairs: int


@dataclass(frozen=True)
class GroupRates:
    """Error rates of a group, as fractions 0..1.

    Args:
        fnmr: false non-match rate, the fraction of its genuine pairs that are rejected.
        fmr: false match rate, the fraction of its impostor pairs that are accepted.
    """

    fnmr: Estimate
    fmr: Estimate


@dataclass(frozen=True)
class Gap:
    """Gap between the groups with the highest and the lowest error rate.

    Args:
        highest: name of the group with the highest rate.
        lowest: name of the group with the lowest rate.
        size: difference of false non-match rates, or ratio of false match rates. Its interval is for these two groups.
            None if the lowest false match rate is 0.
    """

    highest: str
    lowest: str
    size: Estimate


@dataclass(frozen=True)
class ModelGroups:
    """Error rates of one model in each group.

    Args:
        threshold: cosine above which a pair is accepted, in every group.
        rates: error rates by group.
        fnmr_gap: difference of false non-match rates; None with fewer than two measured groups.
        fmr_gap: ratio of false match rates; None likewise.
    """

    threshold: float
    rates: dict[str, GroupRates]
    fnmr_gap: Gap | None
    fmr_gap: Gap | None


@dataclass(frozen=True, repr=False)
class GroupsResult(Result):
    """Result of :func:`evaluate_groups`.

    Args:
        at_fpr: false-positive rate over all identities that sets the threshold, as a decimal.
        images: number of images embedded.
        identities: number of identities.
        ungrouped: number of identities without a group; they count only for the threshold.
        genuine_needed: minimum number of genuine pairs to measure a false non-match rate.
        impostors_needed: minimum number of impostor pairs to measure a false match rate.
        groups: size of each group.
        model: error rates of the model.
        reference: error rates of the reference at its own threshold; None without one.
        fnmr_gap_change: false non-match gap of the model minus that of the reference; None without reference or gaps.
        fmr_gap_change: false match gap of the model divided by that of the reference; None likewise.
        bootstrap: number of bootstrap replicates; 0 for no intervals.
        runtimes: runtime of the model and of the reference, such as ``"torch cpu"``.
        preprocessing: preprocessing of both and its source, in words.

    Example:
        >>> qface.evaluate_groups("student.onnx", "faces/", "groups.csv", at_fpr="1e-2").ungrouped
        0
    """

    at_fpr: str
    images: int
    identities: int
    ungrouped: int
    genuine_needed: int
    impostors_needed: int
    groups: tuple[Group, ...]
    model: ModelGroups
    reference: ModelGroups | None
    fnmr_gap_change: Estimate | None
    fmr_gap_change: Estimate | None
    bootstrap: int
    runtimes: tuple[str, ...] = ()
    preprocessing: tuple[str, ...] = ()

    def _key_figures(self) -> Mapping[str, object]:
        return {"images": self.images, "groups": len(self.groups), "at_fpr": self.at_fpr}

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values, ready for JSON."""
        return asdict(self)


@shows_progress
def evaluate_groups(
    model: Model,
    images: str | Path | ImageFolder,
    groups: str | Path,
    reference: Model | None = None,
    at_fpr: str = "1e-3",
    identities: str | Path | None = None,
    bootstrap: int = 0,
    flip: bool = False,
    batch_size: int = 64,
    progress: bool = False,
) -> GroupsResult:
    """Measure the error rates of groups at one common threshold, and the gaps between groups.

    Does not change ``model`` or ``reference``.

    Args:
        model: a module, the path of its file, ``package.module:factory``, or an Embedder.
        images: a folder of 112x112 crops with one subfolder per identity.
        groups: text file with one line ``person,group`` per identity; see :func:`qface.data.groups.read_groups`.
        reference: another model to compare with, such as the float network; it gets its own threshold.
        at_fpr: false-positive rate over the impostor pairs of all identities that sets the threshold, a decimal.
        identities: identities to use from the folder; see :func:`qface.data.identities.select_identities`.
        bootstrap: number of replicates over identities for 95 % confidence intervals; 0 computes none.
        flip: add the embedding of the mirrored image before normalization.
        batch_size: images per forward pass.
        progress: show progress on stderr.

    Returns:
        Error rates of each group and gaps between groups, for model and reference.

    Raises:
        ConfigError: ``at_fpr`` is not a decimal between 0 and 1, or ``bootstrap`` is negative.
        ImagesError: images or groups cannot be read or do not match, or there are too few pairs for ``at_fpr``.
        CheckpointError: a model file cannot be read.
        QFaceError: an embedding is not finite.

    Example:
        >>> result = qface.evaluate_groups("student.onnx", "faces/", "groups.csv", "teacher.onnx", at_fpr="1e-2")
        >>> [(group.name, group.people, group.impostor_pairs) for group in result.groups]
        [('A', 6, 540), ('B', 6, 540)]
    """
    check_whole(0, bootstrap=bootstrap)
    folder, labels = _labeled_folder(images, identities)
    grouping = read_groups(groups, folder)
    _check_rate(at_fpr, labels)
    embedders = [as_embedder(model), *([] if reference is None else [as_embedder(reference)])]
    embeddings = [embed(each, folder, batch_size, flip) for each in embedders]
    return replace(
        measure_groups(embeddings, labels, grouping, at_fpr, bootstrap),
        runtimes=tuple(str(getattr(each, "runtime", type(each).__name__)) for each in embedders),
        preprocessing=tuple(each.preprocessing.describe() for each in embedders),
    )


def _labeled_folder(images: Images, identities: str | Path | None) -> tuple[ImageFolder, Labels]:
    source = as_image_source(images, identities)
    labels = labels_of(source)
    if not isinstance(source, ImageFolder) or labels is None:
        raise ImagesError("groups need identities with names: pass a folder with one subfolder per identity")
    return source, labels


def _check_rate(at_fpr: str, labels: npt.ArrayLike) -> None:
    if reason := unmeasured([at_fpr], count_pairs(labels)[1]):
        raise ImagesError(f"the threshold cannot be measured: {reason}")


def measure_groups(
    embeddings: Sequence[Embeddings],
    labels: npt.ArrayLike,
    grouping: Grouping,
    at_fpr: str = "1e-3",
    bootstrap: int = 0,
) -> GroupsResult:
    """Measure the error rates of groups on embeddings; see :func:`evaluate_groups`.

    Args:
        embeddings: embeddings by the model and an optional reference, float32 [images, dimensions], L2-normalized.
        labels: [images], identity labels.
        grouping: group of each identity.
        at_fpr: false-positive rate that sets the threshold, a decimal.
        bootstrap: number of replicates for confidence intervals; 0 computes none.

    Raises:
        ConfigError: a setting is out of range.
        ImagesError: there are too few pairs for ``at_fpr``.
        QFaceError: the embeddings do not match the labels, or are not finite.

    Example:
        >>> faces, labels = np.eye(40, dtype=np.float32)[np.repeat(range(40), 4)], np.repeat(range(40), 4)
        >>> halves = Grouping(("a", "b"), np.repeat([0, 1], 20))
        >>> measure_groups([faces], labels, halves, "1e-2").model.rates["a"].fnmr.value
        0.0
    """
    _check_rate(at_fpr, labels)
    members = _Members(grouping, images_of(labels))
    groups, needed = members.groups(), impostors_needed(at_fpr)
    draws = Draws(len(members.images), bootstrap, 0, CONFIDENCE) if bootstrap else None
    errors = (
        _ErrorKind(np.array([group.genuine_pairs >= GENUINE_NEEDED for group in groups]), np.subtract, draws),
        _ErrorKind(np.array([group.impostor_pairs >= needed for group in groups]), _ratio, draws),
    )
    found = [_ModelRates.of(each, labels, members, at_fpr, draws) for each in embeddings]
    models = [each.as_figures(grouping.names, *errors) for each in found]
    changes = [kind.change([each.rates[:, at] for each in found]) for at, kind in enumerate(errors)]
    return GroupsResult(
        at_fpr=at_fpr,
        images=int(members.images.sum()),
        identities=len(members.images),
        ungrouped=grouping.ungrouped,
        genuine_needed=GENUINE_NEEDED,
        impostors_needed=needed,
        groups=groups,
        model=models[0],
        reference=models[1] if len(models) > 1 else None,
        fnmr_gap_change=changes[0],
        fmr_gap_change=changes[1],
        bootstrap=bootstrap,
    )


@dataclass(frozen=True, eq=False)
class _Members:
    """Groups with the number of images per identity.

    Args:
        grouping: group of each identity.
        images: int64 [identities], number of images of each.
    """

    grouping: Grouping
    images: Ints

    def groups(self) -> tuple[Group, ...]:
        once = np.ones(len(self.images), np.int64)
        columns = (self._sums(once), self._sums(self.images), *self._pairs(once))
        counts = zip(*(column.astype(np.int64).tolist() for column in columns), strict=True)
        return tuple(Group(name, *count) for name, count in zip(self.grouping.names, counts, strict=True))

    def rates_at(self, threshold: float, scores: PairScores) -> Floats:
        """Compute FNMR and FMR, [2, groups]."""
        accepted = np.zeros((2, len(self.grouping.names)))
        for tile in scores.tiles():
            for kind, pairs in enumerate(scores.with_people(tile, threshold)):
                accepted[kind] += self._sums_of(pairs, pairs.scores > np.float32(threshold))
        return self._rates(accepted, np.ones(len(self.images), np.int64))

    def rates_of_draw(self, pairs: WeighedPairs, weights: Ints, fprs: Sequence[str]) -> Floats:
        """Compute rates [fprs, 2, groups] at the thresholds of the replicate; inf where those are unknown."""
        genuine, impostors = pairs.genuine, pairs.impostors
        counts = weights[genuine.first], weights[impostors.first] * weights[impostors.second]
        found = []
        for threshold in pairs.thresholds_at(weights, fprs):
            accepted = [
                self._sums_of(kind, count * (kind.scores > threshold))
                for kind, count in zip((genuine, impostors), counts, strict=True)
            ]
            rates = self._rates(np.array(accepted), weights)
            found.append(rates if np.isfinite(threshold) else np.full_like(rates, np.inf))
        return np.array(found)

    def _rates(self, accepted: Floats, weights: Ints) -> Floats:
        """Compute rates [2, groups] from counts; NaN for groups without pairs."""
        genuine, impostors = self._pairs(weights)
        with np.errstate(invalid="ignore"):
            return np.stack([(genuine - accepted[0]) / genuine, accepted[1] / impostors])

    def _pairs(self, weights: Ints) -> tuple[Floats, Floats]:
        """Count the genuine and impostor pairs of each group, with ``weights`` [identities]."""
        drawn = weights * self.images
        genuine = self._sums(weights * (self.images * (self.images - 1) // 2))
        return genuine, (self._sums(drawn) ** 2 - self._sums(drawn**2)) / 2

    def _sums(self, of_person: Ints) -> Floats:
        """Sum over the identities of each group; exact in float64, because numbers of pairs are below 2^53."""
        inside = self.grouping.of_person >= 0
        return np.bincount(self.grouping.of_person[inside], of_person[inside], len(self.grouping.names)).astype(
            np.float64
        )

    def _sums_of(self, pairs: OwnedScores, counts: npt.NDArray[Any]) -> Floats:
        """Sum over the pairs with both images in the same group."""
        group = self.grouping.of_person[pairs.first]
        inside = (group >= 0) & (group == self.grouping.of_person[pairs.second])
        return np.bincount(group[inside], counts[inside], len(self.grouping.names)).astype(np.float64)


@dataclass(frozen=True, eq=False)
class _ModelRates:
    """Rates of a model on the original identities and on all replicates.

    Args:
        threshold: threshold for the original identities.
        rates: [1 + replicates, 2, groups], the original identities first.
    """

    threshold: float
    rates: Floats

    @classmethod
    def of(
        cls, embeddings: Embeddings, labels: npt.ArrayLike, members: _Members, at_fpr: str, draws: Draws | None
    ) -> _ModelRates:
        threshold = tpr_at_fpr(embeddings, labels, [at_fpr])[at_fpr].threshold
        assert threshold is not None  # _check_rate raises first
        drawn = None
        if draws is not None:
            drawn = each_draw(embeddings, labels, [at_fpr], None, draws, members.rates_of_draw)[at_fpr]
        rates = members.rates_at(threshold, PairScores(embeddings, labels))[None] if drawn is None else drawn
        return cls(threshold, rates)

    def as_figures(self, names: Sequence[str], fnmr: _ErrorKind, fmr: _ErrorKind) -> ModelGroups:
        missed, matched = self.rates[:, 0], self.rates[:, 1]
        rates = map(GroupRates, fnmr.estimates(missed), fmr.estimates(matched))
        return ModelGroups(
            threshold=self.threshold,
            rates=dict(zip(names, rates, strict=True)),
            fnmr_gap=fnmr.gap(missed, names),
            fmr_gap=fmr.gap(matched, names),
        )


@dataclass(frozen=True, eq=False)
class _ErrorKind:
    """Comparison of rates [1 + replicates, groups] of one kind of error.

    Args:
        measured: bool [groups], True for groups with enough pairs.
        compare: function for the gap of two groups and for the change between two models.
        draws: bootstrap replicates; None without bootstrap.
    """

    measured: npt.NDArray[np.bool_]
    compare: Callable[[Floats, Floats], Floats]
    draws: Draws | None

    def estimates(self, rates: Floats) -> list[Estimate]:
        return [
            self._estimate(column) if known else Estimate(None, None)
            for column, known in zip(rates.T, self.measured, strict=True)
        ]

    def gap(self, rates: Floats, names: Sequence[str]) -> Gap | None:
        if np.count_nonzero(self.measured) < 2:
            return None
        highest, lowest = self._extremes(rates)
        return Gap(names[highest], names[lowest], self._estimate(self._gaps(rates)))

    def change(self, models: Sequence[Floats]) -> Estimate | None:
        """Compare the gaps of two ``models``; each replicate has the same identities for both."""
        if len(models) < 2 or np.count_nonzero(self.measured) < 2:
            return None
        return self._estimate(self.compare(*(self._gaps(rates) for rates in models)))

    def _extremes(self, rates: Floats) -> tuple[int, int]:
        """Return the measured groups with the highest and the lowest rate, distinct even if all are equal."""
        ascending = np.flatnonzero(self.measured)[np.argsort(rates[0, self.measured], kind="stable")]
        return int(ascending[-1]), int(ascending[0])

    def _gaps(self, rates: Floats) -> Floats:
        highest, lowest = self._extremes(rates)
        return self.compare(rates[:, highest], rates[:, lowest])

    def _estimate(self, values: Floats) -> Estimate:
        interval = None if self.draws is None or np.isinf(values).any() else self.draws.interval(values)
        return Estimate(float(values[0]) if np.isfinite(values[0]) else None, interval)


def _ratio(first: Floats, second: Floats) -> Floats:
    """Divide ``first`` by ``second``; inf if one of them is inf or ``second`` is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.isinf(second), np.inf, first / second)
