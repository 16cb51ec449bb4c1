"""Progress of long work: each stage says how far it is, and one place decides whether and how that is shown.

A stage calls :func:`track` or :func:`stage` and knows nothing of terminals. A verb decorated with
:func:`shows_progress` shows its stages, and those of all that it calls, where its argument ``progress`` is True. On a
terminal they are bars that go away; elsewhere each minute brings one line of plain text.
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
"""Seconds between two lines where there is no terminal."""


class Advance(Protocol):
    """Called by a stage after each of its items."""

    def __call__(self, note: str = "") -> None:
        """One more item is done; ``note`` says something about it."""


class Display(Protocol):
    """Something that shows stages."""

    def stage(self, name: str, total: int | None, done: int) -> AbstractContextManager[Advance]:
        """Show a stage until the end of the block, ``done`` of whose ``total`` items were done before."""


_DISPLAY: ContextVar[Display | None] = ContextVar("display", default=None)


def stage(name: str, total: int | None, done: int = 0) -> AbstractContextManager[Advance]:
    """A stage of ``total`` items (None where nobody knows); call what it yields after each."""
    display = _DISPLAY.get()
    return nullcontext(_ignore) if display is None else display.stage(name, total, done)


def _ignore(note: str = "") -> None:
    """Advance a stage that nobody looks at."""


def track(items: Iterable[T], name: str, total: int | None = None) -> Iterator[T]:
    """Yield ``items`` as the stage ``name``; their number is known by itself where they are a collection."""
    if total is None and isinstance(items, Collection):
        total = len(items)
    with stage(name, total) as advance:
        for item in items:
            yield item
            advance()


def shows_progress(verb: Callable[P, ReturnT]) -> Callable[P, ReturnT]:
    """Decorate a verb: its stages are shown where its argument ``progress`` is True."""
    signature = inspect.signature(verb)

    @functools.wraps(verb)
    def shown(*args: P.args, **kwargs: P.kwargs) -> ReturnT:
        with progress_shown(bool(signature.bind(*args, **kwargs).arguments.get("progress", False))):
            return verb(*args, **kwargs)

    return shown


def progress_shown(shown: bool) -> AbstractContextManager[None]:
    """Show all stages within the block on stderr, if ``shown``; of several processes, the first shows its own."""
    if not shown or _DISPLAY.get() is not None or os.environ.get("RANK", "0") != "0":
        return nullcontext()
    return displayed(_Bars() if sys.stderr.isatty() else Lines(lambda line: click.echo(line, err=True)))


@contextmanager
def displayed(display: Display) -> Iterator[None]:
    """Show all stages within the block on ``display``."""
    token = _DISPLAY.set(display)
    try:
        yield
    finally:
        _DISPLAY.reset(token)


class Lines:
    """Plain text for logs and pipes: at most one line in each interval, whatever the number of stages.

    Args:
        write: takes each line.
        clock: seconds that have passed.
        interval: seconds between two lines; the first comes after so many.
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
    """``calibrate: 3/8, 0:01:40 left``."""
    parts = [f"{name}: {done}" if total is None else f"{name}: {done}/{total}"]
    if seconds_left is not None:
        minutes, seconds = divmod(round(seconds_left), 60)
        parts.append(f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left")
    return ", ".join([*parts, note] if note else parts)


class _Bars:
    """Bars on a terminal, one for each stage that is under way."""

    def __init__(self) -> None:
        from rich.console import Console  # only here, so that help does not wait for it
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
