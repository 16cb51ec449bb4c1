"""Contexts that overlapping blocks share, also in several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = ["shared_by_threads"]

Changed = TypeVar("Changed")


@dataclass
class _Users:
    count: int
    entered: AbstractContextManager[None]


_LOCK = threading.Lock()
_USERS: dict[tuple[Any, Any], _Users] = {}


@contextmanager
def shared_by_threads(changed: Changed, context: Callable[[Changed], AbstractContextManager[None]]) -> Iterator[None]:
    """Enter ``context(changed)`` with the first of overlapping blocks, in any thread, and exit it with the last.

    With one context per block, the first to exit would restore the state while others still need the change.

    Args:
        changed: object with the state that the context changes.
        context: function that returns a context manager for it.
    """
    key = (changed, context)
    with _LOCK:
        if key not in _USERS:
            entered = context(changed)
            entered.__enter__()
            _USERS[key] = _Users(0, entered)
        _USERS[key].count += 1
    try:
        yield
    finally:
        with _LOCK:
            users = _USERS[key]
            users.count -= 1
            if users.count == 0:
                del _USERS[key]
                users.entered.__exit__(None, None, None)
