"""Float weights of quantized layers during training, from which the integers are rounded.

Both functions keep integers from changing where the loss does not ask for it. If a scale alone moved, the integers of
its whole channel would be rounded anew, and weights between two integers jump from one to the other and back in every
few steps (oscillation; Nagel et al., Overcoming Oscillations in Quantization-Aware Training, ICML 2022).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qface.quantization.quantized_layers import WeightedLayer

__all__ = ["pull_to_integers", "weights_follow_scales"]


@contextmanager
def weights_follow_scales(student: nn.Module) -> Iterator[None]:
    """Multiply weights by the changes that their scales have at the end of the block.

    Weights are then moved in units of their scale: a change of the scale alone changes no integer.

    Args:
        student: any network; layers that are not quantized do not change.
    """
    layers = _rounding_layers(student)
    before = [layer.weight_fake_quant.exact_scale().clone() for layer in layers]
    yield
    with torch.no_grad():
        for layer, scale in zip(layers, before, strict=True):
            layer.weight_fake_quant.keep_positive()
            change = layer.weight_fake_quant.exact_scale() / scale
            layer.weight.mul_(change.view(-1, *[1] * (layer.weight.ndim - 1)))


@torch.no_grad()
def pull_to_integers(student: nn.Module, share: float) -> None:
    """Move weights towards the values that their integers stand for (dampening).

    Args:
        student: any network; layers that are not quantized do not change.
        share: share of the distance, 0 to 1.
    """
    for layer in _rounding_layers(student):
        layer.weight.lerp_(layer.weight_fake_quant.rounded(layer.weight), share)


def _rounding_layers(student: nn.Module) -> list[Any]:
    """Return the layers of ``student`` that round their weights."""
    layers = (layer for layer in student.modules() if isinstance(layer, WeightedLayer))
    return [layer for layer in layers if layer.weight_fake_quant.quantizing]
