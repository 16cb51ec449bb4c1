"""A small client of Chromium's DevTools protocol, over two pipes: no port, and nothing to install."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Page"]

_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync --hide-scrollbars "
    "--remote-debugging-pipe"
).split()
# Chromium reads commands from descriptor 3 and writes answers to 4.
_START = (
    "import os, sys; [os.dup2(int(sys.argv[end]), end + 2) for end in (1, 2)]; os.execvp(sys.argv[3], sys.argv[3:])"
)


class Page:
    """A page in a headless Chromium of its own, which ends with the context.

    Args:
        command: how Chromium is started.
        folder: for its profile and for what it prints; it must exist.
        env: environment variables; None for those of this process.
        seconds: the longest that any answer may take.

    Attributes:
        events: what Chromium reported since the start, as the protocol has it.
    """

    def __init__(
        self, command: Sequence[str | Path], folder: Path, env: Mapping[str, str] | None = None, seconds: float = 120
    ) -> None:
        self.events: list[dict[str, Any]] = []
        self._seconds = seconds
        self._number = 0
        self._buffer = b""
        their_read, self._write = map(_above_standard, os.pipe())
        self._read, their_write = map(_above_standard, os.pipe())
        starter = (sys.executable, "-c", _START, str(their_read), str(their_write))
        self._log = folder / "chromium.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*starter, *command, *_FLAGS, f"--user-data-dir={folder / 'profile'}"],
                pass_fds=(their_read, their_write),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
                start_new_session=True,  # so that its renderers end with it
            )
        os.close(their_read)
        os.close(their_write)

    def __enter__(self) -> Page:
        try:
            target = self._call("Target.createTarget", url="about:blank")["targetId"]
            attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
            self._session = {"sessionId": attached["sessionId"]}
            for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
                self.call(f"{domain}.enable")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol for this page."""
        return self._call(method, self._session, **parameters)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, or of its promise."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def choose(self, selector: str, *files: Path) -> None:
        """Choose files in the file input that ``selector`` finds."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def screenshot(self, path: Path, width: int, dark: bool = False) -> None:
        """Write a PNG of the whole page, laid out for a window ``width`` pixels wide."""
        self.resize(width)
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        image = self.call("Page.captureScreenshot")
        path.write_bytes(base64.b64decode(image["data"]))

    def resize(self, width: int) -> None:
        """Lay the page out for a window ``width`` pixels wide and high enough for all of it."""
        metrics = {"width": width, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", height=600, **metrics)
        height = self.evaluate("document.documentElement.scrollHeight")
        self.call("Emulation.setDeviceMetricsOverride", height=height, **metrics)

    def _call(self, method: str, session: Mapping[str, str] | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **(session or {})}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + self._seconds
        while (answer := self._receive(method, deadline)).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def _receive(self, method: str, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0, deadline - time.monotonic()))
            received = os.read(self._read, 1 << 20) if ready else b""
            if not received:
                why = "ended" if ready else f"did not answer within {self._seconds:g} s"
                raise RuntimeError(f"Chromium {why} at {method}: {self._log.read_text(errors='replace')[-2000:]}")
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message


def _above_standard(descriptor: int) -> int:
    """The same pipe under a number above those that Chromium takes."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return moved
