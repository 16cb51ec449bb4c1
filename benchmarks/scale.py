"""Time and memory of TPR at FPR over all pairs, by number of embeddings.

    python benchmarks/scale.py [--images 25000 --images 50000 ...] [--dimensions 512] [--device cpu]

Embeddings are random, ten per person around a random center, with cosines like those of a good network. Each number of
images runs in its own process, so that its peak memory covers only these embeddings and their comparison. The last row
is extrapolated from the largest set measured: the number of pairs grows with the square of the number of images.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
from harness.benchmark_command import BenchmarkCommand
from harness.report_files import write_json
from rich.console import Console
from rich.table import Table

from qface.evaluation import tpr_at_fpr

FPRS = ("1e-3", "1e-4", "1e-5", "1e-6")
EXTRAPOLATED = 1_000_000
IMAGES_OF_A_PERSON = 10
SPREAD = 1.8  # distance from the center relative to its length: genuine cosines are 1 / (1 + 1.8^2) on average


@dataclass(frozen=True)
class Row:
    """Result for one number of images.

    Args:
        images: number of embeddings compared.
        people: number of people.
        pairs: number of pairs of images.
        seconds: time of the comparison.
        gigabytes: peak memory of the process in GiB, with the embeddings.
        extrapolated: True if the row was not measured.
        tpr: TPR by FPR; empty if not measured.
    """

    images: int
    people: int
    pairs: int
    seconds: float
    gigabytes: float
    extrapolated: bool
    tpr: dict[str, float | None]


@click.command(cls=BenchmarkCommand)
@click.option(
    "--images",
    type=click.IntRange(100),
    multiple=True,
    default=(25_000, 50_000, 100_000, 200_000),
    show_default=True,
    help="Repeatable.",
)
@click.option("--dimensions", type=click.IntRange(2), default=512, show_default=True)
@click.option("--device", help="Device that computes cosines.  [default: a GPU if there is one]")
@click.option("--run-dir", type=click.Path(path_type=Path), help="Keep counts here, and continue a stopped run.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write all figures here.")
@click.option("--alone", is_flag=True, hidden=True, help="Measure one number of images in this process.")
def main(
    images: Sequence[int],
    dimensions: int,
    device: str | None,
    run_dir: Path | None,
    json_path: Path | None,
    alone: bool,
) -> None:
    """Measure each number of images in its own process, extrapolate to a million, and print the table."""
    if alone:
        click.echo(json.dumps(asdict(measure(images[0], dimensions, device, run_dir))))
        return
    rows = [_in_a_process(count, dimensions, device, run_dir) for count in sorted(images)]
    rows += [extrapolate(rows, EXTRAPOLATED, dimensions)]
    Console(width=140).print(_table(rows, dimensions, device))
    if json_path is not None:
        write_json(json_path, [asdict(row) for row in rows])


def measure(images: int, dimensions: int, device: str | None, run_dir: Path | None) -> Row:
    """Compare ``images`` random embeddings, and measure the time and memory of this process."""
    embeddings, labels = random_embeddings(images, dimensions)
    start = time.perf_counter()
    points = tpr_at_fpr(embeddings, labels, FPRS, run_dir=run_dir, device=device, progress=True)
    seconds = time.perf_counter() - start
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    tpr = {fpr: point.tpr for fpr, point in points.items()}
    return Row(images, int(labels[-1]) + 1, images * (images - 1) // 2, seconds, gigabytes, False, tpr)


def random_embeddings(images: int, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors, float32 `[images, dimensions]`, and their labels `[images]`."""
    rng = np.random.default_rng(0)
    labels = np.arange(images) // IMAGES_OF_A_PERSON
    centers = rng.standard_normal((int(labels[-1]) + 1, dimensions), np.float32)
    embeddings = rng.standard_normal((images, dimensions), np.float32)
    embeddings *= SPREAD
    embeddings += np.repeat(centers, IMAGES_OF_A_PERSON, axis=0)[:images]
    embeddings /= np.sqrt(np.einsum("ij,ij->i", embeddings, embeddings))[:, None]
    return embeddings, labels


def _in_a_process(images: int, dimensions: int, device: str | None, run_dir: Path | None) -> Row:
    options = ["--images", str(images), "--dimensions", str(dimensions)]
    if device is not None:
        options += ["--device", device]
    if run_dir is not None:
        options += ["--run-dir", str(run_dir / str(images))]
    done = subprocess.run(
        [sys.executable, __file__, "--alone", *options], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise click.ClickException(f"{images} images failed: see the error above")
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def extrapolate(rows: Sequence[Row], images: int, dimensions: int) -> Row:
    """Extrapolate the last row: time in proportion to the pairs, plus the memory of more embeddings."""
    last = rows[-1]
    pairs = images * (images - 1) // 2
    gigabytes = last.gigabytes + 4 * dimensions * (images - last.images) / 2**30
    return Row(images, images // IMAGES_OF_A_PERSON, pairs, last.seconds * pairs / last.pairs, gigabytes, True, {})


def _table(rows: Sequence[Row], dimensions: int, device: str | None) -> Table:
    threads = os.environ.get("OMP_NUM_THREADS", f"{os.cpu_count()}")
    table = Table(
        title=f"All pairs of embeddings of {dimensions} numbers, {device or 'default device'}, {threads} threads"
    )
    for column in ("images", "pairs", "seconds", "10^9 pairs/s", "GiB", *(f"TPR at {fpr}" for fpr in FPRS)):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        rates = [row.tpr.get(fpr) for fpr in FPRS]
        table.add_row(
            f"{row.images:,}{' (extrapolated)' if row.extrapolated else ''}",
            f"{row.pairs:.2e}",
            f"{row.seconds:,.1f}",
            f"{row.pairs / row.seconds / 1e9:.3f}",
            f"{row.gigabytes:.2f}",
            *("" if rate is None else f"{100 * rate:.2f}" for rate in rates),
        )
    return table


if __name__ == "__main__":
    main()
