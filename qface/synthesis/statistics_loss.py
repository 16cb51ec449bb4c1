"""Difference between the statistics of a batch and those that a network's BatchNorm layers have stored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qface.errors import UnsupportedLayerError

__all__ = ["StatisticsLoss", "recorded_statistics"]


class StatisticsLoss:
    """Mean difference over the BatchNorm layers of a network, of the batch that went through it last.

    The difference of a layer is that of its inputs' means, in standard deviations, and that of their standard
    deviations, relative to the stored ones, each squared and averaged over channels: equation 4 of ZeroQ (Cai et al.,
    CVPR 2020), without the sizes of the layers.
    """

    def __init__(self) -> None:
        self._differences: list[Tensor] = []

    def compare(self, layer: nn.Module, inputs: Any) -> None:
        """Add the difference of ``layer``; a forward pre-hook."""
        assert isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None
        values = inputs[0].transpose(0, 1).flatten(1)
        deviation = (layer.running_var + layer.eps).sqrt()
        means = (values.mean(1) - layer.running_mean) / deviation
        ratios = (values.var(1, correction=0) + layer.eps).sqrt() / deviation
        self._differences.append(means.square().mean() + (ratios - 1).square().mean())

    def take(self) -> Tensor:
        """Return the mean difference over all layers since the last call, a scalar."""
        differences, self._differences = self._differences, []
        return torch.stack(differences).mean()


@contextmanager
def recorded_statistics(network: nn.Module) -> Iterator[StatisticsLoss]:
    """Compare the inputs of the BatchNorm layers of ``network`` during the block.

    Raises:
        UnsupportedLayerError: no layer has stored statistics.
    """
    layers = [each for each in network.modules() if isinstance(each, _BatchNorm) and each.running_mean is not None]
    if not layers:
        raise UnsupportedLayerError(
            "this network has no BatchNorm with running statistics, from which images are made: give the checkpoint "
            "that was trained, because export to ONNX folds BatchNorm into weights"
        )
    loss = StatisticsLoss()
    hooks = [layer.register_forward_pre_hook(loss.compare) for layer in layers]
    try:
        yield loss
    finally:
        for hook in hooks:
            hook.remove()
