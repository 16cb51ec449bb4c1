"""Virtual environments of other tools, whose packages contradict those of qface or of each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qface.errors import QFaceError
from qface.files import make_folder

__all__ = ["Environment", "ToolError"]


class ToolError(QFaceError):
    """A tool cannot be installed, or its script fails."""


@dataclass(frozen=True)
class Environment:
    """Virtual environment, which is created when it is first needed.

    Args:
        folder: the folder of the environment; a folder without its packages is cleared.
        requirements: arguments of ``pip install``, one tuple per call, since the first one decides the build of torch.
    """

    folder: Path
    requirements: tuple[tuple[str, ...], ...]

    @property
    def python(self) -> Path:
        """Interpreter of the environment."""
        return self.folder / "bin" / "python"

    @property
    def installed(self) -> Path:
        """File with the requirements that are installed."""
        return self.folder / "requirements.json"

    def install(self) -> None:
        """Create the environment, unless it has these requirements already.

        Raises:
            ToolError: a package cannot be installed.
        """
        wanted = json.dumps(self.requirements)
        if self.installed.exists() and self.installed.read_text(encoding="utf-8") == wanted:
            return
        make_folder(self.folder)
        log = self.folder.with_name(f"{self.folder.name}.log")
        _run([sys.executable, "-m", "venv", "--clear", str(self.folder)], log)
        pip = [str(self.python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        for packages in self.requirements:
            _run([*pip, *packages], log)
        self.installed.write_text(wanted, encoding="utf-8")

    def run(self, script: Path, arguments: Sequence[Path], log: Path) -> None:
        """Run a script in the environment.

        Args:
            script: the Python file.
            arguments: paths to pass to it.
            log: file for the output of the script.

        Raises:
            ToolError: the script fails; the message has the last line of its output.
        """
        _run([str(self.python), str(script), *map(str, arguments)], log)


def _run(command: Sequence[str], log: Path) -> None:
    """Run ``command`` without the Python path of this process; its output goes to ``log``."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("w", encoding="utf-8") as output:
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False)
    if status.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
        raise ToolError(f"{last[:200]} (exit status {status.returncode}; all output: {log})")
