"""Tables as text, and as HTML for notebooks."""

from __future__ import annotations

import io
from collections.abc import Iterable
from html import escape

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

__all__ = ["as_html", "as_text"]


def as_text(table: Table | Group) -> str:
    """The lines that a terminal of this width shows, without colors."""
    # Without both, rich writes colors where FORCE_COLOR is set, and into the page instead of a text in a notebook.
    console = Console(file=io.StringIO(), emoji=False, force_terminal=False, force_jupyter=False)
    with console.capture() as captured:
        console.print(table)
    return _printable(captured.get().rstrip("\n"))


def as_html(table: Table | Group) -> str:
    """One ``<table>`` for each table, with all text escaped."""
    tables = table.renderables if isinstance(table, Group) else [table]
    return _printable("\n".join(_table(each) for each in tables if isinstance(each, Table)))


def _printable(text: str) -> str:
    """``text`` with bytes of names of files that are no UTF-8 as escapes, since nothing else can be printed."""
    return text.encode(errors="backslashreplace").decode()


def _table(table: Table) -> str:
    """Title, names of columns, rows, and notes."""
    title = f"<caption>{_plain(table.title)}</caption>" if table.title else ""
    names = _row("th", (column.header for column in table.columns)) if table.show_header else ""
    rows = "".join(_row("td", cells) for cells in zip(*(column.cells for column in table.columns), strict=True))
    notes = f'<tr><td colspan="{len(table.columns)}">{_plain(table.caption)}</td></tr>' if table.caption else ""
    return f"<table>{title}<thead>{names}</thead><tbody>{rows}</tbody><tfoot>{notes}</tfoot></table>"


def _row(tag: str, cells: Iterable[RenderableType]) -> str:
    return "<tr>" + "".join(f"<{tag}>{_plain(cell)}</{tag}>" for cell in cells) + "</tr>"


def _plain(cell: RenderableType) -> str:
    """The text of ``cell`` without the markup of :mod:`rich`, escaped for HTML."""
    text = Text.from_markup(cell, emoji=False) if isinstance(cell, str) else cell
    return escape(str(text)).replace("\n", "<br>")
