"""Run a call in a child process with time and memory limits, so that a crash becomes a result."""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qface

__all__ = ["Outcome", "confined"]

_HEADROOM = 4 * 2**30
"""Bytes a child may map beyond its initial size, so that no file exhausts the memory of the machine."""


@dataclass(frozen=True)
class Outcome:
    """Result of a confined call.

    Args:
        kind: ``"read"``, ``"refused"`` (a QFaceError), ``"traceback"``, ``"crash"`` or ``"timeout"``.
        message: error message, traceback, exit status or time limit; empty for ``"read"``.
        seconds: lifetime of the child process.
        memory: peak growth of resident memory in bytes; 0 after a crash or timeout.
    """

    kind: str
    message: str
    seconds: float
    memory: int


def confined(call: Callable[[], object], seconds: float) -> Outcome:
    """Run ``call`` in a forked child that is killed after ``seconds``.

    Import all modules that ``call`` needs first, and run no other threads in this process.
    """
    reader, writer = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _report(call, writer)
    os.close(writer)
    try:
        answer = _answer(reader, start + seconds)
        if answer is None:
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(reader)
        _, status = os.waitpid(child, 0)
    elapsed = time.monotonic() - start
    if answer is None:
        return Outcome("timeout", f"still running after {seconds:g} s", elapsed, 0)
    if not answer:
        return Outcome("crash", f"ended with status {os.waitstatus_to_exitcode(status)}", elapsed, 0)
    kind, message, memory = json.loads(answer)
    return Outcome(kind, message, elapsed, memory)


def _answer(reader: int, deadline: float) -> bytes | None:
    """Return all output of the child, or None if it is still running at ``deadline``."""
    content = b""
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        piece = os.read(reader, 65536)
        if not piece:
            return content
        content += piece


def _report(call: Callable[[], object], writer: int) -> None:
    """Run ``call``, write its result to the pipe ``writer`` and exit this process."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    sys.stderr = sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    warnings.simplefilter("ignore")
    faulthandler.disable()  # it may write to a file other than stderr
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM, the peak resident size
    mapped = _status("VmSize") + _HEADROOM
    resource.setrlimit(resource.RLIMIT_AS, (mapped, mapped))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    kind, message = _outcome(call)
    report: Any = [kind, message, max(0, _status("VmHWM") - before)]
    os.write(writer, json.dumps(report).encode())
    os._exit(0)


def _outcome(call: Callable[[], object]) -> tuple[str, str]:
    try:
        call()
    except qface.QFaceError as error:
        return "refused", str(error)[:2000]
    except BaseException:  # SystemExit and KeyboardInterrupt count as faults too
        return "traceback", traceback.format_exc()[-3000:]
    return "read", ""


def _status(field: str) -> int:
    """Return a size field of ``/proc/self/status`` in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
