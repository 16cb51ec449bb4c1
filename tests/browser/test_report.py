"""A report in a headless Chromium."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import qface
from qface.errors import ConfigError
from qface.reporting.report.data import ReportData
from tests.browser.devtools import Page
from tests.browser.test_page import complaints, page
from tests.small_record import write_record

__all__ = ["page"]

PHONE = 390


@pytest.fixture
def record(tmp_path: Path, crops: Callable[..., Path]) -> qface.RunRecord:
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": step, "loss": 1 / (1 + step)}) + "\n" for step in range(9)))
    return replace(write_record(tmp_path, crops), log=str(log), trials=({"bits": 4, "kept": True},))


def written(record: qface.RunRecord, path: Path, faces: bool = True) -> tuple[ReportData, str]:
    data = qface.report(record, path, fpr="1e-1", faces=faces, latency_runs=0)
    return data, path.read_text()


def test_the_page_fits_a_phone_and_loads_nothing(record: qface.RunRecord, page: Page, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    written(record, tmp_path / "report.html")
    page.call("Page.navigate", url=(tmp_path / "report.html").as_uri())
    page.evaluate("new Promise((done) => document.readyState === 'complete' ? done() : addEventListener('load', done))")
    page.resize(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE
    colors = []
    for dark in (False, True):
        page.screenshot(tmp_path / f"report-{dark}.png", PHONE, dark)
        colors.append(
            page.evaluate(
                "[document.body, document.querySelector('svg text')].map("
                "(each, i) => getComputedStyle(each)[i ? 'fill' : 'backgroundColor'])"
            )
        )
    assert colors[0][0] != colors[1][0]
    assert colors[0][1] != colors[1][1]
    requests = [
        event["params"]["request"]["url"] for event in page.events if event.get("method") == "Network.requestWillBeSent"
    ]
    assert {url.partition(":")[0] for url in requests} <= {"file", "data"}
    assert complaints(page) == []


def test_a_run_folder_gives_the_same_bytes_and_faces_are_left_out(record: qface.RunRecord, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    data, page_of_record = written(record, tmp_path / "one.html")
    record.write(tmp_path / "run")
    assert qface.report(tmp_path / "run", tmp_path / "two.html", fpr="1e-1", latency_runs=0) == data
    assert (tmp_path / "two.html").read_text() == page_of_record
    assert not re.search(r'(src|href)="(?!data:|#)', page_of_record)
    assert data.changes is not None
    assert page_of_record.count("<img") == 2 * len(data.changes.pairs)

    evaluated = qface.evaluate(record.file, record.images)
    assert data.models[1].tpr_at_fpr == evaluated.tpr_at_fpr
    assert data.agreement["agrees"]
    assert "<img" not in written(record, tmp_path / "none.html", faces=False)[1]


def test_a_wrong_rate_is_refused(record: qface.RunRecord, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"fpr must be one of .*, got '2'"):
        qface.report(record, tmp_path / "report.html", fpr="2")
