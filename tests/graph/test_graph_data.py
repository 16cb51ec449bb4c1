"""Captured networks as data: every layer and every float function comes back as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qface
from qface.errors import UnsupportedLayerError
from qface.graph import capture, layers
from qface.graph.aten import FLOAT_FUNCTIONS
from qface.preprocessing import with_preprocessing
from tests.graph.float_functions import FUNCTIONS, SMALL, network
from tests.graph.kinds import kinds


def images(count: int = 5) -> Tensor:
    return torch.randn(count, 3, 16, 12, generator=torch.Generator().manual_seed(2))


def check_round_trip(model: nn.Module, folder: Path) -> None:
    qface.save(model, folder / "m.safetensors")
    loaded, captured = qface.load(folder / "m.safetensors"), capture(model)
    with torch.no_grad():
        expected = model(images())
        torch.testing.assert_close(captured(images()), expected)
        torch.testing.assert_close(loaded(images()), expected)
    assert kinds(loaded) == kinds(captured)


OWN: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    layers.Add: lambda x: x + x,
    layers.ChannelAffine: lambda x: x * torch.arange(6.0) + 1,
    layers.Concat: lambda x: torch.cat([x, x], 3),
    layers.L2Normalize: layers.L2Normalize(),
    layers.Maximum: lambda x: torch.maximum(x, x + x),
    layers.Multiply: lambda x: x * x,
    layers.Pad: lambda x: F.pad(x, (1, 2, 3, 4), "replicate"),
    layers.Permute: lambda x: x.permute(0, 3, 1, 2),
    layers.Reshape: lambda x: x.view(len(x.flatten(2).sum(2)), 2, 2, 8, 6),
    layers.Slice: lambda x: x[:, :, 1:7:2],
    layers.UpsampleNearest: lambda x: F.interpolate(x, scale_factor=(2, 3)),
}


@pytest.mark.parametrize("layer", layers.OWN_LAYERS, ids=lambda layer: layer.__name__)
def test_a_layer_of_ours_comes_back(layer: type[nn.Module], tmp_path: Path) -> None:
    model = network(OWN[layer])
    if layer is layers.L2Normalize:
        model = with_preprocessing(nn.Sequential(model, nn.Flatten(), OWN[layer]), SMALL)  # of rows
    check_round_trip(model, tmp_path)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_float_function_comes_back(name: str, tmp_path: Path) -> None:
    check_round_trip(network(FUNCTIONS[name]), tmp_path)


def test_an_operator_that_is_not_on_the_list_is_refused_with_its_place() -> None:
    model = with_preprocessing(nn.Sequential(nn.Identity(), network(torch.fft.rfft)), SMALL)
    with pytest.raises(UnsupportedLayerError, match=r"the operator fft_rfft in '1'.*float_functions\.py:\d+\)$"):
        capture(model)


def test_every_float_function_is_an_operator_of_torch() -> None:
    assert [name for name in sorted(FLOAT_FUNCTIONS) if not hasattr(torch.ops.aten, name)] == []
