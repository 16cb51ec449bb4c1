"""Run folders of commands, in which a stopped command continues."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from qface.cli.command import note
from qface.errors import ConfigError
from qface.files import alone_in

__all__ = ["Run", "continued", "continued_in", "run_of"]


@contextmanager
def continued(*options: str) -> Iterator[None]:
    """If a signal ends the block, print the command that continues: this command with ``options``."""
    try:
        yield
    except SystemExit:
        note(f"stopped; to continue: {shlex.join(['qface', *sys.argv[1:], *options])}")
        raise


def continued_in(run_dir: Path | None) -> AbstractContextManager[None]:
    """Like :func:`continued` if there is a run folder; otherwise a stopped command starts over, and says nothing."""
    return nullcontext() if run_dir is None else continued()


@dataclass(frozen=True)
class Run:
    """The run folder of a command.

    Args:
        folder: folder of checkpoints.
        resume: True to continue from its checkpoint.
    """

    folder: Path
    resume: bool

    def resumable(self) -> AbstractContextManager[None]:
        """If a signal ends the block, after a checkpoint was written, print the command that continues."""
        return continued(*([] if self.resume else ["--resume"]))


@contextmanager
def run_of(output: Path, run_dir: Path | None, resume: bool) -> Iterator[Run]:
    """Yield the run in ``run_dir``, or in ``OUTPUT.run``, where the same command continues without ``--resume``.

    ``OUTPUT.run`` is deleted at the end of the block, unless an error ends it.

    Args:
        output: file that the command writes.
        run_dir: run folder; None means ``OUTPUT.run``.
        resume: True to continue in ``run_dir``.
    """
    if run_dir is not None:
        yield Run(run_dir, resume)
        return
    folder = output.with_name(f"{output.name}.run")
    yield Run(folder, resume=True)
    if os.environ.get("RANK", "0") == "0":
        _delete_unless_used(folder)


def _delete_unless_used(folder: Path) -> None:
    """Delete the run folder, unless the same command runs a second time in it, and will delete it."""
    with suppress(ConfigError), alone_in(folder):
        shutil.rmtree(folder, ignore_errors=True)
