"""Stress conditions in a report, and its continuation after a stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

import qface
from qface.data.stress import STRESS_CONDITIONS
from qface.reporting.report.data import ReportData
from tests.networks import TinyFaceNet, tiny_face_net
from tests.small_record import write_record


@pytest.fixture
def record(tmp_path: Path, crops: Callable[..., Path]) -> qface.RunRecord:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    return replace(write_record(tmp_path, crops), teacher=f"{__name__}:counting_net")


class Counter:
    """Images that the teacher has embedded, and the number after which it is stopped."""

    images = 0
    last = float("inf")


def counting_net() -> TinyFaceNet:
    network = tiny_face_net()
    network.register_forward_pre_hook(count)
    return network


def count(_: object, inputs: tuple[Tensor]) -> None:
    Counter.images += len(inputs[0])
    if Counter.images > Counter.last:
        raise KeyboardInterrupt


def report(record: qface.RunRecord, page: Path, run_dir: Path | None = None) -> ReportData:
    return qface.report(record, page, "1e-1", latency_runs=0, bootstrap=2, stress=True, run_dir=run_dir)


def test_conditions_are_measured_and_a_stopped_report_continues(
    record: qface.RunRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Counter, "images", 0)
    whole, embedded = report(record, tmp_path / "whole.html"), Counter.images
    page = (tmp_path / "whole.html").read_text()
    for name in ("none", *STRESS_CONDITIONS):
        assert f'<th scope="row">{name}</th>' in page
    assert "<svg" in page.partition('<h2 id="stress">')[2].partition("</section>")[0]

    Counter.images, embeddings = 0, tmp_path / "embeddings"
    monkeypatch.setattr(Counter, "last", 0.8 * embedded)
    with pytest.raises(KeyboardInterrupt):
        report(record, tmp_path / "stopped.html", embeddings)
    assert not (tmp_path / "stopped.html").exists()
    Counter.images = 0
    assert report(record, tmp_path / "stopped.html", embeddings) == whole
    assert Counter.images < embedded / 2
    assert (tmp_path / "stopped.html").read_text() == page

    Counter.last = float("inf")
    settings = {"reference": record.teacher, "bootstrap": 2, "run_dir": embeddings / "stress"}
    expected = qface.evaluate_stress(record.file, record.images, **settings)
    assert whole.stress == expected and whole.to_dict()["stress"] == expected.to_dict()
