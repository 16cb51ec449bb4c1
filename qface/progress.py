"""Progress display of long work.

Code reports its progress with :func:`track` or :func:`stage`. A function decorated with :func:`shows_progress` displays
this progress, also of nested calls, if its argument ``progress`` is True: as temporary bars on a terminal, otherwise as
one line of text per minute.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import ParamSpec, Protocol, TypeVar

import click

__all__ = ["Advance", "Display", "Lines", "displayed", "progress_shown", "shows_progress", "stage", "track"]

T = TypeVar("T")
P = ParamSpec("P")
ReturnT = TypeVar("ReturnT")

_INTERVAL = 60.0
"""Seconds between two lines of text."""


class Advance(Protocol):
    """Function that a stage calls after each item."""

    def __call__(self, note: str = "") -> None:
        """Count one more item; ``note`` is displayed with the count."""


class Display(Protocol):
    """Display of stages."""

    def stage(self, name: str, total: int | None, done: int) -> AbstractContextManager[Advance]:
        """Show a stage during the block, starting with ``done`` of ``total`` items."""


_DISPLAY: ContextVar[Display | None] = ContextVar("display", default=None)


def stage(name: str, total: int | None, done: int = 0) -> AbstractContextManager[Advance]:
    """Start a stage of ``total`` items (None if unknown); call the yielded function after each item."""
    display = _DISPLAY.get()
    return nullcontext(_ignore) if display is None else display.stage(name, total, done)


def _ignore(note: str = "") -> None:
    """Count an item of a stage that is not displayed."""


def track(items: Iterable[T], name: str, total: int | None = None) -> Iterator[T]:
    """Yield ``items`` as the stage ``name``; ``total`` is not needed for a collection."""
    if total is None and isinstance(items, Collection):
        total = len(items)
    with stage(name, total) as advance:
        for item in items:
            yield item
            advance()


def shows_progress(verb: Callable[P, ReturnT]) -> Callable[P, ReturnT]:
    """Decorate a function to show its stages if its argument ``progress`` is True."""
    signature = inspect.signature(verb)

    @functools.wraps(verb)
    def shown(*args: P.args, **kwargs: P.kwargs) -> ReturnT:
        with progress_shown(bool(signature.bind(*args, **kwargs).arguments.get("progress", False))):
            return verb(*args, **kwargs)

    return shown


def progress_shown(shown: bool) -> AbstractContextManager[None]:
    """Show the stages of the block on stderr if ``shown``; of several processes, only rank 0 shows them."""
    if not shown or _DISPLAY.get() is not None or os.environ.get("RANK", "0") != "0":
        return nullcontext()
    return displayed(_Bars() if sys.stderr.isatty() else Lines(lambda line: click.echo(line, err=True)))


@contextmanager
def displayed(display: Display) -> Iterator[None]:
    """Show the stages of the block on ``display``."""
    token = _DISPLAY.set(display)
    try:
        yield
    finally:
        _DISPLAY.reset(token)


class Lines:
    """Display as plain text for logs and pipes: at most one line per interval over all stages.

    Args:
        write: function that is called with each line.
        clock: function that returns the time in seconds.
        interval: seconds before the first line and between lines.
    """

    def __init__(
        self, write: Callable[[str], object], clock: Callable[[], float] = time.monotonic, interval: float = _INTERVAL
    ) -> None:
        self._write = write
        self._clock = clock
        self._interval = interval
        self._due = clock() + interval

    @contextmanager
    def stage(self, name: str, total: int | None, done: int) -> Iterator[Advance]:
        """See :class:`Display`."""
        start, first = self._clock(), done

        def advance(note: str = "") -> None:
            nonlocal done
            done += 1
            now = self._clock()
            if now >= self._due:
                self._due = now + self._interval
                left = None if total is None else (now - start) / (done - first) * (total - done)
                self._write(_line(name, done, total, left, note))

        yield advance


def _line(name: str, done: int, total: int | None, seconds_left: float | None, note: str) -> str:
    """Format a line like ``calibrate: 3/8, 0:01:40 left``."""
    parts = [f"{name}: {done}" if total is None else f"{name}: {done}/{total}"]
    if seconds_left is not None:
        minutes, seconds = divmod(round(seconds_left), 60)
        parts.append(f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left")
    return ", ".join([*parts, note] if note else parts)


class _Bars:
    """Bars on a terminal, one per active stage."""

    def __init__(self) -> None:
        from rich.console import Console  # imported late, so that --help is fast
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        note = TextColumn("{task.fields[note]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note)
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)

    @contextmanager
    def stage(self, name: str, total: int | None, done: int) -> Iterator[Advance]:
        """See :class:`Display`."""
        task = self._progress.add_task(name, total=total, completed=done, note="")
        self._progress.start()
        try:
            yield lambda note="": self._progress.update(task, advance=1, note=note)
        finally:
            self._progress.remove_task(task)
            if not self._progress.task_ids:
                self._progress.stop()
