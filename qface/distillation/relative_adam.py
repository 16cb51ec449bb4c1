"""Adam whose steps are in parts of the size of what they change.

Equalization multiplies channels by factors, and divides the weights behind them by the same: the network is the same,
but its weights are of very different size. SGD's steps then break the small ones before they reach the large ones, and
Adam's, of one size for all, do as well. Here a step for a weight of a matrix is in parts of (root mean square of its
row) x (that of its column) / (that of the matrix), which factors of rows and columns multiply as they do the weight: so
training does not depend on them. LARS and LAMB (You et al., 2017, 2020) do so for whole layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["RelativeAdam", "sizes"]

_LEAST = 1e-3
"""Lower bound of the RMS of a row or column, relative to that of the matrix, so that rows of zeros can still train."""
_LEAST_ELEMENT = 0.1
"""Lower bound of a value of a vector, relative to the mean absolute value, for the same reason."""


class RelativeAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba, ICLR 2015) on ``parameter / size``, without weight decay.

    Args:
        params: parameters, or groups of them.
        lr: size of a step in parts of :func:`sizes`.
        betas: of the moving averages of gradients and of their squares.
        eps: added to the root of the latter.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-12
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step along the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        state["step"] += 1
        first, second = group["betas"]
        size = sizes(parameter)
        gradient = parameter.grad * size
        mean = state["mean"].mul_(first).add_(gradient, alpha=1 - first)
        square = state["square"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = (square / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
        parameter.addcmul_(size, mean / root, value=-group["lr"] / (1 - first ** state["step"]))


@torch.no_grad()
def sizes(parameter: Tensor) -> Tensor:
    """The magnitude of the values of ``parameter``, to be broadcast against it.

    Of two dimensions or more: (root mean square of its row) x (of its column) / (of all), where the first dimension
    tells rows and the second one columns. Of one: the absolute value, at least a tenth of their mean. Of zeros: 1.
    """
    values = parameter.detach()
    whole = values.square().mean().sqrt()
    if not whole > 0:
        return torch.ones_like(values)
    if values.ndim <= 1:
        magnitudes = values.abs()
        return magnitudes.clamp(min=_LEAST_ELEMENT * float(magnitudes.mean()))
    least = _LEAST * float(whole)
    return _along(values, 0, least) * _along(values, 1, least) / whole


def _along(values: Tensor, dimension: int, least: float) -> Tensor:
    """Root mean square, at least ``least``, over all dimensions but one, which stays with the others of length 1."""
    others = [each for each in range(values.ndim) if each != dimension]
    squares: Tensor = values.square().mean(others, keepdim=True)
    return squares.sqrt().clamp_(min=least)
