"""Time of a step and of an epoch in QuantFace's training loop and in ours.

    python benchmarks/training_time.py [--data ../shared] [--networks mobilefacenet] [--steps 8] [--rounds 3]
                                       [-o runs/training_time] [--json FILE]

Figure 1 of Ef-QuantFace compares epochs: 6,600 minutes for QuantFace on 5.8 million images, and 15 minutes for
Ef-QuantFace on 13,233, a factor of 440. Here the loops train alternately on the same images, a few steps at a time. The
seconds per step are measured; the minutes per epoch are *extrapolated* from them: seconds per step x number of steps.

QuantFace's loop is benchmarks/paper/quantface.py in :func:`qface.distill`. Like the original, it embeds each batch with
both teacher and student. Only its first 299 steps search for activation ranges; the timed steps, which stand for up to
91,000, do not. A GPU is used if there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from harness.benchmark_command import BenchmarkCommand
from harness.recipes import NETWORKS
from harness.report_files import write_figure, write_json
from harness.stopwatch import timed
from paper import quantface
from rich.console import Console
from rich.table import Table
from torch import nn

import qface
from qface.data import ImageFolder, TensorImages
from qface.data.sample import sample_batches
from qface.files import make_folder
from qface.progress import track

EPOCHS = {"LFW": 13_233, "QuantFace, synthetic": 500_000, "MS1MV2": 5_822_653}
"""Number of images per epoch."""
PRINTED_MINUTES = {"QuantFace on MS1MV2": 6_600, "Ef-QuantFace on LFW": 15}
"""Minutes per epoch in figure 1 of the paper."""
QUANTFACE, PAPER, OURS = "QuantFace", "qface, paper's recipe", "qface"
CALIBRATION_IMAGES = 128

Loop = Callable[[], nn.Module]


@click.command(cls=BenchmarkCommand)
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared"), show_default=True)
@click.option("--networks", type=click.Choice(list(NETWORKS)), multiple=True, default=["mobilefacenet"])
@click.option("--bits", default=6, show_default=True)
@click.option("--batch-size", type=click.IntRange(2), default=64, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=8, show_default=True, help="Steps of each loop per round.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Timed rounds, after a warm-up.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("runs/training_time"), show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures here.")
def main(
    data: Path,
    networks: Sequence[str],
    bits: int,
    batch_size: int,
    steps: int,
    rounds: int,
    output: Path,
    json_file: Path | None,
) -> None:
    """Time the loops of each network, then print, draw and write the time of an epoch."""
    make_folder(output)
    report = [{"network": name, **measured(name, data, bits, batch_size, steps, rounds)} for name in networks]
    for entry in report:
        Console(width=max(Console().width, 130)).print(table(entry))
        click.echo(explained(entry))
        draw(entry, output / f"training_time-{entry['network']}.png")
    if json_file is not None:
        write_json(json_file, report)


def measured(name: str, data: Path, bits: int, batch_size: int, steps: int, rounds: int) -> dict[str, Any]:
    """Return each loop's median seconds per step, and its minutes per epoch of each dataset."""
    weights = data / "weights" / NETWORKS[name]
    teacher = qface.load(weights if weights.exists() else name)
    images = _images(data, max(CALIBRATION_IMAGES, batch_size * steps))
    students = _students(teacher, images, bits, batch_size)
    loops = _loops(students, teacher, images, batch_size, steps)
    seconds: dict[str, list[float]] = {loop: [] for loop in loops}
    for _ in track(range(rounds + 1), "rounds"):
        for loop, train in loops.items():
            seconds[loop].append(timed(train)[1] / steps)
        _end_search_for_ranges(students[QUANTFACE])
    of_a_step = {loop: median(values[1:]) for loop, values in seconds.items()}
    return {
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "steps_timed": steps * rounds,
        "seconds_a_step": of_a_step,
        "images_a_second": {loop: batch_size / value for loop, value in of_a_step.items()},
        "minutes_an_epoch": {
            loop: {name: images // batch_size * value / 60 for name, images in EPOCHS.items()}
            for loop, value in of_a_step.items()
        },
    }


def _images(data: Path, count: int) -> TensorImages:
    """Read ``count`` labeled LFW crops of the first half into memory, so that the disk is not timed."""
    folder = ImageFolder(data / "data" / "lfw", identities="first-half")
    chosen = list(range(min(count, len(folder))))
    assert folder.labels is not None
    return TensorImages(folder.read(chosen), folder.labels[chosen])


def _students(teacher: nn.Module, images: TensorImages, bits: int, batch_size: int) -> dict[str, nn.Module]:
    """Return a student per loop; QuantFace's student finds its ranges in the warm-up round."""
    sample = torch.cat(sample_batches(images, CALIBRATION_IMAGES, batch_size))
    return {
        QUANTFACE: quantface.student_of(teacher, bits, bits),
        PAPER: qface.calibrate(qface.quantize(teacher, bits), sample),
        OURS: qface.calibrate(qface.quantize(teacher, bits), sample),
    }


def _loops(
    students: dict[str, nn.Module], teacher: nn.Module, images: TensorImages, batch_size: int, steps: int
) -> dict[str, Loop]:
    """Return functions that train each student for ``steps`` steps."""

    def loop(student: nn.Module, config: qface.DistillConfig) -> Loop:
        # With a tiny learning rate, repeated training hardly changes the students.
        optimizer = replace(config.optimizer, learning_rate=1e-9)
        timed_config = replace(config, batch_size=batch_size, max_steps=steps, epochs=steps, optimizer=optimizer)
        return partial(qface.distill, student, teacher, images, timed_config, progress=False)

    configs = {QUANTFACE: quantface.TRAINING, PAPER: qface.DistillConfig.paper(), OURS: qface.DistillConfig()}
    return {name: loop(student, configs[name]) for name, student in students.items()}


def _end_search_for_ranges(student: nn.Module) -> None:
    """Freeze the ranges of QuantFace's quantizers, as training does after its first 299 steps."""
    for module in student.modules():
        if isinstance(module, quantface.RangeQuantizer):
            module.steps.fill_(quantface.STEPS_OF_RANGES)


def table(entry: dict[str, Any]) -> Table:
    """Return the table, one row per loop."""
    title = f"{entry['network']}, {entry['device']}, batch {entry['batch_size']}, {entry['threads']} threads"
    result = Table(title=f"{title}; minutes an epoch are extrapolated from {entry['steps_timed']} steps")
    for heading in ("loop", "seconds a step", "images a second", *(f"{name}, {n:,}" for name, n in EPOCHS.items())):
        result.add_column(heading, justify="left" if heading == "loop" else "right")
    for loop, seconds in entry["seconds_a_step"].items():
        minutes = (f"{value:,.1f} min" for value in entry["minutes_an_epoch"][loop].values())
        result.add_row(loop, f"{seconds:.3f}", f"{entry['images_a_second'][loop]:.1f}", *minutes)
    return result


def explained(entry: dict[str, Any]) -> str:
    """Split the paper's factor of 440 into the time of a step and the number of images."""
    minutes = entry["minutes_an_epoch"]
    whole = minutes["QuantFace"]["MS1MV2"] / minutes["qface"]["LFW"]
    step = entry["seconds_a_step"]["QuantFace"] / entry["seconds_a_step"]["qface"]
    images = EPOCHS["MS1MV2"] / EPOCHS["LFW"]
    printed = PRINTED_MINUTES["QuantFace on MS1MV2"] / PRINTED_MINUTES["Ef-QuantFace on LFW"]
    return (
        f"An epoch of QuantFace on MS1MV2 against one of ours on LFW: {whole:.0f} times as long. "
        f"{images:.0f} of it is the number of images, {step:.2f} the step. The paper prints {printed:.0f}."
    )


def draw(entry: dict[str, Any], path: Path) -> None:
    """Draw the minutes per epoch like the paper's figure 1, with the printed minutes."""
    from matplotlib.figure import Figure

    minutes = entry["minutes_an_epoch"]
    bars = {
        "QuantFace, MS1MV2\n5.8 M images (extrapolated)": minutes["QuantFace"]["MS1MV2"],
        "QuantFace, synthetic\n0.5 M images (extrapolated)": minutes["QuantFace"]["QuantFace, synthetic"],
        "qface, LFW\n13,233 images (extrapolated)": minutes["qface"]["LFW"],
        "printed: QuantFace": PRINTED_MINUTES["QuantFace on MS1MV2"],
        "printed: Ef-QuantFace": PRINTED_MINUTES["Ef-QuantFace on LFW"],
    }
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panel = figure.subplots()
    panel.barh(list(bars), list(bars.values()), color=["C0"] * 3 + ["0.7"] * 2)
    panel.bar_label(panel.containers[0], fmt="{:,.0f}", padding=3)
    panel.invert_yaxis()
    panel.set_xscale("log")
    panel.set_xlabel(f"minutes an epoch, {entry['network']}, {entry['device']}, {entry['threads']} threads")
    write_figure(path, figure)


if __name__ == "__main__":
    main()
