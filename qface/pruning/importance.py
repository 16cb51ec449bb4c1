"""Channel importance: torch-pruning's estimators, and the gradients that two of them need."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qface.pruning.pruning_config import PruningConfig

__all__ = ["Gradients", "estimator", "gradients"]

Gradients = list[Tensor | None]
"""One gradient per parameter, in the order of ``model.parameters()``."""

_BATCH = 32


def estimator(config: PruningConfig) -> Callable[[Any], Tensor]:
    """Return torch-pruning's estimator of the importance of each channel in a group."""
    # Imported late, since it takes as long as torch itself; by name, because it has no type hints.
    pruner = import_module("torch_pruning.pruner.importance")
    if config.importance == "magnitude":
        made = pruner.MagnitudeImportance(p=config.norm)
    else:
        kinds = {
            "taylor": pruner.TaylorImportance,
            "hessian": pruner.HessianImportance,
            "fpgm": pruner.FPGMImportance,
            "bn_scale": pruner.BNScaleImportance,
        }
        made = kinds[config.importance]()
    return made  # type: ignore[no-any-return]


def gradients(model: nn.Module, images: Tensor, config: PruningConfig) -> Gradients:
    """Return the parameter gradients that ``taylor`` and ``hessian`` need; None for other importances.

    The distance of a network to itself has zero gradient, so ``taylor`` uses the mean cosine distance between the
    embeddings of images and of their mirror images. ``hessian`` uses normalized embeddings z: the Hessian of
    |z - z0|^2 / 2 at z0 is J^T J, and its diagonal is the mean squared gradient of v . z over random v.

    Args:
        model: the network, not changed; gradients are computed in eval mode.
        images: normalized images, float [N, 3, H, W].
        config: the importance and the seed.
    """
    twin = copy.deepcopy(model).eval().requires_grad_(True)
    twin.zero_grad()
    with torch.enable_grad():
        if config.importance == "taylor":
            _write_mirror_gradients(twin, images)
        elif config.importance == "hessian":
            _write_squared_gradients(twin, images, torch.Generator().manual_seed(config.seed))
    return [parameter.grad for parameter in twin.parameters()]


def _write_mirror_gradients(model: nn.Module, images: Tensor) -> None:
    for batch in torch.split(images, _BATCH):
        distances = 1 - F.cosine_similarity(model(batch), model(batch.flip(-1)))
        (distances.sum() / len(images)).backward()  # type: ignore[no-untyped-call]


def _write_squared_gradients(model: nn.Module, images: Tensor, generator: torch.Generator) -> None:
    parameters = list(model.parameters())
    squares = [torch.zeros_like(parameter) for parameter in parameters]
    for image in torch.split(images, 1):
        embedding = F.normalize(model(image))
        direction = torch.randn(embedding.shape, generator=generator).to(embedding)
        for square, gradient in zip(
            squares, torch.autograd.grad((embedding * direction).sum(), parameters, allow_unused=True), strict=True
        ):
            if gradient is not None:
                square.addcmul_(gradient, gradient, value=1 / len(images))
    for parameter, square in zip(parameters, squares, strict=True):
        parameter.grad = square
