"""``Result``: the base of what verbs return, so that it is short to look at wherever it is shown."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

__all__ = ["Result"]

_LONGEST = 200  # characters of a repr


class Result:
    """The result of a verb: a table in text and notebooks, and one line of key figures in a REPL.

    A subclass has its table in :mod:`qface.reporting.tables`, under :func:`qface.reporting.tables.table_of`, and names
    its key figures. It is a dataclass with ``repr=False``, since a dataclass writes a repr of all its fields otherwise.
    Where the command prints a sentence instead of a table, ``__str__`` returns that.
    """

    def _key_figures(self) -> Mapping[str, object]:
        """The few values that the repr names."""
        raise NotImplementedError(f"{type(self).__name__} must name its key figures")

    def __repr__(self) -> str:
        """The name of the class and its key figures, in one line."""
        figures = ", ".join(f"{name}={_FORMAT.repr(value)}" for name, value in self._key_figures().items())
        line = f"{type(self).__name__}({figures})"
        return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 4]}...)"

    def __str__(self) -> str:
        """The table that the command prints."""
        from qface.reporting.rendering import as_text  # tables know the results, not the other way round

        return as_text(self.__rich__())

    def __rich__(self) -> Table | Group:
        """The table, for :mod:`rich`, which the command line prints with."""
        from qface.reporting.tables import table_of

        return table_of(self)

    def _repr_html_(self) -> str:
        """The table for notebooks."""
        from qface.reporting.rendering import as_html

        return as_html(self.__rich__())


class _Format(reprlib.Repr):
    """Short values: four digits of a float, and the ends of long texts."""

    def repr_float(self, value: float, level: int) -> str:
        """``value`` with four digits."""
        return f"{value:.4g}"


_FORMAT = _Format()
