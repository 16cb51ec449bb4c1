"""Places in the user's code: the file and line, or the module, that an error is about."""

from __future__ import annotations

from pathlib import Path

from torch import fx

__all__ = ["module_of", "place_of", "place_of_error"]

_HERE = Path(__file__).parent.as_posix()


def place_of_error(error: Exception) -> str:
    """File and line of the innermost frame outside torch, where the user can change something."""
    place = ""
    frame = error.__traceback__
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename.replace("\\", "/")
        if "/torch/" not in file and not file.startswith((_HERE, "<")):
            place = f" at {file}:{frame.tb_lineno} in {frame.tb_frame.f_code.co_name}"
        frame = frame.tb_next
    return place


def module_of(node: fx.Node) -> str:
    """The path of the user's module that calls ``node``."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0].partition("@")[0] if stack else ""
    return f" in {path!r}" if path else ""


def place_of(node: fx.Node) -> str:
    """The line of the user's code that ``node`` comes from."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    places = [line for line in lines if line.startswith("File ") and "/torch/" not in line.replace("\\", "/")]
    if not places:
        return ""
    file, _, rest = places[-1].removeprefix('File "').partition('", line ')
    return f" ({file}:{rest.partition(',')[0]})"
