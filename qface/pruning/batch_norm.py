"""Re-estimation of BatchNorm statistics, which no longer fit after channels were removed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qface.training_mode import preserve_training_mode

__all__ = ["reestimate_batch_norms"]

_BATCH = 64


@torch.no_grad()
def reestimate_batch_norms(model: nn.Module, images: Tensor) -> None:
    """Replace the running mean and variance of all BatchNorm layers of ``model``, in place.

    The new statistics are the plain average over batches of about 64 images. During these passes BatchNorm uses batch
    statistics, so that later layers get normalized inputs; dropout stays off.

    Args:
        model: any network.
        images: normalized images, float [N, 3, H, W].
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    parts = max(1, len(images) // _BATCH)
    with preserve_training_mode(model):
        model.eval()
        for norm in norms:
            norm.train()
            norm.momentum = None  # cumulative average over batches
            norm.reset_running_stats()
        for part in torch.tensor_split(images, parts):
            model(part)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
