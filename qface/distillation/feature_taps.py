"""Feature distillation on the sums of residual connections.

With few bits, the embedding alone is too weak a signal. A quantized student computes its teacher's residual sums, with
each channel scaled by a factor from cross-layer equalization. These factors are fitted once by least squares, and the
difference of the sums is measured relative to their variance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qface.errors import QFaceError
from qface.graph.canonicalize import canonicalize
from qface.graph.layers import Add

__all__ = ["FeatureLoss", "FeaturePairs", "FeatureTaps"]

FeaturePairs = Sequence[tuple[Tensor, Tensor]]
"""Values of each residual sum in the student and in the teacher, each [N, C, ...]."""


class FeatureTaps:
    """Forward hooks on residual sums of student and teacher.

    Args:
        student: the student.
        teacher: the teacher.
        names: names of the addition layers, which both networks have.

    Attributes:
        teacher: the network to call as the teacher.
        names: names of the addition layers.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, names: Sequence[str] = ()) -> None:
        self.teacher = teacher
        self.names = names
        self._student = student
        self._values: dict[tuple[str, str], Tensor] = {}

    @classmethod
    def shared(cls, student: nn.Module, teacher: nn.Module) -> FeatureTaps:
        """Return taps on the sums that a quantized student and its teacher have in common.

        Other pairs of networks have none. If there are sums, the ``teacher`` of the result is an equivalent network
        with a layer for each.

        Args:
            student: the student.
            teacher: the teacher.
        """
        known = _adds_of(student)
        canonical = _canonical(teacher) if known else teacher
        names = sorted(known & _adds_of(canonical))
        return cls(student, canonical if names else teacher, names)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Record the sums of each forward pass within the block, for :meth:`take`."""
        with ExitStack() as hooks:
            hooks.callback(self._values.clear)
            for side, network in (("student", self._student), ("teacher", self.teacher)):
                for name in self.names:
                    hook = network.get_submodule(name).register_forward_hook(partial(self._record, (side, name)))
                    hooks.callback(hook.remove)
            yield

    def take(self, images: int) -> FeaturePairs:
        """Return and forget the sums of the last forward pass that have a comparable shape.

        Args:
            images: number of images N in that pass. Sums are comparable if both networks have shape [N, C, ...].
        """
        pairs = [(self._values.pop(("student", name)), self._values.pop(("teacher", name))) for name in self.names]
        return [(found.float(), wanted.float()) for found, wanted in pairs if _comparable(found, wanted, images)]

    def _record(self, key: tuple[str, str], layer: nn.Module, inputs: Any, output: Tensor) -> None:
        self._values[key] = output


def _comparable(found: Tensor, wanted: Tensor, images: int) -> bool:
    return found.shape == wanted.shape and found.ndim > 1 and len(found) == images


def _adds_of(network: nn.Module) -> set[str]:
    return {name for name, layer in network.named_modules() if isinstance(layer, Add)}


def _canonical(teacher: nn.Module) -> nn.Module:
    """Return ``teacher`` with the addition layers of its students, or unchanged if it cannot be traced."""
    try:
        return canonicalize(teacher)
    except QFaceError:  # a teacher may be any module
        return teacher


class FeatureLoss(nn.Module):
    """Mean squared error between residual sums, relative to the mean channel variance.

    Args:
        pairs: sums of some images, on which the factor of each channel is fitted.
    """

    def __init__(self, pairs: FeaturePairs) -> None:
        super().__init__()
        for number, pair in enumerate(pairs):
            factor, variance = _fitted(*pair)
            self.register_buffer(f"factor{number}", factor)
            self.register_buffer(f"variance{number}", variance)

    def forward(self, pairs: FeaturePairs) -> Tensor:
        """Return the loss of each image, [N, 1]: the mean over sums, channels and positions.

        Args:
            pairs: the same sums as at construction, for other images.
        """
        losses = [self._loss(number, *pair) for number, pair in enumerate(pairs)]
        return torch.stack(losses).mean(0)[:, None]

    def _loss(self, number: int, found: Tensor, wanted: Tensor) -> Tensor:
        factor, variance = getattr(self, f"factor{number}"), getattr(self, f"variance{number}")
        losses: Tensor = (found - factor * wanted).square().flatten(1).mean(1) / variance
        return losses


@torch.no_grad()
def _fitted(found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return least-squares factors [C, 1, ...] from ``wanted`` to ``found``, and the mean variance."""
    student, teacher = (values.transpose(0, 1).flatten(1) for values in (found, wanted))
    tiny = torch.finfo(found.dtype).tiny
    factor = (student * teacher).mean(1) / teacher.square().mean(1).clamp(min=tiny)
    variance = (factor.square() * teacher.var(1, correction=0)).mean().clamp(min=tiny)
    return factor.view(-1, *(1,) * (found.ndim - 2)), variance
