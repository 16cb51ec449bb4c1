"""Bias correction: what rounding adds to the mean of a channel, taken off its bias again.

Rounded weights, and clipped activations, shift the mean of what a layer makes (Nagel et al., Data-Free Quantization,
ICCV 2019). Layer by layer, each one behind those corrected before it, its bias takes up the difference to the mean in
float.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from qface.graph.layers import along_channels
from qface.graph.queries import layer_of
from qface.progress import track
from qface.quantization.quantized_layers import WeightedLayer

__all__ = ["channel_means", "correct_biases"]


def channel_means(student: fx.GraphModule, images: Tensor) -> dict[str, Tensor]:
    """Mean of each output channel of every convolution and linear layer, [channels], by the name of its node."""
    recorder = _Recorder(student)
    with torch.no_grad():
        recorder.run(images)
    return recorder.means


def correct_biases(student: fx.GraphModule, batches: Sequence[Tensor], wanted: Sequence[dict[str, Tensor]]) -> None:
    """Give every channel of ``student``, in place, the mean that it is ``wanted`` to have; biases only.

    Each batch corrects what those before it left, and counts as much as each of them.

    Args:
        student: calibrated, in eval mode.
        batches: normalized images, float32 [N, 3, height, width].
        wanted: what :func:`channel_means` returned for each batch with quantizers off.
    """
    with torch.no_grad():
        parts = list(zip(batches, wanted, strict=True))
        for number, (images, means) in enumerate(track(parts, "correct biases"), 1):
            _Corrector(student, means, 1 / number).run(images)


class _Recorder(fx.Interpreter):
    def __init__(self, student: fx.GraphModule) -> None:
        super().__init__(student)
        self.means: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        layer = layer_of(n)
        if isinstance(layer, WeightedLayer):
            self.means[n.name] = _mean(result, layer)
        return result


class _Corrector(fx.Interpreter):
    def __init__(self, student: fx.GraphModule, wanted: dict[str, Tensor], weight: float) -> None:
        super().__init__(student)
        self._wanted = wanted
        self._weight = weight

    def run_node(self, n: fx.Node) -> Any:
        layer = layer_of(n)
        if not isinstance(layer, WeightedLayer) or layer.bias is None:
            return super().run_node(n)
        (values,), _ = self.fetch_args_kwargs_from_env(n)
        result, bias = layer.simulate(values), cast(Tensor, layer.used_bias())
        layer.bias.add_(self._weight * (self._wanted[n.name] - _mean(layer.in_steps(result), layer)))
        shift = cast(Tensor, layer.used_bias()) - bias
        return result + (shift if isinstance(layer, nn.Linear) else along_channels(shift, result))


def _mean(x: Tensor, layer: nn.Module) -> Tensor:
    """The mean of each channel of an output of ``layer``; those of a linear layer come last."""
    channels = -1 if isinstance(layer, nn.Linear) else 1
    return x.movedim(channels, 0).flatten(1).mean(1)
