"""The base of all commands: common options, errors in one line, and output as a table or JSON."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click

from qface.errors import ConfigError, QFaceError
from qface.progress import progress_shown

__all__ = ["SCHEMA_VERSION", "Command", "note", "show", "written"]

SCHEMA_VERSION = 1
"""Version in every printed JSON object; it rises when a key is removed or changes its meaning."""
_QUIET = "qface.quiet"
_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


class Command(click.Command):
    """A command with the common options, which prints an error of the library in one line and exits with code 2.

    An option that the command itself defines replaces the common option of that name. Help shows every default.

    Args:
        args: positional arguments of :class:`click.Command`.
        examples: command lines for the end of the help.
        kwargs: keyword arguments of :class:`click.Command`.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)
        self.context_settings = {"show_default": True, **self.context_settings}
        own = {name for param in self.params for name in param.opts}
        self.params += [option for option in _common_options() if own.isdisjoint(option.opts)]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each example in one line of any length, so that it can be copied."""
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write(f"{'':>{formatter.current_indent}}{example}\n")

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command with the progress and logging that its options ask for."""
        quiet, verbose, log_file = (ctx.params.pop(name, None) for name in ("quiet", "verbose", "log_file"))
        ctx.meta[_QUIET] = quiet
        try:
            if quiet and verbose:
                raise ConfigError("-q and -v contradict each other: give only one of them")
            with _logging_at(_LEVELS[min(verbose or 0, 2)]), _log_to(log_file), progress_shown(not quiet):
                return super().invoke(ctx)
        except QFaceError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(2)


def _common_options() -> list[click.Option]:
    return [
        click.Option(["-q", "--quiet"], is_flag=True, help="Print no progress and no notes, only warnings and errors."),
        click.Option(
            ["-v", "--verbose"], count=True, show_default=False, help="Print more on stderr; -vv prints most."
        ),
        click.Option(
            ["--log", "log_file"],
            type=click.Path(path_type=Path),
            help="File to append log lines to, with times; -v adds lines.  [default: none]",
        ),
    ]


@contextmanager
def _logging_at(level: int) -> Iterator[None]:
    """Print log records >= ``level`` of the logger ``qface`` on stderr within the block."""
    logger = logging.getLogger("qface")
    before, handler = logger.level, _Stderr()
    logger.setLevel(level)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


class _Stderr(logging.Handler):
    """Write to the current stderr, since progress bars replace it while they are shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        click.echo(self.format(record), err=True)


def _log_to(file: Path | None) -> AbstractContextManager[None]:
    return nullcontext() if file is None else _appending(file)


@contextmanager
def _appending(file: Path) -> Iterator[None]:
    """Append the records of the logger ``qface``, and the error that ends the block, to ``file``."""
    try:
        handler = logging.FileHandler(file, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot append to {file} ({error.strerror}): give --log a file in a folder") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("qface")
    logger.addHandler(handler)
    try:
        yield
    except QFaceError as error:
        handler.handle(logger.makeRecord("qface", logging.ERROR, __file__, 0, str(error), (), None))
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()


def note(text: object) -> None:
    """Print a line on stderr, unless the command is quiet.

    Args:
        text: the line.
    """
    if not click.get_current_context().meta.get(_QUIET):
        click.echo(text, err=True)


def written(file: Path) -> dict[str, Any]:
    """Return the JSON keys of a written file: its name and size.

    Args:
        file: the file.
    """
    return {"output": str(file), "bytes": file.stat().st_size}


def show(record: dict[str, Any], words: Any, as_json: bool) -> None:
    """Print the result of a command, in the first of several processes only.

    Args:
        record: the JSON object, as docs/json.md lists it, without its version.
        words: the same as a line, a :class:`qface.results.Result`, or a table of :mod:`rich`.
        as_json: True to print the JSON object.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        click.echo(json.dumps({"schema_version": SCHEMA_VERSION, **record}))
    elif isinstance(words, str):
        click.echo(words)
    else:
        from rich.console import Console  # imported here to keep --help fast

        Console(emoji=False).print(words)
