"""Residual sums of student and teacher: where few bits lose most, the embedding alone says too little.

A quantized student computes its teacher's residual sums, each channel times a factor that equalization chose. So the
factors are found once, by least squares, and the sums compared in parts of their variance.
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
"""The value of each sum in the student and in the teacher, [n, channels, ...] each."""


class FeatureTaps:
    """Values of some sums of a student and of its teacher.

    Args:
        student: the network that learns.
        teacher: the network to learn from.
        names: of the sums, which are layers of both.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, names: Sequence[str] = ()) -> None:
        self.teacher = teacher
        self.names = names
        self._student = student
        self._made: dict[tuple[str, str], Tensor] = {}

    @classmethod
    def shared(cls, student: nn.Module, teacher: nn.Module) -> FeatureTaps:
        """The sums that a quantized student shares with its teacher; those of other networks are none.

        Where there are any, ``teacher`` of the result computes what the teacher does, and has a layer for each.
        """
        known = _adds_of(student)
        canonical = _canonical(teacher) if known else teacher
        names = sorted(known & _adds_of(canonical))
        return cls(student, canonical if names else teacher, names)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within, each forward pass of student and teacher leaves its sums for :meth:`take`."""
        with ExitStack() as hooks:
            hooks.callback(self._made.clear)
            for side, network in (("student", self._student), ("teacher", self.teacher)):
                for name in self.names:
                    hook = network.get_submodule(name).register_forward_hook(partial(self._keep, (side, name)))
                    hooks.callback(hook.remove)
            yield

    def take(self, images: int) -> FeaturePairs:
        """The sums of both networks' last pass, on so many images; those that have one shape, and a row of channels for
        each image."""
        pairs = [(self._made.pop(("student", name)), self._made.pop(("teacher", name))) for name in self.names]
        return [(found.float(), wanted.float()) for found, wanted in pairs if _comparable(found, wanted, images)]

    def _keep(self, place: tuple[str, str], layer: nn.Module, inputs: Any, output: Tensor) -> None:
        self._made[place] = output


def _comparable(found: Tensor, wanted: Tensor, images: int) -> bool:
    return found.shape == wanted.shape and found.ndim > 1 and len(found) == images


def _adds_of(network: nn.Module) -> set[str]:
    return {name for name, layer in network.named_modules() if isinstance(layer, Add)}


def _canonical(teacher: nn.Module) -> nn.Module:
    """``teacher`` with a layer for each sum, named as its students' are; itself where that is not possible."""
    try:
        return canonicalize(teacher)
    except QFaceError:  # a teacher may be any module
        return teacher


class FeatureLoss(nn.Module):
    """Mean squared difference of the sums of two networks, in parts of the mean variance of a channel.

    Args:
        pairs: sums of some images, from which the factor of each channel is found.
    """

    def __init__(self, pairs: FeaturePairs) -> None:
        super().__init__()
        for number, pair in enumerate(pairs):
            factor, variance = _fitted(*pair)
            self.register_buffer(f"factor{number}", factor)
            self.register_buffer(f"variance{number}", variance)

    def forward(self, pairs: FeaturePairs) -> Tensor:
        """The loss of each image, [n, 1]: the mean over sums, channels and places."""
        losses = [self._loss(number, *pair) for number, pair in enumerate(pairs)]
        return torch.stack(losses).mean(0)[:, None]

    def _loss(self, number: int, found: Tensor, wanted: Tensor) -> Tensor:
        factor, variance = getattr(self, f"factor{number}"), getattr(self, f"variance{number}")
        losses: Tensor = (found - factor * wanted).square().flatten(1).mean(1) / variance
        return losses


@torch.no_grad()
def _fitted(found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The factors [channels, 1, ...] that bring ``wanted`` nearest to ``found``, and the mean variance of its channels
    then, a scalar."""
    student, teacher = (values.transpose(0, 1).flatten(1) for values in (found, wanted))
    least = torch.finfo(found.dtype).tiny
    factor = (student * teacher).mean(1) / teacher.square().mean(1).clamp(min=least)
    variance = (factor.square() * teacher.var(1, correction=0)).mean().clamp(min=least)
    return factor.view(-1, *(1,) * (found.ndim - 2)), variance
