"""Batch-norm statistics, measured again: a network that lost channels sees other means and variances than it keeps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qface.training_mode import preserve_training_mode

__all__ = ["reestimate_batch_norms"]

_BATCH = 64


@torch.no_grad()
def reestimate_batch_norms(model: nn.Module, images: Tensor) -> None:
    """Replace the running means and variances of all batch norms of ``model``, in place.

    They become those of the images, averaged over batches of 64 of one size. Each norm then normalizes by what it
    computes of a batch itself, so that those behind it see what they will see.

    Args:
        model: any network; dropout stays off.
        images: normalized, [N, 3, height, width].
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    parts = max(1, len(images) // _BATCH)
    with preserve_training_mode(model):
        model.eval()
        for norm in norms:
            norm.train()
            norm.momentum = None  # the plain average of all batches
            norm.reset_running_stats()
        for part in torch.tensor_split(images, parts):
            model(part)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
