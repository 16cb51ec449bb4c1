"""Digests of the structure and values of a network, to resume a run only with the same network."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import chain

from torch import Tensor, nn

from qface.data.images import bytes_of
from qface.preprocessing import preprocessing_of

__all__ = ["digest_of_batches", "digest_of_structure", "digest_of_values", "digests_of_network", "sha256_of_values"]

_WORD = 16  # characters of a digest


def digests_of_network(model: nn.Module) -> dict[str, str]:
    """Return what a result of ``model`` depends on, by its name in words, for the record of a run folder."""
    return {
        "layers": digest_of_structure(model),
        "weights": digest_of_values(model),
        "preprocessing": preprocessing_of(model).to_json(),
    }


def digest_of_batches(batches: Iterable[Tensor]) -> str:
    """Return a digest of the values of ``batches``."""
    return _sha256(map(bytes_of, batches))[:_WORD]


def digest_of_structure(model: nn.Module) -> str:
    """Return a digest of the layers, bit widths, and names, shapes and dtypes of parameters and buffers."""
    layers = (f"{name} {type(layer).__name__} {_quantizer_settings(layer)}" for name, layer in model.named_modules())
    tensors = (f"{name} {tuple(t.shape)} {t.dtype}" for name, t in _tensors(model))
    return _sha256(line.encode() for line in chain(layers, tensors))[:_WORD]


def _quantizer_settings(layer: nn.Module) -> str:
    # By attribute name, since only qface.quantization imports the quantizer classes.
    return " ".join(str(getattr(layer, name, "")) for name in ("bits", "observer"))


def digest_of_values(model: nn.Module) -> str:
    """Return a digest of the names and values of all parameters and buffers."""
    return sha256_of_values(model)[:_WORD]


def sha256_of_values(model: nn.Module) -> str:
    """Return the SHA-256 of the names and values of all parameters and buffers, in hexadecimal."""
    return _sha256(name.encode() + bytes_of(tensor) for name, tensor in _tensors(model))


def _tensors(model: nn.Module) -> chain[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def _sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
