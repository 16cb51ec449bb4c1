"""Ends a command at Ctrl-C, SIGTERM and SIGHUP: it cleans up, says nothing, and exits with 128 + the signal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["ended_by_signals", "signals_noted"]

_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_AGAIN_AFTER = 0.01  # seconds
_noted: list[int] | None = None  # within signals_noted, those that came


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Unwind the block at the first signal; a second one, or one after the block, ends the process on the spot.

    A signal that is ignored already, as under nohup, stays so.

    Raises:
        SystemExit: a signal came, whatever the block made of that.
    """
    heard = [each for each in _ENDING if signal.getsignal(each) is not signal.SIG_IGN]
    received: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        received.append(number)
        _let_end(heard)
        if _noted is not None:
            _noted.append(number)
            return
        raise SystemExit(128 + received[0])

    def raise_again(unraisable: Any) -> None:
        # Destructors and callbacks of the import system swallow what is raised in them.
        if not isinstance(unraisable.exc_value, SystemExit):
            sys.__unraisablehook__(unraisable)
            return
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_AFTER)

    for each in heard:
        signal.signal(each, stop)
    sys.unraisablehook = raise_again
    try:
        yield
    finally:
        _let_end(heard)
        if received:
            raise SystemExit(128 + received[0])


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Put off the end that :func:`ended_by_signals` brings until the end of the block, which should come soon.

    Yields:
        A list that holds the number of the signal, once one came. A second signal ends the process on the spot.

    Raises:
        SystemExit: a signal came within the block.
    """
    global _noted
    noted: list[int] = []
    _noted = noted
    try:
        yield noted
    finally:
        _noted = None
    if noted:
        raise SystemExit(128 + noted[0])


def _let_end(numbers: list[signal.Signals]) -> None:
    for each in numbers:
        signal.signal(each, signal.SIG_DFL)
