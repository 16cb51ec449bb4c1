"""``Result``: base class of the results of the public functions, with short text and HTML forms."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

__all__ = ["Result"]

_LONGEST = 200  # maximum length of a repr, characters


class Result:
    """Base class of results: ``str`` and notebooks show a table, ``repr`` one line of key figures.

    A subclass registers its table with :func:`qface.reporting.tables.table_of` and defines its key figures. It is a
    dataclass with ``repr=False``, since a dataclass would otherwise replace ``__repr__``. A subclass that the command
    line prints as a sentence overrides ``__str__``.
    """

    def _key_figures(self) -> Mapping[str, object]:
        """Return the values that ``repr`` shows, by name."""
        raise NotImplementedError(f"{type(self).__name__} must name its key figures")

    def __repr__(self) -> str:
        """Return the class name and the key figures in one line."""
        figures = ", ".join(f"{name}={_FORMAT.repr(value)}" for name, value in self._key_figures().items())
        line = f"{type(self).__name__}({figures})"
        return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 4]}...)"

    def __str__(self) -> str:
        """Return the table that the command line prints."""
        from qface.reporting.rendering import as_text  # imported late, since the tables import the results

        return as_text(self.__rich__())

    def __rich__(self) -> Table | Group:
        """Return the table for :mod:`rich`."""
        from qface.reporting.tables import table_of

        return table_of(self)

    def _repr_html_(self) -> str:
        """Return the table for notebooks as HTML."""
        from qface.reporting.rendering import as_html

        return as_html(self.__rich__())


class _Format(reprlib.Repr):
    """Short repr of values: floats with four digits, long strings abbreviated."""

    def repr_float(self, value: float, level: int) -> str:
        """Return ``value`` with four significant digits."""
        return f"{value:.4g}"


_FORMAT = _Format()
