"""Time of a training step of a quantized student, relative to a step of the float network.

    python benchmarks/qat_step.py [--data ../shared] [--network mobilefacenet] [--batch-size 64] [--repeats 10]
                                  [--json FILE]

A step is forward, backward and SGD in training mode, in float32 and in bfloat16. The float network has its BatchNorm
layers; the student has all quantizers on and learns their scales. The teacher's forward, which distillation adds to
both, has its own row. One run times all steps alternately; compare the ratios. On a CPU freed memory is kept and images
are channels last, as in :func:`qface.distill`; the last rows leave out one of the two.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from harness.benchmark_command import BenchmarkCommand
from harness.recipes import NETWORKS
from harness.report_files import write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import qface
from qface.kept_memory import memory_kept
from qface.memory_format import fastest_memory_format
from qface.preprocessing import example_input
from qface.progress import track

CALIBRATION_IMAGES = 32
FLOAT, QAT, TEACHER = "float step", "QAT step", "teacher's forward"
BF16 = ", bfloat16"


@click.command(cls=BenchmarkCommand)
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared"), show_default=True)
@click.option(
    "--network", type=click.Choice(list(NETWORKS)), multiple=True, default=["mobilefacenet"], show_default=True
)
@click.option("--bits", default=6, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=10, show_default=True, help="Timed steps of each kind.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures here.")
def main(data: Path, network: Sequence[str], bits: int, batch_size: int, repeats: int, json_file: Path | None) -> None:
    """Time the steps of each network on the CPU, and on a GPU if there is one."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    report = [
        {"network": name, "device": device, **measured(name, data, bits, batch_size, repeats, device)}
        for name in network
        for device in devices
    ]
    for entry in report:
        show(entry)
    if json_file is not None:
        write_json(json_file, report)


def measured(name: str, data: Path, bits: int, batch_size: int, repeats: int, device: str) -> dict[str, Any]:
    """Return the median seconds of each kind of step."""
    file = data / "weights" / NETWORKS[name]
    teacher = qface.load(file if file.exists() else name).to(device).eval()
    planes = torch.rand(batch_size, *example_input(teacher).shape[1:], device=device) * 2 - 1
    student = qface.calibrate(qface.quantize(teacher, bits), planes[:CALIBRATION_IMAGES])
    trained = copy.deepcopy(teacher)
    images = planes.contiguous(memory_format=fastest_memory_format(planes[:1], teacher))
    steps = {
        FLOAT: training_step(trained, images),
        FLOAT + BF16: training_step(trained, images, torch.bfloat16),
        QAT: training_step(student, images),
        QAT + BF16: training_step(student, images, torch.bfloat16),
        TEACHER: lambda: forward(teacher, images),
    }
    planar = {FLOAT: training_step(trained, planes), QAT: training_step(student, planes)}
    with memory_kept():
        kept = interleaved(steps, repeats)
        in_planes = interleaved(planar, repeats) if device == "cpu" else {}
    given_back = interleaved({kind: steps[kind] for kind in (FLOAT, QAT)}, repeats) if device == "cpu" else {}
    return {
        "weights": "pretrained" if file.exists() else "random",
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "seconds": kept,
        "seconds_with_channels_first": in_planes,
        "seconds_with_memory_given_back": given_back,
    }


def training_step(model: nn.Module, images: Tensor, dtype: torch.dtype = torch.float32) -> Callable[[], None]:
    """Return an SGD step in ``dtype`` on the embeddings; its tiny learning rate hardly changes weights."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-8, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            embeddings = model(images)
        embeddings.float().square().mean().backward()
        optimizer.step()

    return step


@torch.no_grad()
def forward(model: nn.Module, images: Tensor) -> None:
    """Run the forward pass without gradients."""
    model(images)


def interleaved(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each step, timed in rounds of random order after a warm-up round."""
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    order = random.Random(0)
    for _ in track(range(repeats + 1), "steps"):
        for kind in order.sample(list(steps), len(steps)):
            seconds[kind].append(timed(steps[kind]))
    return {kind: median(values[1:]) for kind, values in seconds.items()}


def timed(step: Callable[[], None]) -> float:
    """Return the seconds of ``step``, including the work that it queues on a GPU."""
    finish = torch.cuda.synchronize if torch.cuda.is_available() else nullcontext
    start = time.perf_counter()
    step()
    finish()
    return time.perf_counter() - start


def show(entry: dict[str, Any]) -> None:
    """Print the table of one network on one device."""
    title = f"{entry['network']} ({entry['weights']} weights), {entry['device']}, batch {entry['batch_size']}"
    table = Table(title=f"{title}, {entry['threads']} threads")
    for heading in ("step", "seconds", "of the float step"):
        table.add_column(heading, justify="left" if heading == "step" else "right")
    for words, seconds in (
        ("", entry["seconds"]),
        (", channels first", entry["seconds_with_channels_first"]),
        (", memory given back", entry["seconds_with_memory_given_back"]),
    ):
        for kind, value in seconds.items():
            table.add_row(kind + words, f"{value:.3f}", f"{value / seconds[FLOAT]:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
