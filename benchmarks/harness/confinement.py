"""Run calls in child processes with time and memory limits, so that a crash becomes a result."""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import qface

__all__ = ["Outcome", "confined", "confined_calls"]

_HEADROOM = 4 * 2**30
"""Bytes a child may map beyond its size before a call, so that no file exhausts the memory of the machine."""


@dataclass(frozen=True)
class Outcome:
    """Result of a confined call.

    Args:
        kind: ``"read"``, ``"refused"`` (a QFaceError), ``"traceback"``, ``"crash"`` or ``"timeout"``.
        message: error message, traceback, exit status or time limit; empty for ``"read"``.
        seconds: duration of the call, and of the fork if it is the first in its process.
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
    (outcome,) = confined_calls([call], seconds, 1)
    return outcome


def confined_calls(calls: Sequence[Callable[[], object]], seconds: float, per_process: int) -> Iterator[Outcome]:
    """Run ``calls`` in forked children, up to ``per_process`` in each; yield their outcomes in order.

    A fork takes longer than most calls. A child that crashes or exceeds ``seconds`` in one call ends, and the calls
    after that one run in a new child.
    """
    done = 0
    while done < len(calls):
        for outcome in _of_one_child(calls[done : done + per_process], seconds):
            done += 1
            yield outcome


def _of_one_child(calls: Sequence[Callable[[], object]], seconds: float) -> Iterator[Outcome]:
    """Yield the outcomes of ``calls`` up to the first one that crashes or exceeds ``seconds``."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        ours.close()
        _run_when_told(calls, theirs)
    theirs.close()
    status = None
    try:
        for _ in calls:
            start = time.monotonic()
            ours.sendall(b"\n")
            answer = _answer(ours, start + seconds)
            elapsed = time.monotonic() - start
            if answer is None:
                yield Outcome("timeout", f"still running after {seconds:g} s", elapsed, 0)
                return
            if not answer:
                _, status = os.waitpid(child, 0)
                yield Outcome("crash", f"ended with status {os.waitstatus_to_exitcode(status)}", elapsed, 0)
                return
            kind, message, memory = json.loads(answer)
            yield Outcome(kind, message, elapsed, memory)
    finally:
        ours.close()
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _answer(child: socket.socket, deadline: float) -> bytes | None:
    """Return one line of the child, empty if it has ended, or None if it is still running at ``deadline``."""
    content = b""
    while not content.endswith(b"\n"):
        ready, _, _ = select.select([child], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        piece = child.recv(65536)
        if not piece:
            return b""
        content += piece
    return content


def _run_when_told(calls: Sequence[Callable[[], object]], parent: socket.socket) -> None:
    """Run a call for each byte from ``parent``, answer with a line, and exit this process."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    sys.stderr = sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    warnings.simplefilter("ignore")
    faulthandler.disable()  # it may write to a file other than stderr
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    gc.freeze()  # a collection would walk the objects of the parent and copy their pages
    for call in calls:
        if not parent.recv(1):
            break
        parent.sendall(json.dumps(_measured(call)).encode() + b"\n")
    os._exit(0)


def _measured(call: Callable[[], object]) -> tuple[str, str, int]:
    """Return kind, message and memory of the outcome of ``call``."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM, the peak resident size
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + _HEADROOM, most))
    kind, message = _outcome(call)
    return kind, message, max(0, _status("VmHWM") - before)


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
