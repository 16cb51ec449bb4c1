"""Clean exit of a command on Ctrl-C, SIGTERM and SIGHUP, silently and with code 128 + signal."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["ended_by_signals", "signals_noted"]

_LOGGER = logging.getLogger("qface")

_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_AGAIN_AFTER = 0.01  # seconds
_noted: list[int] | None = None  # signals received within signals_noted


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise SystemExit in the block at the first signal; a later signal ends the process immediately.

    Signals that are already ignored, as under nohup, stay ignored.

    Raises:
        SystemExit: a signal was received, even if the block suppressed the exception.
    """
    heard = [each for each in _ENDING if signal.getsignal(each) is not signal.SIG_IGN]
    received: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        received.append(number)
        _let_end(heard)
        if _noted is not None:
            _noted.append(number)
            _LOGGER.warning("stopping after this step; a second signal stops at once, and the step is lost")
            return
        raise SystemExit(128 + received[0])

    def raise_again(unraisable: Any) -> None:
        # Destructors and import callbacks swallow exceptions, so the SystemExit is raised again by a timer.
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
    """Delay the SystemExit of :func:`ended_by_signals` until the end of the outermost such block.

    For steps that are kept whole, and where torch traces a network: its FakeTensorMode does not survive an exception
    between two operators, and aborts the process. In another thread than the main one, which alone hears signals, the
    block changes nothing.

    Yields:
        A list to which a received signal number is added, with a warning that the current step ends first. A second
        signal ends the process immediately.

    Raises:
        SystemExit: a signal was received within the block.
    """
    global _noted
    if _noted is not None or threading.current_thread() is not threading.main_thread():
        yield [] if _noted is None else _noted
        return
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
