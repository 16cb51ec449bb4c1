"""Runs a benchmark as a user does, in this process."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from click.testing import CliRunner, Result

FOLDER = Path(__file__).parents[2] / "benchmarks"


def script(name: str) -> ModuleType:
    """``benchmarks/<name>.py`` as a module; a dot in ``name`` leads into a folder."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))  # as for a script, which finds the modules beside it
    spec = importlib.util.spec_from_file_location(
        f"benchmarks_{name}", FOLDER.joinpath(*name.split(".")).with_suffix(".py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run(name: str, *arguments: object) -> Result:
    """The result of ``python benchmarks/<name>.py ARGUMENTS``."""
    return CliRunner().invoke(script(name).main, [str(argument) for argument in arguments], catch_exceptions=False)
