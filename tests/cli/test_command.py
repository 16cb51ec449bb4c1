from __future__ import annotations

import logging
import re
from functools import partial
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from qface.cli import main
from qface.cli.command import Command, note
from qface.errors import ImagesError
from qface.progress import Lines, stage

_LOGGER = logging.getLogger("qface")
_NAMES = ["warning", "info", "debug"]


@click.command(cls=Command)
@click.option("--fail", is_flag=True)
def speak(fail: bool) -> None:
    """Say one line at each level, and a note."""
    for name in _NAMES:
        getattr(_LOGGER, name)("a line: %s", name)
    note("a note")
    if fail:
        raise ImagesError("no faces:\ngive others")


def stderr_of(*options: str) -> list[str]:
    result = CliRunner().invoke(speak, options)
    assert result.exit_code == (2 if "--fail" in options else 0), result.output
    assert result.stdout == ""
    return result.stderr.splitlines()


@pytest.mark.parametrize(
    ("options", "levels", "notes"),
    [
        ((), 1, ["a note"]),
        (("-q",), 1, []),
        (("--verbose",), 2, ["a note"]),
        (("-vv",), 3, ["a note"]),
        (("-vvv",), 3, ["a note"]),
    ],
    ids=str,
)
def test_as_much_is_said_as_was_asked_for(options: tuple[str, ...], levels: int, notes: list[str]) -> None:
    assert stderr_of(*options) == [f"a line: {name}" for name in _NAMES[:levels]] + notes


def test_quiet_and_verbose_contradict() -> None:
    result = CliRunner().invoke(speak, ["-q", "-v"])
    assert (result.exit_code, result.stderr) == (2, "Error: -q and -v contradict each other: give only one of them\n")


def test_the_log_is_appended_to_with_times_and_ends_with_the_error(tmp_path: Path) -> None:
    file = tmp_path / "qface.log"
    stderr_of("--log", str(file))
    stderr_of("-v", "--fail", "--log", str(file))
    lines = file.read_text().splitlines()
    times, said = zip(
        *(re.fullmatch(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) (.*)", line).groups() for line in lines), strict=True
    )
    assert list(times) == sorted(times)
    assert list(said) == [
        "WARNING a line: warning",
        "WARNING a line: warning",
        "INFO a line: info",
        r"ERROR no faces:\ngive others",
    ]


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (line,) = CliRunner().invoke(speak, ["--log", str(tmp_path / "absent" / "qface.log")]).stderr.splitlines()
    assert line.startswith("Error: cannot append to ")


@pytest.mark.parametrize("options", [(), ("-q",), ("-vv",), ("--fail", "--log", "qface.log")], ids=str)
def test_the_logger_is_as_it_was(options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = (_LOGGER.level, list(_LOGGER.handlers), _LOGGER.propagate, logging.root.level)
    stderr_of(*options)
    assert (_LOGGER.level, list(_LOGGER.handlers), _LOGGER.propagate, logging.root.level) == before


@pytest.mark.parametrize(("options", "shown"), [((), True), (("-q",), False)], ids=str)
def test_progress_is_shown_unless_quiet(options: tuple[str, ...], shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command(cls=Command)
    def work() -> None:
        with stage("count", 1) as advance:
            advance()

    monkeypatch.setattr("qface.progress.Lines", partial(Lines, interval=0.0))
    assert ("count: 1/1" in CliRunner().invoke(work, options).stderr) == shown


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_has_the_common_options(name: str) -> None:
    options = [option for param in main.commands[name].params for option in param.opts]
    assert {"-q", "--quiet", "-v", "--verbose", "--log"} <= set(options)
    assert len(options) == len(set(options))
