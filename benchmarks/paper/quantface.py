"""Quantization and training of QuantFace, as a baseline.

Boutros, Damer, Kuijper: QuantFace, ICPR 2022. As in its published code: weights are asymmetric per output channel, with
a range from the current weights at each step; activations after PReLUs and residual sums have a running min/max range,
which is frozen after 299 steps; slopes have as many bits as activations. Training minimizes the MSE of normalized
embeddings with SGD and Nesterov momentum, learning rate 0.1 / 512 per image and gradient norm clipped to 5. BatchNorm
stays float. There is no integer file: weights have zero points per channel, which onnxruntime's integer convolutions do
not support, so students run in torch. Two differences: weight decay applies to weights only (not biases, norms,
slopes), and dropout is off.

Layers of IResNet and MobileFaceNet have the names of QuantFace's files, so that :func:`load_published` finds them.
"""

from __future__ import annotations

import copy
import operator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import qface
from qface.errors import CheckpointError
from qface.graph import Add
from qface.models.iresnet import IResNetBlock
from qface.models.mobilefacenet import Bottleneck
from qface.pickles import read_pickled_module
from qface.preprocessing import preprocessing_of, with_preprocessing

STEPS_OF_RANGES = 299
BATCH_SIZE = 64  # Ef-QuantFace's comparison; QuantFace itself uses 128
RATE_OF_AN_IMAGE = 0.1 / 512
_NOT_READ = ("beta", "beta_t")  # unused buffers of QuantFace's quantizers

TRAINING = qface.DistillConfig(
    batch_size=BATCH_SIZE,
    losses=qface.LossConfig(ekd_weight=0.0, embedding_loss="mse", feature_loss_weight=0.0),
    optimizer=qface.OptimizerConfig(
        "sgd",
        learning_rate=RATE_OF_AN_IMAGE * BATCH_SIZE,
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
        max_gradient_norm=5.0,
    ),
    schedule=qface.ScheduleConfig("constant", warmup_steps=0),
    bn_statistics_steps=None,
)


def fake_quantize(x: Tensor, bits: int, low: Tensor, high: Tensor) -> Tensor:
    """Fake-quantize ``x`` to 2^bits values between ``low`` and ``high``, with a straight-through gradient."""
    steps = 2**bits - 1
    step = (high - low).clamp(min=1e-8) / steps
    zero = (low / step).round()
    rounded = ((x / step).round() - zero).clamp(0, steps)
    return x + ((rounded + zero) * step - x).detach()


class RangeQuantizer(nn.Module):
    """Fake quantization of activations with a running min/max range."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("x_min", torch.zeros(1))
        self.register_buffer("x_max", torch.zeros(1))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x``."""
        if self.training and self.steps < STEPS_OF_RANGES:
            self.steps += 1
            self.x_min.copy_(torch.minimum(self.x_min, x.detach().min()))
            self.x_max.copy_(torch.maximum(self.x_max, x.detach().max()))
        return fake_quantize(x, self.bits, self.x_min, self.x_max)


class RangeConv2d(nn.Conv2d):
    """Convolution with weights fake-quantized to the min/max range of each output channel."""

    bits: int

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x``."""
        return self._conv_forward(x, rounded_rows(self.weight, self.bits), self.bias)


class RangeLinear(nn.Linear):
    """Linear layer with weights fake-quantized to the min/max range of each output channel."""

    bits: int

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x``."""
        return F.linear(x, rounded_rows(self.weight, self.bits), self.bias)


def rounded_rows(weight: Tensor, bits: int) -> Tensor:
    """Fake-quantize ``weight`` to the min/max range of each row."""
    rows = weight.detach().flatten(1)
    shape = (-1,) + (1,) * (weight.ndim - 1)
    return fake_quantize(weight, bits, rows.amin(1).view(shape), rows.amax(1).view(shape))


class RangePReLU(nn.PReLU):
    """PReLU with fake-quantized slopes and output."""

    def __init__(self, channels: int, bits: int) -> None:
        super().__init__(channels)
        self.quantAct = RangeQuantizer(bits)

    def forward(self, x: Tensor) -> Tensor:
        """Apply PReLU to ``x`` and fake-quantize the result."""
        slopes = self.weight.detach()
        rounded = fake_quantize(self.weight, self.quantAct.bits, slopes.min(), slopes.max())
        return self.quantAct(F.prelu(x, rounded))


def student_of(teacher: nn.Module, weight_bits: int, activation_bits: int) -> nn.Module:
    """Return a copy of ``teacher`` with QuantFace's fake quantization."""
    student = _rounding(copy.deepcopy(teacher), weight_bits, activation_bits)
    if isinstance(student, fx.GraphModule):
        _round_sums(student, activation_bits)
    return with_preprocessing(student, preprocessing_of(teacher)).train(teacher.training)


def _rounding(module: nn.Module, weight_bits: int, activation_bits: int) -> nn.Module:
    if isinstance(module, nn.Conv2d | nn.Linear):
        module.__class__ = RangeConv2d if isinstance(module, nn.Conv2d) else RangeLinear
        module.bits = weight_bits  # type: ignore[assignment]
        return module
    if isinstance(module, nn.PReLU):
        rounded = RangePReLU(module.num_parameters, activation_bits)
        rounded.weight = module.weight
        return rounded
    for name, child in list(module.named_children()):
        changed = _rounding(child, weight_bits, activation_bits)
        if _ends_in_sum(child):
            changed = nn.Sequential(changed, RangeQuantizer(activation_bits))
        setattr(module, name, changed)
    return module


def _ends_in_sum(module: nn.Module) -> bool:
    return isinstance(module, IResNetBlock) or (isinstance(module, Bottleneck) and module._residual)


def _round_sums(student: fx.GraphModule, bits: int) -> None:
    """Insert quantizers after residual sums of a network without known blocks."""
    graph = student.graph
    for node in [node for node in graph.nodes if _is_sum(node, student)]:
        name = f"{node.name}_quantAct"
        student.add_submodule(name, RangeQuantizer(bits))
        with graph.inserting_after(node):
            rounded = graph.call_module(name, (node,))
        node.replace_all_uses_with(rounded, delete_user_cb=lambda user, kept=rounded: user is not kept)
    student.recompile()


def _is_sum(node: fx.Node, network: fx.GraphModule) -> bool:
    if node.op == "call_module":
        return isinstance(network.get_submodule(str(node.target)), Add)
    return node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add)


def load_published(path: Path, model: nn.Module, weight_bits: int, activation_bits: int) -> nn.Module:
    """Return a student with weights and ranges from a published QuantFace file, a pickled module.

    Args:
        path: the file.
        model: the network, with any weights.
        weight_bits: bits of weights that the file was trained with.
        activation_bits: bits of activations that the file was trained with.

    Raises:
        CheckpointError: the file belongs to another network.
    """
    student = student_of(model, weight_bits, activation_bits)
    own, tensors = student.state_dict(), read_pickled_module(path)
    differing = [name for name in own if name not in tensors and not name.endswith(".steps")]
    differing += [name for name in tensors if name not in own and name.rpartition(".")[2] not in _NOT_READ]
    differing += [name for name in own if name in tensors and tensors[name].shape != own[name].shape]
    if differing:
        raise CheckpointError(
            f"{path} differs in {len(differing)} tensors (first: {differing[0]}); pass the network that it belongs to"
        )
    student.load_state_dict({name: tensors.get(name, value) for name, value in own.items()})
    return student.eval()
