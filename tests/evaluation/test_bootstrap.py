"""Intervals by bootstrap over people, against sets in which people are really repeated."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qface.errors import ConfigError
from qface.evaluation import bootstrap, equal_error_rate, pair_scores, ten_fold_accuracy, tpr_at_fpr
from qface.evaluation.bootstrap import (
    Interval,
    bootstrap_eer,
    bootstrap_pairs,
    bootstrap_tpr,
    bootstrap_tpr_drop,
    bootstrap_tpr_of_scores,
)
from qface.evaluation.verification import single_fold_accuracy

FPRS = ("0.05", "0.3")


def faces(labels: np.ndarray, seed: int, spread: float = 1.0) -> np.ndarray:
    """Small whole numbers: products are exact and ties are many."""
    rng = np.random.default_rng(seed)
    return np.round(rng.normal(size=(labels.max() + 1, 6))[labels] * 3 + spread * rng.normal(size=(len(labels), 6)))


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def draw(people: int, seed: int) -> np.ndarray:
    """The multiplicities of the first replicate."""
    return np.random.default_rng(seed).multinomial(people, np.full(people, 1 / people))


def repeated(labels: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, people and copies of a set in which each person's images are there as often as the person is drawn."""
    rows = [(image, person, (person, copy)) for image, person in enumerate(labels) for copy in range(weights[person])]
    names = sorted({copy for _, _, copy in rows})
    return (
        np.array([image for image, _, _ in rows], np.int64),
        np.array([person for _, person, _ in rows], np.int64),
        np.array([names.index(copy) for _, _, copy in rows], np.int64),
    )


def repeated_scores(
    probes: np.ndarray, gallery: np.ndarray | None, labels: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Genuine and impostor scores of the repeated set; pairs of two copies of a person are no pairs."""
    images, people, copies = repeated(labels, weights)
    scores = (probes[images] @ (probes if gallery is None else gallery)[images].T).astype(np.float32)
    i, j = np.indices(scores.shape)
    counted = i < j if gallery is None else i != j
    genuine = scores[counted & (copies[:, None] == copies) & (images[:, None] != images)]
    return genuine, scores[counted & (people[:, None] != people)]


def obvious_tpr(genuine: np.ndarray, impostors: np.ndarray, fpr: str) -> float:
    hundredths = round(100 * float(fpr))
    return np.mean(genuine > np.sort(impostors)[::-1][len(impostors) * hundredths // 100])


def obvious_eer(genuine: np.ndarray, impostors: np.ndarray) -> float:
    thresholds = [-np.inf, *genuine, *impostors]
    return min(max(np.mean(impostors > each), np.mean(genuine <= each)) for each in thresholds)


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 5), min_size=8, max_size=14),
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.sampled_from([0, 10, 1000]),
    st.sampled_from([7, 2048]),
)
def test_a_replicate_is_a_set_with_repeated_people(
    images_of: list[int], seed: int, against_gallery: bool, margin: int, tile: int
) -> None:
    labels = np.repeat(np.arange(len(images_of) + 1), [2, *images_of])
    probes = faces(labels, seed).astype(np.float32)
    gallery = faces(labels, seed + 1).astype(np.float32) if against_gallery else None
    # Without a margin most replicates need scores that are not kept at first.
    few = mock.patch.object(bootstrap, "_with_margin", lambda rank: rank + margin)
    with few, mock.patch.object(pair_scores, "_TILE_SIZE", tile), mock.patch.object(bootstrap, "_BLOCK", 5):
        found = bootstrap_tpr(probes, labels, FPRS, gallery, replicates=1, seed=seed)
        eer = bootstrap_eer(equal_error_rate(probes, labels, gallery), probes, labels, gallery, 1, seed)
    measured = tpr_at_fpr(probes, labels, FPRS, gallery)
    genuine, impostors = repeated_scores(probes, gallery, labels, draw(len(images_of) + 1, seed))
    if not len(genuine) or not len(impostors):
        assert [*found.values(), eer] == [None] * 3
        return
    for fpr in FPRS:
        expected = pytest.approx(obvious_tpr(genuine, impostors, fpr))
        assert found[fpr] == (None if measured[fpr].tpr is None else Interval(expected, expected))
    expected = pytest.approx(obvious_eer(genuine, impostors))
    assert eer == Interval(expected, expected)


def test_faces_without_an_error_need_scores_too() -> None:
    """An equal error rate of 0 lies at rank 0, and a replicate needs the score at that rank."""
    labels = np.repeat(np.arange(8), 2)
    probes = np.eye(8, dtype=np.float32)[labels]
    with mock.patch.object(bootstrap, "_with_margin", lambda rank: rank):
        assert bootstrap_eer(0.0, probes, labels, replicates=5) == Interval(0.0, 0.0)


def many(people: int, images: int, seed: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    labels, rng = np.repeat(np.arange(people), images), np.random.default_rng(seed)
    return unit(rng.normal(size=(people, 8))[labels] + spread * rng.normal(size=(len(labels), 8))), labels


def test_a_drop_is_paired() -> None:
    probes, labels = many(60, 4, 0, 0.6)
    rough = unit(probes + 0.02 * np.random.default_rng(1).normal(size=probes.shape))
    expected = tpr_at_fpr(probes, labels, ("1e-2",))["1e-2"].tpr - tpr_at_fpr(rough, labels, ("1e-2",))["1e-2"].tpr
    drop = bootstrap_tpr_drop(probes, rough, labels, ("1e-2", "1e-6"))
    assert drop["1e-6"] is None
    assert drop["1e-2"].drop == pytest.approx(expected)
    assert drop["1e-2"].interval.low < drop["1e-2"].drop < drop["1e-2"].upper < drop["1e-2"].interval.high
    alone = bootstrap_tpr(rough, labels, ("1e-2",))["1e-2"]
    width = drop["1e-2"].interval.high - drop["1e-2"].interval.low
    assert width < 0.7 * (alone.high - alone.low)  # hard people are hard for both
    same = bootstrap_tpr_drop(probes, probes, labels, ("1e-2",))["1e-2"]
    assert (same.drop, same.interval, same.upper) == (0, Interval(0, 0), 0)
    mixed = bootstrap_tpr_drop(probes, rough, labels, ("1e-2",), gallery=probes)["1e-2"]
    against = tpr_at_fpr(rough, labels, ("1e-2",), probes)["1e-2"].tpr
    assert mixed.drop == pytest.approx(tpr_at_fpr(probes, labels, ("1e-2",))["1e-2"].tpr - against)


def test_intervals_cover_what_holds_for_everybody() -> None:
    everybody, labels = many(1500, 3, 3, 0.6)
    truth = tpr_at_fpr(everybody, labels, ("1e-2",))["1e-2"].tpr
    covered = 0
    for sample in range(40):
        chosen = np.isin(labels, np.random.default_rng(sample).choice(1500, 60, replace=False))
        interval = bootstrap_tpr(everybody[chosen], labels[chosen], ("1e-2",), seed=sample)["1e-2"]
        covered += interval.low <= truth <= interval.high
    assert covered >= 33  # 38 are expected; fewer than 33 would be one in two hundred


def test_rates_beyond_what_is_kept_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    probes, labels = many(40, 3, 0, 0.6)
    monkeypatch.setattr(bootstrap, "_MAX_KEPT", 1200)
    found = bootstrap_tpr(probes, labels, ("1e-1", "1e-2", "1e-6"))
    assert found["1e-1"] is None and found["1e-6"] is None
    assert found["1e-2"] is not None
    assert bootstrap_eer(0.1, probes, labels) is None
    monkeypatch.setattr(bootstrap, "_MAX_KEPT", 150)
    monkeypatch.setattr(bootstrap, "_with_margin", lambda rank: 100)
    assert bootstrap_eer(0.0, probes, labels) is None  # needs more than 150 scores


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from([1, 3]))
def test_listed_pairs_are_those_of_repeated_people(seed: int, known: bool, folds: int) -> None:
    rng = np.random.default_rng(seed)
    pairs, people = 90, 12
    same = rng.random(pairs) < 0.5
    first = rng.integers(0, people, pairs)
    second = np.where(same, first, (first + rng.integers(1, people, pairs)) % people)
    scores, fold = np.round(rng.normal(0.4 * same, 0.3), 1).astype(np.float32), np.arange(pairs) % folds
    if known:
        drawn = draw(len(np.unique([first, second])), seed)
        names = np.unique([first, second])
        weights = dict(zip(names, drawn, strict=True))
        counts = [
            weights[a] * (1 if is_same else weights[b]) for a, b, is_same in zip(first, second, same, strict=True)
        ]
    else:
        counts = list(draw(pairs, seed))
    rows = np.repeat(np.arange(pairs), counts)
    found = bootstrap_pairs(scores, same, fold, (first, second) if known else None, ("0.3",), 1, seed)
    if len(set(zip(fold[rows], same[rows], strict=True))) == 2 * folds:
        measure = single_fold_accuracy if folds == 1 else lambda *listed: ten_fold_accuracy(*listed, fold[rows])[0]
        accuracy = pytest.approx(measure(scores[rows], same[rows]))
        assert found.accuracy == Interval(accuracy, accuracy)
    if np.count_nonzero(~same) * 3 // 10 < 10:
        assert found.tpr_at_fpr["0.3"] is None
        return
    genuine, impostors = scores[rows][same[rows]], scores[rows][~same[rows]]
    eer, tpr = pytest.approx(obvious_eer(genuine, impostors)), pytest.approx(obvious_tpr(genuine, impostors, "0.3"))
    assert found.eer == Interval(eer, eer)
    assert found.tpr_at_fpr["0.3"] == Interval(tpr, tpr)
    if known:
        numbers = tuple(np.searchsorted(names, side) for side in (first, second))
        assert bootstrap_tpr_of_scores(scores, same, numbers, ("0.3",), 1, seed) == found.tpr_at_fpr


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ({"confidence": 1}, "confidence"),
        ({"confidence": float("nan")}, "confidence"),
        ({"replicates": 0}, "replicates"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, float], hint: str) -> None:
    probes, labels = many(10, 3, 0, 0.6)
    with pytest.raises(ConfigError, match=hint):
        bootstrap_tpr(probes, labels, ("1e-1",), **setting)
