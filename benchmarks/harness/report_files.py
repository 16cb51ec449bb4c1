"""Tables, figures and JSON of a benchmark; files are replaced atomically."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from qface.files import replacing

__all__ = ["markdown_table", "terminal_table", "write_figure", "write_json", "write_text"]


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def terminal_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a rich table for the terminal."""
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading)
    for cells in rows:
        table.add_row(*cells)
    return table


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` to ``path``."""
    write_text(path, json.dumps(data, indent=1))


def write_figure(path: Path, figure: Any) -> None:
    """Write a matplotlib figure to ``path`` as PNG."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, pil_kwargs={"optimize": True})
