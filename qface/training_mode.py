"""Training and eval mode of networks, lent and given back."""

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
    """Afterwards, even after an error, each part of ``model`` is in the mode that it is in now."""
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
    """``model`` in eval mode until the last thread that asked for it is done; then its parts are as before."""
    return shared_by_threads(model, _eval_mode)


@dataclass
class _Users:
    count: int
    entered: AbstractContextManager[None]


_LOCK = threading.Lock()
_USERS: dict[tuple[nn.Module, Context], _Users] = {}


@contextmanager
def shared_by_threads(model: nn.Module, context: Context) -> Iterator[None]:
    """Enter ``context(model)`` with the first of the threads that are in here at once, and leave it with the last.

    Otherwise the first to leave would take from the others what it has set, and the last would put that back.
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
