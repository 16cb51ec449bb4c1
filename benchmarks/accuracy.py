"""Measure the accuracy loss from quantization on LFW, for each network, recipe, bit setting and seed.

    python benchmarks/accuracy.py [--data ../shared] [--networks mobilefacenet] [--recipe qface] [--recipe paper]
                                  [--rows w6a6] [--seeds 3] [--epochs N] [--max-steps N] [--sweep] [-o runs/accuracy]
                                  [--json FILE]

Calibration, training and the choice of mixed bits use the first half of the identities. All figures are measured on
the second half with the exported file in onnxruntime. "float gallery" means that the float network embeds the gallery
and the exported file the probes. A row with a share uses only that fraction of the first half, for calibration too. The
seed selects the 512 calibration images, the share and the training order. Goals apply to the recipe ``qface`` with one
epoch and are compared with means over seeds. ``qface-bf16`` is ``qface`` trained in bfloat16, which is faster on GPUs
and on CPUs with AMX.

``--recipe paper`` is Ef-QuantFace: EKD loss only, one epoch, batch size 64, learning rate 0.001, no cross-layer
equalization, GPTQ or bias correction. Ranges are min-max, as in QuantFace (``QuantAct`` in its ``quant_modules.py``),
with two differences. QuantFace keeps widening activation ranges during training; here they stay as calibrated on 512
images. Its weights are asymmetric; here they are symmetric. Mixed bits are chosen once per seed and shared by all
recipes.

``--sweep`` adds the rows with 8, 6, 4 and 2 bits for both weights and activations, and draws a figure; ``--rows w8a8
--sweep`` runs only these rows. Each run is saved at once. Repeat the command to resume after the last saved run, and a
training from its last checkpoint (its duration is then unknown). Ctrl-C prints the table of the runs so far.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import click
from accuracy_report import draw_sweep, markdown, show, summarize
from accuracy_rows import EVERY_ROW, ROWS, SWEEP, Row
from harness.benchmark_command import BenchmarkCommand
from harness.held_out import Embeddings, Halves
from harness.recipes import CALIBRATION_IMAGES, NETWORKS, RECIPES
from harness.records import Record, Records, digest, digest_of_file
from harness.report_files import write_json, write_text
from harness.stopwatch import timed
from torch import nn

import qface
from qface.data import IndexedImages, nested_subset
from qface.evaluation import embed
from qface.files import make_folder


@dataclass(frozen=True)
class Run:
    """Settings of one student: network, recipe, row, seed and training length."""

    network: str
    recipe: str
    row: Row
    seed: int
    epochs: int | None
    max_steps: int | None

    @property
    def name(self) -> str:
        """Name for files and messages."""
        return f"{self.network}-{self.recipe}-{self.row.name}-seed{self.seed}"

    @property
    def training(self) -> qface.DistillConfig:
        """Distillation settings of the recipe with the seed and length of this run."""
        training = RECIPES[self.recipe].training
        return replace(training, seed=self.seed, epochs=self.epochs or training.epochs, max_steps=self.max_steps)

    def settings(self) -> Record:
        """Return all settings that affect the figures, except network and images."""
        recipe = RECIPES[self.recipe]
        return {
            **self.row.settings(),
            "seed": self.seed,
            "calibration_images": CALIBRATION_IMAGES,
            "weight_observer": recipe.quantization.weight_observer,
            "activation_observer": recipe.quantization.activation_observer,
            "wide_residuals": recipe.quantization.wide_residuals,
            "calibration": asdict(recipe.calibration),
            "training": asdict(self.training) if self.row.trained else None,
        }


class Bench:
    """Students of one network and their figures; saved results are not measured again.

    Args:
        network: one of :data:`NETWORKS`.
        data: folder with ``weights/``.
        halves: images and pairs.
        records: saved results.
    """

    def __init__(self, network: str, data: Path, halves: Halves, records: Records) -> None:
        self.network = network
        self._weights = data / "weights" / NETWORKS[network]
        if not self._weights.exists():
            raise click.ClickException(f"no weights of {network} in {self._weights}: put them there or set --data")
        self._halves = halves
        self._records = records
        self._inputs = {
            "version": qface.__version__,
            "weights": digest_of_file(self._weights),
            "images": digest(halves.names()),
        }

    def find(self, run: Run) -> Record | None:
        """Return the saved figures of ``run``, or None."""
        return self._records.find(run.name, self._settings(run))

    def figures(self, run: Run) -> Record:
        """Return the figures of ``run``; measure them if they are not saved."""
        result = self._records.recall(run.name, self._settings(run), lambda: self._measure(run))
        shutil.rmtree(self._training_folder(run), ignore_errors=True)
        return result

    def find_teacher(self) -> Record | None:
        """Return the saved figures of the float network, or None."""
        return self._records.find(f"{self.network}-float", self._inputs)

    def teacher_figures(self) -> Record:
        """Return the figures of the float network; measure them if they are not saved."""
        return self._records.recall(
            f"{self.network}-float",
            self._inputs,
            lambda: self._halves.figures(self._teacher_embeddings, self._teacher_embeddings),
        )

    def _settings(self, run: Run) -> Record:
        return {**self._inputs, **run.settings()}

    def _training_folder(self, run: Run) -> Path:
        return self._records.path(run.name, self._settings(run), ".training")

    @cached_property
    def _teacher(self) -> nn.Module:
        return qface.load(self._weights)

    @cached_property
    def _teacher_embeddings(self) -> Embeddings:
        return self._records.recall_array(
            f"{self.network}-float",
            self._inputs,
            lambda: embed(self._teacher, self._halves.held_out, progress=True),
        )

    def _measure(self, run: Run) -> Record:
        """Quantize and train the student of ``run``, export it and evaluate the file."""
        student, seconds = self._tuned(run)
        file = qface.export(student, self._records.path(run.name, self._settings(run), ".onnx"))
        figures = self._halves.figures(embed(file, self._halves.held_out, progress=True), self._teacher_embeddings)
        size = {"bytes": file.stat().st_size, "mean_weight_bits": mean_weight_bits(file)}
        return {**figures, **size, "seconds": seconds, "file": file.name}

    def _tuned(self, run: Run) -> tuple[nn.Module, float | None]:
        """Return the student of ``run`` and its tuning seconds, None if its training was resumed."""
        tuning = nested_subset(self._halves.tuning, run.row.share, run.seed)
        calibration = nested_subset(tuning, min(CALIBRATION_IMAGES, len(tuning)), run.seed)
        config, choosing = self._config(run, calibration)
        student, calibrating = timed(lambda: self._calibrated(run, config, calibration))
        if not run.row.trained:
            return student, choosing + calibrating
        folder = self._training_folder(run)
        resumed = folder.exists()
        _, training = timed(
            lambda: qface.distill(student, self._teacher, tuning, run.training, run_dir=folder, resume=True)
        )
        return student, None if resumed else choosing + calibrating + training

    def _calibrated(self, run: Run, config: qface.QuantizationConfig, images: IndexedImages) -> Any:
        return qface.calibrate(qface.quantize(self._teacher, config), images, RECIPES[run.recipe].calibration)

    def _config(self, run: Run, images: IndexedImages) -> tuple[qface.QuantizationConfig, float]:
        """Return the quantization settings and the seconds spent on choosing mixed bits."""
        row, ranges = run.row, RECIPES[run.recipe].quantization
        uniform = replace(ranges, weight_bits=row.weight_bits, activation_bits=row.activation_bits)
        if not row.mixed:
            return uniform, 0.0
        chosen = self._mixed_bits(run, images)
        overrides = {name: qface.LayerBits(weight=bits) for name, bits in chosen["bit_widths"].items()}
        return replace(uniform, weight_bits=chosen["weight_bits"], overrides=overrides), chosen["seconds"]

    def _mixed_bits(self, run: Run, images: IndexedImages) -> Record:
        row = run.row
        what = {"weight_bits": row.weight_bits, "activation_bits": row.activation_bits}
        settings = {
            **self._inputs,
            **what,
            "share": row.share,
            "seed": run.seed,
            "calibration_images": CALIBRATION_IMAGES,
        }
        name = f"{self.network}-bits-w{row.weight_bits}a{row.activation_bits}-seed{run.seed}"
        return self._records.recall(name, settings, lambda: self._allocate(row, images))

    def _allocate(self, row: Row, images: IndexedImages) -> Record:
        """Choose bits per weight tensor, limited to the file size of uniform ``row.weight_bits``.

        Each additional bit width adds nodes to the file, so the mean weight bits do not exceed ``row.weight_bits``.
        """
        start = time.perf_counter()
        uniform = qface.QuantizationConfig(row.weight_bits, row.activation_bits)
        student = qface.calibrate(qface.quantize(self._teacher, uniform), images)
        with tempfile.TemporaryDirectory() as folder:
            budget = qface.export(student, Path(folder) / "uniform.onnx").stat().st_size
        config = qface.allocate_bits(
            self._teacher, images, budget / 1e6, activation_bits=row.activation_bits, progress=True
        )
        bit_widths = {name: bits.weight for name, bits in config.overrides.items()}
        return {"weight_bits": config.weight_bits, "bit_widths": bit_widths, "seconds": time.perf_counter() - start}


def mean_weight_bits(file: Path) -> float:
    """Return the mean bits per weight of ``file``."""
    weights = qface.measure_size(file).of_kind("weight").entries
    return sum(entry.elements * (entry.bits or 0) for entry in weights) / sum(entry.elements for entry in weights)


@click.command(cls=BenchmarkCommand)
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared"), show_default=True)
@click.option("--networks", type=click.Choice(list(NETWORKS)), multiple=True, default=list(NETWORKS), show_default=True)
@click.option("--recipe", "recipes", type=click.Choice(list(RECIPES)), multiple=True, default=["qface"])
@click.option("--rows", type=click.Choice(list(EVERY_ROW)), multiple=True, help="Repeatable.  [default: main rows]")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--epochs", type=click.IntRange(1), help="Passes over the training images.  [default: the recipe's]")
@click.option("--max-steps", type=click.IntRange(1), help="Maximum number of training steps.  [default: all epochs]")
@click.option("--sweep", is_flag=True, help="Also measure 8, 6, 4 and 2 bits for both weights and activations.")
@click.option("--no-train", is_flag=True, help="Skip rows that train.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("runs/accuracy"), show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write all figures to this file.")
def main(
    data: Path,
    networks: Sequence[str],
    recipes: Sequence[str],
    rows: Sequence[str],
    seeds: int,
    epochs: int | None,
    max_steps: int | None,
    sweep: bool,
    no_train: bool,
    output: Path,
    json_file: Path | None,
) -> None:
    """Measure the missing runs and print the table; Ctrl-C prints the table of the runs so far."""
    make_folder(output)
    halves, records = Halves(data / "data"), Records(output)
    benches = {network: Bench(network, data, halves, records) for network in networks}
    runs = list(planned(networks, recipes, chosen(rows, sweep, no_train), seeds, epochs, max_steps))
    code = 130  # exit code of a shell after Ctrl-C
    try:
        code = 0 if measure_missing(runs, benches) else 1
    except KeyboardInterrupt:
        click.echo("interrupted: repeat the command to resume", err=True)
    report(runs, benches, output, sweep, json_file)
    sys.exit(code)


def chosen(names: Sequence[str], sweep: bool, no_train: bool) -> list[Row]:
    """Return the rows in ``names``, or all of ROWS if it is empty, plus the sweep rows."""
    wanted = {*(names or [row.name for row in ROWS]), *(SWEEP if sweep else ())}
    return [row for row in EVERY_ROW.values() if row.name in wanted and not (no_train and row.trained)]


def planned(
    networks: Sequence[str],
    recipes: Sequence[str],
    rows: Sequence[Row],
    seeds: int,
    epochs: int | None,
    max_steps: int | None,
) -> Iterator[Run]:
    """Yield the runs by network, then by seed, so that all rows of a seed precede the next seed."""
    for network in networks:
        for seed in range(seeds):
            for row in rows:
                for recipe in recipes:
                    yield Run(network, recipe, row, seed, epochs, max_steps)


def measure_missing(runs: Sequence[Run], benches: dict[str, Bench]) -> bool:
    """Measure the runs that are not saved; report a run that fails, go on, and return False at the end."""
    complete = True
    for bench in benches.values():
        bench.teacher_figures()
    missing = [run for run in runs if benches[run.network].find(run) is None]
    for number, run in enumerate(missing, 1):
        click.echo(f"{number} of {len(missing)}: {run.name}", err=True)
        try:
            benches[run.network].figures(run)
        except qface.QFaceError as error:
            click.echo(f"{run.name} failed: {error}", err=True)
            complete = False
    return complete


def report(runs: Sequence[Run], benches: dict[str, Bench], output: Path, sweep: bool, json_file: Path | None) -> None:
    """Print and write the figures of the saved ``runs``."""
    teachers = {name: found for name, bench in benches.items() if (found := bench.find_teacher())}
    results = [(run, benches[run.network].find(run)) for run in runs if run.network in teachers]
    figures = [_identified(run, result) for run, result in results if result is not None]
    lines = summarize(teachers, figures)
    show(lines, teachers)
    click.echo(f"{len(figures)} of {len(runs)} runs are complete")
    write_text(output / "accuracy.md", markdown(lines, teachers))
    if sweep:
        draw_sweep(lines, output / "accuracy.png")
    if json_file is not None:
        write_json(json_file, {"float": teachers, "runs": figures, "summary": lines})


def _identified(run: Run, result: Record) -> Record:
    which = {"network": run.network, "recipe": run.recipe, "row": run.row.name, "settings": run.settings()}
    return {**which, "seed": run.seed, **result}


if __name__ == "__main__":
    main()
