"""Values that convolutions multiply and sums add: each with its own bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.ao.quantization import disable_fake_quant

from qface.graph import ChannelAffine
from qface.graph.layers import Add
from qface.quantization import LayerBits, LSQFakeQuantize, QuantizationConfig, quantize
from tests.deployment.networks import CHANNELS, Applied, Sum, calibrated, framed


def conv(kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, CHANNELS, kernel, padding=kernel // 2)


def chain() -> nn.Module:
    return nn.Sequential(Sum(conv()), Sum(conv()), Sum(conv()), conv(1))


BODIES: dict[str, Callable[[], nn.Module]] = {
    "chain": chain,
    "both branches": lambda: nn.Sequential(Sum(conv()), Sum(conv(), conv(1)), Sum(conv())),
    "behind a ReLU": lambda: nn.Sequential(Sum(conv()), nn.ReLU(), Sum(conv()), nn.ReLU(), conv(1)),
    "behind a PReLU": lambda: nn.Sequential(conv(1), nn.PReLU(CHANNELS), Sum(conv()), conv(1)),
    "part of a map": lambda: nn.Sequential(conv(1), Applied(lambda x: x[:, :, 1:]), Sum(conv()), conv(1)),
    "tokens": lambda: nn.Sequential(nn.Flatten(2), nn.Linear(144, 8), Sum(nn.Linear(8, 8)), Sum(nn.Linear(8, 8))),
    "doubled": lambda: nn.Sequential(Sum(conv()), Sum(Sum(conv()), Sum(nn.Identity())), conv(1)),
}


def bit_widths(student: fx.GraphModule, kinds: tuple[type[nn.Module], ...]) -> set[int]:
    """Of everything that layers of ``kinds`` read, save the image."""
    layers = dict(student.named_modules())
    sources = [
        layers[source.target]
        for node in student.graph.nodes
        if node.op == "call_module" and isinstance(layers[node.target], kinds)
        for source in node.all_input_nodes
    ]
    return {source.bits for source in sources if isinstance(source, LSQFakeQuantize)}


@pytest.mark.parametrize("body", ["chain", "both branches", "behind a ReLU", "behind a PReLU"])
@pytest.mark.parametrize("bits", [2, 6])
def test_sums_read_bytes_and_convolutions_their_own_bits(body: str, bits: int) -> None:
    student = quantize(framed(BODIES[body]), bits)
    assert bit_widths(student, (Add,)) == {8}
    assert bit_widths(student, (nn.Conv2d,)) == {bits}


@pytest.mark.parametrize("body", BODIES)
def test_the_float_network_computes_what_it_did(body: str) -> None:
    model = framed(BODIES[body])
    student = quantize(model, 4).eval().apply(disable_fake_quant)
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(student(images), model(images), rtol=1e-4, atol=1e-5)


def test_both_read_the_same_where_that_is_wanted() -> None:
    student = quantize(framed(chain), QuantizationConfig(4, 4, wide_residuals=False))
    assert 4 in bit_widths(student, (Add,))
    assert not any(isinstance(layer, ChannelAffine) for layer in student.modules())


def test_nothing_is_made_twice_where_convolutions_read_bytes() -> None:
    configs = [QuantizationConfig(4, 8, wide_residuals=wide) for wide in (True, False)]
    graphs = [[node.name for node in quantize(framed(chain), config).graph.nodes] for config in configs]
    assert graphs[0] == graphs[1]


def test_one_narrow_layer_is_read_apart_alone() -> None:
    config = QuantizationConfig(8, 8, overrides={"body.1.left": LayerBits(activation=3)})
    student = quantize(framed(chain), config)
    assert bit_widths(student, (Add,)) == {8}
    assert bit_widths(student, (nn.Conv2d,)) == {3, 8}
    assert sum(isinstance(layer, Add) for layer in student.modules()) == 4


def test_chains_of_sums_lose_less() -> None:
    """Over three networks: what one of them loses at 3 bits is partly chance."""
    losses = torch.stack([_losses_of_a_chain(seed) for seed in range(3)])
    wide, shared = losses.mean(0)
    assert wide < 0.8 * shared


def _losses_of_a_chain(seed: int) -> torch.Tensor:
    """1 - cosine with wide residuals and without, [2]."""
    images = torch.randn(16, 3, 24, 24, generator=torch.Generator().manual_seed(seed))
    model = framed(lambda: nn.Sequential(*(Sum(conv()) for _ in range(8)), conv(1)), seed)
    with torch.no_grad():
        wanted = model(images)
        students = [calibrated(model, QuantizationConfig(8, 3, wide_residuals=wide)).eval() for wide in (True, False)]
        return torch.stack([1 - F.cosine_similarity(student(images), wanted).mean() for student in students])
