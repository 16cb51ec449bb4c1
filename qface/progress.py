"""Progress bars on standard error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

__all__ = ["track"]

T = TypeVar("T")


def track(items: Iterable[T], description: str, shown: bool, total: int | None = None) -> Iterator[T]:
    """Yield ``items``, with a bar that goes away at the end where it is ``shown``."""
    if not shown:
        yield from items
        return
    yield from rich_track(items, description, total=total, console=Console(stderr=True), transient=True)
