"""Confidence of the curves of a report."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import qface
from qface.data import ImageFolder
from qface.errors import ConfigError
from qface.evaluation import bootstrap_tpr, embed
from qface.evaluation.score_histogram import ScoreHistogram
from qface.reporting import figures
from qface.reporting.report.data import Curve, ModelFigures
from tests.small_record import write_record

CURVE = Curve((0.1, 0.01, 0.001), (1.0, 0.99, 0.9), (0.1, 0.2, 0.3), (1.0, 0.95, None), (1.0, 1.0, None))


def model(curve: Curve) -> ModelFigures:
    histogram = ScoreHistogram((-1.0, 1.0), (1.0,), (1.0,))
    return ModelFigures("file", "", "", 2, {}, {}, None, None, curve, histogram)


def bands(figure: object) -> list[np.ndarray]:
    """Corners of what is filled."""
    return [path.vertices for filled in figure.axes[0].collections for path in filled.get_paths()]


def test_bands_reach_from_low_to_high() -> None:
    pytest.importorskip("matplotlib")
    (roc,) = bands(figures.roc_figure([model(CURVE)]))
    assert {tuple(corner) for corner in roc.round(6)} == {(0.1, 100.0), (0.01, 95.0), (0.01, 100.0)}
    (det,) = bands(figures.det_figure([model(CURVE)]))
    # A rate of zero has no place on a log axis: the band ends at the least rate that is drawn.
    assert {tuple(corner) for corner in det.round(6)} == {(0.01, 0.01), (0.01, 0.05)}


def test_without_intervals_no_band_is_drawn() -> None:
    pytest.importorskip("matplotlib")
    plain = [model(replace(CURVE, low=(None,) * 3, high=(None,) * 3)), model(Curve((), (), (), (), ()))]
    for draw in (figures.roc_figure, figures.det_figure):
        assert bands(draw(plain)) == []


@pytest.fixture
def record(tmp_path: Path, crops: Callable[..., Path]) -> qface.RunRecord:
    return write_record(tmp_path, crops)


def test_a_report_has_the_intervals_of_its_rates(record: qface.RunRecord, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    data = qface.report(record, tmp_path / "one.html", "1e-1", latency_runs=0, bootstrap=20)
    curve = data.models[1].curve
    labels = np.repeat(np.arange(6), 4)
    expected = bootstrap_tpr(embed(record.file, ImageFolder(record.images)), labels, ("1e-1",), replicates=20)["1e-1"]
    at = curve.fpr.index(0.1)
    assert (curve.low[at], curve.high[at]) == (expected.low, expected.high)
    assert curve.fpr[:2] == (0.5, 0.2) and curve.low[:2] == (None, None)
    page = (tmp_path / "one.html").read_text()
    assert f"[{100 * expected.low:.2f}, {100 * expected.high:.2f}]</td>" in page
    assert "20 replicates" in page
    fills = re.findall(r'style="fill: ([^;]+); fill-opacity: 0.2', page)
    assert {"var(--line-0)", "var(--line-1)"} <= set(fills)  # colors that fit light and dark

    plain = qface.report(record, tmp_path / "two.html", "1e-1", latency_runs=0, bootstrap=0)
    assert plain.models[1].curve.tpr == curve.tpr and set(plain.models[1].curve.low) == {None}
    assert "replicates" not in (tmp_path / "two.html").read_text()
    assert plain.stress is None and "tress conditions" not in page
    with pytest.raises(ConfigError, match="bootstrap"):
        qface.report(record, tmp_path / "three.html", bootstrap=-1)
