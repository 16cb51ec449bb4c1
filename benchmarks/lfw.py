"""Accuracy of a teacher and its student on LFW: calibrated and distilled, in torch and as a file.

    python benchmarks/lfw.py --data ../shared [--weights FILE] [--bits 6] [--recipe qface] [--json lfw.json]

The first half of the people tunes the student, the second half evaluates it. The table also has size, latency and
seconds of tuning. Figures of the student are measured in onnxruntime unless the row says torch. ``--recipe`` takes a
recipe of accuracy.py, which measures several students and compares their means with goals.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from harness.benchmark_command import BenchmarkCommand
from harness.held_out import FPRS
from harness.recipes import RECIPES
from harness.report_files import terminal_table, write_json
from harness.stopwatch import timed
from rich.console import Console

import qface
from qface.data import ImageFolder
from qface.deployment import median_milliseconds
from qface.evaluation import embed
from qface.files import make_folder

AGREEMENT_IMAGES = 2000


@click.command(cls=BenchmarkCommand)
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared"), show_default=True)
@click.option("--weights", default="weights/mobilefacenet_112x96.safetensors", show_default=True, help="Below --data.")
@click.option("--bits", default=6, show_default=True)
@click.option("--recipe", type=click.Choice(list(RECIPES)), default="qface", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("runs/lfw"), show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures here.")
def main(data: Path, weights: str, bits: int, recipe: str, seed: int, output: Path, json_file: Path | None) -> None:
    """Measure the teacher, the calibrated student, the distilled student and both exported files."""
    chosen = RECIPES[recipe]
    quantization = replace(chosen.quantization, weight_bits=bits, activation_bits=bits)
    training = replace(chosen.training, seed=seed)
    make_folder(output)
    faces, pairs = data / "data" / "lfw", data / "data" / "lfw_pairs.txt"
    teacher = qface.load(data / weights)
    float_file = qface.export(teacher, output / "teacher.onnx")
    rows = [row("teacher", teacher, faces, pairs, float_file)]

    student = qface.quantize(teacher, quantization)
    calibration, seconds = timed(lambda: qface.calibrate(student, faces, chosen.calibration, "first-half"))
    calibrated_file = qface.export(student, output / "calibrated.onnx")
    rows += [
        row("calibrated, torch", calibration, faces, pairs, seconds=seconds),
        row("calibrated, file", calibrated_file, faces, pairs, calibrated_file),
    ]

    _, seconds = timed(lambda: qface.distill(student, teacher, faces, training, identities="first-half"))
    qface.save(student, output / "student.safetensors")
    student_file = qface.export(student, output / "student.onnx")
    rows += [
        row("distilled, torch", student, faces, pairs, seconds=seconds),
        row("distilled, file", student_file, faces, pairs, student_file),
        row("distilled, file, against the teacher's gallery", student_file, faces, pairs, gallery=teacher),
    ]
    add_latencies(rows)
    report = {"bits": bits, "recipe": recipe, "rows": rows, "agreement": agreement(student, student_file, faces)}
    if json_file is not None:
        write_json(json_file, report)
    show(report)


def row(
    name: str,
    model: Any,
    faces: Path,
    pairs: Path,
    file: Path | None = None,
    seconds: float | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Evaluate ``model`` on the second half of the people, and return its row of the table."""
    result = qface.evaluate(model, faces, pairs=pairs, identities="second-half", **options)
    return {
        "model": name,
        **result.to_dict(),
        "tuning_seconds": seconds,
        "bytes": None if file is None else file.stat().st_size,
        "file": None if file is None else str(file),
    }


def add_latencies(rows: list[dict[str, Any]]) -> None:
    """Add each file's median milliseconds for one image on one thread; calls alternate between files."""
    timed_rows = [line for line in rows if line["file"] is not None]
    for line in rows:
        line["milliseconds"] = None
    latencies = median_milliseconds([line["file"] for line in timed_rows])
    for line, milliseconds in zip(timed_rows, latencies, strict=True):
        line["milliseconds"] = milliseconds


def agreement(student: Any, file: Path, faces: Path) -> dict[str, float]:
    """Return the mean and minimum cosine between embeddings of student and file, on held-out faces."""
    folder = ImageFolder(faces, identities="second-half")
    images = qface.data.TensorImages(folder.read(range(min(AGREEMENT_IMAGES, len(folder)))))
    cosines = np.sum(embed(student, images) * embed(file, images), axis=1)
    return {"images": len(cosines), "mean_cosine": float(cosines.mean()), "min_cosine": float(cosines.min())}


def show(report: dict[str, Any]) -> None:
    """Print the table and the agreement of file and student."""
    title = f"w{report['bits']}a{report['bits']}, recipe {report['recipe']}, second half of the people"
    headings = ("model", *(f"TPR at {fpr}" for fpr in FPRS), "LFW 10-fold", "MB", "ms", "tuning s")
    Console().print(terminal_table(title, headings, map(cells, report["rows"])))
    Console().print(f"file against student: {report['agreement']}")


def cells(line: dict[str, Any]) -> list[str]:
    """Return a row as text: empty if not measured, ``-`` if there are too few pairs."""
    rates = ["-" if rate is None else f"{100 * rate:.2f}" for rate in (line["tpr_at_fpr"][fpr] for fpr in FPRS)]
    size = "" if line["bytes"] is None else f"{line['bytes'] / 1e6:.2f}"
    latency = "" if line["milliseconds"] is None else f"{line['milliseconds']:.2f}"
    seconds = "" if line["tuning_seconds"] is None else f"{line['tuning_seconds']:.0f}"
    return [line["model"], *rates, f"{100 * line['accuracy']:.2f}", size, latency, seconds]


if __name__ == "__main__":
    main()
