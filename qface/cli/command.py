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
"""First key of every JSON object that a command prints; it rises when a key goes or changes its meaning."""
_QUIET = "qface.quiet"
_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


class Command(click.Command):
    """A command with the options that all have; it turns errors of the library into one line and exit code 2.

    An option of the command's own hides the common one of the same name. Help shows every default.

    Args:
        args: as of :class:`click.Command`.
        examples: lines that a user may type, for the end of the help.
        kwargs: likewise.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)
        self.context_settings = {"show_default": True, **self.context_settings}
        own = {name for param in self.params for name in param.opts}
        self.params += [option for option in _common_options() if own.isdisjoint(option.opts)]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, each in one line whatever its length, so that it can be copied."""
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write(f"{'':>{formatter.current_indent}}{example}\n")

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command as click does, with progress and logging as its options say."""
        quiet, verbose, log_file = (ctx.params.pop(name, None) for name in ("quiet", "verbose", "log_file"))
        ctx.meta[_QUIET] = quiet
        try:
            if quiet and verbose:
                raise ConfigError("-q and -v contradict each other: give one of them")
            with _logging_at(_LEVELS[min(verbose or 0, 2)]), _written_to(log_file), progress_shown(not quiet):
                return super().invoke(ctx)
        except QFaceError as error:
            click.echo(f"Error: {_line(error)}", err=True)
            ctx.exit(2)


def _line(error: QFaceError) -> str:
    return " ".join(str(error).split())


def _common_options() -> list[click.Option]:
    return [
        click.Option(["-q", "--quiet"], is_flag=True, help="Show no progress and no notes, only warnings and errors."),
        click.Option(["-v", "--verbose"], count=True, show_default=False, help="Say more on stderr; -vv says most."),
        click.Option(
            ["--log", "log_file"],
            type=click.Path(path_type=Path),
            help="File to append warnings and errors to, with times; with -v, more.  [default: none]",
        ),
    ]


@contextmanager
def _logging_at(level: int) -> Iterator[None]:
    """Show the logger ``qface`` on stderr from ``level`` on, and leave it as it was."""
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
    """Writes to what stderr is at the moment, since bars of progress replace it while they are shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        click.echo(self.format(record), err=True)


def _written_to(file: Path | None) -> AbstractContextManager[None]:
    return nullcontext() if file is None else _appending(file)


@contextmanager
def _appending(file: Path) -> Iterator[None]:
    """Append the lines of the logger ``qface`` to ``file``, and the error that ends the block."""
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
        handler.handle(logger.makeRecord("qface", logging.ERROR, __file__, 0, _line(error), (), None))
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()


def note(text: object) -> None:
    """Say on stderr what a command did, unless it is to be quiet."""
    if not click.get_current_context().meta.get(_QUIET):
        click.echo(text, err=True)


def written(file: Path) -> dict[str, Any]:
    """Name and size of a file that a command wrote."""
    return {"output": str(file), "bytes": file.stat().st_size}


def show(record: dict[str, Any], words: Any, as_json: bool) -> None:
    """Print what a verb did, as one JSON object or in words; of several processes, the first does.

    Args:
        record: what docs/json.md lists, without the version.
        words: the same as a line, as a :class:`qface.results.Result`, or as a table of :mod:`rich`.
        as_json: which of both.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        click.echo(json.dumps({"schema_version": SCHEMA_VERSION, **record}))
    elif isinstance(words, str):
        click.echo(words)
    else:
        from rich.console import Console  # only here, so that help does not wait for it

        Console(emoji=False).print(words)
