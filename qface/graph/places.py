"""Locations in user code (file and line, or module) for error messages."""

from __future__ import annotations

from pathlib import Path

from torch import fx

__all__ = ["module_of", "place_of", "place_of_error"]

_HERE = Path(__file__).parent.as_posix()


def place_of_error(error: Exception) -> str:
    """Return " at file:line in function" of the innermost frame outside torch and qface.graph, or ""."""
    place = ""
    frame = error.__traceback__
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename.replace("\\", "/")
        if "/torch/" not in file and not file.startswith((_HERE, "<")):
            place = f" at {file}:{frame.tb_lineno} in {frame.tb_frame.f_code.co_name}"
        frame = frame.tb_next
    return place


def module_of(node: fx.Node) -> str:
    """Return " in 'path'" with the path of the module that calls ``node``, or ""."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0].partition("@")[0] if stack else ""
    return f" in {path!r}" if path else ""


def place_of(node: fx.Node) -> str:
    """Return " (file:line)" of the user code that ``node`` comes from, or ""."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    places = [line for line in lines if line.startswith("File ") and "/torch/" not in line.replace("\\", "/")]
    if not places:
        return ""
    file, _, rest = places[-1].removeprefix('File "').partition('", line ')
    return f" ({file}:{rest.partition(',')[0]})"
