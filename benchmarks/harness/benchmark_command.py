"""The command line of a benchmark, which tells errors of the library in one line, as ``qface`` does."""

from __future__ import annotations

from typing import Any

import click

import qface
from qface.errors import one_line

__all__ = ["BenchmarkCommand"]


class BenchmarkCommand(click.Command):
    """``@click.command(cls=BenchmarkCommand)``."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the benchmark.

        Raises:
            click.ClickException: the library refused something.
        """
        try:
            return super().invoke(ctx)
        except qface.QFaceError as error:
            raise click.ClickException(one_line(error)) from error
