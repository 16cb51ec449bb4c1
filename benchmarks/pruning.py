"""Where pruning pays against lower bits: accuracy, size and latency of networks pruned, quantized, and both.

    python benchmarks/pruning.py [--data ../shared] [--network mobilefacenet] [--ratios 0.1 --ratios 0.2]
                                 [--bits 6 --bits w4a8] [--global-pruning] [--round-to 16] [--no-train]
                                 [--max-steps N] [-o runs/pruning] [--json FILE]

Everything is tuned on the first half of the people, and judged on the second: all figures are those of the exported
file in onnxruntime. Latencies are of one image on one thread, all files in turns, in multiples of the float network's
time; "of the products saved" is what pruning gained in time, over what it saved in products. Numbers of channels are
rounded down to multiples of 16, which integer kernels are fastest at; ``--round-to 1`` leaves them as they come out.
Each file is written at once with its figures; the same command goes on behind the last. It prints a table, and writes
it as Markdown beside a figure of accuracy over size and over latency.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import click
from harness.benchmark_command import BenchmarkCommand
from harness.held_out import Embeddings, Halves
from harness.recipes import NETWORKS
from harness.records import Record, Records, digest, digest_of_file
from harness.report_files import write_json, write_text
from pruning_report import Bits, draw, gain_per_macs, markdown, name_of, table
from rich.console import Console
from torch import nn

import qface
from qface.deployment import median_milliseconds
from qface.evaluation import embed
from qface.files import make_folder
from qface.pruning import cost_of


class BitsOption(click.ParamType):
    """``6`` for weights and activations alike, or ``w4a8``."""

    name = "BITS"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> Bits:
        """Bits of weights and of activations."""
        found = re.fullmatch(r"([2-8])|w([2-8])a([2-8])", value)
        if found is None:
            self.fail(f"{value!r} is neither a number of bits from 2 to 8 nor two of them, as in w4a8", param, ctx)
        both, weights, activations = found.groups()
        return int(both or weights), int(both or activations)


@dataclass(frozen=True)
class Variant:
    """One network: pruned by ``ratio`` and repaired or not, quantized to ``bits``; None leaves a step out.

    Args:
        ratio: share of channels removed.
        repaired: layers solved for their outputs after pruning.
        bits: of weights, and of activations.
        trained: distilled after pruning, and again after calibration.
    """

    ratio: float | None = None
    repaired: bool = True
    bits: Bits | None = None
    trained: bool = False

    @property
    def name(self) -> str:
        """For files and the table."""
        pruned = "" if self.ratio is None else f"pruned{self.ratio:g}"
        parts = (
            pruned,
            "unrepaired" if not self.repaired else "",
            name_of(self.bits) if self.bits else "",
            "distilled" if self.trained else "",
        )
        return "-".join(part for part in parts if part) or "float"


FLOAT = Variant()


def variants(ratios: Sequence[float], bits: Sequence[Bits], train: bool) -> Iterator[Variant]:
    """All that is compared."""
    yield FLOAT
    for ratio in ratios:
        yield Variant(ratio, repaired=False)
    for trained in (False, True) if train else (False,):
        for ratio in ratios:
            yield Variant(ratio, trained=trained)
        for each in bits:
            yield Variant(bits=each, trained=trained)
            for ratio in ratios:
                yield Variant(ratio, bits=each, trained=trained)


class Bench:
    """Makes and judges variants of one network.

    Args:
        network: one of :data:`NETWORKS`.
        data: the folder with ``data/`` and ``weights/``.
        records: where files and figures are kept.
        pruning: how channels are chosen.
        max_steps: of each training; None for one epoch.
    """

    def __init__(
        self, network: str, data: Path, records: Records, pruning: qface.PruningConfig, max_steps: int | None
    ) -> None:
        weights = data / "weights" / NETWORKS[network]
        self.network = network
        self.teacher = qface.load(weights)
        self._halves = Halves(data / "data")
        self._records = records
        self._pruning = pruning
        self._training = qface.DistillConfig(max_steps=max_steps)
        self._inputs = {
            "version": qface.__version__,
            "weights": digest_of_file(weights),
            "images": digest(self._halves.names()),
            "pruning": asdict(self._pruning),
        }

    def figures(self, variant: Variant) -> Record:
        """Accuracy, size, MACs and file of ``variant``."""
        return self._records.recall(*self._key(variant), lambda: self._measure(variant))

    def _key(self, variant: Variant) -> tuple[str, Record]:
        """Name and settings of ``variant``."""
        training = {"training": asdict(self._training)} if variant.trained else {}
        return f"{self.network}-{variant.name}", {**self._inputs, **training, **asdict(variant)}

    def _path(self, variant: Variant, ending: str) -> Path:
        return self._records.path(*self._key(variant), ending)

    def _measure(self, variant: Variant) -> Record:
        network = self._pruned(variant)
        costs = asdict(cost_of(network))
        if variant.bits is not None:
            network = self._quantized(network, variant)
        file = qface.export(network, self._path(variant, ".onnx"))
        embeddings = self._float_embeddings if variant == FLOAT else self._embed(file)
        figures = self._halves.figures(embeddings, self._float_embeddings)
        return {**figures, **costs, "bytes": file.stat().st_size, "file": file.name}

    def _pruned(self, variant: Variant) -> nn.Module:
        """The float network, pruned as far as ``variant`` says; once trained, from its own file."""
        if variant.ratio is None:
            return self.teacher
        path = self._path(replace(variant, bits=None), ".safetensors")
        if not path.exists():
            qface.save(self._distilled(variant) if variant.trained else self._narrowed(variant), path)
        return qface.load(path)

    def _distilled(self, variant: Variant) -> nn.Module:
        pruned = self._pruned(replace(variant, trained=False))
        return qface.distill(pruned, self.teacher, self._halves.tuning, self._training)

    def _narrowed(self, variant: Variant) -> nn.Module:
        assert variant.ratio is not None
        config = replace(self._pruning, repair=variant.repaired)
        images = self._halves.tuning if variant.repaired else None
        return qface.prune(self.teacher, variant.ratio, images, config, progress=True)

    def _quantized(self, network: nn.Module, variant: Variant) -> nn.Module:
        assert variant.bits is not None
        student = qface.calibrate(
            qface.quantize(network, qface.QuantizationConfig(*variant.bits)), self._halves.tuning, progress=True
        )
        if variant.trained:
            qface.distill(student, self.teacher, self._halves.tuning, self._training)
        return student

    @cached_property
    def _float_embeddings(self) -> Embeddings:
        """Of the float network's file, which is measured first."""
        return self._records.recall_array(*self._key(FLOAT), lambda: self._embed(self._path(FLOAT, ".onnx")))

    def _embed(self, file: Path) -> Embeddings:
        return embed(file, self._halves.judging, progress=True)


@click.command(cls=BenchmarkCommand)
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared"), show_default=True)
@click.option("--network", type=click.Choice(list(NETWORKS)), default="mobilefacenet", show_default=True)
@click.option("--ratios", type=click.FloatRange(0, 1, True, True), multiple=True, default=[0.1, 0.2, 0.3])
@click.option("--bits", type=BitsOption(), multiple=True, default=["6", "w4a8"], show_default=True)
@click.option("--global-pruning", is_flag=True, help="Compare all channels of the network.")
@click.option("--round-to", type=click.IntRange(1), default=16, show_default=True)
@click.option("--no-train", is_flag=True, help="Leave out all that is distilled.")
@click.option("--max-steps", type=click.IntRange(1), help="Train no longer than this.  [default: one epoch]")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("runs/pruning"), show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write all figures here.")
def main(
    data: Path,
    network: str,
    ratios: Sequence[float],
    bits: Sequence[Bits],
    global_pruning: bool,
    round_to: int,
    no_train: bool,
    max_steps: int | None,
    output: Path,
    json_file: Path | None,
) -> None:
    """Measure what is missing, time all files in turns, print the table and draw the figure."""
    make_folder(output)
    pruning = qface.PruningConfig(global_pruning=global_pruning, round_to=round_to)
    bench = Bench(network, data, Records(output), pruning, max_steps)
    rows = []
    for variant in variants(ratios, bits, not no_train):
        click.echo(variant.name, err=True)
        rows.append({"name": variant.name, **asdict(variant), **bench.figures(variant)})
    times = median_milliseconds([output / row["file"] for row in rows])
    for row, milliseconds in zip(rows, times, strict=True):
        row["milliseconds"], row["speedup"] = milliseconds, times[0] / milliseconds
    for row in rows:
        row["gain_per_macs"] = gain_per_macs(row, rows)
    Console(width=max(Console().width, 160)).print(table(network, rows))
    write_text(output / f"{network}.md", markdown(rows))
    draw(network, rows, output / f"{network}.png")
    if json_file is not None:
        write_json(json_file, {"network": network, "rows": rows})


if __name__ == "__main__":
    main()
