"""Time a call."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

ResultT = TypeVar("ResultT")


def timed(work: Callable[[], ResultT]) -> tuple[ResultT, float]:
    """Call ``work``; return its result and the elapsed seconds."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def cpu_timed(work: Callable[[], ResultT]) -> tuple[ResultT, float]:
    """Call ``work``; return its result and the CPU seconds of all threads of this process."""
    start = time.process_time()
    result = work()
    return result, time.process_time() - start
