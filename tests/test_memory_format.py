from __future__ import annotations

import torch
from torch import Tensor, nn

from qface.data.images import TensorImages
from qface.evaluation import embed
from qface.memory_format import fastest_memory_format

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def across_channels(images: Tensor) -> Tensor:
    return images.view(len(images), -1)


def test_channels_last_where_all_networks_read_it() -> None:
    assert fastest_memory_format(IMAGES, nn.Flatten(), nn.ReLU()) is torch.channels_last
    assert fastest_memory_format(IMAGES, nn.Flatten(), across_channels) is torch.contiguous_format


def test_what_is_no_image_stays_as_it_is() -> None:
    assert fastest_memory_format(IMAGES.flatten(1), nn.ReLU()) is torch.contiguous_format


def test_networks_embed_the_same_in_either() -> None:
    class Network(nn.Module):
        def __init__(self, across: bool) -> None:
            super().__init__()
            self.across, self.channels_last = across, False

        def forward(self, images: Tensor) -> Tensor:
            self.channels_last = images.is_contiguous(memory_format=torch.channels_last)
            return across_channels(images) if self.across else images.flatten(1)

    fast, slow = Network(across=False), Network(across=True)
    assert (embed(fast, TensorImages(IMAGES)) == embed(slow, TensorImages(IMAGES))).all()
    assert fast.channels_last
    assert not slow.channels_last
