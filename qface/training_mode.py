"""Temporary changes of the training mode of networks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from torch import nn

__all__ = ["eval_mode", "preserve_training_mode", "shared_by_threads"]

Context = Callable[[nn.Module], AbstractContextManager[None]]


@contextmanager
def preserve_training_mode(model: nn.Module) -> Iterator[None]:
    """Restore the training mode of each submodule of ``model`` after the block, even after an error."""
    modes = [(part, part.training) for part in model.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    with preserve_training_mode(model):
        model.eval()
        yield


def eval_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Keep ``model`` in eval mode until the last thread leaves the block; then restore the previous modes."""
    return shared_by_threads(model, _eval_mode)


@dataclass
class _Users:
    count: int
    entered: AbstractContextManager[None]


_LOCK = threading.Lock()
_USERS: dict[tuple[nn.Module, Context], _Users] = {}


@contextmanager
def shared_by_threads(model: nn.Module, context: Context) -> Iterator[None]:
    """Enter ``context(model)`` with the first concurrent thread and exit it with the last.

    With one context per thread, the first to exit would restore the state while others still need the change.
    """
    key = (model, context)
    with _LOCK:
        if key not in _USERS:
            entered = context(model)
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
