"""Every class of results: short in a REPL, a table in text, and HTML without a hole in a notebook."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import qface
from qface.cli import main
from qface.compression.trials import Trial
from qface.deployment import Agreement
from qface.deployment.agreement import LayerAgreement
from qface.deployment.size import SizeEntry
from qface.evaluation import (
    GalleryFigures,
    IdentificationRates,
    Interval,
    ListedFigures,
    Rates,
    StressFigures,
    TemplateIdentification,
)
from qface.evaluation.groups import Estimate, Gap, Group, GroupRates, ModelGroups
from qface.evaluation.score_histogram import ScoreHistogram
from qface.evaluation.thresholds import PairingThreshold
from qface.mixed_precision import LayerSensitivity
from qface.quantization.plan import LayerPlan
from qface.reporting.report.data import Curve, ModelFigures, ReportData
from qface.results import Result
from tests.crops import write_crops
from tests.networks import tiny_face_net

TAGS = {"table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td", "br"}


def evaluation(text: str, value: float) -> qface.EvaluationResult:
    rates = {"1e-3": value}
    listed = ListedFigures(1, 1, value, rates, rates, Interval(value, value), Interval(value, value), {}, "people")
    return qface.EvaluationResult(
        value, value, rates, rates, 1, 1, 1, 0, 1, 1, text, 1.0, text, None, value, 1, {}, listed=listed
    )


def groups(text: str, value: float) -> qface.GroupsResult:
    estimate = Estimate(value, Interval(value, value))
    model = ModelGroups(value, {text: GroupRates(estimate, Estimate(None, None))}, Gap(text, text, estimate), None)
    group = Group(text, 1, 1, 1, 1)
    return qface.GroupsResult("1e-3", 1, 1, 1, 1, 1, (group,), model, None, None, None, 1, (text,), (text,))


def compression(text: str, value: float) -> qface.Compression:
    trial = Trial(text, value, value, value, value, value, value, value, None, False, {})
    target = qface.CompressionTarget(max_mb=1)
    return qface.Compression(target, value, 1, 1, (trial,) * 9, trial, text, text)


def report(text: str, value: float) -> ReportData:
    curve, histogram = Curve((), (), (), (), ()), ScoreHistogram((), (), ())
    model = ModelFigures(text, text, text, 1, {"1e-3": value}, {"1e-3": value}, None, None, curve, histogram)
    return ReportData(
        *(text, text, text, text, (), None, text, 1, 1, 1, 1, 1, (model, model), None, 1, (), text, (), None, ()),
        agreement={"agrees": True},
        changes=None,
        trials=(),
        stopped=None,
        bootstrap=0,
        stress=None,
    )


def stress(text: str, value: float) -> qface.StressResult:
    figures = StressFigures(text, {"1e-3": value, "1e-4": None}, value, None, {}, None, {})
    return qface.StressResult((figures,) * 11, 1, 1, 0, 0)


def thresholds(text: str, value: float) -> qface.OperatingThresholds:
    pairings = (PairingThreshold(text, value, Rates(value, value), None), PairingThreshold("float", None, None, None))
    return qface.OperatingThresholds("1e-3", text, None, pairings)


def identification(text: str, value: float) -> qface.IdentificationResult:
    return qface.IdentificationResult(value, value, {"1e-1": value}, {"1e-1": None}, 1, 1, 1, 0, text, text)


def templates(text: str, value: float) -> qface.TemplateResult:
    rates, interval = {"1e-3": value}, Interval(value, value)
    searched = IdentificationRates(value, value, rates, {"rank_1": interval}, {"1e-3": None})
    found = TemplateIdentification(searched, {text: GalleryFigures(1, 1, 1, rates, searched)})
    return qface.TemplateResult(
        "paper", True, True, rates, rates, 1, 1, 1, 1, text, 1.0, text, 1, {"1e-3": interval}, found
    )


EXAMPLES: dict[type[Result], Callable[[str, float], Result]] = {
    Agreement: lambda text, value: Agreement((LayerAgreement(text, text, 6, 9, 1, 1, (0, 1)),) * 20, 1, value, value),
    ReportData: report,
    qface.AlignmentReport: lambda text, value: qface.AlignmentReport(3, 1, 0, (text,) * 20, (text,), (text,)),
    qface.Compression: compression,
    qface.EvaluationResult: evaluation,
    qface.GroupsResult: groups,
    qface.IdentificationResult: identification,
    qface.MatchThresholds: lambda text, value: qface.MatchThresholds({text: value}, 1, 1, 1, text),
    qface.OperatingThresholds: thresholds,
    qface.QuantizationPlan: lambda text, value: qface.QuantizationPlan((LayerPlan(text, text, False, 6, 3),) * 20),
    qface.RunRecord: lambda text, value: qface.RunRecord(text, text, text, text, stopped=text),
    qface.SelfTest: lambda text, value: qface.SelfTest(text, value, 16, 0, value, 4),
    qface.Sensitivity: lambda text, value: qface.Sensitivity(1, (LayerSensitivity(text, 1, {4: value}, {}),) * 20),
    qface.SizeReport: lambda text, value: qface.SizeReport("file", (SizeEntry(text, "weight", 1, 1, 6),) * 209),
    qface.StressResult: stress,
    qface.TemplateResult: templates,
}
"""An example of each class, of any text and number."""

any_class = pytest.mark.parametrize("kind", EXAMPLES, ids=lambda kind: kind.__name__)
HOSTILE = ("<script>", "[bold]", "[/]", "a\\", ":smile:", "x" * 999, "a\nb", '"&<td>', "caf\udce9")
texts = st.one_of(st.text(), st.sampled_from(HOSTILE))


def any_content(test: Callable[..., None]) -> Callable[..., None]:
    """Run ``test`` on 30 texts and numbers; there are many classes."""
    return settings(max_examples=30)(given(text=texts, value=st.floats(-1e9, 1e9))(test))


class Page(HTMLParser):
    """Tags and text of a page; a tag that was not closed is an error."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_every_result_has_an_example_here() -> None:
    assert set(EXAMPLES) == set(Result.__subclasses__())


def test_every_class_that_a_verb_returns_is_a_result() -> None:
    public = {name: getattr(qface, name) for name in qface.__all__}
    returned = [inspect.signature(verb).return_annotation for verb in public.values() if inspect.isfunction(verb)]
    classes = {public[name] for name in (each.removesuffix(" | None") for each in returned) if name in public}
    assert len(classes) > 10
    assert classes - {qface.QuantizationConfig} <= set(EXAMPLES)


@any_class
@any_content
def test_a_repr_is_one_short_line(kind: type[Result], text: str, value: float) -> None:
    shown = repr(EXAMPLES[kind](text, value))
    assert shown.startswith(f"{kind.__name__}(") and shown.endswith(")")
    assert len(shown) <= 200 and len(shown.splitlines()) == 1


@any_class
@any_content
def test_html_is_tables_of_escaped_text(kind: type[Result], text: str, value: float) -> None:
    page = Page(EXAMPLES[kind](text, value)._repr_html_().encode().decode())
    assert set(page.tags) <= TAGS and "td" in page.tags
    assert page.tags[0] == "table"


@pytest.mark.parametrize("kind", [kind for kind in EXAMPLES if kind.__str__ is Result.__str__])  # others: a sentence
@any_content
def test_text_is_a_table_that_any_text_fits_into(kind: type[Result], text: str, value: float) -> None:
    assert str(EXAMPLES[kind](text, value)).encode()


@pytest.mark.parametrize("kind", [qface.GroupsResult, qface.Sensitivity, qface.AlignmentReport, qface.RunRecord])
def test_html_and_text_show_names_as_they_are(kind: type[Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result, name = EXAMPLES[kind]("[b]<i>:a:", 0.5), "[b]<i>:a:"
    assert name in "".join(Page(result._repr_html_()).texts)
    assert name in str(result)


@pytest.mark.parametrize("color", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_text_has_no_colors(color: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(color, "1")
    assert "\x1b" not in str(evaluation("runtime", 0.5))


def test_printed_results_are_what_the_commands_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_crops(Path("faces"), {"Ann": 3, "Bob": 3})
    student = qface.calibrate(qface.quantize(tiny_face_net()), torch.zeros(2, 3, 112, 112, dtype=torch.uint8))
    qface.save(student, "student.safetensors")
    qface.export(student, "student.onnx")
    commands: dict[str, Callable[[], Result]] = {
        "size student.onnx": lambda: qface.measure_size("student.onnx"),
        "size student.safetensors": lambda: qface.measure_size("student.safetensors"),
        "selftest student.onnx": lambda: qface.selftest("student.onnx"),
        "evaluate student.onnx --images faces": lambda: qface.evaluate("student.onnx", "faces"),
        "verify student.safetensors student.onnx --images faces": lambda: qface.verify(
            "student.safetensors", "student.onnx", "faces"
        ),
    }
    for command, verb in commands.items():
        printed = CliRunner().invoke(main, [*command.split(), "-q"])
        assert printed.stdout.rstrip("\n") == str(verb()), printed.output
    inspected = CliRunner().invoke(main, ["inspect", "student.safetensors"]).stdout
    assert str(qface.inspect(student)).strip() in inspected
