"""Command line of a benchmark that prints library errors in one line, as ``qface`` does."""

from __future__ import annotations

from typing import Any

import click

import qface
from qface.errors import one_line

__all__ = ["BenchmarkCommand"]


class BenchmarkCommand(click.Command):
    """Command class for ``@click.command(cls=BenchmarkCommand)``."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the benchmark; a QFaceError becomes a one-line click.ClickException."""
        try:
            return super().invoke(ctx)
        except qface.QFaceError as error:
            raise click.ClickException(one_line(error)) from error
