"""Accuracy, size and latency of a network after pruning, after quantization, and after both.

    python benchmarks/pruning.py [--data ../shared] [--network mobilefacenet] [--ratios 0.1 --ratios 0.2]
                                 [--bits 6 --bits w4a8] [--global-pruning] [--round-to 16] [--no-train]
                                 [--max-steps N] [-o runs/pruning] [--json FILE]

The first half of the people tunes each network, the second half evaluates its exported file in onnxruntime. Latency is
measured with one image on one thread. Timed calls alternate between all files, and the table gives the speedup over the
float network. "of the products saved" is the speedup by pruning relative to the reduction in multiply-adds. Numbers of
channels are rounded down to multiples of 16, where integer kernels are fastest; ``--round-to 1`` turns this off.

Each file and its figures are written when they are ready, so that the same command continues a stopped run. The script
prints a table, and writes it as Markdown with a plot of accuracy over size and over speedup. pruning_report.py draws
the plot again from the JSON file.
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
    """Option such as ``6``, for weights and activations, or ``w4a8``."""

    name = "BITS"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> Bits:
        """Return the bits of weights and of activations."""
        found = re.fullmatch(r"([2-8])|w([2-8])a([2-8])", value)
        if found is None:
            self.fail(f"{value!r} is neither a number of bits from 2 to 8 nor two of them, as in w4a8", param, ctx)
        both, weights, activations = found.groups()
        return int(both or weights), int(both or activations)


@dataclass(frozen=True)
class Variant:
    """Steps that one network goes through.

    Args:
        ratio: fraction of channels removed; None skips pruning.
        repaired: after pruning, refit layers to their original outputs.
        bits: bits of weights and of activations; None keeps the network in float.
        trained: distill after pruning, and again after calibration.
    """

    ratio: float | None = None
    repaired: bool = True
    bits: Bits | None = None
    trained: bool = False

    @property
    def name(self) -> str:
        """Name in files and in the table."""
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
    """Yield all variants to compare, the float network first."""
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
    """Build and evaluate variants of one network.

    Args:
        network: a name in :data:`NETWORKS`.
        data: folder with ``data/`` and ``weights/``.
        records: store of files and figures.
        pruning: settings of pruning.
        max_steps: maximum number of steps of each training; None for one epoch.
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
        """Return accuracy, size, MACs and file of ``variant``, measured once."""
        return self._records.recall(*self._key(variant), lambda: self._measure(variant))

    def _key(self, variant: Variant) -> tuple[str, Record]:
        """Return the name and all inputs of ``variant``, which identify its record."""
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
        """Return the network of ``variant`` before quantization; a pruned one is built once and saved."""
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
        """Embeddings of the float network's file, which is measured first."""
        return self._records.recall_array(*self._key(FLOAT), lambda: self._embed(self._path(FLOAT, ".onnx")))

    def _embed(self, file: Path) -> Embeddings:
        return embed(file, self._halves.held_out, progress=True)


@click.command(cls=BenchmarkCommand)
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared"), show_default=True)
@click.option("--network", type=click.Choice(list(NETWORKS)), default="mobilefacenet", show_default=True)
@click.option("--ratios", type=click.FloatRange(0, 1, True, True), multiple=True, default=[0.1, 0.2, 0.3])
@click.option("--bits", type=BitsOption(), multiple=True, default=["6", "w4a8"], show_default=True)
@click.option("--global-pruning", is_flag=True, help="Rank channels across all layers.")
@click.option("--round-to", type=click.IntRange(1), default=16, show_default=True)
@click.option("--no-train", is_flag=True, help="Skip all variants that are distilled.")
@click.option("--max-steps", type=click.IntRange(1), help="Maximum of steps per training.  [default: one epoch]")
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
    """Measure the missing variants, time all files, print the table and draw the figure."""
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
