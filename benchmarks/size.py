"""Model sizes printed by Ef-QuantFace ("the paper") and QuantFace, their formula, and ours.

    python benchmarks/size.py [--json]

Neither has code that computes its low-bit sizes: the figures equal the size of the float file x bits / 32, in MB (10^6
bytes) or MiB (2^20 bytes) as the row says. Ours come from :func:`qface.measure_size`: BatchNorm folded, weights packed,
biases, scales and slopes with four bytes each. A list of the paper's errors follows the table.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import click
from harness.benchmark_command import BenchmarkCommand
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

import qface
from qface.models import iresnet

DEPTHS = (18, 34, 50, 100)
BITS = (32, 8, 6)
UNITS = {"MB": 10**6, "MiB": 2**20}
TOLERANCE = 0.005


@dataclass(frozen=True)
class Published:
    """A size as a paper prints it.

    Args:
        source: paper and table; "paper" is Ef-QuantFace.
        depth: depth of the IResNet.
        bits: bits of weights; 32 for the float file.
        size: size in ``unit``.
        unit: unit in which the formula gives ``size``; the paper prints MB in every row.
    """

    source: str
    depth: int
    bits: int
    size: float
    unit: str


PUBLISHED = (
    Published("paper, tables 1 and 5", 18, 32, 96.22, "MB"),
    Published("paper, tables 1 and 5; QuantFace", 18, 6, 18.10, "MB"),
    Published("paper, table 1", 34, 32, 130.44, "MiB"),
    Published("paper, table 2", 34, 8, 32.61, "MiB"),
    Published("paper, tables 1 and 2", 34, 6, 24.45, "MiB"),
    Published("paper, tables 1 and 5", 50, 32, 174.68, "MB"),
    Published("QuantFace, table 2", 50, 8, 43.67, "MB"),
    Published("paper, table 1; QuantFace", 50, 6, 32.77, "MB"),
    Published("QuantFace, table 2", 100, 8, 65.31, "MB"),
    Published("QuantFace, table 2", 100, 6, 49.01, "MB"),
)

SLIPS = (
    "R34's 130.44, 32.61 and 24.45 are in MiB, not in MB as the heading says: 136.8, 34.2 and 25.6 MB.",
    "R34 is not 7.32 MB smaller than R50 at w6a6: the table's figures differ by 8.32, but by 7.1 MB in the same unit.",
    "The pruned sizes 61.39, 87.22 and 111.32 do not match their parameters: 17.39, 23.83 and 29.83 M take 69.6, 95.3 "
    "and 119.3 MB. They match another model, whose embedding dimension is pruned to 409 too.",
    'Table 5 repeats R18\'s size as its number of training images, "96.22M".',
    'Table 5 prints sizes of 96.22 and 18.10 with an "M" like a number of parameters.',
)


def file_tensors(model: nn.Module) -> int:
    """Count the numbers in a checkpoint: parameters and BatchNorm statistics."""
    return sum(tensor.numel() for tensor in model.state_dict().values())


def by_formula(numbers: int, bits: int) -> float:
    """Return the bytes of the float file x bits / 32."""
    return 4 * numbers * bits / 32


def rows_of(depth: int) -> list[dict[str, Any]]:
    """Return one row per number of bits: published sizes, their formula, and ours."""
    model = iresnet(depth).eval()
    numbers = file_tensors(model)
    reports = {bits: qface.measure_size(model, bits) for bits in BITS if bits < 32}
    ours = {32: reports[6].fp32_bytes, **{bits: report.bytes for bits, report in reports.items()}}
    return [
        {
            "network": f"R{depth}",
            "bits": bits,
            "formula": f"4 x {numbers:,} x {bits}/32",
            "formula_bytes": by_formula(numbers, bits),
            "published": [
                published_row(figure, by_formula(numbers, bits))
                for figure in PUBLISHED
                if (figure.depth, figure.bits) == (depth, bits)
            ],
            "ours_bytes": ours[bits],
            **{f"ours_{unit.lower()}": ours[bits] / size for unit, size in UNITS.items()},
        }
        for bits in BITS
    ]


def published_row(figure: Published, expected: float) -> dict[str, Any]:
    """Return a published size with the deviation of the formula from it."""
    deviation = expected / UNITS[figure.unit] / figure.size - 1
    return {**asdict(figure), "formula_deviation": deviation, "explained": abs(deviation) < TOLERANCE}


@click.command(cls=BenchmarkCommand)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def main(as_json: bool) -> None:
    """Print published sizes and ours."""
    rows = [row for depth in DEPTHS for row in rows_of(depth)]
    if as_json:
        click.echo(json.dumps({"rows": rows, "slips": SLIPS}))
    else:
        show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table, then the paper's errors."""
    table = Table(title="Sizes, published and ours", box=box.SIMPLE, pad_edge=False)
    for name in ("network", "bits", "published", "deviation", "source", "formula", "qface: bytes", "MB", "MiB"):
        table.add_column(name, justify="left" if name in ("network", "source", "formula") else "right", overflow="fold")
    for row in rows:
        figures = row["published"]
        table.add_row(
            row["network"],
            str(row["bits"]),
            "\n".join(f"{figure['size']:.2f} {figure['unit']}" for figure in figures) or "-",
            "\n".join(f"{100 * figure['formula_deviation']:+.2f} %" for figure in figures) or "-",
            "\n".join(figure["source"] for figure in figures) or "-",
            row["formula"],
            f"{row['ours_bytes']:,}",
            f"{row['ours_mb']:.3f}",
            f"{row['ours_mib']:.3f}",
        )
    console = Console(width=max(Console().width, 140))
    console.print(table)
    console.print("deviation: of the formula from the published size. Errors of the paper:")
    for slip in SLIPS:
        console.print(f"- {slip}", soft_wrap=True)


if __name__ == "__main__":
    main()
