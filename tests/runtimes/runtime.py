"""Other runtimes and processors, each as a function from images to embeddings."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.runtimes.parts import part_folder, reason_missing

__all__ = ["HOST", "RUNTIMES", "Runtime", "RuntimeFailedError"]

Images = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
Embeddings = npt.NDArray[np.float32]

HOST = "host"
_WORKERS = Path(__file__).parent / "workers"


class RuntimeFailedError(Exception):
    """A runtime is not there, or cannot run a file; says what is missing, or what it printed."""


@dataclass(frozen=True)
class Environment:
    """The settings with which a worker is started in a runtime.

    Args:
        parts: that must be installed.
        interpreter: the beginning of the command, which the worker follows.
        packages: folder of the worker's packages; None for those of this Python.
        worker: in ``workers/``.
        exact: whether embeddings must equal those of the host.
        emulated: whether a time says nothing about the processor.
    """

    parts: tuple[str, ...]
    interpreter: Callable[[], list[str | Path]]
    packages: Callable[[], Path] | None = None
    worker: str = "embed_onnxruntime.py"
    exact: bool = True
    emulated: bool = False


def _this_python() -> list[str | Path]:
    return [sys.executable]


def _qemu(architecture: str) -> Path:
    return part_folder("qemu") / "usr" / "bin" / f"qemu-{architecture}-static"


def _x86(core: str) -> Environment:
    def interpreter() -> list[str | Path]:
        return [_qemu("x86_64"), "-cpu", core, sys.executable]

    return Environment(("qemu",), interpreter, emulated=True)


def _aarch64(core: str) -> Environment:
    def interpreter() -> list[str | Path]:
        root = part_folder("aarch64") / core
        return [_qemu("aarch64"), "-L", root, "-cpu", core, root / "usr" / "bin" / "python3"]

    return Environment(("qemu", "aarch64"), interpreter, lambda: part_folder("aarch64") / "site", emulated=True)


def _python(part: str, **options: Any) -> Environment:
    return Environment((part,), _this_python, lambda: part_folder(part), **options)


RUNTIMES = {
    HOST: Environment((), _this_python),
    "onnxruntime-1.24": _python("onnxruntime-1.24"),
    "onnxruntime-newest": _python("onnxruntime-newest"),
    "x86-haswell": _x86("Haswell"),
    "x86-nehalem": _x86("Nehalem"),
    "aarch64-dotprod": _aarch64("max"),
    "aarch64-cortex-a72": _aarch64("cortex-a72"),
    "web": Environment(("web",), lambda: ["node"], lambda: part_folder("web") / "node_modules", worker="embed_web.cjs"),
    "openvino": _python("openvino", worker="embed_openvino.py", exact=False),
}
"""All runtimes by name. HOST, the reference, is the onnxruntime of this Python on this processor."""


class Runtime:
    """One of :data:`RUNTIMES`, on one thread, one image per call.

    Each method starts one process for all its files, since a start under qemu takes seconds.

    Attributes:
        environment: how it is started.
        version: of onnxruntime or OpenVINO, once something has been run.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.environment = RUNTIMES[name]
        self.version = ""

    def reason_missing(self) -> str | None:
        """Why it cannot be used here, in one line; None if it can."""
        if self.name.startswith("x86-") and platform.machine() != "x86_64":
            return f"{self.name} runs this Python, which is not of x86-64"
        reasons = (reason_missing(part) for part in self.environment.parts)
        return next((reason for reason in reasons if reason), None)

    def embed(self, path: str | Path, images: Images) -> Embeddings:
        """Embed ``images``, uint8 or float32 [N, 3, height, width] as the file ``path`` reads, to float32 [N, D].

        Raises:
            RuntimeFailedError: the runtime is missing, or cannot run the file.
        """
        return self.embed_files([(path, images)])[0]

    def embed_files(self, files: Sequence[tuple[str | Path, Images]]) -> list[Embeddings]:
        """Embed by each file the images that come with it.

        Raises:
            RuntimeFailedError: the runtime is missing, or cannot run a file.
        """
        with tempfile.TemporaryDirectory() as folder:
            self._work(Path(folder), files)
            outputs = [np.fromfile(Path(folder) / f"{number}.out", np.float32) for number in range(len(files))]
        return [output.reshape(len(images), -1) for output, (_, images) in zip(outputs, files, strict=True)]

    def milliseconds(self, files: Sequence[tuple[str | Path, Images]], runs: int) -> list[list[float]]:
        """Time ``runs`` calls of each file with its first image, alternating the files, after a warm-up.

        Raises:
            RuntimeFailedError: the runtime is missing, or cannot run a file.
        """
        with tempfile.TemporaryDirectory() as folder:
            times: list[list[float]] = self._work(Path(folder), files, runs)["milliseconds"]
        return times

    def _work(self, folder: Path, files: Sequence[tuple[str | Path, Images]], runs: int = 0) -> dict[str, Any]:
        if reason := self.reason_missing():
            raise RuntimeFailedError(reason)
        for number, (_, images) in enumerate(files):
            images.tofile(folder / f"{number}.in")
        models = [
            {"path": str(Path(path).resolve()), "dtype": images.dtype.name, "shape": images.shape}
            for path, images in files
        ]
        (folder / "request.json").write_text(json.dumps({"models": models, "runs": runs}))
        command = [*self.environment.interpreter(), _WORKERS / self.environment.worker, folder]
        done = subprocess.run(command, env=self._variables(), capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeFailedError(f"{self.name}: {done.stderr.strip() or f'exit code {done.returncode}'}")
        response: dict[str, Any] = json.loads((folder / "response.json").read_text())
        self.version = response["version"]
        return response

    def _variables(self) -> dict[str, str]:
        # OpenBLAS's variables, such as OPENBLAS_CORETYPE, describe this processor, not the emulated one.
        ours = ("PYTHONPATH", "PYTHONHOME", "OPENBLAS_")
        variables = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        if self.environment.packages is not None:
            packages = str(self.environment.packages())
            variables |= {"PYTHONPATH": packages, "NODE_PATH": packages}
        return variables | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
