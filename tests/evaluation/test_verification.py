from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qface.errors import ConfigError, ImagesError, PairsError, QFaceError
from qface.evaluation import (
    FPRS,
    OperatingPoint,
    count_pairs,
    equal_error_rate,
    equal_error_rate_of_scores,
    pair_scores,
    rates_at,
    score_counts,
    ten_fold_accuracy,
    tpr_at_fpr,
    unmeasured,
)

NOT_MEASURED = OperatingPoint(None, None)


def all_scores(probes, labels, gallery=None):
    """Genuine and impostor scores by the definition, in one matrix."""
    scores = probes @ (probes if gallery is None else gallery).T
    i, j = np.indices(scores.shape)
    counted = i < j if gallery is None else i != j
    same = labels[:, None] == labels[None, :]
    return scores[counted & same], scores[counted & ~same]


def brute_force(probes, labels, gallery=None):
    genuine, impostor = all_scores(probes, labels, gallery)
    points = {}
    for k in range(1, 7):
        rank = len(impostor) // 10**k
        points[f"1e-{k}"] = NOT_MEASURED
        if len(impostor) >= 10 * 10**k:
            threshold = np.sort(impostor)[::-1][rank]
            points[f"1e-{k}"] = OperatingPoint(float(np.mean(genuine > threshold)), float(threshold))
    return points


def assert_same_points(found, expected):
    assert found.keys() == expected.keys()
    for fpr, point in expected.items():
        assert found[fpr].threshold == pytest.approx(point.threshold, abs=1e-6)
        assert found[fpr].tpr == pytest.approx(point.tpr, abs=1e-12)


def faces(images, dimensions, people, spread=1.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, people, images)
    centers = rng.standard_normal((people, dimensions))
    embeddings = centers[labels] + spread * rng.standard_normal((images, dimensions))
    return (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype(np.float32), labels


@st.composite
def small_sets(draw):
    """Labels and small whole numbers as embeddings: products are exact and ties are many."""
    labels = draw(hnp.arrays(np.int64, st.integers(12, 40), elements=st.integers(0, 5)))
    shape = (len(labels), draw(st.integers(1, 4)))
    values = hnp.arrays(np.float32, shape, elements=st.integers(-3, 3))
    return labels, draw(values), draw(values)


def usable(labels):
    counts = np.unique(labels, return_counts=True)[1]
    return len(counts) > 1 and counts.max() > 1


@given(small_sets().filter(lambda drawn: usable(drawn[0])), st.sampled_from([7, 16, 2048]), st.booleans())
def test_equals_brute_force_with_ties_and_tiles_of_any_size(drawn, tile, sampled):
    labels, probes, gallery = drawn
    large = mock.patch.object(score_counts, "_LARGE", 1 if sampled else 2**25)
    with mock.patch.object(pair_scores, "_TILE_SIZE", tile), large:
        assert tpr_at_fpr(probes, labels) == brute_force(probes, labels)
        assert tpr_at_fpr(probes, labels, gallery=gallery) == brute_force(probes, labels, gallery)


@pytest.mark.parametrize("images", [200, 2000, 4100])
def test_equals_brute_force_on_embeddings(images):
    probes, labels = faces(images, 128, people=images // 4, spread=3.0)
    gallery, _ = faces(images, 128, people=images // 4, spread=3.0, seed=1)
    assert_same_points(tpr_at_fpr(probes, labels), brute_force(probes, labels))
    assert_same_points(tpr_at_fpr(probes, labels, gallery=gallery), brute_force(probes, labels, gallery))


def test_agrees_with_the_roc_curve_of_sklearn():
    metrics = pytest.importorskip("sklearn.metrics")
    probes, labels = faces(300, 16, people=60, spread=1.5)
    genuine, impostor = all_scores(probes, labels)
    truth = np.r_[np.ones(len(genuine)), np.zeros(len(impostor))]
    fpr, tpr, _ = metrics.roc_curve(truth, np.r_[genuine, impostor], drop_intermediate=False)
    for key, point in tpr_at_fpr(probes, labels, fprs=("1e-1", "1e-2", "1e-3")).items():
        accepted = len(impostor) // round(1 / float(key)) / len(impostor)
        assert point.tpr == pytest.approx(tpr[np.searchsorted(fpr, accepted + 1e-12) - 1])


def test_identical_embeddings_accept_nobody():
    points = tpr_at_fpr(np.ones((100, 2), np.float32), np.arange(100) // 2)
    assert points["1e-1"] == OperatingPoint(0.0, 2.0)


def test_perfect_embeddings_accept_every_genuine_pair():
    labels = np.arange(200) // 2
    points = tpr_at_fpr(np.eye(100, dtype=np.float32)[labels], labels)
    assert points["1e-3"] == OperatingPoint(1.0, 0.0)


def test_order_of_images_does_not_matter():
    probes, labels = faces(300, 16, people=50)
    shuffled = np.random.default_rng(0).permutation(300)
    assert_same_points(tpr_at_fpr(probes[shuffled], labels[shuffled]), tpr_at_fpr(probes, labels))


def test_labels_may_be_names():
    probes, labels = faces(100, 16, people=20)
    names = np.array([f"person {label:02d}" for label in labels])
    assert_same_points(tpr_at_fpr(probes, names), tpr_at_fpr(probes, labels))


def test_a_rate_is_measured_from_ten_accepted_impostors_on():
    # 2 people with 5 and 20 images: 100 impostor pairs, 200 ordered ones
    labels = np.repeat([0, 1], [5, 20])
    probes = np.random.default_rng(0).standard_normal((25, 4)).astype(np.float32)
    assert count_pairs(labels) == (200, 100)
    points = tpr_at_fpr(probes, labels, fprs=("1e-1", "0.0999", "0.05"))
    assert [point.tpr is None for point in points.values()] == [False, True, True]
    assert tpr_at_fpr(probes, labels, fprs=("0.05",), gallery=probes)["0.05"].tpr is not None


@given(st.lists(st.integers(0, 6), min_size=2, max_size=30).filter(usable))
def test_count_pairs_counts_all_pairs(labels):
    same = np.equal.outer(labels, labels)
    ordered = ~np.eye(len(labels), dtype=bool)
    assert count_pairs(labels, ordered=True) == ((same & ordered).sum(), (~same).sum())
    assert count_pairs(labels) == ((same & ordered).sum() // 2, (~same).sum() // 2)


def test_one_person_or_no_genuine_pair_is_an_error():
    with pytest.raises(ImagesError, match="at least two identities, got 1"):
        tpr_at_fpr(np.ones((3, 2), np.float32), [0, 0, 0])
    with pytest.raises(ImagesError, match="genuine pairs"):
        tpr_at_fpr(np.ones((3, 2), np.float32), [0, 1, 2])


@pytest.mark.parametrize("fpr", ["0", "1", "-1e-3", "often", "1/0", "1e-99999999", "1e99999999"])
def test_a_rate_is_a_decimal_between_0_and_1(fpr):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        tpr_at_fpr(np.ones((3, 2), np.float32), [0, 0, 1], fprs=(fpr,))


def test_embeddings_must_match_and_be_finite():
    ones = np.ones((3, 2), np.float32)
    with pytest.raises(QFaceError, match="do not match labels"):
        tpr_at_fpr(ones, [0, 0, 1, 1])
    with pytest.raises(QFaceError, match=r"gallery \[2, 2\] do not match"):
        tpr_at_fpr(ones, [0, 0, 1], gallery=ones[:2])
    with pytest.raises(QFaceError, match="2 dimensions and the gallery 1"):
        tpr_at_fpr(ones, [0, 0, 1], gallery=ones[:, :1])
    with pytest.raises(QFaceError, match="not finite"):
        tpr_at_fpr(ones * np.float32("nan"), [0, 0, 1])


def test_all_rates_are_reported_by_default():
    probes, labels = faces(30, 4, people=5)
    assert tuple(tpr_at_fpr(probes, labels)) == FPRS


def balanced_accuracy(accepted, same):
    return (accepted[same].mean() + (~accepted[~same]).mean()) / 2


@settings(max_examples=200)
@example(283968388, 2, 1)  # a held-out score lies exactly on the threshold
@given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.sampled_from([1, 2, 6]))
def test_ten_folds_equal_brute_force(seed, folds, decimals):
    rng = np.random.default_rng(seed)
    fold = np.repeat(np.arange(folds), 12)
    same = rng.permuted(np.tile(np.arange(12) < 5, (folds, 1)), axis=1).ravel()
    scores = np.round(rng.normal(0.4 * same, 0.3), decimals)
    accuracies = []
    for k in range(folds):
        others = scores[fold != k]
        cuts = np.unique(others)[::-1]
        cuts = np.r_[(cuts[:-1] + cuts[1:]) / 2, -np.inf]
        balanced = [balanced_accuracy(others > cut, same[fold != k]) for cut in cuts]
        best = cuts[np.argmax(np.round(balanced, 12))]
        accuracies.append(balanced_accuracy(scores[fold == k] > best, same[fold == k]))
    found = ten_fold_accuracy(scores, same, fold)
    assert found == pytest.approx((np.mean(accuracies), np.std(accuracies)))


def test_separable_pairs_are_all_right():
    same = np.tile([True, False], 10)
    assert ten_fold_accuracy(np.where(same, 0.8, 0.1), same, np.repeat(range(5), 4)) == (1.0, 0.0)


def test_equal_scores_are_a_coin_toss():
    same = np.tile([True, False], 10)
    assert ten_fold_accuracy(np.zeros(20), same, np.repeat(range(5), 4)) == (0.5, 0.0)


@pytest.mark.parametrize("score", [np.nan, np.inf])
def test_scores_must_be_finite(score):
    same = np.tile([True, False], 10)
    scores = np.where(same, 0.8, 0.1)
    scores[3] = score
    with pytest.raises(QFaceError, match="the scores are not finite"):
        ten_fold_accuracy(scores, same, np.repeat(range(5), 4))


def test_folds_of_one_kind_are_not_judged():
    same = np.array([True, False, True, False, True, True])
    scores = np.array([0.9, 0.1, 0.9, 0.1, 0.2, 0.0])
    assert ten_fold_accuracy(scores, same, [0, 0, 1, 1, 2, 2])[1] == 0.0


def test_fewer_than_two_usable_folds_are_an_error():
    with pytest.raises(PairsError, match=r"^1 of 2 folds"):
        ten_fold_accuracy([0.9, 0.1, 0.9], [True, False, True], [0, 0, 1])
    with pytest.raises(PairsError, match=r"^0 of 0 folds"):
        ten_fold_accuracy([], [], [])


@given(small_sets().filter(lambda drawn: usable(drawn[0])), st.integers(-20, 20), st.sampled_from([1, 7, 2048]))
def test_the_rates_of_a_threshold_equal_brute_force(drawn, threshold, tile):
    labels, probes, gallery = drawn
    with mock.patch.object(pair_scores, "_TILE_SIZE", tile):
        for mates in (None, gallery):
            rates = rates_at(threshold, probes, labels, mates)
            genuine, impostor = all_scores(probes, labels, mates)
            assert (rates.tpr, rates.fpr) == (np.mean(genuine > threshold), np.mean(impostor > threshold))


def test_the_threshold_of_a_rate_accepts_that_rate():
    embeddings, labels = faces(300, 16, 60)
    point = tpr_at_fpr(embeddings, labels, ["1e-2"])["1e-2"]
    rates = rates_at(point.threshold, embeddings, labels)
    assert rates.tpr == point.tpr
    assert 0.0099 < rates.fpr <= 0.01


def obvious_equal_error(genuine, impostor):
    """The smallest e for which some threshold keeps both rates of errors at e or below."""
    cuts = [-np.inf, *genuine, *impostor]
    return min(max(np.mean(genuine <= cut), np.mean(impostor > cut)) for cut in cuts)


@given(small_sets().filter(lambda drawn: usable(drawn[0])), st.sampled_from([7, 2048]))
def test_the_equal_error_rate_equals_brute_force(drawn, tile):
    labels, probes, gallery = drawn
    with mock.patch.object(pair_scores, "_TILE_SIZE", tile):
        for mates in (None, gallery):
            genuine, impostor = all_scores(probes, labels, mates)
            expected = pytest.approx(obvious_equal_error(genuine, impostor), abs=1e-15)
            assert equal_error_rate(probes, labels, mates) == expected
            same = np.repeat([True, False], [len(genuine), len(impostor)])
            assert equal_error_rate_of_scores(np.r_[genuine, impostor], same) == expected


def test_the_equal_error_rate_of_embeddings_and_its_bounds():
    embeddings, labels = faces(300, 16, 60, spread=1.5)
    expected = obvious_equal_error(*all_scores(embeddings, labels))
    assert equal_error_rate(embeddings, labels) == pytest.approx(expected, abs=1e-4)
    assert equal_error_rate_of_scores([0.1, 0.9], [True, False]) == 1.0
    with pytest.raises(PairsError, match="both genuine and impostor pairs"):
        equal_error_rate_of_scores([0.1, 0.9], [True, True])


def test_a_rate_that_cannot_be_measured_is_told_with_one_that_can():
    said = "FPR 1e-4 needs 100,000 impostor pairs, there are 14,587: use 1e-3, or more people"
    assert unmeasured(FPRS, 14587) == said
    assert unmeasured(["0.3"], 20) == "FPR 0.3 needs 34 impostor pairs, there are 20: use more people"
    assert unmeasured(FPRS, 10**7) is None
