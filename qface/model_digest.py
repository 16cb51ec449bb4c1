"""Words for what a network is and holds, so that a run does not go on with another one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import chain

from torch import Tensor, nn

from qface.data.images import bytes_of

__all__ = ["digest_of_structure", "digest_of_values"]


def digest_of_structure(model: nn.Module) -> str:
    """A word for the layers of ``model``, their bits, and the names, shapes and types of all they hold, whatever the
    values."""
    layers = (f"{name} {type(layer).__name__} {_quantizer_settings(layer)}" for name, layer in model.named_modules())
    tensors = (f"{name} {tuple(t.shape)} {t.dtype}" for name, t in _tensors(model))
    return _digest(line.encode() for line in chain(layers, tensors))


def _quantizer_settings(layer: nn.Module) -> str:
    # By name: only qface.quantization knows its quantizers.
    return " ".join(str(getattr(layer, name, "")) for name in ("bits", "observer"))


def digest_of_values(model: nn.Module) -> str:
    """A word for the names and values of everything ``model`` holds."""
    return _digest(name.encode() + bytes_of(tensor) for name, tensor in _tensors(model))


def _tensors(model: nn.Module) -> chain[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
