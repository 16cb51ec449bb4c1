"""The progress bar of a run, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["training_bar"]


@contextmanager
def training_bar(done: int, total: int, shown: bool) -> Iterator[Callable[[float], None]]:
    """A bar that stands at ``done`` of ``total`` steps; call what it yields with the loss after each step."""
    columns = (
        TextColumn("distilling"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task("", completed=done, total=total)
        yield lambda loss: progress.update(task, advance=1, description=f"loss {loss:.4f}")
