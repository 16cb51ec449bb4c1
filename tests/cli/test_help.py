"""Help of every command: examples that parse, defaults, and no library that takes seconds to import."""

from __future__ import annotations

import shlex
import subprocess
import sys

import click
import pytest

from qface.cli import main
from qface.cli.command import Command

COMMANDS = sorted(main.commands)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_two_examples_that_parse(name: str) -> None:
    command = main.commands[name]
    assert isinstance(command, Command)
    assert len(command.examples) >= 2
    text = command.get_help(click.Context(command))
    for example in command.examples:
        assert f"  {example}\n" in f"{text}\n"
        program, called, *arguments = shlex.split(example)
        assert (program, called) == ("qface", name)
        command.make_context(name, arguments)


def test_an_example_that_does_not_parse_is_found() -> None:
    with pytest.raises(click.UsageError):
        main.commands["export"].make_context("export", ["student.safetensors", "--no-such-option"])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is_without(name: str) -> None:
    command = main.commands[name]
    context = click.Context(command, **command.context_settings)
    for option in command.params:
        if not isinstance(option, click.Option):
            continue
        assert option.help, option.name
        if not (option.required or option.multiple or option.count or (option.is_flag and not option.secondary_opts)):
            assert "[default: " in " ".join(option.get_help_record(context) or ()), option.name


INPUT_OPTIONS = {"--color", "--mean", "--std", "--crop", "--size"}
MODELS = {"model", "student", "teacher", "gallery", "reference", "files"}
"""Names of the arguments that may be a file of another program, which does not state its input."""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_takes_a_model_can_be_told_its_input(name: str) -> None:
    params = main.commands[name].params
    takes_model = any(param.name in MODELS for param in params)
    assert ({option for param in params for option in param.opts} >= INPUT_OPTIONS) == takes_model


SLOW = ("torch", "onnx", "onnxruntime", "numpy", "rich", "PIL")


EACH = "from qface.cli import main\nfor name in main.commands: main([name, '--help'], standalone_mode=False)"
AS_A_COMMAND = "import runpy\nrunpy.run_module('qface', run_name='__main__')"


@pytest.mark.parametrize(
    ("code", "arguments"),
    [(AS_A_COMMAND, ("--help",)), (AS_A_COMMAND, ("--version",)), (AS_A_COMMAND, ("export", "--help")), (EACH, ())],
    ids=["--help", "--version", "export --help", "the help of each"],
)
def test_help_imports_no_slow_library(code: str, arguments: tuple[str, ...]) -> None:
    told = f"import atexit, sys\natexit.register(lambda: print([name for name in {SLOW} if name in sys.modules]))\n"
    done = subprocess.run([sys.executable, "-c", told + code, *arguments], capture_output=True, text=True, check=True)
    assert "qface" in done.stdout
    assert done.stdout.endswith("\n[]\n")
