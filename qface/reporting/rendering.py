"""Rendering of tables as text and as HTML."""

from __future__ import annotations

import io
from collections.abc import Iterable
from html import escape

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

__all__ = ["as_html", "as_text"]


def as_text(table: Table | Group) -> str:
    """Render tables as plain text with the width of the terminal."""
    # Otherwise rich writes colors if FORCE_COLOR is set, and displays the table itself in a notebook.
    console = Console(file=io.StringIO(), emoji=False, force_terminal=False, force_jupyter=False)
    with console.capture() as captured:
        console.print(table)
    return _printable(captured.get().rstrip("\n"))


def as_html(table: Table | Group) -> str:
    """Render each table as an HTML ``<table>``, with all text escaped."""
    tables = table.renderables if isinstance(table, Group) else [table]
    return _printable("\n".join(_table(each) for each in tables if isinstance(each, Table)))


def _printable(text: str) -> str:
    """Escape bytes of file names that are not valid UTF-8, which cannot be printed."""
    return text.encode(errors="backslashreplace").decode()


def _table(table: Table) -> str:
    """Render title, column names, rows and caption."""
    title = f"<caption>{_plain(table.title)}</caption>" if table.title else ""
    names = _row("th", (column.header for column in table.columns)) if table.show_header else ""
    rows = "".join(_row("td", cells) for cells in zip(*(column.cells for column in table.columns), strict=True))
    notes = f'<tr><td colspan="{len(table.columns)}">{_plain(table.caption)}</td></tr>' if table.caption else ""
    return f"<table>{title}<thead>{names}</thead><tbody>{rows}</tbody><tfoot>{notes}</tfoot></table>"


def _row(tag: str, cells: Iterable[RenderableType]) -> str:
    return "<tr>" + "".join(f"<{tag}>{_plain(cell)}</{tag}>" for cell in cells) + "</tr>"


def _plain(cell: RenderableType) -> str:
    """Return the text of ``cell`` without :mod:`rich` markup, escaped for HTML."""
    text = Text.from_markup(cell, emoji=False) if isinstance(cell, str) else cell
    return escape(str(text)).replace("\n", "<br>")
