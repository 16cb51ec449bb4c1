"""qface and other tools for post-training quantization, on one float network, calibration images and people.

    python benchmarks/peers.py [--data ../shared] [--network mobilefacenet] [--every 3] [--distill] [--json FILE]
    python benchmarks/peers.py --rows nncf-w8a8 --rows qface-w8a8

Calibration takes 512 images of the first half of the LFW identities; figures are measured on the second half, or on
each n-th identity of it (``--every``). Ten folds are LFW's own pairs among these identities. "lost" is percentage
points of TPR against the float network, at 1e-4 with a 95 % interval over people; the row "float" has its TPR.

Files are embedded and timed in onnxruntime, NNCF's in OpenVINO. "latency" is the CPU time of one image on one thread
relative to the float32 network in the same runtime: the ratio of the medians of ``--runs`` alternating calls. A tool
that writes no file of these bits is simulated in torch: it has neither size nor latency. "CPU s" is the CPU time of the
quantization on all threads, for qface without the export; other work on the machine affects it little.

Each tool runs in a virtual environment of its own, which is made at the first use and takes up to 7 GB. Its settings
are its documented ones for convolutional networks: see ``peer_rows.py``. A tool that cannot be installed or that fails
has a row that says so. Each row is saved at once; repeat the command to resume after the last saved row.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import click
import numpy as np
from harness.benchmark_command import BenchmarkCommand
from harness.environments import Environment
from harness.held_out import Embeddings, Halves
from harness.recipes import CALIBRATION_IMAGES, NETWORKS
from harness.records import Record, Records, digest, digest_of_file
from harness.report_files import write_json, write_text
from harness.stopwatch import cpu_timed
from paper import quantface
from peer_inputs import TEACHER, write_inputs
from peer_report import INTERVAL_FPR, markdown, show
from peer_rows import EVERY_ROW, ROWS, TOOLS, Row, Tool
from peer_tools.task import latency_ratio
from torch import nn

import qface
from qface.data import nested_subset
from qface.deployment.runtime import OnnxEmbedder
from qface.errors import one_line
from qface.evaluation import bootstrap_tpr_drop, embed
from qface.evaluation.embedding import unit_rows
from qface.files import make_folder
from qface.preprocessing import preprocessing_of

SCRIPTS = Path(__file__).parent / "peer_tools"


@dataclass(frozen=True)
class Quantized:
    """Embeddings, size and costs of one quantized network.

    Args:
        embeddings: L2-normalized embeddings of the judged images, ``[N, D]``.
        bytes: size of its files; None if it is simulated.
        cpu_seconds: CPU time of the quantization on all threads; None for float.
        latency_ratio: CPU time of one image relative to the float network; None if it is simulated.
        versions: versions of the packages that made it.
    """

    embeddings: Embeddings
    bytes: int | None = None
    cpu_seconds: float | None = None
    latency_ratio: float | None = None
    versions: dict[str, str] = field(default_factory=lambda: {"qface": qface.__version__})


class Comparison:
    """Rows of one network; saved results are not measured again.

    Args:
        network: one of :data:`NETWORKS`.
        data: folder with ``weights/`` and ``data/``.
        every: judge each ``every``-th identity of the second half.
        seed: seed of the calibration images and of training.
        runs: timed calls of each file.
        environments: folder of the tools' environments.
        output: folder of the results.
    """

    def __init__(
        self, network: str, data: Path, every: int, seed: int, runs: int, environments: Path, output: Path
    ) -> None:
        self._teacher = qface.load(data / "weights" / NETWORKS[network])
        self._halves = Halves(data / "data", every)
        self._calibration = nested_subset(self._halves.tuning, min(CALIBRATION_IMAGES, len(self._halves.tuning)), seed)
        self._network, self._seed, self._runs = network, seed, runs
        self._environments, self._records = environments, Records(output)
        self._inputs = {
            "weights": digest_of_file(data / "weights" / NETWORKS[network]),
            "images": digest(self._halves.names()),
            "seed": seed,
        }

    @property
    def num_images(self) -> int:
        """Number of judged images."""
        return len(self._halves.held_out)

    def row(self, row: Row) -> Record:
        """Return a row with its figures, or with the error of its method."""
        found = {"row": row.name, "method": row.method, "label": row.label, "bits": row.bits, "options": row.options}
        try:
            figures = self._records.recall(self._name(row), self._settings(row), lambda: self._measure(row))
        except qface.QFaceError as error:
            return {**found, "error": one_line(error)}
        return {**found, "figures": figures}

    def _name(self, row: Row) -> str:
        return f"{self._network}-{row.name}"

    def _settings(self, row: Row) -> Record:
        return {**self._inputs, "runs": self._runs, **row.settings()}

    def _path(self, row: Row, ending: str = "") -> Path:
        return self._records.path(self._name(row), self._settings(row), ending)

    def _measure(self, row: Row) -> Record:
        methods: dict[str, Callable[[Row], Quantized]] = {
            "float": self._float,
            "qface": self._qface,
            "QuantFace": self._quantface,
        }
        made = methods.get(row.method, self._by_tool)(row)
        figures = self._halves.figures(made.embeddings, self._float_embeddings)
        return {
            **figures,
            "drop_interval": self._drop_interval(made.embeddings),
            "bytes": made.bytes,
            "cpu_seconds": made.cpu_seconds,
            "latency_ratio": made.latency_ratio,
            "versions": made.versions,
        }

    def _drop_interval(self, embeddings: Embeddings) -> list[float] | None:
        """Return the ends of the confidence interval of the loss of TPR at :data:`INTERVAL_FPR`, as fractions."""
        assert self._halves.held_out.labels is not None
        labels = self._halves.held_out.labels.numpy()
        drop = bootstrap_tpr_drop(self._float_embeddings, embeddings, labels, [INTERVAL_FPR])[INTERVAL_FPR]
        return None if drop is None else [drop.interval.low, drop.interval.high]

    @cached_property
    def _folder(self) -> Path:
        """Folder with the inputs of all methods."""
        folder = self._records.path(f"{self._network}-inputs", self._inputs)
        write_inputs(folder, self._teacher, self._calibration, self._halves.held_out)
        return folder

    @cached_property
    def _float_embeddings(self) -> Embeddings:
        return self._records.recall_array(
            f"{self._network}-float", self._inputs, lambda: self._embeddings(self._folder / TEACHER)
        )

    def _embeddings(self, model: Path | nn.Module) -> Embeddings:
        return embed(model, self._halves.held_out, progress=True)

    def _float(self, _: Row) -> Quantized:
        return Quantized(self._float_embeddings, (self._folder / TEACHER).stat().st_size, latency_ratio=1.0)

    def _qface(self, row: Row) -> Quantized:
        student, seconds = cpu_timed(lambda: self._student(row))
        file = qface.export(student, self._path(row, ".onnx"))
        return Quantized(self._embeddings(file), file.stat().st_size, seconds, self._latency_ratio(file))

    def _latency_ratio(self, file: Path) -> float:
        image = preprocessing_of(self._teacher)(self._calibration.read([0]))
        quantized, teacher = (OnnxEmbedder(path, threads=1) for path in (file, self._folder / TEACHER))
        return latency_ratio(lambda: quantized(image), lambda: teacher(image), self._runs)

    def _student(self, row: Row) -> nn.Module:
        config = qface.QuantizationConfig(row.weight_bits, row.activation_bits)
        student = qface.calibrate(qface.quantize(self._teacher, config), self._calibration)
        if row.trained:
            self._distill(student, qface.DistillConfig(seed=self._seed))
        return student

    def _quantface(self, row: Row) -> Quantized:
        student = quantface.student_of(self._teacher, row.weight_bits, row.activation_bits)
        config = replace(quantface.TRAINING, seed=self._seed)
        _, seconds = cpu_timed(lambda: self._distill(student, config))
        return Quantized(self._embeddings(student), cpu_seconds=seconds)

    def _distill(self, student: nn.Module, config: qface.DistillConfig) -> None:
        qface.distill(student, self._teacher, self._halves.tuning, config)

    def _by_tool(self, row: Row) -> Quantized:
        """Run the script of the row's tool in its environment."""
        tool, folder = TOOLS[row.method], self._path(row)
        environment = self._environment(row.method, tool)
        environment.install()
        make_folder(folder)
        write_json(folder / "settings.json", self._settings(row))
        environment.run(SCRIPTS / tool.script, [self._folder, folder], folder / "log.txt")
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return Quantized(
            unit_rows(np.load(folder / "embeddings.npy")),
            sum((folder / name).stat().st_size for name in result["files"]) or None,
            result["cpu_seconds"],
            result["latency_ratio"],
            result["versions"],
        )

    def _environment(self, method: str, tool: Tool) -> Environment:
        return Environment(self._environments / method.lower(), tool.requirements)


@click.command(cls=BenchmarkCommand)
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared"), show_default=True)
@click.option("--network", type=click.Choice(list(NETWORKS)), default="mobilefacenet", show_default=True)
@click.option("--rows", type=click.Choice(list(EVERY_ROW)), multiple=True, help="Repeatable.  [default: all untrained]")
@click.option("--distill", is_flag=True, help="Also measure the rows that train for one epoch.")
@click.option("--every", type=click.IntRange(1), default=1, show_default=True, help="Judge each n-th identity.")
@click.option("--seed", default=0, show_default=True)
@click.option("--runs", type=click.IntRange(1), default=40, show_default=True, help="Timed calls of each file.")
@click.option("--environments", type=click.Path(path_type=Path), help="[default: environments/ in the output folder]")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("runs/peers"), show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write all figures to this file.")
def main(
    data: Path,
    network: str,
    rows: Sequence[str],
    distill: bool,
    every: int,
    seed: int,
    runs: int,
    environments: Path | None,
    output: Path,
    json_file: Path | None,
) -> None:
    """Measure the missing rows and print the table."""
    make_folder(output)
    where = (environments or output / "environments").absolute()
    comparison = Comparison(network, data, every, seed, runs, where, output.absolute())
    found = [measured(comparison, row) for row in chosen(rows, distill)]
    title = f"{network}, {comparison.num_images:,} images of people who were not used for calibration"
    show(found, title)
    write_text(output / f"{network}.md", markdown(found))
    if json_file is not None:
        write_json(json_file, {"network": network, "every": every, "images": comparison.num_images, "rows": found})
    sys.exit(1 if any("error" in row for row in found) else 0)


def chosen(names: Sequence[str], distill: bool) -> list[Row]:
    """Return the rows in ``names``; without names, those that do not train, and with ``distill`` the others too."""
    if names:
        return [row for row in ROWS if row.name in names]
    return [row for row in ROWS if distill or not row.trained]


def measured(comparison: Comparison, row: Row) -> Record:
    """Return the row; report its name before and its failure after."""
    click.echo(row.name, err=True)
    found = comparison.row(row)
    if "error" in found:
        click.echo(f"{row.name} failed: {found['error']}", err=True)
    return found


if __name__ == "__main__":
    main()
