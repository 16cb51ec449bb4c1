"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import singledispatch

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from qface.compression.run_record import RunRecord
from qface.compression.trials import Compression
from qface.data import AlignmentReport
from qface.demo import DemoReport
from qface.deployment import Agreement, SelfTest, SizeReport
from qface.deployment.latency import Latency
from qface.evaluation import (
    STRESS_FPRS,
    EvaluationResult,
    GroupsResult,
    IdentificationRates,
    IdentificationResult,
    Interval,
    ListedFigures,
    MatchThresholds,
    OperatingThresholds,
    Rates,
    StressFigures,
    StressResult,
    TemplateIdentification,
    TemplateResult,
    unmeasured,
)
from qface.evaluation.groups import Estimate, Gap, ModelGroups
from qface.evaluation.verification import MIN_FALSE_POSITIVES, impostors_needed
from qface.mixed_precision import Sensitivity
from qface.pruning import Cost
from qface.quantization import QuantizationPlan
from qface.reporting.file_description import FileDescription
from qface.reporting.report.data import ReportData
from qface.results import Result

__all__ = [
    "agreement_table",
    "alignment_table",
    "compression_table",
    "costs_table",
    "demo_table",
    "description_table",
    "evaluation_table",
    "groups_tables",
    "identification_table",
    "latency_table",
    "plan_table",
    "sensitivity_tables",
    "size_tables",
    "stress_losses",
    "stress_table",
    "table_of",
    "templates_tables",
    "thresholds_table",
]


@singledispatch
def table_of(result: Result) -> Table | Group:
    """Return the table of a :class:`qface.results.Result`, with the function registered for its class."""
    raise NotImplementedError(f"{type(result).__name__} has no table: register one in qface.reporting.tables")


def percent(value: float | None) -> str:
    """Format a fraction like ``97.95 %``; ``-`` if it could not be measured."""
    return "-" if value is None else f"{100 * value:.2f} %"


@table_of.register
def evaluation_table(result: EvaluationResult) -> Table:
    """Return the table of a verification, one row per figure.

    Args:
        result: the result of :func:`qface.evaluate`.
    """
    table = _figures(f"{result.images} images of {result.identities} people, {result.runtime}")
    notes = [f"reads {result.preprocessing}"] if result.preprocessing else []
    if result.listed is not None:
        _add_listed(table, result, result.listed)
        notes += _notes(result.listed, "listed pairs: ")
    if result.eer is not None:
        table.add_row("equal error rate, all pairs", percent(result.eer) + _between(result.eer_interval), "")
        _add_rates(table, result, result.tpr_intervals)
        notes += _notes(result)
    if result.bootstrap:
        resampled = "people" if result.listed is None else result.listed.resampled
        notes.append(f"in brackets: 95 % confidence, {result.bootstrap} replicates over {resampled}")
    table.caption = escape("\n".join(notes)) if notes else None
    return table


def _add_listed(table: Table, result: EvaluationResult, listed: ListedFigures) -> None:
    pairs, interval = f"{result.pairs} pairs", _between(listed.accuracy_interval)
    if result.accuracy_std is None:
        row = f"accuracy ({pairs}, threshold chosen on them)"
        table.add_row(row, percent(result.accuracy) + interval, "")
    else:
        figure = f"{percent(result.accuracy)} ± {100 * result.accuracy_std:.2f}{interval}"
        table.add_row(f"10-fold accuracy ({pairs}, {result.pairs_dropped} dropped)", figure, "")
    table.add_row("equal error rate, listed pairs", percent(listed.eer) + _between(listed.eer_interval), "")
    for fpr, rate in listed.tpr_at_fpr.items():
        if rate is not None:
            value = percent(rate) + _between(listed.tpr_intervals.get(fpr))
            table.add_row(f"TPR at FPR {fpr}, listed pairs", value, f"{listed.thresholds[fpr]:.4f}")


def _notes(counted: EvaluationResult | TemplateResult | ListedFigures, subject: str = "") -> list[str]:
    """Return a line that says why rates are missing; empty if none are."""
    reason = unmeasured(tuple(counted.tpr_at_fpr), counted.impostor_pairs)
    return [] if reason is None else [subject + reason]


def _between(interval: Interval | None) -> str:
    return "" if interval is None else f" \\[{100 * interval.low:.2f}, {100 * interval.high:.2f}]"


@table_of.register
def identification_table(result: IdentificationResult) -> Table:
    """Return the table of an identification, one row per figure.

    Args:
        result: the result of :func:`qface.evaluate_identification`.
    """
    counts = f"{result.mated_probes} mated and {result.non_mated_probes} non-mated probes"
    table = _figures(f"{result.enrolled} people enrolled, {counts}, {result.runtime}")
    for name, row in (("rank_1", "rank 1, closed set"), ("rank_5", "rank 5, closed set")):
        table.add_row(row, percent(getattr(result, name)) + _between(result.rank_intervals.get(name)), "")
    for fpir, rate in result.tpir_at_fpir.items():
        threshold = result.thresholds[fpir]
        value = percent(rate) + _between(result.tpir_intervals.get(fpir))
        table.add_row(f"TPIR at FPIR {fpir}", value, "-" if threshold is None else f"{threshold:.4f}")
    notes = [f"reads {result.preprocessing}"]
    if None in result.tpir_at_fpir.values():
        notes.append("an FPIR is measured only if it accepts at least 10 non-mated probes")
    if result.bootstrap:
        notes.append(f"in brackets: 95 % confidence, {result.bootstrap} replicates over people")
    table.caption = escape("\n".join(notes))
    return table


@table_of.register
def groups_tables(result: GroupsResult) -> Group:
    """Return tables of the pair counts and the error rates of groups, one row per group.

    Args:
        result: the result of :func:`qface.evaluate_groups`.
    """
    runtimes = " and ".join(dict.fromkeys(result.runtimes))
    counts = Table(title=escape(f"{result.images:,} images of {result.identities:,} people, {runtimes}"))
    for name in ("group", "people", "images", "genuine pairs", "impostor pairs"):
        counts.add_column(name, justify="left" if name == "group" else "right", overflow="fold")
    for group in result.groups:
        numbers = (group.people, group.images, group.genuine_pairs, group.impostor_pairs)
        counts.add_row(escape(group.name), *(f"{number:,}" for number in numbers))
    notes = [f"reads {preprocessing}" for preprocessing in dict.fromkeys(result.preprocessing)]
    if result.ungrouped:
        notes.append(f"{result.ungrouped:,} people are in no group: they only count for the threshold")
    counts.caption = escape("\n".join(notes)) if notes else None
    return Group(counts, _group_rates(result))


def _group_rates(result: GroupsResult) -> Table:
    models = {"": result.model} | ({} if result.reference is None else {"reference's ": result.reference})
    thresholds = ", ".join(f"{name}threshold {model.threshold:.4f}" for name, model in models.items())
    table = Table(title=f"FPR {result.at_fpr} over everybody: {thresholds}")
    for name in ("group", *(f"{model}{rate}" for rate in ("FNMR, %", "FMR") for model in models)):
        table.add_column(name, justify="left" if name == "group" else "right", overflow="fold")
    for group in result.groups:
        rates = [model.rates[group.name] for model in models.values()]
        missed = [_estimate(each.fnmr, _hundredths, "too few") for each in rates]
        table.add_row(escape(group.name), *missed, *(_estimate(each.fmr, "{:.1e}".format, "too few") for each in rates))
    table.add_section()
    differences = [_gap(model.fnmr_gap, "-", _hundredths) for model in models.values()]
    table.add_row("gap", *differences, *(_gap(model.fmr_gap, "/", "{:.2f}".format) for model in models.values()))
    if result.reference is not None:
        added = _estimate(result.fnmr_gap_change, lambda share: f"{100 * share:+.2f}")
        table.add_row("change of the gap", added, "", _estimate(result.fmr_gap_change, "x {:.2f}".format), "")
    table.caption = escape("\n".join(_rate_notes(result, list(models.values())))) or None
    return table


def _rate_notes(result: GroupsResult, models: Sequence[ModelGroups]) -> list[str]:
    notes = []
    rates = [rate for model in models for each in model.rates.values() for rate in (each.fnmr, each.fmr)]
    if any(rate.value is None for rate in rates):
        needed = f"{result.genuine_needed:,} genuine pairs for FNMR, {result.impostors_needed:,} impostor pairs for FMR"
        notes.append(f"too few: a group needs {needed}")
    gaps = [model.fmr_gap for model in models if model.fmr_gap is not None]
    unmatched = dict.fromkeys(gap.lowest for gap in gaps if gap.size.value is None)
    if unmatched:
        notes.append(f"no FMR ratio, since no impostor pair is accepted in {', '.join(unmatched)}")
    if result.bootstrap:
        notes.append(f"in brackets: 95 % confidence, {result.bootstrap} replicates over people")
    return notes


def _gap(gap: Gap | None, sign: str, style: Callable[[float], str]) -> str:
    return "-" if gap is None else f"{escape(gap.highest)} {sign} {escape(gap.lowest)}: {_estimate(gap.size, style)}"


def _estimate(found: Estimate | None, style: Callable[[float], str], missing: str = "-") -> str:
    if found is None or found.value is None:
        return missing
    interval = "" if found.interval is None else f" \\[{style(found.interval.low)}, {style(found.interval.high)}]"
    return style(found.value) + interval


def _hundredths(share: float) -> str:
    return f"{100 * share:.2f}"


@table_of.register
def stress_table(result: StressResult) -> Table:
    """Return the table of a stress evaluation, one row per condition.

    Args:
        result: the result of :func:`qface.evaluate_stress`.
    """
    compared = bool(result.figures[0].reference_tpr_at_fpr)
    table = Table(title=f"{result.images:,} images of {result.identities:,} people", box=box.SIMPLE)
    table.add_column("condition")
    figures = [*(f"TPR at {fpr}" for fpr in STRESS_FPRS), "accuracy"]
    for name in [*figures, *([f"lost: {figure}" for figure in figures] if compared else [])]:
        table.add_column(name, justify="right")
    for each in result.figures:
        found = [*each.tpr_at_fpr.values(), each.accuracy]
        table.add_row(escape(each.condition), *map(percent, found), *(stress_losses(each) if compared else []))
    notes = ["changed images compared with unchanged images; percent"]
    if result.bootstrap:
        notes.append(f"in brackets: upper bound, 95 % confidence, {result.bootstrap} replicates over people")
    table.caption = escape("\n".join(notes))
    return table


def stress_losses(figures: StressFigures) -> list[str]:
    """Return the losses against the reference as text: of each TPR, with an upper bound if known, and of accuracy."""
    found = [*figures.tpr_at_fpr.values(), figures.accuracy]
    bounds = [figures.drops.get(fpr) for fpr in figures.tpr_at_fpr]
    before = [*figures.reference_tpr_at_fpr.values(), figures.reference_accuracy]
    return [
        "-"
        if was is None or now is None
        else f"{100 * (was - now):.2f}" + (f" [{100 * bound.upper:.2f}]" if bound else "")
        for was, now, bound in zip(before, found, [*bounds, None], strict=True)
    ]


@table_of.register
def plan_table(plan: QuantizationPlan) -> Table:
    """Return the table of the layers of a student by kind.

    Args:
        plan: the result of :func:`qface.inspect`.
    """
    table = Table(title=escape(plan.summary), box=box.SIMPLE)
    for name in ("layers", "number", "computes in", "multiply-adds"):
        table.add_column(name, justify="left" if name == "layers" else "right")
    kinds = dict.fromkeys((layer.kind, layer.integer) for layer in plan.layers)
    for kind, integer in kinds:
        layers = [layer for layer in plan.layers if (layer.kind, layer.integer) == (kind, integer)]
        work = sum(layer.multiply_adds for layer in layers)
        table.add_row(escape(kind), str(len(layers)), "integers" if integer else "float", f"{work:,}" if work else "")
    return table


def description_table(found: FileDescription) -> Group:
    """Return the properties of a file or network, one per row, and the plan of its layers if known.

    Args:
        found: the result of :func:`qface.reporting.file_description.describe`.
    """
    table = Table(box=box.SIMPLE, show_header=False)
    for name, value in _properties(found):
        table.add_row(name, escape(value))
    return Group(table, *([] if found.plan is None else [plan_table(found.plan)]))


def _properties(found: FileDescription) -> Iterator[tuple[str, str]]:
    yield "kind", found.kind
    if found.bytes is not None:
        yield "size", f"{found.bytes:,} bytes ({found.bytes / 1e6:.2f} MB)"
    yield "input", f"{found.input}, {found.preprocessing.describe()}"
    yield "embedding", f"{found.dimensions} numbers"
    yield "parameters", f"{found.parameters:,}"
    yield "weights", _by_bits(found.weight_bits)
    yield "activations", "not known" if found.activation_bits is None else _by_bits(found.activation_bits)
    if found.steps:
        yield "made by", "\n".join(found.steps)
    if found.thresholds is not None:
        yield "thresholds", str(found.thresholds)


def _by_bits(counts: Mapping[int, int]) -> str:
    """Format counts like ``5 with 6 bits, 9 with 8 bits``."""
    return ", ".join(f"{count} with {bits} bits" for bits, count in counts.items()) or "in float"


@table_of.register
def templates_tables(result: TemplateResult) -> Group:
    """Return the tables of an evaluation of templates, one row per rate: verification, and identification if measured.

    Args:
        result: the result of :func:`qface.evaluate_templates`.
    """
    added = [name for name, used in (("flip", result.flip), ("detector score", result.detector_score)) if used]
    how = f"protocol {result.protocol}, " + (" and ".join(added) if added else "neither flip nor detector score")
    table = _figures(f"{how}: {result.images} images, {result.templates} templates, {result.runtime}")
    _add_rates(table, result, result.tpr_intervals)
    notes = ([f"reads {result.preprocessing}"] if result.preprocessing else []) + _notes(result)
    if result.identification is None:
        notes.append("no 1:N identification: the folder has no files *_1N_*.csv")
    if result.bootstrap:
        notes.append(f"in brackets: 95 % confidence, {result.bootstrap} replicates over people")
    table.caption = escape("\n".join(notes)) if notes else None
    return Group(table, *([] if result.identification is None else [_galleries_table(result.identification)]))


def _galleries_table(found: TemplateIdentification) -> Table:
    """Return the table of 1:N identification, per rate one row for the mean and one per gallery."""
    table = _figures("1:N identification")
    for name, row in (("rank_1", "rank 1"), ("rank_5", "rank 5")):
        for place, rates, _ in _places(found):
            value = percent(getattr(rates, name)) + _between(rates.rank_intervals.get(name))
            table.add_row(f"{row}, {place}", value, "")
        table.add_section()
    for fpir in found.mean.tpir_at_fpir:
        for place, rates, thresholds in _places(found):
            value = percent(rates.tpir_at_fpir[fpir]) + _between(rates.tpir_intervals.get(fpir))
            threshold = thresholds.get(fpir)
            table.add_row(f"TPIR at FPIR {fpir}, {place}", value, "" if threshold is None else f"{threshold:.4f}")
        table.add_section()
    table.caption = escape("\n".join(_gallery_notes(found)))
    return table


def _places(found: TemplateIdentification) -> Iterator[tuple[str, IdentificationRates, Mapping[str, float | None]]]:
    """Yield name, rates and thresholds of the mean and of each gallery."""
    yield "mean", found.mean, {}
    for name, figures in found.galleries.items():
        yield escape(name), figures.rates, figures.thresholds


def _gallery_notes(found: TemplateIdentification) -> list[str]:
    notes = [
        f"{name}: {each.enrolled} people, {each.mated_probes} mated and {each.non_mated_probes} non-mated probes"
        for name, each in found.galleries.items()
    ]
    needed = max(map(impostors_needed, found.mean.tpir_at_fpir))
    if any(each.non_mated_probes < needed for each in found.galleries.values()):
        few = f"an FPIR that accepts fewer than {MIN_FALSE_POSITIVES} non-mated probes depends on these few"
        notes.append(f"{few}; one that accepts none is not measured")
    return notes


def _figures(title: str) -> Table:
    table = Table(title=escape(title))
    for name in ("figure", "value", "threshold"):
        table.add_column(name, justify="left" if name == "figure" else "right")
    return table


def _add_rates(
    table: Table, result: EvaluationResult | TemplateResult, intervals: Mapping[str, Interval | None]
) -> None:
    for fpr, rate in result.tpr_at_fpr.items():
        threshold = result.thresholds[fpr]
        value = percent(rate) + _between(intervals.get(fpr))
        table.add_row(f"TPR at FPR {fpr}", value, "-" if threshold is None else f"{threshold:.4f}")


@table_of.register
def alignment_table(report: AlignmentReport) -> Table:
    """Return the table of an alignment: number of crops, and names of the first photos without one.

    Args:
        report: the result of :func:`qface.align`.
    """
    table = Table()
    for name in ("photos", "number", "first of them"):
        table.add_column(name, justify="right" if name == "number" else "left")
    table.add_row("found", str(report.photos), "")
    table.add_row("aligned now", str(report.aligned), "")
    table.add_row("aligned before", str(report.present), "")
    table.add_row("without a face", str(len(report.faceless)), _first_of(report.faceless))
    table.add_row("landmarks not a face", str(len(report.misplaced)), _first_of(report.misplaced))
    table.add_row("unreadable", str(len(report.unreadable)), _first_of(report.unreadable))
    return table


def _first_of(names: Sequence[str]) -> str:
    """Return up to three names, with bytes that are not valid UTF-8 escaped."""
    return ", ".join(escape(name.encode(errors="backslashreplace").decode()) for name in names[:3])


@table_of.register
def compression_table(found: Compression) -> Table:
    """Return the table of a compression, one row per trial.

    Args:
        found: the result of :func:`qface.compress`.
    """
    target = found.target
    people = f"{found.identities} people, {found.images} images; float network {found.float_tpr:.2f} %"
    table = Table(title=f"TPR at FPR {target.at_fpr} of {people}")
    bound = f"at most ({target.confidence:.0%})"
    stress = ("with changed probes",) if target.stress else ()
    for name in ("trial", "weights, bits", "MB", "TPR, %", "lost, points", bound, *stress, "ms", "meets the target"):
        table.add_column(name, justify="left" if name == "trial" else "right")
    for trial in found.trials:
        largest = max(trial.stress.items(), key=lambda item: item[1], default=None)
        table.add_row(
            escape(trial.name),
            f"{trial.weight_bits:.2f}",
            f"{trial.mb:.3f}",
            f"{trial.tpr:.2f}",
            f"{trial.drop:.2f}",
            f"{trial.drop_bound:.2f}",
            *(() if not stress else ("-",) if largest is None else (f"{largest[1]:.2f} ({largest[0]})",)),
            "-" if trial.ms is None else f"{trial.ms:.2f}",
            "chosen" if trial == found.chosen else "yes" if trial.keeps else "no",
        )
    return table


def costs_table(before: Cost, after: Cost) -> Table:
    """Return the table of a network's cost before and after pruning.

    Args:
        before: cost of the original network.
        after: cost of the pruned network.
    """
    table = Table()
    for name in ("cost", "before", "after", "share left"):
        table.add_column(name, justify="left" if name == "cost" else "right")
    rows = (
        ("parameters", before.parameters, after.parameters, "{:,}"),
        ("MACs", before.macs, after.macs, "{:,}"),
        ("MB as float32", before.mb, after.mb, "{:.2f}"),
    )
    for name, old, new, style in rows:
        table.add_row(name, style.format(old), style.format(new), percent(new / old))
    return table


@table_of.register
def thresholds_table(result: OperatingThresholds) -> Table:
    """Return the table of the thresholds for one FPR, one row per pairing of networks.

    Args:
        result: the result of :func:`qface.operating_thresholds`.
    """
    people = f"set on {result.identities or 'all people'}, evaluated on {result.eval_identities or 'all people'}"
    table = Table(title=escape(f"FPR {result.fpr}, {people}"))
    for name in ("probe and gallery", "threshold", "TPR", "FPR", "TPR with float's", "FPR with float's"):
        table.add_column(name, justify="left" if name == "probe and gallery" else "right")
    for row in result.pairings:
        threshold = "-" if row.threshold is None else f"{row.threshold:.4f}"
        table.add_row(escape(row.pairing), threshold, *_rates(row.rates), *_rates(row.rates_at_float))
    return table


def _rates(rates: Rates | None) -> tuple[str, str]:
    return ("-", "-") if rates is None else (percent(rates.tpr), f"{rates.fpr:.1e}")


@table_of.register
def agreement_table(agreement: Agreement) -> Table:
    """Return the table that compares a student with its file: embeddings, and each layer that differs.

    Args:
        agreement: the result of :func:`qface.verify`.
    """
    verdict = "agree" if agreement.agrees else "DO NOT AGREE"
    layers = f"{len(agreement.layers)} layers, " if agreement.layers else ""
    read = f"reads {agreement.preprocessing}" if agreement.preprocessing else None
    table = Table(title=f"student and file {verdict}: {layers}{agreement.images} images", caption=read)
    table.add_column("compared")
    table.add_column("result", justify="right")
    table.add_row("embeddings, mean cosine", f"{agreement.mean_cosine:.7f}")
    table.add_row("embeddings, minimum cosine", f"{agreement.min_cosine:.7f}")
    if agreement.layers:  # empty for float files, and for OpenVINO
        different = sum(layer.different for layer in agreement.layers)
        table.add_row("integers that differ", f"{different} of {sum(layer.elements for layer in agreement.layers)}")
    for layer in agreement.layers:
        if layer.different:
            table.add_row(
                escape(layer.layer), f"{layer.different} of {layer.elements}, by up to {layer.max_difference}"
            )
    return table


def demo_table(report: DemoReport) -> Table:
    """Return the table of the demo, one row per model.

    Args:
        report: the result of the demo.
    """
    table = Table(title=f"{report.identities} people that no model was trained on, {report.images} images, onnxruntime")
    for name in ("model", "accuracy", *(f"TPR at FPR {fpr}" for fpr in report.fprs), "file", "latency"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in report.rows:
        rates = (percent(row.tpr_at_fpr[fpr]) for fpr in report.fprs)
        table.add_row(row.model, percent(row.accuracy), *rates, f"{row.bytes / 1e6:.2f} MB", f"{row.median_ms:.2f} ms")
    return table


def latency_table(rows: Sequence[Latency], title: str) -> Table:
    """Return the table of a latency comparison, one row per network; ratios are relative to the first.

    Args:
        rows: the latencies.
        title: first part of the title, which also has the number of threads and the batch size.
    """
    setting = f"{counted(rows[0].threads, 'thread')}, {counted(rows[0].batch, 'image')} a call"
    table = Table(title=f"{title}, {setting}", box=box.SIMPLE)
    for name in ("network", "provider", "median ms", "min ms", "ratio", "MB", "MiB", "load s"):
        table.add_column(name, justify="left" if name in ("network", "provider") else "right", overflow="fold")
    for row in rows:
        figures = (row.median, row.minimum, row.ratio, row.megabytes, row.mebibytes, row.load_seconds)
        provider = row.provider.removesuffix("ExecutionProvider")
        table.add_row(escape(row.name), provider, *(f"{figure:.2f}" for figure in figures))
    return table


def counted(count: int, noun: str) -> str:
    """Format a count like ``1 thread`` or ``2 threads``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


@table_of.register
def size_tables(report: SizeReport, largest: int = 10) -> Group:
    """Return tables of the size of a file by kind of content, and of its ``largest`` entries."""
    origin = "" if report.source == "file" else ", predicted for the tensors, without names and nodes"
    kinds = Table(title=f"{report.bytes:,} bytes{origin}", box=box.SIMPLE, collapse_padding=True, pad_edge=False)
    for name in ("kind", "elements", "float32", "packed", "bytes", "MB", "MiB"):
        kinds.add_column(name, justify="left" if name == "kind" else "right", overflow="fold")
    for kind, part in report.kinds.items():
        kinds.add_row(*_size_row(kind, part))
    kinds.add_section()
    kinds.add_row(*_size_row("total", report))

    entries = Table(title=f"the {largest} largest of {len(report.entries)} entries", box=box.SIMPLE)
    for name in ("name", "kind", "elements", "bits", "bytes"):
        entries.add_column(name, justify="left" if name in ("name", "kind") else "right", overflow="fold")
    for entry in sorted(report.entries, key=lambda entry: -entry.bytes)[:largest]:
        bits = "-" if entry.bits is None else str(entry.bits)
        entries.add_row(escape(entry.name), entry.kind, f"{entry.elements:,}", bits, f"{entry.bytes:,}")
    return Group(kinds, entries)


def _size_row(name: str, report: SizeReport) -> list[str]:
    totals = report.totals()
    counts = [f"{totals[key]:,}" for key in ("elements", "fp32_bytes", "packed_bytes", "bytes")]
    return [name, *counts, f"{report.mb:.3f}", f"{report.mib:.3f}"]


@table_of.register
def sensitivity_tables(result: Sensitivity) -> Group:
    """Return a table of the losses for weights and one for activations, one row per layer.

    Args:
        result: the result of :func:`qface.sensitivity`.
    """
    return Group(*(_sensitivity_table(result, tensor) for tensor in result.tensors))


def _sensitivity_table(result: Sensitivity, tensor: str) -> Table:
    """Return the table for ``tensor``, ``"weight"`` or ``"activation"``."""
    bit_widths = result.bit_widths(tensor)
    title = f"1000 x (1 - cosine) with one {tensor} quantized, {counted(result.images, 'image')}"
    table = Table(title=title, box=box.SIMPLE, collapse_padding=True, pad_edge=False)
    table.add_column("layer", overflow="fold")
    for name in ("elements", *(counted(bits, "bit") for bits in bit_widths)):
        table.add_column(name, justify="right", overflow="fold")
    for layer, losses in zip(result.layers, result.losses(tensor), strict=True):
        figures = (f"{1000 * losses[bits]:.3f}" if bits in losses else "-" for bits in bit_widths)
        table.add_row(escape(layer.name), f"{layer.elements:,}", *figures)
    return table


@table_of.register
def selftest_table(result: SelfTest) -> Table:
    """Return the table that compares the embeddings of this machine with the stored ones."""
    table = Table(title=escape(f"{'computes' if result.agrees else 'DIFFERS from'} what was trained, {result.runtime}"))
    for name in ("figure", "value"):
        table.add_column(name, justify="left" if name == "figure" else "right")
    table.add_row("embeddings that differ", f"{result.different} of {result.images}")
    table.add_row(f"minimum cosine of the first {result.cosines}", f"{result.min_cosine:.6f}")
    table.add_row("tolerance", str(result.tolerance))
    return table


@table_of.register
def match_thresholds_table(result: MatchThresholds) -> Table:
    """Return the table of the thresholds of one model, one row per FPR."""
    people = f"{result.identities:,} people, {result.impostor_pairs:,} impostor pairs"
    table = Table(title=f"{result.images:,} images of {people}")
    for name in ("FPR", "threshold"):
        table.add_column(name, justify="right")
    for fpr, threshold in result.by_fpr.items():
        table.add_row(escape(fpr), f"{threshold:.4f}")
    return table


@table_of.register
def run_table(record: RunRecord) -> Table:
    """Return the table of a compression's files and of the end of its search."""
    table = Table(box=box.SIMPLE, show_header=False)
    fields = {**asdict(record), "trials": len(record.trials) or None}
    for name, value in fields.items():
        if value is not None:
            table.add_row(name.replace("_", " "), escape(str(value)))
    return table


@table_of.register
def report_table(report: ReportData) -> Table:
    """Return the table of verification by the teacher and the file of a report, one row per figure."""
    table = Table(title=f"{report.images:,} images of {report.identities:,} people")
    for name in ("figure", *(model.name for model in report.models)):
        table.add_column(escape(name), justify="left" if name == "figure" else "right")
    for fpr in report.models[0].tpr_at_fpr:
        table.add_row(f"TPR at FPR {fpr}", *(percent(model.tpr_at_fpr[fpr]) for model in report.models))
    table.add_row("accuracy", *(percent(model.accuracy) for model in report.models))
    return table
