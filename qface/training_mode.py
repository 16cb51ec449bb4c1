"""Temporary changes of the training mode of networks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from qface.shared_context import shared_by_threads

__all__ = ["eval_mode", "preserve_training_mode"]


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
