"""The command line: each command parses its options, calls one verb of the library and prints what came of it.

Modules of this package import torch and all that needs it within functions, so that help is there at once.
"""

from __future__ import annotations

import sys
import warnings

import click

import qface
from qface.cli.compression import compress
from qface.cli.deployment import bench, export, inspect, selftest, size, verify
from qface.cli.evaluation import evaluate, identify, ijb, sensitivity, thresholds
from qface.cli.faces import align, demo, pairs
from qface.cli.reporting import plot, report
from qface.cli.training import distill, prune, quantize

__all__ = ["export_alias", "main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(qface.__version__, prog_name="qface")
def main() -> None:
    """Make face-recognition networks small and fast without losing what they know."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # those of libraries; qface's own are logged


for _each in (
    *(compress, quantize, prune, distill),
    *(evaluate, identify, ijb, thresholds, sensitivity),
    *(inspect, export, verify, selftest, bench, size),
    *(report, plot, align, pairs, demo),
):
    main.add_command(_each)

export_alias = export
