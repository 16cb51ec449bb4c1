"""Equal embeddings, accuracy and latency of a file in other runtimes and on other processors.

    make runtimes
    python benchmarks/runtimes.py student.onnx [--float float32.onnx] [--images 2000] [--json] [-o FILE]

``tests/runtimes`` defines the runtimes. A runtime that is not installed has no row; a line says why. All figures use
the held-out second half of the people. Emulated processors take about half a second per face, so they embed fewer faces
(``--emulated-images``) and are not timed.

- "equal": number of embeddings that equal those of the host's onnxruntime bit for bit.
- "minimum cosine": minimum cosine between an embedding and the host's.
- "TPR": TPR at FPR 1e-4 over all pairs of the embedded faces, for the runtime and for the host on the same faces.
- "ms": median time of one image on one thread; calls alternate between the file and the float32 file.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from harness.benchmark_command import BenchmarkCommand
from harness.report_files import markdown_table, terminal_table, write_text
from rich.console import Console

from qface.data import ImageFolder
from qface.deployment.inputs import UINT8_INPUT
from qface.deployment.runtime import OnnxEmbedder
from qface.evaluation import tpr_at_fpr

sys.path.append(str(Path(__file__).parents[1]))
runtimes = importlib.import_module("tests.runtimes.runtime")

FPR = "1e-4"
HEADINGS = ("runtime", "version", "equal", "minimum cosine", f"TPR at {FPR}", "host's", "ms", "float32 ms", "ratio")

Array = npt.NDArray[Any]


@dataclass
class Row:
    """The result of one runtime.

    Args:
        runtime: name of the runtime.
        version: version of onnxruntime or OpenVINO.
        images: number of images embedded.
        equal: number of embeddings that equal the host's bit for bit.
        min_cosine: minimum cosine between an embedding and the host's.
        tpr: TPR at :data:`FPR`; None if there are too few pairs.
        host_tpr: TPR of the host on the same images.
        milliseconds: median time of one image; None if not timed.
        float_milliseconds: the same for the float32 file; None without one.
    """

    runtime: str
    version: str
    images: int
    equal: int
    min_cosine: float
    tpr: float | None
    host_tpr: float | None
    milliseconds: float | None = None
    float_milliseconds: float | None = None


class Faces:
    """Held-out faces, converted to the input of a file.

    Args:
        root: folder with ``data/lfw``.
        count: number of faces; all are taken if there are fewer.
    """

    def __init__(self, root: Path, count: int) -> None:
        folder = ImageFolder(root / "data" / "lfw", identities="second-half")
        chosen = range(min(count, len(folder)))
        self.crops = folder.read(chosen)
        assert folder.labels is not None
        self.labels = folder.labels[: len(chosen)].numpy()

    def read_by(self, file: Path) -> Array:
        """Return all faces as the input of ``file``: uint8 or normalized float32."""
        embedder = OnnxEmbedder(file)
        images = embedder.preprocessing(self.crops)
        pixels = embedder.preprocessing.to_bytes(images) if embedder.input == UINT8_INPUT else images
        return np.ascontiguousarray(pixels.numpy())


@click.command(cls=BenchmarkCommand)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--float", "float_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared"), show_default=True)
@click.option("--runtimes", "names", type=click.Choice(list(runtimes.RUNTIMES)), multiple=True, help="[default: all]")
@click.option("--images", type=click.IntRange(1), default=2000, show_default=True)
@click.option("--emulated-images", type=click.IntRange(1), default=200, show_default=True)
@click.option("--runs", type=click.IntRange(0), default=40, show_default=True, help="Timed calls of each file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Also write the table here, as Markdown.")
def main(
    file: Path,
    float_file: Path | None,
    data: Path,
    names: Sequence[str],
    images: int,
    emulated_images: int,
    runs: int,
    as_json: bool,
    output: Path | None,
) -> None:
    """Measure FILE, an exported student, in each runtime."""
    faces = Faces(data, images)
    inputs = faces.read_by(file)
    timed_files = [(path, faces.read_by(path)[:1]) for path in (file, float_file) if path is not None]
    reference = runtimes.Runtime(runtimes.HOST).embed(file, inputs)
    rows: list[Row] = []
    notes: list[str] = []
    for name in names or runtimes.RUNTIMES:
        runtime = runtimes.Runtime(name)
        if reason := runtime.reason_missing():
            notes.append(reason)
            continue
        count = min(emulated_images if runtime.environment.emulated else images, len(inputs))
        embeddings = runtime.embed(file, inputs[:count])
        rows.append(compare(runtime, embeddings, reference[:count], faces.labels[:count]))
        if runs and not runtime.environment.emulated:
            add_times(rows[-1], runtime.milliseconds(timed_files, runs))
    show(rows, notes, file, as_json)
    if output is not None:
        write_text(output, markdown_table(HEADINGS, map(cells, rows)))


def compare(runtime: Any, embeddings: Array, reference: Array, labels: Array) -> Row:
    """Compare embeddings of ``runtime`` with the host's; the row has no times yet."""
    ours, hosts = normalized(embeddings), normalized(reference)
    return Row(
        runtime.name,
        runtime.version,
        len(embeddings),
        int(np.all(embeddings == reference, axis=1).sum()),
        float(np.sum(ours * hosts, axis=1).min()),
        tpr_at_fpr(ours, labels, [FPR])[FPR].tpr,
        tpr_at_fpr(hosts, labels, [FPR])[FPR].tpr,
    )


def normalized(embeddings: Array) -> Array:
    """Scale each row to length 1."""
    lengths: Array = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings / lengths


def add_times(row: Row, times: list[list[float]]) -> None:
    """Set the median times of the file and, if there is one, of the float32 file."""
    medians = [statistics.median(measured) for measured in times]
    row.milliseconds, row.float_milliseconds = (*medians, None)[:2]


def show(rows: list[Row], notes: list[str], file: Path, as_json: bool) -> None:
    """Print the rows, and the reasons why others are missing."""
    if as_json:
        print(json.dumps({"file": file.name, "rows": [asdict(row) for row in rows], "notes": notes}, indent=1))
        return
    console = Console()
    console.print(terminal_table(file.name, HEADINGS, map(cells, rows)))
    for note in notes:
        console.print(note)


def cells(row: Row) -> list[str]:
    """Return a row as text: empty if not measured, ``-`` if there are too few pairs."""
    rates = ["-" if rate is None else f"{100 * rate:.2f}" for rate in (row.tpr, row.host_tpr)]
    times = ["" if time is None else f"{time:.2f}" for time in (row.milliseconds, row.float_milliseconds)]
    ratio = f"{row.milliseconds / row.float_milliseconds:.2f}" if row.milliseconds and row.float_milliseconds else ""
    equal = f"{row.equal} of {row.images}"
    return [row.runtime, row.version, equal, f"{row.min_cosine:.4f}", *rates, *times, ratio]


if __name__ == "__main__":
    main()
