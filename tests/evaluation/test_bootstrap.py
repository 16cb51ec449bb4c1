"""Bootstrap over people: each replicate is what an evaluation of really repeated people would give."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qface.errors import ConfigError
from qface.evaluation.bootstrap import bootstrap_tpr, bootstrap_tpr_drop
from qface.evaluation.verification import tpr_at_fpr

Faces = npt.NDArray[np.float32]


def faces(seed: int, images_of: list[int], noise: float) -> tuple[Faces, npt.NDArray[np.int64]]:
    """Embeddings of people around random centers."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(images_of)), images_of)
    rows = rng.normal(size=(len(images_of), 8))[labels] + noise * rng.normal(size=(len(labels), 8))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels


def repeated_tpr(embeddings: Faces, labels: npt.NDArray[np.int64], drawn: npt.NDArray[np.int64], fpr: str) -> float:
    """TPR where each person's images are written down as often as the person is drawn."""
    rows = [
        (person, copy, index)
        for person, count in enumerate(drawn)
        for copy in range(count)
        for index in np.flatnonzero(labels == person)
    ]
    genuine, impostors = [], []
    for at, (person, copy, index) in enumerate(rows):
        for other, its_copy, its_index in rows[at + 1 :]:
            score = embeddings[index] @ embeddings[its_index]
            if person != other:
                impostors.append(score)
            elif copy == its_copy:
                genuine.append(score)
    threshold = sorted(impostors, reverse=True)[int(len(impostors) * Fraction(fpr))]
    return sum(score > threshold for score in genuine) / max(len(genuine), 1)


@settings(max_examples=8)
@given(st.integers(0, 1000), st.lists(st.integers(1, 4), min_size=9, max_size=12), st.sampled_from(["0.1", "0.4"]))
def test_a_replicate_is_the_evaluation_of_repeated_people(seed: int, images_of: list[int], fpr: str) -> None:
    embeddings, labels = faces(seed, [2, *images_of], 0.7)
    people = len(images_of) + 1
    (drawn,) = np.random.default_rng(seed).multinomial(people, np.full(people, 1 / people), size=1)
    found = bootstrap_tpr(embeddings, labels, [fpr], replicates=1, seed=seed)[fpr]
    if found is not None:
        # BLAS may round a cosine otherwise in a block than alone, which moves at most a tie
        assert found.low == pytest.approx(repeated_tpr(embeddings, labels, drawn, fpr), abs=0.02)


def test_the_drop_of_the_people_as_they_are_is_the_difference_of_both_rates() -> None:
    clean, labels = faces(0, [4] * 40, 0.5)
    rough = clean + 0.2 * np.random.default_rng(1).normal(size=clean.shape).astype(np.float32)
    rough /= np.linalg.norm(rough, axis=1, keepdims=True)
    before, after = (tpr_at_fpr(each, labels, ["1e-2"])["1e-2"].tpr for each in (clean, rough))
    found = bootstrap_tpr_drop(clean, rough, labels, ["1e-2", "1e-6"])
    assert found["1e-6"] is None
    drop = found["1e-2"]
    assert drop is not None and before is not None and after is not None
    assert drop.drop == pytest.approx(before - after)
    assert drop.interval.low < drop.drop < drop.upper < drop.interval.high


def test_an_interval_covers_the_rate_of_all_people_as_often_as_it_says() -> None:
    everybody, labels = faces(3, [3] * 2000, 0.6)
    truth = tpr_at_fpr(everybody, labels, ["1e-2"])["1e-2"].tpr
    assert truth is not None
    covered = 0
    for sample in range(40):
        people = np.random.default_rng(sample).choice(2000, 50, replace=False)
        of = np.isin(labels, people)
        interval = bootstrap_tpr(everybody[of], labels[of], ["1e-2"], seed=sample)["1e-2"]
        assert interval is not None
        covered += interval.low <= truth <= interval.high
    assert covered >= 33  # 38 are expected of 40


def test_a_confidence_of_one_is_refused() -> None:
    embeddings, labels = faces(0, [3] * 10, 0.5)
    with pytest.raises(ConfigError, match="confidence is 1"):
        bootstrap_tpr(embeddings, labels, ["0.1"], confidence=1)
