"""Adam with steps relative to the size of each weight.

Cross-layer equalization multiplies channels by factors and divides the weights of their consumers by the same factors.
The function of the network stays the same, but its weights differ widely in size: steps of SGD and Adam that move large
weights destroy small ones. Here the step of a weight is relative to RMS(row) x RMS(column) / RMS(matrix). Factors of
rows and columns scale this product like the weight itself, so training does not depend on them. LARS and LAMB (You et
al., 2017, 2020) do this per layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["RelativeAdam", "sizes"]

_MIN_RMS = 1e-3
"""Lower bound on row and column RMS relative to the matrix RMS, so that all-zero rows can still train."""
_MIN_ELEMENT = 0.1
"""Lower bound on the elements of a vector relative to their mean absolute value, for the same reason."""


class RelativeAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba, ICLR 2015) on ``parameter / size``, without weight decay.

    Args:
        params: parameters or parameter groups.
        lr: learning rate relative to :func:`sizes`.
        betas: decay rates of the moving averages of gradients and of squared gradients.
        eps: added to the root of the squared average.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-12
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step along the gradients.

        Args:
            closure: computes the loss again, with gradients; None to use the present gradients.

        Returns:
            The loss of ``closure``, or None without one.
        """
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
    """Return the size of each value of ``parameter``, in a shape that broadcasts to it.

    With two or more dimensions: RMS(row) x RMS(column) / RMS(all), where the first dimension are rows and the second
    columns. With one: the absolute value, at least a tenth of the mean absolute value. All-zero parameters: 1.

    Args:
        parameter: any shape.
    """
    values = parameter.detach()
    rms = values.square().mean().sqrt()
    if not rms > 0:
        return torch.ones_like(values)
    if values.ndim <= 1:
        magnitudes = values.abs()
        return magnitudes.clamp(min=_MIN_ELEMENT * float(magnitudes.mean()))
    minimum = _MIN_RMS * float(rms)
    return _rms_along(values, 0, minimum) * _rms_along(values, 1, minimum) / rms


def _rms_along(values: Tensor, dimension: int, minimum: float) -> Tensor:
    """Return the RMS over all other dimensions, which are kept with length 1, but at least ``minimum``."""
    others = [each for each in range(values.ndim) if each != dimension]
    squares: Tensor = values.square().mean(others, keepdim=True)
    return squares.sqrt().clamp_(min=minimum)
