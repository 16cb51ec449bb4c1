"""Common parts of all figures: matplotlib (extra ``qface[figures]``), colors, and reproducible files."""

from __future__ import annotations

import io
import re
from html import escape
from pathlib import Path
from typing import Any

from qface.errors import DependencyError, ExportError
from qface.files import check_folder, replacing

__all__ = ["FORMATS", "INK", "LINES", "MUTED", "check_figure", "inline_svg", "new_figure", "save_figure"]

FORMATS = (".png", ".svg", ".pdf")
"""File extensions of figures."""

INK, MUTED = "#1b1f24", "#c9ced6"
LINES = ("#0b6bcb", "#c2410c", "#7c3aed", "#15803d")
"""Colors on white; the report page replaces them by CSS variables for light and dark mode."""

_VARIABLES = {INK: "ink", "#000000": "ink", MUTED: "muted"} | {
    color: f"line-{number}" for number, color in enumerate(LINES)
}
_UNDATED = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_STYLE: Any = {
    "svg.hashsalt": "qface",  # no random names, so that equal results give equal files
    "svg.fonttype": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": MUTED,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def check_figure(path: str | Path) -> None:
    """Raise if a figure cannot be written to ``path``; called before long work.

    Raises:
        DependencyError: matplotlib is not installed.
        ExportError: the extension is not one of :data:`FORMATS`, or the folder is not writable.
    """
    figure_class()
    if Path(path).suffix not in FORMATS:
        raise ExportError(f"{path} must end in one of {', '.join(FORMATS)}")
    check_folder(path)


def figure_class() -> Any:
    """Return matplotlib's class ``Figure``.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise DependencyError("figures need matplotlib: pip install 'qface[figures]'") from error
    return Figure


def new_figure(width: float = 4.6, height: float = 3.4) -> tuple[Any, Any]:
    """Return a figure of ``width`` x ``height`` inches and its axes, both transparent.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    from_class = figure_class()
    with _style():
        figure = from_class(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.grid(linewidth=0.5, color=MUTED)
    axes.set_axisbelow(True)
    return figure, axes


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write ``figure`` in the format of the extension of ``path``, and return the path.

    Raises:
        DependencyError: matplotlib is not installed.
        ExportError: the extension is not one of :data:`FORMATS`, or the file cannot be written.
    """
    path = Path(path)
    check_figure(path)
    kind = path.suffix[1:]
    with replacing(path) as temporary, _style():
        figure.savefig(temporary, format=kind, dpi=150, metadata=_UNDATED.get(kind), facecolor="white")
    return path


def inline_svg(figure: Any, name: str, title: str, description: str) -> str:
    """Return ``figure`` as an SVG element for an HTML page, with text as text and colors as CSS variables.

    Args:
        figure: a matplotlib figure.
        name: unique name of the figure in the page.
        title: title for screen readers.
        description: description for screen readers, one sentence.
    """
    file = io.StringIO()
    with _style():
        figure.savefig(file, format="svg", metadata=_NO_METADATA, transparent=True)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    label = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
    opening, _, rest = text.partition(">")
    return f'{opening} role="img" aria-labelledby="{name}-title {name}-desc">{label}{rest}'


def _style() -> Any:
    from matplotlib import rc_context

    return rc_context(_STYLE)
