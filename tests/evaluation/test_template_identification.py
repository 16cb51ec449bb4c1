"""1:N identification in two galleries against a slow, obvious implementation of the protocol's text."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qface.data import TemplateGalleries
from qface.evaluation import FPIRS, Interval
from qface.evaluation.template_identification import identify_templates

SUBJECTS = 30


def templates(seed: int, probes: int = 420) -> tuple[np.ndarray, TemplateGalleries]:
    """Whole-number embeddings with many ties, galleries of 12 and of 15 subjects, and probes, in any order."""
    rng = np.random.default_rng(seed)
    enrolled = rng.permutation(SUBJECTS)[:27]
    subjects = np.r_[enrolled, enrolled[[0, 12]], rng.integers(-1, SUBJECTS, probes)]
    faces = 2 * rng.normal(size=(SUBJECTS + 1, 5))
    joined = np.round(faces[subjects] + 1.2 * rng.normal(size=(len(subjects), 5))).astype(np.float32)
    order = rng.permutation(len(subjects))
    places = np.argsort(order)
    listed = np.flatnonzero(subjects[27:] >= 0) + 27
    galleries = {"G1": places[:12], "G2": places[12:27]}
    return joined[order], TemplateGalleries(subjects[order], galleries, places[listed])


def obvious_rates(joined: np.ndarray, lists: TemplateGalleries, gallery: str, times: np.ndarray) -> dict[str, float]:
    """Rates of one gallery if the probes of each subject are there ``times`` over."""
    ranks, mates, strangers = [], [], []
    for probe in lists.probes:
        subject = lists.subjects[probe]
        scores = {lists.subjects[entry]: joined[entry] @ joined[probe] for entry in lists.galleries[gallery]}
        for _ in range(times[subject]):
            if subject in scores:
                mates.append(scores[subject])
                ranks.append(1 + sum(scores[other] >= scores[subject] for other in scores if other != subject))
            else:
                strangers.append(max(scores.values()))
    strangers.sort(reverse=True)
    found = {f"rank_{k}": np.mean([rank <= k for rank in ranks]) for k in (1, 5)}
    return found | {
        fpir: np.mean([score > strangers[int(len(strangers) * Fraction(fpir))] for score in mates]) for fpir in FPIRS
    }


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1))
def test_rates_are_those_of_a_loop_over_probes(seed: int) -> None:
    joined, lists = templates(seed)
    found = identify_templates(joined, lists)
    once, means = np.ones(SUBJECTS, int), []
    for gallery, enrolled in lists.galleries.items():
        each, expected = found.galleries[gallery], obvious_rates(joined, lists, gallery, once)
        mated = np.isin(lists.subjects[lists.probes], lists.subjects[enrolled])
        assert (each.enrolled, each.mated_probes) == (len(enrolled), np.count_nonzero(mated))
        assert each.mated_probes + each.non_mated_probes == len(lists.probes)
        assert (each.rates.rank_1, each.rates.rank_5) == pytest.approx((expected["rank_1"], expected["rank_5"]))
        for fpir in ("1e-1", "1e-2"):
            assert each.rates.tpir_at_fpir[fpir] == pytest.approx(expected[fpir])
        assert each.rates.tpir_at_fpir["1e-3"] is None and each.thresholds["1e-3"] is None  # of fewer than 1,000 probes
        means.append(expected)
    mean = found.mean
    assert (mean.rank_1, mean.rank_5) == pytest.approx([np.mean([e[k] for e in means]) for k in ("rank_1", "rank_5")])
    assert mean.tpir_at_fpir["1e-1"] == pytest.approx(np.mean([each["1e-1"] for each in means]))
    assert mean.tpir_at_fpir["1e-3"] is None
    assert mean.rank_intervals == mean.tpir_intervals == {}


def test_a_mate_need_not_rank_first_in_the_open_set() -> None:
    directions = np.eye(3, dtype=np.float32)
    confused = (0.8 * directions[0] + 0.6 * directions[1])[None]  # of subject 1, more similar to subject 0
    joined = np.concatenate([directions, confused, np.tile(directions[2], (100, 1))])
    lists = TemplateGalleries(
        np.r_[0, 1, 2, 1, np.full(100, 2)], {"G1": np.array([0, 1]), "G2": np.array([2])}, np.arange(3, 104)
    )
    found = identify_templates(joined, lists).galleries["G1"]
    assert (found.rates.rank_1, found.rates.rank_5) == (0, 1)
    assert (found.rates.tpir_at_fpir["1e-1"], found.thresholds["1e-1"]) == (1, 0)


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1))
def test_a_replicate_has_the_same_subjects_in_both_galleries(seed: int) -> None:
    joined, lists = templates(seed)
    found = identify_templates(joined, lists, bootstrap=1)
    times = np.random.default_rng(0).multinomial(SUBJECTS, np.full(SUBJECTS, 1 / SUBJECTS))
    expected = {gallery: obvious_rates(joined, lists, gallery, times) for gallery in lists.galleries}
    rates = {gallery: each.rates for gallery, each in found.galleries.items()} | {"mean": found.mean}
    expected["mean"] = {name: (expected["G1"][name] + expected["G2"][name]) / 2 for name in expected["G1"]}
    for name, each in rates.items():
        for rank, interval in each.rank_intervals.items():
            assert interval == Interval(pytest.approx(expected[name][rank]), pytest.approx(expected[name][rank]))
        tpirs = {fpir: pytest.approx(expected[name][fpir]) for fpir in ("1e-1", "1e-2")}
        assert each.tpir_intervals == {fpir: Interval(tpir, tpir) for fpir, tpir in tpirs.items()} | {"1e-3": None}
    assert found.mean.rank_1 == identify_templates(joined, lists).mean.rank_1
