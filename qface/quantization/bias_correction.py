"""DFQ bias correction (Nagel et al., Data-Free Quantization, ICCV 2019).

Rounded weights and clipped activations shift the mean of each output channel. Layer by layer, each after the corrected
layers before it, the difference to the mean of the float network is added to the bias.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from qface.graph.layers import along_channels
from qface.graph.queries import layer_of
from qface.quantization.quantized_layers import WeightedLayer

__all__ = ["channel_means", "correct_biases"]


def channel_means(student: fx.GraphModule, images: Tensor) -> dict[str, Tensor]:
    """Measure the mean of each output channel of every convolution and linear layer.

    Args:
        student: in eval mode.
        images: normalized images, float32 [N, 3, H, W].

    Returns:
        Means [C] by node name.
    """
    recorder = _Recorder(student)
    with torch.no_grad():
        recorder.run(images)
    return recorder.means


def correct_biases(student: fx.GraphModule, images: Tensor, wanted: dict[str, Tensor], number: int = 1) -> None:
    """Correct the biases of ``student`` in place, to restore the channel means of the float network.

    Called for one batch after the other, each batch corrects the error that the batches before it left, and all have
    equal weight.

    Args:
        student: calibrated, in eval mode.
        images: normalized images, float32 [N, 3, H, W].
        wanted: the result of :func:`channel_means` for ``images``, with fake quantization off.
        number: number of this batch, from 1.
    """
    with torch.no_grad():
        _Corrector(student, wanted, 1 / number).run(images)


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
    """Return the mean of each output channel of ``layer``, [C]; a linear layer has its channels last."""
    channels = -1 if isinstance(layer, nn.Linear) else 1
    return x.movedim(channels, 0).flatten(1).mean(1)
