"""Synthetic images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qface.preprocessing import CROP_SIZE

__all__ = ["synthetic_crops"]

_SYNTHETIC_IMAGES = 4


def synthetic_crops(count: int = _SYNTHETIC_IMAGES, seed: int = 0) -> Tensor:
    """Return seeded noise at two scales, to activate all layers, as uint8 [count, 3, 112, 112]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 7, 7, generator=generator)
    coarse = F.interpolate(coarse, CROP_SIZE, mode="bilinear", align_corners=False)
    fine = torch.rand(count, 3, CROP_SIZE, CROP_SIZE, generator=generator)
    return ((0.8 * coarse + 0.2 * fine) * 255).round().byte()
