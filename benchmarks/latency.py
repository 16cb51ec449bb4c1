"""Latency and size of a network as float32, as int8 from three quantizers, and as qface's packed file.

    python benchmarks/latency.py [--data ../shared] [--networks mobilefacenet] [--threads 1] [--batch 1] [--runs 40]

The timed calls alternate between the files. Compare ratios within one table; milliseconds depend on the machine and
its load. If --data has no weights, the network gets random weights and the table's title says so; ratios of random and
trained weights differ. Times on a GPU include the copies of images and embeddings.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import platform
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import torch
from harness.benchmark_command import BenchmarkCommand
from harness.report_files import write_figure, write_json
from rich.console import Console
from torch import Tensor, nn

import qface
from qface.data import ImageFolder
from qface.deployment.latency import Candidate, Latency, compare, open_file
from qface.deployment.runtime import OnnxEmbedder
from qface.files import make_folder
from qface.preprocessing import CROP_SIZE, preprocessing_of
from qface.reporting.tables import latency_table

NETWORKS = {
    "mobilefacenet": "mobilefacenet_112x96.safetensors",
    "iresnet18": "iresnet18.safetensors",
    "iresnet50": "iresnet50.safetensors",
}
"""Weight file of each network, in ``weights/`` of --data."""

CROPS = 32
CPU, CUDA, TENSORRT = (f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt"))
PACKED, INT8, FLOAT, STATIC, OPENVINO = "qface packed", "qface int8", "float32", "quantize_static", "NNCF int8"


@dataclass(frozen=True)
class Setting:
    """Execution provider, number of threads and batch size of a comparison."""

    provider: str
    threads: int
    batch: int


@click.command(cls=BenchmarkCommand)
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared"), show_default=True)
@click.option("--networks", type=click.Choice(list(NETWORKS)), multiple=True, default=list(NETWORKS), show_default=True)
@click.option("--bits", default=6, show_default=True)
@click.option("--threads", type=click.IntRange(1), multiple=True, help="Repeatable.  [default: 1, and all]")
@click.option("--batch", type=click.IntRange(1), multiple=True, default=(1, 16), show_default=True, help="Repeatable.")
@click.option("--runs", type=click.IntRange(1), default=40, show_default=True, help="Timed calls of each file.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("runs/latency"), show_default=True)
def main(
    data: Path,
    networks: Sequence[str],
    bits: int,
    threads: Sequence[int],
    batch: Sequence[int],
    runs: int,
    output: Path,
) -> None:
    """Export each network in all forms, time them, and write a table, JSON and a figure."""
    console, notes = Console(), list(missing_packages())
    crops = few_crops(data)
    report: dict[str, Any] = {"machine": machine(), "bits": bits, "runs": runs, "notes": notes, "networks": {}}
    measured: dict[str, list[list[Latency]]] = {}
    for name in networks:
        teacher, origin = load_network(name, data, crops)
        files = write_forms(teacher, crops, bits, folder(output / name))
        places = settings(files[PACKED], sorted(set(threads)) or every_thread(), batch)
        comparisons = [time_forms(files, setting, runs) for setting in places]
        title = f"{name}, w{bits}a{bits}, {origin} weights"
        measured[title] = comparisons
        records = [row.to_dict() for rows in comparisons for row in rows]
        report["networks"][name] = {"weights": origin, "rows": records}
        for rows in comparisons:
            console.print(latency_table(rows, title))
    write_json(output / "latency.json", report)
    if importlib.util.find_spec("matplotlib"):
        draw(measured, output / "latency.png")
    for note in notes:
        console.print(note)


def missing_packages() -> Iterator[str]:
    """Yield a line for each part of the report that a missing package prevents."""
    if not has_openvino():
        yield f"no row {OPENVINO}: nncf and openvino are not installed; run: pip install 'qface[bench]'"
    if importlib.util.find_spec("matplotlib") is None:
        yield "no figure: matplotlib is not installed; run: pip install 'qface[bench]'"


def has_openvino() -> bool:
    """True if OpenVINO and its quantizer NNCF are installed."""
    return all(importlib.util.find_spec(package) for package in ("openvino", "nncf"))


def machine() -> dict[str, Any]:
    """Return the processor, the number of cores and the version of torch."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }


def every_thread() -> list[int]:
    """Return 1 and the number of cores that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return sorted({1, usable})


def folder(path: Path) -> Path:
    """Create the folder ``path`` if it is missing, and return it."""
    make_folder(path)
    return path


def settings(file: Path, threads: Sequence[int], batch: Sequence[int]) -> list[Setting]:
    """Return settings of the CPU for each number of threads, then of each accelerator that runs ``file``."""
    places = [(CPU, count) for count in threads] + [(provider, 1) for provider in accelerators(file)]
    return [Setting(provider, count, images) for provider, count in places for images in sorted(set(batch))]


def accelerators(file: Path) -> list[str]:
    """Return CUDA and TensorRT if sessions get them; onnxruntime lists both even without a GPU."""
    if OnnxEmbedder(file).provider != CUDA:
        return []
    return [CUDA, *(provider for provider in [TENSORRT] if runs_on(file, provider))]


def runs_on(file: Path, provider: str) -> bool:
    """True if onnxruntime runs ``file`` with ``provider`` and does not fall back to another one."""
    try:
        return OnnxEmbedder(file, [provider, CPU]).provider == provider
    except qface.QFaceError:
        return False


# Network and exported forms


def few_crops(data: Path) -> Tensor:
    """Return LFW crops, uint8 `[CROPS, 3, 112, 112]`, or random pixels if --data has no LFW."""
    faces = data / "data" / "lfw"
    if not faces.is_dir():
        shape = (CROPS, 3, CROP_SIZE, CROP_SIZE)
        return torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).byte()
    images = ImageFolder(faces, identities="first-half")
    return images.read(torch.linspace(0, len(images) - 1, CROPS).long().tolist())


def load_network(name: str, data: Path, crops: Tensor) -> tuple[nn.Module, str]:
    """Return the network and the origin of its weights: ``pretrained`` or ``random``."""
    weights = data / "weights" / NETWORKS[name]
    if weights.exists():
        return qface.load(weights), "pretrained"
    torch.manual_seed(0)
    return with_statistics(qface.load(name), crops), "random"


def with_statistics(network: nn.Module, crops: Tensor) -> nn.Module:
    """Set BatchNorm statistics and PReLU slopes of a random network, so that it runs like a trained one.

    BatchNorm gets the statistics of ``crops``, since a deep network overflows with its initial ones. PReLU layers get
    different slopes, since ``torch.onnx.export`` lets layers share equal slopes through Identity.
    """
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = 1.0
        elif isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, 0.1, 0.4)
    with torch.no_grad():
        network.train()(preprocessing_of(network)(crops))
    return network.eval()


def write_forms(teacher: nn.Module, crops: Tensor, bits: int, into: Path) -> dict[str, Path]:
    """Write the network in every form; the first file is the reference of all ratios."""
    images = preprocessing_of(teacher)(crops).numpy()
    student = qface.calibrate(qface.quantize(teacher, bits), crops)
    files = {
        PACKED: qface.export(student, into / "packed.onnx"),
        INT8: qface.export(student, into / "int8.onnx", weight_format="int8"),
        FLOAT: qface.export(teacher, into / "float32.onnx"),
    }
    files[STATIC] = quantize_static(files[FLOAT], images, into / "quantize_static.onnx")
    if has_openvino():
        files[OPENVINO] = quantize_openvino(files[FLOAT], images, into / "openvino.xml")
    return files


def quantize_static(source: Path, images: np.ndarray[Any, Any], target: Path) -> Path:
    """Quantize with onnxruntime to QDQ: uint8 activations, per-channel int8 weights."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._images = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            image = next(self._images, None)
            return None if image is None else {"images": image[None]}

    prepared = target.with_suffix(".prepared.onnx")
    with quiet():
        quant_pre_process(str(source), str(prepared))
        quantization.quantize_static(
            str(prepared),
            str(target),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
    prepared.unlink()
    written = onnx.load(target)
    metadata = {entry.key: entry.value for entry in onnx.load(source).metadata_props}
    onnx.helper.set_model_props(written, metadata)
    onnx.save(written, target)
    return target


def quantize_openvino(source: Path, images: np.ndarray[Any, Any], target: Path) -> Path:
    """Quantize to int8 with NNCF's defaults, and write OpenVINO's .xml and .bin files."""
    os.environ.setdefault("NNCF_CI", "1")  # turns off NNCF's telemetry
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    with quiet():
        dataset = nncf.Dataset([image[None] for image in images])
        model = nncf.quantize(openvino.Core().read_model(source), dataset, subset_size=len(images))
    openvino.save_model(model, target)
    return target


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress progress bars, log messages and warnings of the other quantizers."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


# Timing


def time_forms(files: dict[str, Path], setting: Setting, runs: int) -> list[Latency]:
    """Return the latencies of all forms that run in ``setting``."""
    candidates = [
        open_openvino(file, name, setting)
        if name == OPENVINO
        else open_file(file, setting.threads, name, list(dict.fromkeys([setting.provider, CPU])))
        for name, file in files.items()
        if name != OPENVINO or setting.provider == CPU
    ]
    return compare(candidates, setting.threads, setting.batch, runs)


def open_openvino(file: Path, name: str, setting: Setting) -> Candidate:
    """Compile ``file`` with OpenVINO on the CPU, for exactly this batch size."""
    import openvino

    start = time.perf_counter()
    core = openvino.Core()
    model = core.read_model(file)
    size = tuple(dimension.get_length() for dimension in model.input().partial_shape[2:])
    model.reshape([setting.batch, 3, *size])
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": setting.threads, "ENABLE_CPU_PINNING": False}
    request = core.compile_model(model, "CPU", options).create_infer_request()
    seconds = time.perf_counter() - start

    def embed(images: Tensor) -> object:
        return request.infer([images.numpy()])

    size_on_disk = sum(part.stat().st_size for part in (file, file.with_suffix(".bin")))
    return Candidate(name, embed, size, "OpenVINO CPU", size_on_disk, seconds)


# Figure


def draw(networks: dict[str, list[list[Latency]]], path: Path) -> None:
    """Draw one panel per network: median times relative to qface's packed file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(networks), figsize=(5 * len(networks), 4), squeeze=False, sharey=True)
    for panel, (title, comparisons) in zip(panels[0], networks.items(), strict=True):
        draw_panel(panel, comparisons)
        panel.set_title(title, fontsize="medium")
    panels[0][0].set_ylabel(f"median time / {PACKED}")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.set_layout_engine("constrained")
    write_figure(path, figure)
    pyplot.close(figure)


def draw_panel(panel: Any, comparisons: list[list[Latency]]) -> None:
    """Draw one group of bars per comparison."""
    names = [row.name for row in max(comparisons, key=len)]
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        ratios = {group: row.ratio for group, rows in enumerate(comparisons) for row in rows if row.name == name}
        centers = [group + (place + 0.5) * width - 0.4 for group in ratios]
        panel.bar(centers, list(ratios.values()), width, label=name)
    panel.set_xticks(range(len(comparisons)), [label(rows[0]) for rows in comparisons], fontsize="small")
    panel.axhline(1, color="gray", linewidth=0.8)


def label(row: Latency) -> str:
    """Return the axis label of a comparison: provider, threads and batch size."""
    return f"{row.provider.removesuffix('ExecutionProvider')}, {row.threads} thr.\nbatch {row.batch}"


if __name__ == "__main__":
    main()
