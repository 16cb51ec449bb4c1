"""Budgets: the maximum cost of a pruned network, in place of a share of channels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from qface.errors import ConfigError
from qface.preprocessing import example_input
from qface.training_mode import eval_mode

__all__ = ["Budget", "Cost", "cost_of", "count_parameters"]

Unit = Literal["parameters", "macs", "mb"]
_BYTES = 4  # of a float32


@dataclass(frozen=True)
class Cost:
    """The cost of a float network.

    Args:
        parameters: how many it has.
        macs: products of all convolutions and linear layers for one image.
        mb: 10^6 bytes of its parameters as float32.
    """

    parameters: int
    macs: int
    mb: float


def cost_of(model: nn.Module) -> Cost:
    """The cost of ``model``."""
    return Cost(count_parameters(model), _count_macs(model), _count_megabytes(model))


@dataclass(frozen=True)
class Budget:
    """An upper limit.

    Args:
        limit: above 0.
        unit: ``"parameters"``, ``"macs"`` or ``"mb"``, as in :class:`Cost`.

    Raises:
        ConfigError: the limit is not above 0, or the unit unknown.

    Example:
        >>> pruned = qface.prune(teacher, Budget(7000, "parameters"))
    """

    limit: float
    unit: Unit

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise ConfigError(f"the unit of a budget is one of {', '.join(get_args(Unit))}, not {self.unit!r}")
        if not self.limit > 0:
            raise ConfigError(f"a budget of {self.limit} {self.unit} leaves nothing: choose a limit above 0")

    def cost(self, model: nn.Module) -> float:
        """The cost of ``model``, in the unit."""
        return _COUNT[self.unit](model)


def count_parameters(model: nn.Module) -> int:
    """All parameters of ``model``."""
    return sum(parameter.numel() for parameter in model.parameters())


def _count_megabytes(model: nn.Module) -> float:
    """10^6 bytes of the parameters of ``model`` as float32."""
    return count_parameters(model) * _BYTES / 1e6


def _count_macs(model: nn.Module) -> int:
    """The products that convolutions and linear layers of ``model`` compute for one image."""
    total = 0

    def add(layer: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        # Each output value is a sum over all weights of its channel.
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
