"""Single figures: those of the report, from its JSON, an exported file, or the log of a distillation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner

import qface
from qface.choices import FigureKind
from qface.cli import main
from qface.errors import ConfigError, ExportError
from qface.evaluation.bootstrap import Interval, TprDrop
from qface.evaluation.score_histogram import ScoreHistogram
from qface.evaluation.stress_evaluation import StressFigures, StressResult
from qface.reporting import figures
from qface.reporting.drawing import save_figure
from qface.reporting.report.data import Curve, ModelFigures, stress_of_report
from tests.small_record import write_record

pytest.importorskip("matplotlib")

CURVE = Curve((0.1, 0.01), (1.0, 0.9), (0.1, 0.2), (0.95, None), (1.0, None))
HISTOGRAM = ScoreHistogram((-1.0, 0.0, 1.0), (0.25, 0.75), (1.0, 0.0))
MODELS = [
    ModelFigures(name, "", "", 2, {}, {"1e-2": cosine, "1e-3": None}, None, None, CURVE, HISTOGRAM)
    for name, cosine in (("teacher", 0.25), ("file", 0.5))
]
ROWS = [{"step": step, "loss": 1 / step} for step in range(1, 20)]
DROP = TprDrop(0.1, Interval(0.0, 0.2), 0.15)
RATES = dict.fromkeys(("1e-3", "1e-4", "1e-5"))
STRESS = StressResult(
    tuple(
        StressFigures(name, RATES | {"1e-3": rate}, None, 0.9, RATES | {"1e-3": 0.9}, None, RATES | {"1e-3": DROP})
        for name, rate in (("none", 0.8), ("dark", None))
    ),
    *(24, 6, 0, 2),
)
EXPECTED: dict[str, Callable[[], Any]] = {
    "roc": lambda: figures.roc_figure(MODELS),
    "det": lambda: figures.det_figure(MODELS),
    "histogram-teacher": lambda: figures.histogram_figure(MODELS[0], "1e-2"),
    "histogram-file": lambda: figures.histogram_figure(MODELS[1], "1e-2"),
    "stress": lambda: figures.stress_figure(STRESS),
    "training": lambda: figures.training_figure(ROWS),
}


def record(**changed: Any) -> dict[str, Any]:
    """The part of a report's JSON that is drawn."""
    models = [vars(each) | {"curve": vars(CURVE), "histogram": vars(HISTOGRAM)} for each in MODELS]
    return {"models": models, "changes": {"fpr": "1e-2"}, "stress": STRESS.to_dict(), **changed}


@pytest.fixture
def report(tmp_path: Path) -> Path:
    (tmp_path / "report.json").write_text(json.dumps(record()))
    return tmp_path / "report.json"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "run"


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_figure_is_that_of_the_report(kind: FigureKind, report: Path, run: Path, tmp_path: Path) -> None:
    drawn = qface.plot(kind, run if kind == "training" else report, tmp_path / "drawn.svg")
    expected = save_figure(EXPECTED[kind](), tmp_path / "expected.svg")
    assert drawn.read_bytes() == expected.read_bytes()


def test_the_log_is_found_in_the_run_of_a_compression(run: Path, tmp_path: Path) -> None:
    inside = qface.RunRecord("teacher", "student", "file", "faces", log=str(run / "log.jsonl"))
    inside.write(tmp_path / "found")
    drawn = [qface.plot("training", source, tmp_path / "a.svg").read_bytes() for source in (run, tmp_path / "found")]
    assert drawn[0] == drawn[1]
    qface.RunRecord("teacher", "student", "file", "faces").write(tmp_path / "untrained")
    with pytest.raises(ConfigError, match="untrained has no training log"):
        qface.plot("training", tmp_path / "untrained", tmp_path / "b.svg")


def test_what_report_prints_can_be_drawn(tmp_path: Path, crops: Callable[..., Path]) -> None:
    pytest.importorskip("jinja2")
    files = write_record(tmp_path, crops)
    data = qface.report(files, tmp_path / "page.html", "1e-1", latency_runs=0, bootstrap=2)
    (tmp_path / "report.json").write_text(json.dumps(data.to_dict()))
    for kind, expected in (
        ("roc", figures.roc_figure(data.models)),
        ("histogram-file", figures.histogram_figure(data.models[1], "1e-1")),
        ("size", figures.size_figure(data.layers)),
    ):
        source = files.file if kind == "size" else tmp_path / "report.json"
        drawn = qface.plot(kind, source, tmp_path / "drawn.png")
        assert drawn.read_bytes() == save_figure(expected, tmp_path / "expected.png").read_bytes()


def without(name: str) -> dict[str, Any]:
    models = record()["models"]
    return record(models=[{key: value for key, value in model.items() if key != name} for model in models])


def replaced(name: str, **values: Any) -> dict[str, Any]:
    models = record()["models"]
    return record(models=[{**model, name: {**model[name], **values}} for model in models])


NO_REPORTS = {
    "nothing": {},
    "a list": [],
    "a number of models": record(models=5),
    "no curve": without("curve"),
    "no name": without("name"),
    "words": replaced("curve", tpr=["high", "low"]),
    "a short curve": replaced("curve", tpr=[1.0]),
    "a short histogram": replaced("histogram", genuine=[1.0]),
    "a threshold in words": replaced("thresholds", **{"1e-2": "low"}),
}


@pytest.mark.parametrize("wrong", NO_REPORTS.values(), ids=NO_REPORTS.keys())
def test_what_is_no_report_is_refused(wrong: Any, tmp_path: Path) -> None:
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    for kind in ("roc", "histogram-file"):
        with pytest.raises(ConfigError, match=r"not a report .*: write it with qface report --json"):
            qface.plot(kind, tmp_path / "wrong.json", tmp_path / "figure.svg")


@pytest.mark.parametrize(
    ("stress", "words"),
    [
        (None, "no stress conditions: write it with qface report --stress --json"),
        ({"figures": []}, "not a report"),
        ({**STRESS.to_dict(), "figures": [{}]}, "not a report"),
    ],
)
def test_a_report_without_stress_conditions_is_refused(stress: Any, words: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(record(stress=stress)))
    with pytest.raises(ConfigError, match=words):
        qface.plot("stress", tmp_path / "report.json", tmp_path / "figure.svg")


def test_stress_conditions_are_read_as_they_were_written() -> None:
    assert stress_of_report(json.loads(json.dumps(record()))) == STRESS


def test_refusals(report: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kind must be one of 'roc', .*, got 'loss'"):
        qface.plot("loss", report, tmp_path / "figure.svg")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"figure.gif must end in"):
        qface.plot("roc", report, tmp_path / "figure.gif")
    with pytest.raises(ConfigError, match="cannot be read"):
        qface.plot("roc", tmp_path / "none.json", tmp_path / "figure.svg")
    with pytest.raises(ConfigError, match="is not a log"):
        qface.plot("training", report, tmp_path / "figure.svg")
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": "high"}\n')
    with pytest.raises(ConfigError, match="is not a log"):
        qface.plot("training", tmp_path / "log.jsonl", tmp_path / "figure.svg")
    report.write_text(json.dumps(record(models=record()["models"][:1])))
    with pytest.raises(ConfigError, match="has no model 'file'"):
        qface.plot("histogram-file", report, tmp_path / "figure.svg")


def test_the_command(report: Path, tmp_path: Path) -> None:
    assert set(EXPECTED) | {"size"} == set(get_args(FigureKind))
    figure = tmp_path / "roc.svg"
    result = CliRunner().invoke(main, ["plot", "roc", str(report), "-o", str(figure), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["bytes"] == figure.stat().st_size
    refused = CliRunner().invoke(main, ["plot", "size", str(report), "-o", str(figure)])
    assert refused.exit_code == 2 and len(refused.stderr.splitlines()) == 1
