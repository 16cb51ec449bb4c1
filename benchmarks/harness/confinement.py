"""Calls in processes of their own, with bounds on time and memory, so that a crash is a result like others."""

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
"""Bytes beyond its present size that a child may map, so that no file fills the machine."""


@dataclass(frozen=True)
class Outcome:
    """The end of a call.

    Args:
        kind: ``"read"``, ``"refused"`` (by an error of qface's), ``"traceback"``, ``"crash"`` or ``"timeout"``.
        message: the error in a line, a traceback, or the signal.
        seconds: from the start of the process to its end.
        memory: bytes by which its resident memory grew at most.
    """

    kind: str
    message: str
    seconds: float
    memory: int


def confined(call: Callable[[], object], seconds: float) -> Outcome:
    """Run ``call`` in a fork of this process, which is killed after ``seconds``.

    This process should have imported what ``call`` needs, and should run no threads.
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
    """All that the child writes; None if the time is up before."""
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
    """Write what comes of ``call``, and end this process."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    sys.stderr = sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    warnings.simplefilter("ignore")
    faulthandler.disable()  # whose file may be another than stderr
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
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
    except BaseException:  # SystemExit and KeyboardInterrupt are no better than the others here
        return "traceback", traceback.format_exc()[-3000:]
    return "read", ""


def _status(field: str) -> int:
    """A line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
