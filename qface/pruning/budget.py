"""Cost of a network, and the maximum cost of a pruned one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from qface.checks import check_choice
from qface.errors import ConfigError
from qface.preprocessing import example_input
from qface.training_mode import eval_mode

__all__ = ["Budget", "Cost", "cost_of", "count_parameters"]

Unit = Literal["parameters", "macs", "mb"]
_BYTES = 4  # per float32


@dataclass(frozen=True)
class Cost:
    """Cost of a float network.

    Args:
        parameters: number of parameters.
        macs: multiply-accumulates of convolutions and linear layers for one image.
        mb: size of the parameters as float32, in MB (10^6 bytes).
    """

    parameters: int
    macs: int
    mb: float


def cost_of(model: nn.Module) -> Cost:
    """Return the parameters, multiply-accumulates and size of ``model``.

    Args:
        model: a float network from images [N, 3, H, W] to embeddings.
    """
    return Cost(count_parameters(model), _count_macs(model), _count_megabytes(model))


@dataclass(frozen=True)
class Budget:
    """Maximum cost of a pruned network.

    Args:
        limit: the maximum, > 0.
        unit: ``"parameters"``, ``"macs"`` (multiply-accumulates for one image) or ``"mb"`` (float32 parameters in
            10^6 bytes).

    Raises:
        ConfigError: the limit is not > 0, or the unit is unknown.

    Example:
        >>> pruned = qface.prune(teacher, Budget(7000, "parameters"))
    """

    limit: float
    unit: Unit

    def __post_init__(self) -> None:
        check_choice(Unit, unit=self.unit)
        if not self.limit > 0:
            raise ConfigError(f"the limit of a budget must be > 0, got {self.limit!r}")

    def cost(self, model: nn.Module) -> float:
        """Return the cost of ``model`` in ``unit``."""
        return _COUNT[self.unit](model)


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters of ``model``."""
    return sum(parameter.numel() for parameter in model.parameters())


def _count_megabytes(model: nn.Module) -> float:
    """Return the size of the parameters as float32, in MB."""
    return count_parameters(model) * _BYTES / 1e6


def _count_macs(model: nn.Module) -> int:
    """Return the multiply-accumulates of convolutions and linear layers for one image."""
    total = 0

    def add(layer: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        # Each output value sums over all weights of its channel.
        total += output[0].numel() * weight[0].numel()

    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    try:
        with eval_mode(model), torch.no_grad():
            model(example_input(model, 1))
    finally:
        for hook in hooks:
            hook.remove()
    return total


_COUNT: dict[Unit, Callable[[nn.Module], float]] = {
    "parameters": count_parameters,
    "macs": _count_macs,
    "mb": _count_megabytes,
}
