"""Capture, quantize, calibrate, export and verify networks of other packages.

    python benchmarks/networks.py [--names resnet18 --names ViT] [--bits 8] [--runs 40] [--json] [-o FILE]

:mod:`foreign_networks` lists the networks: those of pytorchcv and transformers (``pip install -e '.[networks]'``), with
random weights, and with ``--idioms`` one network per idiom of ``tests/graph/idioms.py``.

- "integers that differ": integers of all layers that differ between student and file on eight synthetic images. The
  next column counts those that are not rounded right after a float operator.
- "integer": fraction of the multiply-adds that convolutions and linear layers compute with integers. "float operators
  left" names the other operators with their number.
- "size": file size relative to the float32 parameters x bits / 32.
- "speed": time of one image on one thread in onnxruntime relative to the float32 file (0.5 is twice as fast). Calls
  alternate between both files; the figure is the ratio of the medians of ``--runs`` calls. ``--runs 0`` leaves it out.
- "ONNX": result for the float ONNX of torch's older exporter. :func:`qface.load` reads the file, which is compared with
  the network, then quantized, exported and verified. The figure counts the integers that differ.
- "newer exporter": "read" if the float ONNX of ``torch.onnx.export(dynamo=True)`` loads and gives the same embeddings.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from foreign_networks import NETWORKS, ForeignNetwork, is_installed
from harness.benchmark_command import BenchmarkCommand
from harness.report_files import markdown_table, terminal_table, write_text
from rich.console import Console
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import qface
from qface.data.synthetic import synthetic_crops
from qface.deployment import median_milliseconds
from qface.errors import one_line
from qface.graph import L2Normalize, canonicalize
from qface.graph.queries import SYMBOLIC_FUNCTIONS, layer_of
from qface.network_output import embedding_of
from qface.preprocessing import example_input, preprocessing_of, with_preprocessing
from qface.progress import track
from qface.quantization.placement import computes_in_float

CROPS = 12
MIN_COSINE = 0.9999  # between embeddings of the network and of its float ONNX file
T = TypeVar("T")


@dataclass
class Row:
    """Result of one network.

    Args:
        name: name of the network.
        package: package that defines the network.
        parameters: number of parameters.
        refused: the step that failed, and why; None if all steps succeeded.
        seconds: duration of each step.
        agrees: True if :func:`qface.verify` finds that file and student agree.
        cosine: minimum cosine between embeddings of student and file.
        different: integers of all layers that differ between student and file.
        different_elsewhere: those of ``different`` that are not rounded right after a float operator.
        compared: number of integers compared, in all layers.
        float_operators: number of operators that compute in float, by kind.
        integer_share: fraction of the multiply-adds that use integers.
        file_bytes: size of the file in bytes.
        size_ratio: file size relative to float32 parameters x bits / 32.
        speed_ratio: latency relative to the float32 file.
        onnx: ``"read"`` if the float ONNX passes all steps, else the reason.
        onnx_different: integers that differ between the student of the float ONNX and its file.
        newer_onnx: the same as ``onnx`` for the newer exporter's file, which is only loaded and compared.
    """

    name: str
    package: str
    parameters: int = 0
    refused: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    agrees: bool | None = None
    cosine: float | None = None
    different: int | None = None
    different_elsewhere: int | None = None
    compared: int | None = None
    float_operators: dict[str, int] = field(default_factory=dict)
    integer_share: float | None = None
    file_bytes: int | None = None
    size_ratio: float | None = None
    speed_ratio: float | None = None
    onnx: str | None = None
    onnx_different: int | None = None
    newer_onnx: str | None = None


class _RefusedError(Exception):
    """A step failed; the row says why."""


class Measurement:
    """Run all steps on one network and fill its row.

    Args:
        network: the network to measure.
        bits: bits of weights and activations.
        runs: timed calls of each file; 0 skips timing.
        folder: folder of the files that are written.
        onnx: also measure the network's float ONNX.
    """

    def __init__(self, network: ForeignNetwork, bits: int, runs: int, folder: Path, onnx: bool = True) -> None:
        self.network = network
        self.onnx = onnx
        self.bits = bits
        self.runs = runs
        self.file, self.onnx_file, self.float_file, self.newer_file = (
            folder / f"{name}.onnx" for name in ("student", "onnx_student", "float", "newer")
        )
        self.row = Row(network.name, network.package)

    def run(self) -> Row:
        """Return the row, filled up to the first step that fails."""
        try:
            self._measure(self._built())
        except _RefusedError:
            pass
        except Exception as error:  # an error that is not one of qface's is a finding; other networks go on
            self.row.refused = f"{type(error).__name__}: {one_line(error, 200)}"
        return self.row

    def _built(self) -> nn.Module:
        try:
            return self.network.build()
        except Exception as error:  # packages raise errors of any type
            self.row.refused = f"build: {type(error).__name__}: {one_line(error, 200)}"
            raise _RefusedError from error

    def _measure(self, model: nn.Module) -> None:
        row, crops = self.row, synthetic_crops(CROPS)
        row.parameters = sum(parameter.numel() for parameter in model.parameters())
        canonical = self._step("capture", lambda: canonicalize(model))
        row.integer_share = integer_share(canonical)
        student = self._step("quantize", lambda: qface.quantize(canonical, self.bits))
        row.float_operators = float_operators(student)
        self._step("calibrate", lambda: qface.calibrate(student, crops))
        self._step("export", lambda: qface.export(student, self.file))
        agreement = self._step("verify", lambda: qface.verify(student, self.file, crops))
        row.agrees, row.cosine = agreement.agrees, agreement.min_cosine
        row.different = sum(layer.different for layer in agreement.layers)
        row.different_elsewhere = sum(layer.different for layer in agreement.layers if layer.operation != "Quantize")
        row.compared = sum(layer.elements for layer in agreement.layers)
        row.file_bytes = self.file.stat().st_size
        row.size_ratio = row.file_bytes / (4 * row.parameters * self.bits / 32)
        if self.onnx:
            self._measure_onnx(model, crops)
        if self.runs and (self.float_file.exists() or self._write_float(model) is None):
            before, after = median_milliseconds([self.float_file, self.file], runs=self.runs)
            row.speed_ratio = after / before

    def _step(self, name: str, act: Callable[[], T]) -> T:
        start = time.perf_counter()
        try:
            result = act()
        except qface.QFaceError as error:
            self.row.refused = f"{name}: {one_line(error, 300)}"
            raise _RefusedError from error
        self.row.seconds[name] = time.perf_counter() - start
        return result

    def _measure_onnx(self, model: nn.Module, crops: Tensor) -> None:
        """Run all steps on the older exporter's ONNX; only load the newer exporter's."""
        row = self.row
        row.onnx = self._write_float(model)
        if row.onnx is None:
            row.onnx = self._read(self.float_file, model, crops) or self._go_on(crops)
        if row.onnx is None:
            row.onnx = "read"
        row.newer_onnx = _told(lambda: export_anew(model, self.newer_file), "not written")
        if row.newer_onnx is None:
            row.newer_onnx = self._read(self.newer_file, model, crops) or "read"

    def _write_float(self, model: nn.Module) -> str | None:
        return _told(lambda: qface.export(model, self.float_file), "not written")

    def _read(self, file: Path, model: nn.Module, crops: Tensor) -> str | None:
        """Load ``file`` and compare it with the network; return the reason of a failure, else None."""

        def act() -> None:
            self.loaded = with_preprocessing(qface.load(file), preprocessing_of(model)).eval()

        told = _told(act, "refused")
        if told is not None:
            return told
        images = preprocessing_of(model)(crops)
        with torch.no_grad():
            lowest = float(torch.cosine_similarity(self.loaded(images), embedding_of(model(images))).min())
        return None if lowest > MIN_COSINE else f"computes something else: {lowest:.6f}"

    def _go_on(self, crops: Tensor) -> str | None:
        """Quantize, export and verify the loaded network; return the reason of a failure, else None."""

        def act() -> None:
            student = qface.quantize(self.loaded, self.bits)
            qface.calibrate(student, crops)
            # A file of its own, since the network's file is timed later.
            agreement = qface.verify(student, qface.export(student, self.onnx_file), crops)
            self.row.onnx_different = sum(layer.different for layer in agreement.layers)

        return _told(act, "not quantized")


def _told(act: Callable[[], Any], failure: str) -> str | None:
    """Return None if ``act`` succeeds, else ``failure`` and the error in one line."""
    try:
        act()
    except Exception as error:  # torch's exporters raise errors of any type
        return f"{failure}: {one_line(error, 200)}"
    return None


def export_anew(model: nn.Module, file: Path) -> None:
    """Export ``model`` with torch's newer ONNX exporter."""
    images = example_input(model)[:1].repeat(2, 1, 1, 1)
    shapes = ({0: torch.export.Dim("images", min=1, max=64)},)
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(model.eval(), (images,), file, dynamo=True, dynamic_shapes=shapes, verbose=False)


def float_operators(student: fx.GraphModule) -> dict[str, int]:
    """Count the operators of ``student`` that compute in float, by kind.

    L2 normalization and arithmetic on the batch size are not counted.
    """
    found: Counter[str] = Counter()
    for node in student.graph.nodes:
        layer = layer_of(node)
        if computes_in_float(node) and not isinstance(layer, L2Normalize) and not _is_number(node):
            found[_operator(node) if layer is None else type(layer).__name__] += 1
    return dict(found.most_common())


def _operator(node: fx.Node) -> str:
    """Return the name of an ATen operator without its overload, or of another function."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket.__name__)
    return str(getattr(node.target, "__name__", node.target))


def _is_number(node: fx.Node) -> bool:
    return node.op == "get_attr" or node.target in (*SYMBOLIC_FUNCTIONS, torch.ops.aten.sym_size.int)


class _Multiplications(fx.Interpreter):
    """Count all multiply-adds, and those of convolutions and linear layers."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.integer = 0
        self.all = 0

    def run_node(self, n: fx.Node) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = super().run_node(n)
        self.all += counter.get_total_flops()
        if isinstance(layer_of(n), (nn.Conv2d, nn.Linear)):
            self.integer += counter.get_total_flops()
        return result


def integer_share(canonical: fx.GraphModule) -> float:
    """Return the fraction of multiply-adds in convolutions and linear layers, which compute with integers."""
    counter = _Multiplications(copy.deepcopy(canonical).requires_grad_(False))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # FlopCounterMode counts its products
        counter.run(example_input(canonical))
    return counter.integer / max(counter.all, 1)


@click.command(cls=BenchmarkCommand)
@click.option("--names", multiple=True, help="Networks to measure.  [default: all of both packages]")
@click.option("--idioms", is_flag=True, help="Also measure one network per idiom.")
@click.option("--bits", type=click.IntRange(2, 8), default=8, show_default=True, help="Of weights and activations.")
@click.option("--runs", type=click.IntRange(0), default=40, show_default=True, help="Timed calls of each file.")
@click.option("--onnx/--no-onnx", default=True, show_default=True, help="Also measure their float ONNX.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Also write the table as Markdown.")
def main(
    names: Sequence[str], idioms: bool, bits: int, runs: int, onnx: bool, as_json: bool, output: Path | None
) -> None:
    """Run all steps on networks of other packages, and print the results."""
    networks = chosen(names, idioms)
    rows = []
    for network in track(networks, "networks"):
        with tempfile.TemporaryDirectory() as folder, _silence():
            rows.append(Measurement(network, bits, runs, Path(folder), onnx).run())
        if output is not None:  # after each network, so that a stopped run has its rows
            write_text(output, markdown_table(HEADINGS, map(cells, rows)))
    if as_json:
        click.echo(json.dumps({"bits": bits, "rows": [asdict(row) for row in rows]}))
    else:
        Console(width=max(Console().width, 180)).print(terminal_table("Networks", HEADINGS, map(cells, rows)))


def chosen(names: Sequence[str], idioms: bool) -> list[ForeignNetwork]:
    """Return the networks of these names, or all whose package is installed.

    Raises:
        ConfigError: a name is unknown, or the package of a named network is not installed.
    """
    unknown = [name for name in names if name not in NETWORKS]
    if unknown:
        raise qface.errors.ConfigError(f"there is no network {unknown[0]!r}: choose among {', '.join(NETWORKS)}")
    networks = [NETWORKS[name] for name in names] or [
        network for network in NETWORKS.values() if idioms or network.package != "idiom"
    ]
    missing = sorted({network.package for network in networks if not is_installed(network.package)})
    if missing and names:
        raise qface.errors.ConfigError(f"{missing[0]} is missing: pip install -e '.[networks]'")
    return [network for network in networks if network.package not in missing]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress warnings of the packages, such as those about random weights."""
    loggers = [logging.getLogger(name) for name in ("transformers", "qface")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


HEADINGS = (
    "network",
    "parameters (M)",
    "capture, quantize, calibrate, export, verify (s)",
    "agrees",
    "integers that differ",
    "of those not after float",
    "float operators left",
    "integer",
    "size",
    "speed",
    "ONNX",
    "newer exporter",
)
STEPS = ("capture", "quantize", "calibrate", "export", "verify")


def cells(row: Row) -> list[str]:
    """Return the row as text."""
    seconds = " ".join(f"{row.seconds[step]:.1f}" for step in STEPS if step in row.seconds)
    onnx, newer = ((told or "-").partition(":")[0] for told in (row.onnx, row.newer_onnx))
    if row.onnx_different is not None:
        onnx = str(row.onnx_different)
    if row.refused is not None:
        return [row.name, f"{row.parameters / 1e6:.2f}", seconds, f"refused at {row.refused}", *"-" * 6, onnx, newer]
    operators = ", ".join(f"{name} {count}" for name, count in row.float_operators.items())
    return [
        row.name,
        f"{row.parameters / 1e6:.2f}",
        seconds,
        "yes" if row.agrees else "no",
        f"{row.different} / {row.compared}",
        str(row.different_elsewhere),
        operators or "none",
        f"{100 * (row.integer_share or 0):.1f} %",
        f"{row.size_ratio:.2f}",
        "-" if row.speed_ratio is None else f"{row.speed_ratio:.2f}",
        onnx,
        newer,
    ]


if __name__ == "__main__":
    main()
