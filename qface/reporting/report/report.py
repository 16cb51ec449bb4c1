"""The verb ``report``."""

from __future__ import annotations

from pathlib import Path

from qface.compression.run_record import RunRecord
from qface.evaluation.bootstrap import REPLICATES
from qface.files import check_folder, replacing
from qface.reporting.report.data import ReportData
from qface.reporting.report.measure import ReportSettings, measure_report
from qface.reporting.report.page import check_page, report_page

__all__ = ["report"]


def report(
    run: RunRecord | str | Path,
    output: str | Path,
    fpr: str = "1e-3",
    faces: bool = True,
    latency_runs: int = 40,
    progress: bool = False,
    bootstrap: int = REPLICATES,
) -> ReportData:
    """Measure one compression, and write a page that shows it and loads nothing.

    Args:
        run: a run folder, or the record of what was compressed.
        output: the page to write (``.html``).
        fpr: false-positive rate at which changed verdicts are looked for.
        faces: True to show the faces whose verdict changed most, at most a dozen pairs. They are personal data.
        latency_runs: timed calls of each file; 0 leaves latency out, and the same models and faces give the same bytes.
        progress: show bars on stderr.
        bootstrap: replicates for 95 % confidence bands of ROC and DET, over people; 0 leaves them out.

    Returns:
        The figures of the page.

    Raises:
        ConfigError: a setting is wrong, or the run folder holds no record.
        DependencyError: jinja2 or matplotlib is not installed.
        ExportError: the page cannot be written.
        QFaceError: a model or the faces cannot be read.

    Example:
        >>> record = qface.RunRecord("teacher.onnx", "student.safetensors", "student.onnx", "faces")
        >>> qface.report(record, "report.html", fpr="1e-2", latency_runs=1).agreement["agrees"]
        True
    """
    settings = ReportSettings(fpr, faces, latency_runs, progress, bootstrap)
    check_page()
    check_folder(output)
    data = measure_report(run if isinstance(run, RunRecord) else RunRecord.read(run), settings)
    page = report_page(data)
    with replacing(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return data
