from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qface.evaluation.score_histogram import score_histogram
from qface.evaluation.verdicts import Verifier, verdict_changes


def unit(seed: int, images: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(images, 4))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@given(st.integers(0, 1000), st.integers(2, 12))
def test_changes_are_those_of_every_pair(seed: int, images: int) -> None:
    before, after = Verifier(unit(seed, images), 0.1), Verifier(unit(seed + 1, images), -0.1)
    labels = np.arange(images) // 2
    expected = {(same, accepted): 0 for same in (True, False) for accepted in (True, False)}
    for i, j in itertools.combinations(range(images), 2):
        old, new = (float(judge.embeddings[i] @ judge.embeddings[j]) > judge.threshold for judge in (before, after))
        if old != new:
            expected[bool(labels[i] == labels[j]), new] += 1
    found = verdict_changes(before, after, labels, each=2)
    assert found.counts == expected
    assert len(found.largest) == sum(min(count, 2) for count in expected.values())
    assert all(change.accepted == (change.after > after.threshold) for change in found.largest)


def test_a_histogram_holds_every_pair_once() -> None:
    faces = np.array([[1, 0], [1, 0], [-1, 0]], np.float32)
    histogram = score_histogram(faces, [0, 0, 1], bins=4)
    assert histogram.edges == (-1, -0.5, 0, 0.5, 1)
    assert histogram.genuine == (0, 0, 0, 1)
    assert histogram.impostors == (1, 0, 0, 0)
