"""Run folders of commands that train: where they lie, and how a command that was stopped goes on."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qface.cli.command import note

__all__ = ["Run", "run_of"]


@dataclass(frozen=True)
class Run:
    """The run folder of a command that trains.

    Args:
        folder: the run folder.
        resume: True to go on.
    """

    folder: Path
    resume: bool

    @contextmanager
    def resumable(self) -> Iterator[None]:
        """Print the command that goes on, if a signal ends the block; the training has written a checkpoint then."""
        try:
            yield
        except SystemExit:
            resume = [] if self.resume else ["--resume"]
            note(f"stopped; to go on: {shlex.join(['qface', *sys.argv[1:], *resume])}")
            raise


@contextmanager
def run_of(output: Path, run_dir: Path | None, resume: bool) -> Iterator[Run]:
    """The run in the folder that a user chose, or in ``OUTPUT.run``, where the same command simply goes on.

    The latter folder goes away once the block has ended well.
    """
    if run_dir is not None:
        yield Run(run_dir, resume)
        return
    folder = output.with_name(f"{output.name}.run")
    yield Run(folder, resume=True)
    if os.environ.get("RANK", "0") == "0":
        shutil.rmtree(folder, ignore_errors=True)
