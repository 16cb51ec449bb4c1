"""Small face networks, one for each way in which networks are written, and the layers that quantization makes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qface.graph import (
    Add,
    ChannelAffine,
    Concat,
    L2Normalize,
    Maximum,
    Multiply,
    Pad,
    Permute,
    Reshape,
    Slice,
    UpsampleNearest,
)
from qface.preprocessing import Preprocessing, with_preprocessing
from tests.networks import with_statistics

__all__ = ["IDIOMS", "Idiom", "build"]

SIZE = (32, 32)
CHANNELS = 8
Function = Callable[[Tensor], Tensor]

COMMON = Counter({nn.Conv2d: 2, nn.ReLU: 2, nn.AdaptiveAvgPool2d: 1, nn.Flatten: 1, nn.Linear: 1})
"""The layers of :class:`FaceNet` itself."""


class FaceNet(nn.Module):
    """A convolution, ``middle`` on maps [N, 8, 16, 16], a convolution, a linear layer, and ``end`` on rows.

    Args:
        middle: module or function, by default none.
        channels: that ``middle`` makes.
        end: of the embeddings [N, 16], by default none.
    """

    def __init__(self, middle: Function | None = None, channels: int = CHANNELS, end: Function | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.middle = middle or nn.Identity()
        self.conv = nn.Conv2d(channels, 8, 3, 2, 1)
        self.fc = nn.Linear(8, 16)
        self.end = end or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(F.relu(self.norm(self.stem(x))))
        return self.end(self.fc(F.relu(self.conv(x)).mean((2, 3))))


@dataclass(frozen=True)
class Idiom:
    """One way to write a network.

    Args:
        make: the network.
        layers: that its canonical form has beside those of :class:`FaceNet`, with their number.
        floats: the layers and functions among them without integer form.
        common: layers that are not counted.
    """

    make: Callable[[], nn.Module]
    layers: dict[Any, int] = field(default_factory=dict)
    floats: frozenset[Any] = frozenset()
    common: Counter[Any] = field(default_factory=lambda: COMMON)


def build(idiom: Idiom) -> nn.Module:
    """The network of ``idiom`` in eval mode, with repeatable weights and statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return with_preprocessing(with_statistics(idiom.make()).eval(), Preprocessing(size=SIZE))


def conv(inputs: int = CHANNELS, outputs: int = CHANNELS, kernel: int = 3, **settings: Any) -> nn.Conv2d:
    settings = {"padding": kernel // 2} | settings
    return nn.Conv2d(inputs, outputs, kernel, **settings)


class Branch(nn.Module):
    """A convolution, and ``join`` of what it makes with what it reads."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor], outputs: int = CHANNELS) -> None:
        super().__init__()
        self.conv, self.join = conv(outputs=outputs), join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.conv(x), x)


def branch(join: Callable[[Tensor, Tensor], Tensor], outputs: int = CHANNELS) -> Callable[[], nn.Module]:
    return lambda: FaceNet(Branch(join, outputs))


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gamma = conv(), nn.Parameter(torch.linspace(0.1, 1.5, CHANNELS)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * self.conv(x) + x


class SqueezeExcite(nn.Module):
    """With linear layers, and ``view`` before and after them."""

    def __init__(self, gate: Function = torch.sigmoid) -> None:
        super().__init__()
        self.pool, self.gate = nn.AdaptiveAvgPool2d(1), gate
        self.fc = nn.Sequential(nn.Linear(CHANNELS, 4), nn.ReLU(inplace=True), nn.Linear(4, CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        n, c, _, _ = x.size()
        y = self.gate(self.fc(self.pool(x).view(n, c))).view(n, c, 1, 1)
        return x * y.expand_as(x)


class ECA(nn.Module):
    """Channel attention by a convolution over the channels, as ECA-Net writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.conv = nn.AdaptiveAvgPool2d(1), nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.pool(x).squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * torch.sigmoid(y).expand_as(x)


def halves_by_slices(x: Tensor) -> Tensor:
    return torch.cat([x[:, 4:], x[:, :4]], 1)


def halves_by_chunk(x: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=1)
    return torch.cat([right, left], 1)


def halves_by_split(x: Tensor) -> Tensor:
    left, right = torch.split(x, [2, 6], 1)
    return torch.cat([right, left], 1)


def shuffled(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class MaxFeatureMap(nn.Module):
    """As Light CNN writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = conv(outputs=2 * CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.split(self.filter(x), CHANNELS, 1)
        return torch.max(left, right)


class SumOfList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([conv(kernel=1), conv(), conv(kernel=5)])

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, sum([each(x) for each in self.convs]))


class MyBatchNorm(nn.BatchNorm2d):
    pass


class MyConv(nn.Conv2d):
    """One whose weights have mean zero."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class MyLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight))


class StochasticDepth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.dropout = conv(), nn.Dropout2d(0.2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(F.dropout(self.conv(x), 0.3, self.training))
        if self.training:
            kept = torch.rand(len(y), 1, 1, 1, device=y.device) < 0.8
            y = y * kept / 0.8
        return y + x


class PaddedSum(nn.Module):
    """Padding that the convolution cannot have, since a sum reads it too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (1, 1, 1, 1))
        return x + self.conv(x)


class ChannelsLast(nn.Module):
    """As TensorFlow's networks are when they are converted: permutations around each convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(padding=0), conv(2 * CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).permute(0, 3, 1, 2)
        x = self.first(x).permute(0, 2, 3, 1)
        x = F.relu(x) + SLOPES.flatten() * (x - x.abs()) * 0.5
        return self.second(torch.cat([x, x], 3).permute(0, 3, 1, 2))


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.conv(x)
        return F.relu(y.float())


class Half(FaceNet):
    """With weights in half precision."""

    def __init__(self) -> None:
        super().__init__(conv())
        self.half()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.fc.weight.dtype)).float()


class Tokens(nn.Module):
    """Blocks of ``layer`` on the tokens [N, 64, 8] of patches, between maps."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.patches, self.layer = nn.Conv2d(CHANNELS, CHANNELS, 2, 2), layer

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.patches(x).flatten(2).transpose(1, 2))
        return x.transpose(1, 2).reshape(len(x), CHANNELS, 8, 8)


class Attention(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, self.norm = fused, nn.LayerNorm(CHANNELS)
        self.qkv, self.proj = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        n, length, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, length, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q * (c // 2) ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return x + self.proj(y.transpose(1, 2).reshape(n, length, c))


class ViT(nn.Module):
    """A vision transformer of one block: patches, a class token, positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, CHANNELS, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, CHANNELS))
        self.positions = nn.Parameter(torch.randn(1, 17, CHANNELS))
        self.attention, self.norm = Attention(fused=True), nn.LayerNorm(CHANNELS)
        self.mlp = nn.Sequential(nn.Linear(CHANNELS, 16), nn.GELU(), nn.Linear(16, CHANNELS))
        self.fc = nn.Linear(CHANNELS, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        x = self.attention(x)
        return self.fc((x + self.mlp(self.norm(x)))[:, 0])


class ConvNeXtBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.norm = conv(kernel=7, groups=CHANNELS), nn.LayerNorm(CHANNELS, eps=1e-6)
        self.wide, self.narrow = nn.Linear(CHANNELS, 16), nn.Linear(16, CHANNELS)
        self.gamma = nn.Parameter(torch.linspace(0.1, 1, CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = self.gamma * self.narrow(F.gelu(self.wide(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


class Windows(nn.Module):
    """Attention within windows, whose code computes the number of images in Python, as Swin's first code does."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.size, self.attention = size, Attention(fused=True)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        rows, columns = h // self.size, w // self.size
        windows = x.view(n, c, rows, self.size, columns, self.size).permute(0, 2, 4, 3, 5, 1)
        windows = self.attention(windows.reshape(-1, self.size**2, c))
        images = int(windows.shape[0] / (h * w / self.size / self.size))
        x = windows.view(images, rows, columns, self.size, self.size, c)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)


def padded(padding: tuple[int, ...], **settings: Any) -> nn.Module:
    return nn.Sequential(nn.ZeroPad2d(padding), nn.Conv2d(CHANNELS, CHANNELS, 3, **settings))


def after_conv(*layers: nn.Module, outputs: int = CHANNELS, channels: int = CHANNELS) -> Callable[[], nn.Module]:
    return lambda: FaceNet(nn.Sequential(conv(outputs=outputs), *layers), channels)


def of_conv(function: Function, outputs: int = CHANNELS, channels: int = CHANNELS) -> Callable[[], nn.Module]:
    return lambda: FaceNet(Branch(lambda y, _: function(y), outputs), channels)


def ends(end: Function, **settings: Any) -> Idiom:
    return Idiom(lambda: FaceNet(end=end), **settings)


def _float(layer: Any, **layers: int) -> dict[str, Any]:
    return {"layers": {nn.Conv2d: 1, layer: 1}, "floats": frozenset([layer])}


CONV = {nn.Conv2d: 1}
SLOPES = torch.linspace(-0.3, 0.8, CHANNELS)[:, None, None]
HARD_SWISH = {ChannelAffine: 1, nn.Hardtanh: 1, Multiply: 1}
NORMALIZED = {L2Normalize: 1}
GATE = {nn.AdaptiveAvgPool2d: 1, nn.Linear: 2, nn.Flatten: 1, nn.ReLU: 1, Reshape: 1, Multiply: 1}
ATEN = torch.ops.aten
SDPA = ATEN.scaled_dot_product_attention.default
TOKENS = {Reshape: 2, Permute: 2}

IDIOMS: dict[str, Idiom] = {
    # embeddings of length 1
    "x / x.norm()": ends(lambda x: x / x.norm(dim=1, keepdim=True), layers=NORMALIZED),
    "torch.div(x, torch.norm())": ends(lambda x: torch.div(x, torch.norm(x, 2, 1, True)), layers=NORMALIZED),
    "linalg.norm": ends(lambda x: x / torch.linalg.norm(x, dim=-1, keepdim=True), layers=NORMALIZED),
    "F.normalize": ends(lambda x: F.normalize(x, p=2, dim=1), layers=NORMALIZED),
    "norm clamped": ends(lambda x: x / x.norm(p=2, dim=1, keepdim=True).clamp(min=1e-12), layers=NORMALIZED),
    "sqrt of sum of squares": ends(lambda x: x / x.pow(2).sum(1, keepdim=True).sqrt(), layers=NORMALIZED),
    "sqrt of sum of products": ends(
        lambda x: x / torch.sqrt(torch.sum(x * x, dim=1, keepdim=True) + 1e-10), layers=NORMALIZED
    ),
    "x * (1 / norm)": ends(lambda x: x * x.norm(dim=1, keepdim=True).reciprocal(), layers=NORMALIZED),
    "x * sum ** -0.5": ends(lambda x: x * x.pow(2).sum(1, keepdim=True).clamp(min=1e-10).pow(-0.5), layers=NORMALIZED),
    "x * rsqrt": ends(lambda x: x * (x**2).sum(1, keepdim=True).rsqrt(), layers=NORMALIZED),
    # constant factors and shifts
    "f(x) * 0.17 + x": Idiom(branch(lambda y, x: y * 0.17 + x), CONV | {Add: 1}),
    "x + 0.17 * f(x)": Idiom(branch(lambda y, x: torch.add(x, y, alpha=0.17)), CONV | {Add: 1}),
    "gamma * f(x) + x": Idiom(lambda: FaceNet(LayerScale()), CONV | {Add: 1}),
    "(f(x) - 0.5) / 2": Idiom(of_conv(lambda y: (y - 0.5) / 2), CONV),
    "1 - f(x)": Idiom(of_conv(lambda y: 1 - y), CONV),
    # activation functions
    "relu6(x + 3) / 6": Idiom(of_conv(lambda y: F.relu6(y + 3) / 6), CONV | {nn.Hardtanh: 1}),
    "x * relu6(x + 3) / 6": Idiom(of_conv(lambda y: y * F.relu6(y + 3) / 6), CONV | HARD_SWISH),
    "x * (relu6(x + 3) / 6)": Idiom(of_conv(lambda y: y * (F.relu6(y + 3) / 6)), CONV | HARD_SWISH),
    "x * relu6(x + 3) * (1 / 6)": Idiom(of_conv(lambda y: F.relu6(y + 3.0) * y * (1 / 6)), CONV | HARD_SWISH),
    "x * clamp(x + 3, 0, 6) / 6": Idiom(of_conv(lambda y: y * (y + 3).clamp(0, 6) / 6), CONV | HARD_SWISH),
    "x * clamp(x / 6 + 0.5, 0, 1)": Idiom(of_conv(lambda y: y * (y / 6 + 0.5).clamp(0, 1)), CONV | HARD_SWISH),
    "clamp(0.2 x + 0.5, 0, 1)": Idiom(of_conv(lambda y: (0.2 * y + 0.5).clamp(0, 1)), CONV | {nn.Hardtanh: 1}),
    "x * sigmoid(x)": Idiom(of_conv(lambda y: y * y.sigmoid()), CONV | {nn.Sigmoid: 1, Multiply: 1}),
    "clamp(min=0)": Idiom(of_conv(lambda y: y.clamp(min=0)), CONV | {nn.ReLU: 1}),
    "clamp(0, 6)": Idiom(of_conv(lambda y: torch.clamp(y, 0, 6)), CONV | {nn.ReLU6: 1}),
    "clamp(-1, 1)": Idiom(of_conv(lambda y: y.clamp(-1, 1)), CONV | {nn.Hardtanh: 1}),
    "maximum(x, 0)": Idiom(of_conv(lambda y: torch.maximum(y, torch.zeros(1))), CONV | {nn.ReLU: 1}),
    "min(relu(x), 6)": Idiom(of_conv(lambda y: F.relu(y).clamp(max=6)), CONV | {nn.ReLU6: 1}),
    "relu(min(x, 6))": Idiom(of_conv(lambda y: F.relu(y.clamp(max=6))), CONV | {nn.ReLU6: 1}),
    "(x + |x|) / 2": Idiom(of_conv(lambda y: (y + y.abs()) / 2), CONV | {nn.ReLU: 1}),
    "relu(x) + a * (x - |x|) / 2": Idiom(
        of_conv(lambda y: F.relu(y) + SLOPES * (y - y.abs()) * 0.5), CONV | {nn.PReLU: 1}
    ),
    "max(x, 0) + a * min(x, 0)": Idiom(
        of_conv(lambda y: y.clamp(min=0) + SLOPES * y.clamp(max=0)), CONV | {nn.PReLU: 1}
    ),
    "relu(x) - a * relu(-x)": Idiom(of_conv(lambda y: F.relu(y) - SLOPES * F.relu(-y)), CONV | {nn.PReLU: 1}),
    "max(x, 0.1 x)": Idiom(of_conv(lambda y: torch.max(y, 0.1 * y)), CONV | {nn.PReLU: 1}),
    "PReLU of one slope": Idiom(after_conv(nn.PReLU()), CONV | {nn.PReLU: 1}),
    "ELU": Idiom(after_conv(nn.ELU()), **_float(nn.ELU)),
    "Mish": Idiom(after_conv(nn.Mish()), **_float(nn.Mish)),
    "GELU": Idiom(after_conv(nn.GELU()), **_float(nn.GELU)),
    "tanh": Idiom(of_conv(torch.tanh), **_float(nn.Tanh)),
    # attention to channels
    "squeeze and excite by view": Idiom(lambda: FaceNet(SqueezeExcite()), GATE | {nn.Sigmoid: 1}),
    "squeeze and excite, hard": Idiom(
        lambda: FaceNet(SqueezeExcite(lambda y: F.relu6(y + 3) / 6)), GATE | {nn.Hardtanh: 1}
    ),
    "ECA": Idiom(
        lambda: FaceNet(ECA()),
        {nn.AdaptiveAvgPool2d: 1, Reshape: 4, Permute: 2, nn.Conv2d: 1, nn.Sigmoid: 1, Multiply: 1},
    ),
    # parts
    "slices": Idiom(lambda: FaceNet(halves_by_slices), {Slice: 2, Concat: 1}),
    "chunk": Idiom(lambda: FaceNet(halves_by_chunk), {Slice: 2, Concat: 1}),
    "split": Idiom(lambda: FaceNet(halves_by_split), {Slice: 2, Concat: 1}),
    "every second pixel": Idiom(lambda: FaceNet(lambda x: x[:, :, ::2, 1::2]), {Slice: 2}),
    "channel shuffle": Idiom(lambda: FaceNet(shuffled), {Reshape: 2, Permute: 1}),
    "nn.ChannelShuffle": Idiom(lambda: FaceNet(nn.ChannelShuffle(2)), {Reshape: 2, Permute: 1}),
    "max feature map": Idiom(lambda: FaceNet(MaxFeatureMap()), CONV | {Slice: 2, Maximum: 1}),
    "PixelShuffle": Idiom(lambda: FaceNet(nn.PixelShuffle(2), 2), {Reshape: 2, Permute: 1}),
    "space to depth": Idiom(lambda: FaceNet(nn.PixelUnshuffle(2), 32), {Reshape: 2, Permute: 1}),
    # sums
    "sum of a list": Idiom(lambda: FaceNet(SumOfList()), {nn.Conv2d: 3, Add: 2}),
    "ReLU after a sum": Idiom(branch(lambda y, x: F.relu(y + x)), CONV | {Add: 1, nn.ReLU: 1}),
    "ReLU6 after a sum in place": Idiom(branch(lambda y, x: F.relu6(y.add_(x))), CONV | {Add: 1, nn.ReLU6: 1}),
    # padding
    "uneven padding": Idiom(lambda: FaceNet(padded((0, 1, 0, 1), stride=2)), CONV | {Pad: 1}),
    "even padding": Idiom(lambda: FaceNet(padded((1, 1, 1, 1))), CONV),
    "padding of channels": Idiom(
        lambda: FaceNet(Branch(lambda y, x: y + F.pad(x, (0, 0, 0, 0, 1, 3)), 12), 12), CONV | {Pad: 1, Add: 1}
    ),
    "padding that a sum reads too": Idiom(lambda: FaceNet(PaddedSum()), CONV | {Pad: 1, Add: 1}),
    "same padding": Idiom(lambda: FaceNet(conv(padding="same")), CONV),
    "same padding of an even kernel": Idiom(lambda: FaceNet(conv(kernel=4, padding="same")), CONV | {Pad: 1}),
    "reflect padding": Idiom(lambda: FaceNet(conv(padding_mode="reflect")), CONV | {Pad: 1}),
    "nn.ReflectionPad2d": Idiom(lambda: FaceNet(nn.ReflectionPad2d(1)), {Pad: 1}),
    "replicate padding": Idiom(lambda: FaceNet(conv(padding_mode="replicate")), CONV | {Pad: 1}),
    # channels last
    "layers on channels last": Idiom(lambda: FaceNet(ChannelsLast()), {nn.Conv2d: 2, nn.PReLU: 1, Concat: 1}),
    "mean of channels last": Idiom(
        lambda: FaceNet(lambda x: x * x.permute(0, 2, 3, 1).mean((1, 2))[:, :, None, None]),
        {nn.AdaptiveAvgPool2d: 1, nn.Flatten: 1, Reshape: 2, Multiply: 1},
    ),
    # size
    "nearest upsampling": Idiom(lambda: FaceNet(lambda x: F.interpolate(x, scale_factor=2)), {UpsampleNearest: 1}),
    "nn.Upsample": Idiom(lambda: FaceNet(nn.Upsample((32, 48))), {UpsampleNearest: 1}),
    "bilinear resizing": Idiom(
        lambda: FaceNet(lambda x: F.interpolate(x, size=(10, 10), mode="bilinear", align_corners=False)),
        {ATEN.upsample_bilinear2d.vec: 1},
        frozenset([ATEN.upsample_bilinear2d.vec]),
    ),
    "max of a map": Idiom(lambda: FaceNet(lambda x: x * x.amax((2, 3), keepdim=True)), {nn.MaxPool2d: 1, Multiply: 1}),
    # norms and subclasses
    "nn.SyncBatchNorm": Idiom(after_conv(nn.SyncBatchNorm(CHANNELS)), CONV),
    "subclass of BatchNorm2d": Idiom(after_conv(MyBatchNorm(CHANNELS)), CONV),
    "subclass of Conv2d": Idiom(lambda: FaceNet(MyConv(CHANNELS, CHANNELS, 3, padding=1)), CONV),
    "subclass of Linear": Idiom(
        lambda: FaceNet(end=MyLinear(16, 5)), {L2Normalize: 1, nn.Linear: 1}, frozenset([L2Normalize])
    ),
    "BatchNorm before a convolution": Idiom(lambda: FaceNet(nn.BatchNorm2d(CHANNELS)), {ChannelAffine: 1}),
    "GroupNorm": Idiom(after_conv(nn.GroupNorm(2, CHANNELS)), **_float(nn.GroupNorm)),
    "InstanceNorm": Idiom(
        after_conv(nn.InstanceNorm2d(CHANNELS, affine=True)),
        CONV | {"get_attr": 2, ATEN.instance_norm.default: 1},
        frozenset([ATEN.instance_norm.default]),
    ),
    "weight norm": Idiom(lambda: FaceNet(nn.utils.parametrizations.weight_norm(conv())), CONV),
    # training and types
    "dropout and stochastic depth": Idiom(lambda: FaceNet(StochasticDepth()), CONV | {Add: 1}),
    "autocast": Idiom(lambda: FaceNet(Autocast()), CONV | {nn.ReLU: 1}),
    "half precision": Idiom(Half, CONV),
    # tokens
    "linear layer on tokens": Idiom(
        lambda: FaceNet(Tokens(nn.Linear(CHANNELS, CHANNELS))), TOKENS | {nn.Conv2d: 1, nn.Linear: 1, Reshape: 4}
    ),
    "fused attention": Idiom(
        lambda: FaceNet(Tokens(Attention(fused=True))),
        TOKENS | {nn.Conv2d: 1, nn.LayerNorm: 1, nn.Linear: 2, Add: 1, Slice: 3, Reshape: 11, Permute: 4, SDPA: 1},
        frozenset([nn.LayerNorm, SDPA]),
    ),
    "attention by matmul": Idiom(
        lambda: FaceNet(Tokens(Attention(fused=False))),
        TOKENS
        | {nn.Conv2d: 1, nn.LayerNorm: 1, nn.Linear: 2, Add: 1, Slice: 3, Reshape: 11, Permute: 5}
        | {ChannelAffine: 1, ATEN.matmul.default: 2, nn.Softmax: 1},
        frozenset([nn.LayerNorm, nn.Softmax, ATEN.matmul.default]),
    ),
    "vision transformer": Idiom(
        ViT,
        {nn.Conv2d: 1, nn.Linear: 5, nn.LayerNorm: 2, nn.GELU: 1, Add: 2, Concat: 1, Slice: 4, Permute: 3, Reshape: 15}
        | {"get_attr": 2, ATEN.sym_size.int: 1, ATEN.expand.default: 1, ATEN.add.Tensor: 1, SDPA: 1},
        frozenset([ATEN.sym_size.int, ATEN.expand.default, ATEN.add.Tensor, nn.LayerNorm, nn.GELU, SDPA]),
        Counter(),
    ),
    "ConvNeXt block": Idiom(
        lambda: FaceNet(ConvNeXtBlock()),
        {nn.Conv2d: 1, Permute: 2, nn.LayerNorm: 1, nn.Linear: 2, Reshape: 4, nn.GELU: 1, Add: 1},
        frozenset([nn.LayerNorm, nn.GELU]),
    ),
    "Swin's windows": Idiom(
        lambda: FaceNet(Windows()),
        {nn.LayerNorm: 1, nn.Linear: 2, Add: 1, Slice: 3, Permute: 4, Reshape: 13, SDPA: 1},
        frozenset([nn.LayerNorm, SDPA]),
    ),
    "transposed convolution": Idiom(
        lambda: FaceNet(nn.ConvTranspose2d(CHANNELS, CHANNELS, 2, 2)),
        {"get_attr": 2, ATEN.conv_transpose2d.input: 1},
        frozenset([ATEN.conv_transpose2d.input]),
    ),
    # several outputs
    "embedding and norm": Idiom(
        lambda: FaceNet(end=lambda x: (F.normalize(x), x.norm(dim=1, keepdim=True))), NORMALIZED
    ),
    "dict of outputs": Idiom(lambda: FaceNet(end=lambda x: {"norm": x.norm(dim=1), "embedding": x})),
}
