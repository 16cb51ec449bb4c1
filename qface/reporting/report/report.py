"""The verb ``report``: write an HTML page about one compression."""

from __future__ import annotations

from pathlib import Path

from qface.compression.run_record import RunRecord
from qface.evaluation.bootstrap import REPLICATES
from qface.files import as_path, check_folder, replacing
from qface.preprocessing import PreprocessingOverride
from qface.progress import shows_progress
from qface.reporting.report.data import ReportData
from qface.reporting.report.measure import ReportSettings, measure_report
from qface.reporting.report.page import check_page, report_page

__all__ = ["report"]


@shows_progress
def report(
    run: RunRecord | str | Path,
    output: str | Path,
    fpr: str = "1e-3",
    faces: bool = True,
    latency_runs: int = 40,
    progress: bool = False,
    bootstrap: int = REPLICATES,
    preprocessing: PreprocessingOverride | None = None,
    stress: bool = False,
    run_dir: str | Path | None = None,
) -> ReportData:
    """Measure one compression and write an HTML page with all figures, without external resources.

    Args:
        run: a run folder of :func:`qface.compress`, or a record of the files.
        output: the HTML file to write.
        fpr: false-positive rate, such as ``"1e-3"``, at which changed verdicts are counted.
        faces: True to show up to 12 pairs of faces whose verdict changed. They are personal data.
        latency_runs: number of timed runs of each file; 0 skips latency, then equal models and faces give equal pages.
        progress: True to show progress on stderr.
        bootstrap: bootstrap replicates over identities for the 95 % confidence bands of ROC and DET; 0 skips them.
        preprocessing: preprocessing of the teacher, or some of its fields, if its file does not state them; student
            and file state theirs.
        stress: True to compare both models on degraded faces too, as :func:`qface.evaluate_stress` does. This takes
            about eleven times as long as the other embeddings.
        run_dir: folder for embeddings, from which an interrupted call resumes. None saves nothing.

    Returns:
        The figures of the page.

    Raises:
        ConfigError: a setting is out of range, the run folder has no record, or ``run_dir`` holds embeddings of other
            models or images.
        DependencyError: jinja2 or matplotlib is not installed.
        ExportError: the page cannot be written.
        QFaceError: a model or the faces cannot be read.

    Example:
        >>> record = qface.RunRecord("teacher.onnx", "student.safetensors", "student.onnx", "faces")
        >>> qface.report(record, "report.html", fpr="1e-2", latency_runs=1).agreement["agrees"]
        True
    """
    folder = None if run_dir is None else as_path(run_dir)
    settings = ReportSettings(fpr, faces, latency_runs, bootstrap, preprocessing, stress, folder)
    check_page()
    check_folder(output)
    data = measure_report(run if isinstance(run, RunRecord) else RunRecord.read(run), settings)
    page = report_page(data)
    with replacing(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return data
