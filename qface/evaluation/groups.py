"""Error rates of groups of people, such as demographic ones, at one threshold for everybody.

As in NIST's FRVT reports on demographics, the impostor pairs of a group are of two people of that group. The threshold
is the one that gives the wanted false match rate over all impostor pairs of everybody.
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
"""With fewer genuine pairs, one pair is more than a percentage point."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure and its confidence.

    Args:
        value: the figure; None where there are too few pairs to measure it.
        interval: its 95 % confidence interval, by bootstrap over people; None without replicates, and where a replicate
            divides by a false match rate of 0.
    """

    value: float | None
    interval: Interval | None


@dataclass(frozen=True)
class Group:
    """The people of a group and their pairs.

    Args:
        name: of the group.
        people: how many are in it.
        images: of these people.
        genuine_pairs: pairs of images of one of them.
        impostor_pairs: pairs of images of two of them.
    """

    name: str
    people: int
    images: int
    genuine_pairs: int
    impostor_pairs: int


@dataclass(frozen=True)
class GroupRates:
    """Error rates of a group, as shares, 0..1.

    Args:
        fnmr: false non-match rate, the share of its genuine pairs that is rejected.
        fmr: false match rate, the share of its impostor pairs that is accepted.
    """

    fnmr: Estimate
    fmr: Estimate


@dataclass(frozen=True)
class Gap:
    """The gap between the groups with the highest and the lowest error rate.

    Args:
        highest: the group with the highest rate.
        lowest: the group with the lowest.
        size: difference of false non-match rates, or ratio of false match rates. Its interval is that of these two
            groups. None where the lowest false match rate is 0.
    """

    highest: str
    lowest: str
    size: Estimate


@dataclass(frozen=True)
class ModelGroups:
    """The error rates of one model in each group.

    Args:
        threshold: the cosine above which a pair is accepted, in every group.
        rates: error rates by group.
        fnmr_gap: difference of false non-match rates; None unless two groups are measured.
        fmr_gap: ratio of false match rates; None likewise.
    """

    threshold: float
    rates: dict[str, GroupRates]
    fnmr_gap: Gap | None
    fmr_gap: Gap | None


@dataclass(frozen=True, repr=False)
class GroupsResult(Result):
    """The result of :func:`evaluate_groups`.

    Args:
        at_fpr: the false-positive rate over everybody that sets the threshold, as a decimal.
        images: images embedded.
        identities: people on them.
        ungrouped: those who are in no group; they count for the threshold alone.
        genuine_needed: a false non-match rate is measured from so many genuine pairs on.
        impostors_needed: a false match rate is measured from so many impostor pairs on.
        groups: the groups, by name.
        model: how the model does.
        reference: how the reference does, at a threshold of its own; None without one.
        fnmr_gap_change: gap of false non-match rates minus that of the reference; None without one, or without gaps.
        fmr_gap_change: gap of false match rates, divided by that of the reference; None likewise.
        bootstrap: replicates that intervals come from; 0 for none.
        runtimes: what computed the embeddings of the model and of the reference, such as ``"torch cpu"``.
        preprocessing: what they read and who says so, in words.

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
        """Plain Python values, ready for JSON."""
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
    """Measure the error rates of groups of people at one threshold, and the gaps between groups.

    Does not change ``model`` or ``reference``.

    Args:
        model: a module, the path of its file, ``package.module:factory``, or an Embedder.
        images: a folder of 112x112 crops with one subfolder a person.
        groups: a text file with one line ``person,group`` a person; see :func:`qface.data.groups.read_groups`.
        reference: another model to compare with, such as the float network; it has a threshold of its own.
        at_fpr: the false-positive rate over all impostor pairs of everybody that sets the threshold, a decimal.
        identities: which of the folder's people; see :func:`qface.data.identities.select_identities`.
        bootstrap: replicates for 95 % confidence intervals, over people; 0 computes none.
        flip: add the embedding of the mirrored image before normalizing.
        batch_size: images a forward pass.
        progress: show the stages on stderr.

    Raises:
        ConfigError: ``at_fpr`` is no such decimal, or ``bootstrap`` is below 0.
        ImagesError: images or groups cannot be read or do not fit, or there are too few pairs for ``at_fpr``.
        CheckpointError: a model file cannot be read.
        QFaceError: a model gives no finite embeddings.

    Example:
        >>> result = qface.evaluate_groups("student.onnx", "faces/", "groups.csv", "teacher.onnx", at_fpr="1e-2")
        >>> [(group.name, group.people, group.impostor_pairs) for group in result.groups]
        [('A', 6, 540), ('B', 6, 540)]
    """
    check_whole(0, bootstrap=bootstrap)
    folder, labels = _named(images, identities)
    grouping = read_groups(groups, folder)
    _check_rate(at_fpr, labels)
    embedders = [as_embedder(model), *([] if reference is None else [as_embedder(reference)])]
    embeddings = [embed(each, folder, batch_size, flip) for each in embedders]
    return replace(
        measure_groups(embeddings, labels, grouping, at_fpr, bootstrap),
        runtimes=tuple(str(getattr(each, "runtime", type(each).__name__)) for each in embedders),
        preprocessing=tuple(each.preprocessing.describe() for each in embedders),
    )


def _named(images: Images, identities: str | Path | None) -> tuple[ImageFolder, Labels]:
    source = as_image_source(images, identities)
    labels = labels_of(source)
    if not isinstance(source, ImageFolder) or labels is None:
        raise ImagesError("groups are of people by name: pass a folder with one subfolder a person")
    return source, labels


def _check_rate(at_fpr: str, labels: npt.ArrayLike) -> None:
    if reason := unmeasured([at_fpr], count_pairs(labels)[1]):
        raise ImagesError(f"no threshold can be set: {reason}")


def measure_groups(
    embeddings: Sequence[Embeddings],
    labels: npt.ArrayLike,
    grouping: Grouping,
    at_fpr: str = "1e-3",
    bootstrap: int = 0,
) -> GroupsResult:
    """Measure the error rates of groups on embeddings; see :func:`evaluate_groups`.

    Args:
        embeddings: of the model and, if there is one, of the reference; float32 [images, dimensions], L2-normalized.
        labels: [images], the identities.
        grouping: the group of each of them.
        at_fpr: the false-positive rate that sets the threshold, a decimal.
        bootstrap: replicates for intervals; 0 computes none.

    Raises:
        ConfigError: a setting is out of its range.
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
    found = [_Found.of(each, labels, members, at_fpr, draws) for each in embeddings]
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
    """Who is in each group, and with how many images.

    Args:
        grouping: the group of each person.
        images: int64 [people], how many there are of each.
    """

    grouping: Grouping
    images: Ints

    def groups(self) -> tuple[Group, ...]:
        once = np.ones(len(self.images), np.int64)
        columns = (self._sums(once), self._sums(self.images), *self._pairs(once))
        counts = zip(*(column.astype(np.int64).tolist() for column in columns), strict=True)
        return tuple(Group(name, *count) for name, count in zip(self.grouping.names, counts, strict=True))

    def rates_at(self, threshold: float, scores: PairScores) -> Floats:
        """Rates [2, groups] of rejected genuine and of accepted impostor pairs."""
        accepted = np.zeros((2, len(self.grouping.names)))
        for tile in scores.tiles():
            for kind, pairs in enumerate(scores.with_people(tile, threshold)):
                accepted[kind] += self._sums_of(pairs, pairs.scores > np.float32(threshold))
        return self._rates(accepted, np.ones(len(self.images), np.int64))

    def rates_of_draw(self, pairs: WeighedPairs, weights: Ints, fprs: Sequence[str]) -> Floats:
        """Rates [rates, 2, groups] at the draw's own thresholds; infinite where these are not known."""
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
        """Rates [2, groups]; not a number where a group has no pairs."""
        genuine, impostors = self._pairs(weights)
        with np.errstate(invalid="ignore"):
            return np.stack([(genuine - accepted[0]) / genuine, accepted[1] / impostors])

    def _pairs(self, weights: Ints) -> tuple[Floats, Floats]:
        """Genuine and impostor pairs of each group, where each person counts as often as ``weights`` say."""
        drawn = weights * self.images
        genuine = self._sums(weights * (self.images * (self.images - 1) // 2))
        return genuine, (self._sums(drawn) ** 2 - self._sums(drawn**2)) / 2

    def _sums(self, of_person: Ints) -> Floats:
        """Sums over the people of each group, which are exact: numbers of pairs are below 2^53."""
        inside = self.grouping.of_person >= 0
        return np.bincount(self.grouping.of_person[inside], of_person[inside], len(self.grouping.names)).astype(
            np.float64
        )

    def _sums_of(self, pairs: OwnedScores, counts: npt.NDArray[Any]) -> Floats:
        """Sums over the pairs of two images of each group."""
        group = self.grouping.of_person[pairs.first]
        inside = (group >= 0) & (group == self.grouping.of_person[pairs.second])
        return np.bincount(group[inside], counts[inside], len(self.grouping.names)).astype(np.float64)


@dataclass(frozen=True, eq=False)
class _Found:
    """The rates of a model in all draws.

    Args:
        threshold: of the people as they are.
        rates: [1 + replicates, 2, groups], of the people as they are and of replicates.
    """

    threshold: float
    rates: Floats

    @classmethod
    def of(
        cls, embeddings: Embeddings, labels: npt.ArrayLike, members: _Members, at_fpr: str, draws: Draws | None
    ) -> _Found:
        threshold = tpr_at_fpr(embeddings, labels, [at_fpr])[at_fpr].threshold
        assert threshold is not None  # since the rate is checked
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
    """One kind of errors, of which rates [1 + replicates, groups] are compared.

    Args:
        measured: bool [groups], those with enough pairs.
        compare: two groups' rates, and two models' gaps.
        draws: where the replicates are from; None without.
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
        """The gap of the first of two ``models`` against that of the second; both meet the same people in a draw."""
        if len(models) < 2 or np.count_nonzero(self.measured) < 2:
            return None
        return self._estimate(self.compare(*(self._gaps(rates) for rates in models)))

    def _extremes(self, rates: Floats) -> tuple[int, int]:
        """The measured groups with the highest and the lowest rate, two also where all are equal."""
        ascending = np.flatnonzero(self.measured)[np.argsort(rates[0, self.measured], kind="stable")]
        return int(ascending[-1]), int(ascending[0])

    def _gaps(self, rates: Floats) -> Floats:
        highest, lowest = self._extremes(rates)
        return self.compare(rates[:, highest], rates[:, lowest])

    def _estimate(self, values: Floats) -> Estimate:
        interval = None if self.draws is None or np.isinf(values).any() else self.draws.interval(values)
        return Estimate(float(values[0]) if np.isfinite(values[0]) else None, interval)


def _ratio(first: Floats, second: Floats) -> Floats:
    """``first / second``; infinite where one of the two is, or the second is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.isinf(second), np.inf, first / second)
