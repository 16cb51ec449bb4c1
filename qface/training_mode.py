"""Training and eval mode of networks, lent and given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["preserve_training_mode"]


@contextmanager
def preserve_training_mode(model: nn.Module) -> Iterator[None]:
    """Afterwards, even after an error, each part of ``model`` is in the mode that it is in now."""
    modes = [(part, part.training) for part in model.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
