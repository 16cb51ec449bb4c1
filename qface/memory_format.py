"""Choice of the fastest memory format of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["fastest_memory_format"]


@torch.no_grad()
def fastest_memory_format(images: Tensor, *networks: Callable[[Tensor], Any]) -> torch.memory_format:
    """Return channels-last for CPU images that all ``networks`` accept in it, else contiguous.

    Channels-last makes convolutions on a CPU about 25 % faster; no gain is known on GPUs. Networks that flatten with
    ``features.view(n, -1)`` do not accept it.

    Args:
        images: a small batch [N, 3, H, W] to try the networks with.
        networks: networks in the mode that they will run in.
    """
    if images.device.type != "cpu" or images.ndim != 4:
        return torch.contiguous_format
    channels_last = images.contiguous(memory_format=torch.channels_last)
    try:
        for network in networks:
            network(channels_last)
    except RuntimeError:
        return torch.contiguous_format
    return torch.channels_last
