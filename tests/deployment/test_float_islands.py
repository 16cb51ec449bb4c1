"""Float islands: every function that may stay in float can be written, and runs as torch computes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qface
from qface.deployment import export
from qface.graph.aten import FLOAT_FUNCTIONS, operator_name
from qface.preprocessing import Preprocessing, with_preprocessing
from tests.deployment.integers import assert_exact
from tests.deployment.networks import CHANNELS, calibrated, framed
from tests.networks import RANGES_ONLY, random_faces

SIZE = Preprocessing(size=(16, 16))
WEIGHT = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(5))
Function = Callable[[Tensor], Tensor]

# Each of x, float32 [N, 4, 8, 8]; operators of torch are named as ATen names them.
FUNCTIONS: dict[str, Function] = {
    "__and__": lambda x: x * ((x > 0) & (x < 1)),
    "__or__": lambda x: x * ((x < 0) | (x > 1)),
    "abs": torch.abs,
    "add": lambda x: torch.add(x, x.flip(1), alpha=2),
    "addmm": lambda x: torch.addmm(x.flatten(1), x.flatten(1), torch.eye(256), alpha=0.5),
    "amax": lambda x: x.amax(1),
    "amin": lambda x: x.amin(1),
    "arange": lambda x: x[:, :1, 0, 0] + torch.arange(x.shape[0], dtype=torch.float32)[:, None],
    "argmax": lambda x: x + x.argmax(1, keepdim=True),
    "argmin": lambda x: x + x.argmin(1, keepdim=True),
    "atan2": lambda x: torch.atan2(x, x.abs() + 1),
    "avg_pool3d": lambda x: F.avg_pool3d(x[:, None], 2),
    "celu": F.celu,
    "glu": lambda x: F.glu(x, 1),
    "log_sigmoid": F.logsigmoid,
    "log_softmax": lambda x: x.log_softmax(1),
    "logsumexp": lambda x: x.logsumexp(1),
    "new_full": lambda x: x + x.new_full((x.shape[0], 1, 1, 1), 2.0),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "prod": lambda x: x.prod(1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "selu": F.selu,
    "tile": lambda x: x.tile((1, 2, 1, 1)),
    "avg_pool1d": lambda x: F.avg_pool1d(x.flatten(2), 4),
    "baddbmm": lambda x: torch.baddbmm(x.flatten(2), x.flatten(2), x.flatten(2).transpose(1, 2) @ x.flatten(2)),
    "bitwise_and": lambda x: x * torch.bitwise_and(x > 0, x < 1),
    "bitwise_or": lambda x: x * torch.bitwise_or(x < 0, x > 1),
    "bitwise_not": lambda x: x * (~(x > 0)),
    "bmm": lambda x: torch.bmm(x[:, 0], x[:, 1]),
    "cat": lambda x: torch.cat([x, torch.ones(1, 4, 8, 8).expand(x.shape[0], -1, -1, -1)], 1),
    "ceil": torch.ceil,
    "chunk": lambda x: x.transpose(0, 1).chunk(2)[1].transpose(0, 1),
    "clamp": lambda x: torch.clamp(x, x.mean(1, keepdim=True), x.abs()),
    "clamp_max": lambda x: torch.clamp_max(x, x.mean()),
    "clamp_min": lambda x: torch.clamp_min(x, x.mean()),
    "col2im": lambda x: F.fold(F.unfold(x, 2, stride=2), 8, 2, stride=2),
    "conv1d": lambda x: F.conv1d(x.flatten(2), torch.softmax(WEIGHT[..., 0] * x.mean(), 0)),
    "conv2d": lambda x: F.conv2d(x, WEIGHT * x.mean()),
    "conv3d": lambda x: F.conv3d(x[:, None], WEIGHT[:1, :1, None]),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x, WEIGHT, stride=2),
    "constant_pad_nd": lambda x: torch.constant_pad_nd(x, (1, 2, 0, 1), 0.5),
    "cos": torch.cos,
    "cumsum": lambda x: x.cumsum(1),
    "div": lambda x: x / (x.abs() + 1),
    "einsum": lambda x: torch.einsum("nchw,ndhw->ncd", x, x),
    "eq": lambda x: x * (x.round() == 0),
    "erf": torch.erf,
    "exp": torch.exp,
    "expand": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "expand_as": lambda x: x[:, :1].expand_as(x),
    "flip": lambda x: x.flip(3),
    "floor": torch.floor,
    "full": lambda x: x + torch.full((x.shape[0], 1, 1, 1), 2.0),
    "full_like": lambda x: x + torch.full_like(x, 2.0),
    "gather": lambda x: x.gather(1, x.argmax(1, keepdim=True)),
    "ge": lambda x: x * (x >= 0),
    "gelu": F.gelu,
    "gt": lambda x: x * (x > 0),
    "im2col": lambda x: F.unfold(x, 2, stride=2),
    "index": lambda x: x[:, torch.tensor([2, 0])],
    "index_select": lambda x: x.index_select(1, torch.tensor([3, 1])),
    "instance_norm": F.instance_norm,
    "layer_norm": lambda x: F.layer_norm(x, (8, 8)),
    "le": lambda x: x * (x <= 0),
    "linalg_vector_norm": lambda x: torch.linalg.vector_norm(x, dim=1),
    "linear": lambda x: F.linear(x, x[0, 0]),
    "log": lambda x: torch.log(x.abs() + 1),
    "log1p": lambda x: torch.log1p(x.abs()),
    "logical_and": lambda x: x * torch.logical_and(x > 0, x < 1),
    "logical_or": lambda x: x * torch.logical_or(x < 0, x > 1),
    "isnan": lambda x: torch.where(torch.isnan(x), 0.0, x.softmax(1)),
    "logical_not": lambda x: x * torch.logical_not(x > 0),
    "lt": lambda x: x * (x < 0),
    "masked_fill": lambda x: x.masked_fill(x > 0, 1.0),
    "matmul": lambda x: x @ x.transpose(2, 3),
    "max": lambda x: x.max(1).values,
    "mean": lambda x: x.mean(1),
    "min": lambda x: torch.min(x, x.flip(1)),
    "minimum": lambda x: torch.minimum(x, x.flip(1)),
    "mm": lambda x: torch.mm(x.flatten(1)[:, :8], x[0, 0]),
    "mul": lambda x: x * (x > 0),
    "ne": lambda x: x * (x.round() != 0),
    "new_ones": lambda x: x + x.new_ones(x.shape[0], 1, 1, 1),
    "new_zeros": lambda x: x + x.new_zeros(x.shape[0], 1, 1, 1),
    "norm": lambda x: torch.norm(x, 2, 1, keepdim=True),
    "ones": lambda x: x + torch.ones(x.shape[0], 1, 1, 1),
    "ones_like": lambda x: x + torch.ones_like(x),
    "pad": lambda x: F.pad(x, (1, 1), value=2.0),
    "pow": lambda x: x.abs() ** 1.5,
    "prelu": lambda x: F.prelu(x, x.mean((0, 2, 3))),
    "reciprocal": lambda x: torch.reciprocal(x.abs() + 1),
    "remainder": lambda x: torch.remainder(x, 0.7),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "reshape": lambda x: x.transpose(0, 1).reshape(4, x.shape[0] * 64)[:, : x.shape[0] * 64].reshape(4, -1, 64)[0],
    "roll": lambda x: x.roll((1, 2), (2, 3)),
    "round": torch.round,
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 1),
    "rsub": lambda x: torch.rsub(x, x.flip(1)),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "select": lambda x: x.transpose(0, 1).select(0, 1),
    "sigmoid": lambda x: torch.sigmoid(x),
    "sign": torch.sign,
    "sin": torch.sin,
    "slice": lambda x: x.transpose(0, 1)[1:3].transpose(0, 1),
    "softmax": lambda x: x.softmax(1),
    "split": lambda x: x.transpose(0, 1).split(2)[1].transpose(0, 1),
    "sqrt": lambda x: x.abs().sqrt(),
    "square": torch.square,
    "stack": lambda x: torch.stack([x, x.flip(1)], 1),
    "std": lambda x: x.std(1),
    "sub": lambda x: x - x.flip(1),
    "sum": lambda x: x.sum(1),
    "tanh": torch.tanh,
    "to": lambda x: (x > 0).to(torch.float32),
    "unfold": lambda x: x.unfold(2, 3, 2),
    "upsample_bicubic2d": lambda x: F.interpolate(x, (12, 12), mode="bicubic"),
    "upsample_bilinear2d": lambda x: F.interpolate(x, (12, 12), mode="bilinear"),
    "upsample_nearest1d": lambda x: F.interpolate(x.flatten(2), 96),
    "upsample_nearest2d": lambda x: F.interpolate(x, (12, 12)),
    "var": lambda x: x.var(1),
    "where": lambda x: torch.where(x > 0, x, x.square()),
    "zeros": lambda x: x + torch.zeros(x.shape[0], 1, 1, 1),
    "zeros_like": lambda x: x + torch.zeros_like(x),
}


MORE_FUNCTIONS: dict[str, Function] = {
    "quotient rounded down": lambda x: torch.floor_divide(x, 0.3),
    "quotient of maps rounded down": lambda x: torch.div(x, x.abs() + 0.3, rounding_mode="floor"),
    "adaptive pool in one dimension": lambda x: F.adaptive_avg_pool1d(x.flatten(2), 5),
    "adaptive pool with windows that overlap": lambda x: F.adaptive_avg_pool2d(x, (3, 5)),
    "average with a divisor": lambda x: F.avg_pool2d(x, 2, padding=1, divisor_override=3),
    "rms norm": lambda x: F.rms_norm(x, (8,), torch.ones(8)),
}


class Between(nn.Module):
    """``function`` between two convolutions and a linear layer."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        with torch.no_grad():
            features = function(self.stem(torch.zeros(2, 3, 16, 16))).reshape(2, -1).shape[1]
        self.fc = nn.Linear(features, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.function(self.stem(x)).reshape(x.shape[0], -1))


@pytest.mark.parametrize("name", [*FUNCTIONS, *MORE_FUNCTIONS])
def test_a_float_function_goes_the_whole_way(name: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = with_preprocessing(Between((FUNCTIONS | MORE_FUNCTIONS)[name]).eval(), SIZE)
    student = qface.quantize(model, 8)
    qface.calibrate(student, random_faces(8), RANGES_ONLY)
    qface.save(student, tmp_path / "student.safetensors")
    student = qface.load(tmp_path / "student.safetensors")
    agreement = qface.verify(student, export(student, tmp_path / "student.onnx"), random_faces(3, seed=4))
    assert agreement.agrees


class Mixer(nn.Module):
    """Pooling and a sum of normalized values, as in a PoolFormer; the last sum has an integer input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.pool, self.relu = nn.GroupNorm(2, CHANNELS), nn.AvgPool2d(3, 1, 1), nn.ReLU()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return cast(Tensor, self.conv(self.relu(self.pool(normed) + normed)) + x)


def test_layers_without_weights_stay_in_float_where_all_their_inputs_are(tmp_path: Path) -> None:
    model = framed(lambda: nn.Sequential(Mixer(), nn.AvgPool2d(3)))
    layers = qface.inspect(model).layers
    assert {layer.kind for layer in layers if not layer.integer} == {"GroupNorm", "AvgPool2d", "Add", "ReLU"}
    assert [layer.kind for layer in layers if layer.integer].count("AvgPool2d") == 1
    assert [layer.kind for layer in layers if layer.integer].count("Add") == 1
    assert_exact(calibrated(model), tmp_path / "net.onnx")
    qface.save(calibrated(model), tmp_path / "student.safetensors")
    assert_exact(qface.load(tmp_path / "student.safetensors"), tmp_path / "loaded.onnx")


def test_every_float_function_is_tried() -> None:
    untried = FLOAT_FUNCTIONS - FUNCTIONS.keys() - {"sym_size"}
    assert untried == set(), sorted(untried)


@pytest.mark.parametrize("name", sorted(FLOAT_FUNCTIONS))
def test_float_functions_are_operators(name: str) -> None:
    packet = getattr(torch.ops.aten, name)
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    assert any(operator_name(overload) == name for overload in overloads)
