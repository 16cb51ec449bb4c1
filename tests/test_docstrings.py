"""Docstrings follow the rules of CONTRIBUTING.md, as far as a test can tell."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path

import pytest

import qface

PACKAGE = Path(qface.__file__).parent
RIDDLES = ("What ", "How ", "Of ", "That ", "All that ", "Those ", "Whose ")
"""Beginnings of a first line that an engineer reads twice."""

Documented = ast.Module | ast.ClassDef | ast.FunctionDef


def docstrings() -> Iterator[tuple[str, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = ast.get_docstring(node) if isinstance(node, Documented) else None
            if text is not None:
                name = getattr(node, "name", "module")
                yield f"{path.relative_to(PACKAGE.parent)}:{getattr(node, 'lineno', 1)} {name}", text


def test_no_first_line_is_a_riddle() -> None:
    assert [where for where, text in docstrings() if text.startswith(RIDDLES)] == []


def test_a_first_line_is_one_sentence() -> None:
    assert [where for where, text in docstrings() if not text.splitlines()[0].endswith((".", ":", "?"))] == []


def public(kind: Callable[[object], bool]) -> list[str]:
    return [name for name in qface.__all__ if kind(getattr(qface, name))]


def documentation(name: str) -> str:
    text = inspect.getdoc(getattr(qface, name))
    assert text, f"qface.{name} has no docstring"
    return text


@pytest.mark.parametrize("section", ["Args:", "Returns:", "Raises:", "Example:"])
@pytest.mark.parametrize("name", public(inspect.isfunction))
def test_a_verb_has_every_section(name: str, section: str) -> None:
    returns_nothing = inspect.signature(getattr(qface, name)).return_annotation == "None"
    assert f"\n{section}\n" in documentation(name) or (section == "Returns:" and returns_nothing)


def is_config(value: object) -> bool:
    return is_dataclass(value) and "__post_init__" in vars(value)


@pytest.mark.parametrize("section", ["Args:", "Raises:", "Example:"])
@pytest.mark.parametrize("name", public(is_config))
def test_a_config_has_every_section(name: str, section: str) -> None:
    assert f"\n{section}\n" in documentation(name)


@pytest.mark.parametrize("name", public(inspect.isfunction))
def test_a_verb_names_each_argument(name: str) -> None:
    arguments = re.split(r"\n\n(?=\S)", documentation(name).split("\nArgs:\n")[1])[0]
    named = re.findall(r"^    (\w+):", arguments, re.MULTILINE)
    assert named == list(inspect.signature(getattr(qface, name)).parameters)
