"""The command line: each command parses its options, calls one verb of the library, and prints the result.

Modules of this package import torch, and whatever imports torch, inside functions, so that ``--help`` is fast.
"""

from __future__ import annotations

import sys
import warnings

import click

import qface
from qface.cli.compression import compress
from qface.cli.deployment import bench, export, inspect, selftest, size, verify
from qface.cli.evaluation import evaluate, identify, ijb, sensitivity, thresholds
from qface.cli.faces import align, demo, pairs, synthesize
from qface.cli.quantization import allocate_bits, calibrate, quantize
from qface.cli.reporting import plot, report, tensorboard
from qface.cli.training import distill, prune

__all__ = ["export_alias", "main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(qface.__version__, prog_name="qface")
def main() -> None:
    """Make face-recognition networks small and fast with little loss of accuracy."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # only libraries warn; qface logs


for _each in (
    *(compress, sensitivity, allocate_bits, quantize, calibrate, distill, prune),
    *(evaluate, identify, ijb, thresholds),
    *(inspect, export, verify, selftest, bench, size),
    *(report, plot, tensorboard, align, pairs, synthesize, demo),
):
    main.add_command(_each)

export_alias = export
