"""Networks from pytorchcv and transformers, and one network per idiom of tests/graph/idioms.py.

Neither package needs torchvision. Weights are random and seeded. BatchNorm statistics are random too, since the initial
ones would make it an identity.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qface
from qface.preprocessing import with_preprocessing

__all__ = ["NETWORKS", "ForeignNetwork", "is_installed"]

_IDIOM = "idiom"


@dataclass(frozen=True)
class ForeignNetwork:
    """A network and how to build it.

    Args:
        name: name for ``--names`` and the table.
        package: package that defines it.
        make: function that builds it.
        size: height and width of its input images.
    """

    name: str
    package: str
    make: Callable[[], nn.Module]
    size: int = 112

    def build(self) -> nn.Module:
        """Build the network in eval mode with seeded random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.make().eval()
            _randomize_statistics(model)
        return with_preprocessing(model, qface.Preprocessing(size=(self.size, self.size)))


def is_installed(package: str) -> bool:
    """True if ``package`` can be imported."""
    return package == _IDIOM or importlib.util.find_spec(package) is not None


def _randomize_statistics(model: nn.Module) -> None:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.05)
                module.running_var.uniform_(0.75, 1.25)


def _pytorchcv(name: str) -> nn.Module:
    model = importlib.import_module("pytorchcv.model_provider").get_model(name)
    for module in list(model.modules()):
        if isinstance(getattr(module, "final_pool", None), nn.AvgPool2d):
            module.final_pool = nn.AdaptiveAvgPool2d(1)  # its window fits 224 x 224 images and is too large here
    return model


class _Embedding(nn.Module):
    """Embedding of a transformers model: pooled output, mean of its feature map, or first token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.model(images)
        pooled = getattr(outputs, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)
        last = outputs.last_hidden_state
        return last.mean((2, 3)) if last.ndim == 4 else last[:, 0]


def _transformers(kind: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        package = importlib.import_module("transformers")
        config = getattr(package, f"{kind}Config")(**settings)
        return _Embedding(getattr(package, f"{kind}Model")(config))

    return make


def _idioms() -> list[ForeignNetwork]:
    sys.path.append(str(Path(__file__).parents[1]))
    idioms = importlib.import_module("tests.graph.idioms")
    return [
        ForeignNetwork(f"idiom: {name}", _IDIOM, lambda idiom=idiom: idioms.build(idiom), idioms.SIZE[0])
        for name, idiom in idioms.IDIOMS.items()
    ]


_PYTORCHCV = (
    "resnet18",
    "preresnet18",
    "seresnet18",
    "densenet121",
    "squeezenet_v1_1",
    "mobilenet_w1",
    "mobilenetv2_w1",
    "mobilenetv3_small_w1",
    "mnasnet_b1",
    "fbnet_cb",
    "proxylessnas_mobile",
    "efficientnet_b0",
    "mixnet_s",
    "ghostnet",
    "shufflenet_g3_w1",
    "shufflenetv2_w1",
    "menet108_8x1_g3",
    "igcv3_w1",
    "peleenet",
    "vovnet27s",
    "hardnet39ds",
    "dla34",
    "hrnet_w18_small_v1",
    "cbam_resnet18",
    "bninception",
)
_LARGER = dict.fromkeys(("dla34", "hrnet_w18_small_v1", "bninception"), 128)
"""Sizes of networks whose branches do not fit on 112 pixels."""
_VIT = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "image_size": 112,
}
_CONVNEXT = {"hidden_sizes": [24, 48, 96, 192], "depths": [1, 1, 2, 1], "image_size": 112}
_FOUR_STAGES = {"hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 1, 1]}
_TRANSFORMERS = (
    ForeignNetwork("ViT", "transformers", _transformers("ViT", **_VIT, patch_size=8)),
    ForeignNetwork("DeiT", "transformers", _transformers("DeiT", **_VIT, patch_size=16)),
    ForeignNetwork(
        "Swin",
        "transformers",
        _transformers("Swin", image_size=112, patch_size=4, embed_dim=24, depths=[2, 2], num_heads=[2, 4]),
    ),
    ForeignNetwork("ConvNeXt", "transformers", _transformers("ConvNext", **_CONVNEXT)),
    ForeignNetwork("ConvNeXt V2", "transformers", _transformers("ConvNextV2", **_CONVNEXT)),
    ForeignNetwork("MobileViT", "transformers", _transformers("MobileViT", image_size=128), 128),
    ForeignNetwork(
        "MobileViT V2", "transformers", _transformers("MobileViTV2", image_size=128, width_multiplier=0.5), 128
    ),
    ForeignNetwork("PoolFormer", "transformers", _transformers("PoolFormer", **_FOUR_STAGES)),
    ForeignNetwork("LeViT", "transformers", _transformers("Levit", image_size=112)),
    ForeignNetwork("RegNet", "transformers", _transformers("RegNet", embedding_size=16, **_FOUR_STAGES)),
    ForeignNetwork(
        "EfficientNet",
        "transformers",
        _transformers("EfficientNet", image_size=112, width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280),
    ),
    ForeignNetwork("SwiftFormer", "transformers", _transformers("SwiftFormer", image_size=224), 224),
)

NETWORKS: dict[str, ForeignNetwork] = {
    network.name: network
    for network in (
        *(
            ForeignNetwork(name, "pytorchcv", lambda name=name: _pytorchcv(name), _LARGER.get(name, 112))
            for name in _PYTORCHCV
        ),
        *_TRANSFORMERS,
        *_idioms(),
    )
}
"""Name of each network and the network."""
