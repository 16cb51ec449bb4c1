"""The canonical form computes what the network computes in eval mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qface.errors import CheckpointError, TraceError, UnsupportedLayerError
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
from qface.graph.canonicalize import canonicalize
from qface.models import IResNet
from qface.preprocessing import Preprocessing, preprocessing_of, with_preprocessing
from qface.provenance import provenance_of, record_step
from tests.graph.kinds import kinds
from tests.networks import foreign_net, tiny_face_net, with_statistics

ATEN = torch.ops.aten
SMALL = Preprocessing(size=(16, 12))


def small(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return with_preprocessing(with_statistics(model).eval(), SMALL)


def images(height: int = 16, width: int = 12) -> Tensor:
    return torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(2))


def check(model: nn.Module, x: Tensor | None = None) -> fx.GraphModule:
    """The canonical form of ``model``, which computes the same."""
    x = images(*preprocessing_of(model).size) if x is None else x
    canonical = canonicalize(model)
    with torch.no_grad():
        expected = model.eval()(x)
        torch.testing.assert_close(canonical.eval()(x), expected, atol=1e-5, rtol=1e-4)
    return canonical


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [tiny_face_net, foreign_net])
def test_a_whole_network(make: Callable[..., nn.Module], training: bool) -> None:
    model = with_preprocessing(make(size=(32, 32)), Preprocessing(size=(32, 32)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train(training)
    canonical = canonicalize(model)
    assert canonical.training == model.training == training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    check(model)
    assert all(isinstance(kind, type) for kind in kinds(canonical))  # layers only
    left = {nn.BatchNorm1d, nn.BatchNorm2d, nn.Dropout}
    assert not left & {type(module) for module in canonical.modules()}


def test_an_iresnet() -> None:
    torch.manual_seed(0)
    canonical = check(with_statistics(IResNet((1, 1, 1, 1), 8)).eval())
    # bn1 of each block and the last bn2 have no convolution of their own in front of them.
    assert kinds(canonical).count(ChannelAffine) == 5


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_norm_behind_a_convolution_is_folded(bias: bool, groups: int) -> None:
    convolution = nn.Conv2d(3, 6, 3, padding=1, groups=groups, bias=bias)
    canonical = check(small(nn.Sequential(convolution, nn.BatchNorm2d(6), nn.Flatten())))
    assert kinds(canonical) == [nn.Conv2d, nn.Flatten]


def test_a_norm_behind_a_linear_layer_is_folded() -> None:
    model = small(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 12, 5), nn.BatchNorm1d(5, affine=False)))
    assert kinds(check(model)) == [nn.Flatten, nn.Linear]


def test_a_channel_of_scale_zero_is_its_shift() -> None:
    model = small(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten()))
    model[1].weight.data[2] = 0
    canonical = check(model)
    assert all(parameter.isfinite().all() for parameter in canonical.parameters())


def test_a_norm_before_a_convolution_becomes_an_affine() -> None:
    model = small(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1), nn.Flatten()))
    assert kinds(check(model)) == [ChannelAffine, nn.Conv2d, nn.Flatten]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.act = nn.PReLU(3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.act(self.norm(self.conv(x)))
        return x.flatten(1)


def test_a_layer_that_is_called_again_gets_copies() -> None:
    canonical = check(small(Twice()))
    targets = [node.target for node in canonical.graph.nodes if node.op == "call_module"]
    assert len(set(targets)) == len(targets) == 3 * 2 + 1
    assert len({id(canonical.get_submodule(target)) for target in targets}) == len(targets)


class ReadBeforeTheNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return (self.norm(x) + x).flatten(1)


def test_a_convolution_that_others_read_too_keeps_its_weights() -> None:
    model = small(ReadBeforeTheNorm())
    canonical = check(model)
    assert kinds(canonical) == [nn.Conv2d, ChannelAffine, Add, nn.Flatten]
    assert torch.equal(canonical.conv.weight, model.conv.weight)


class Function(nn.Module):
    """A function whose result is flattened to an embedding."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x).flatten(1)


POOLED = [nn.AdaptiveAvgPool2d, nn.Flatten]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x + x, [Add]),
        (lambda x: x.add(x), [Add]),
        (lambda x: torch.add(x, x), [Add]),
        (lambda x: x * x, [Multiply]),
        (lambda x: torch.mul(x, other=x), [Multiply]),
        (lambda x: torch.cat([x, x], 1), [Concat]),
        (lambda x: torch.cat((x, x), dim=-3), [Concat]),
        (lambda x: torch.relu(x), [nn.ReLU]),
        (lambda x: x.relu(), [nn.ReLU]),
        (lambda x: F.relu6(x), [nn.ReLU6]),
        (lambda x: F.leaky_relu(x, 0.3), [nn.PReLU]),
        (lambda x: F.leaky_relu(x, negative_slope=0.4), [nn.PReLU]),
        (lambda x: F.hardswish(x), [ChannelAffine, nn.Hardtanh, Multiply]),
        (lambda x: F.hardsigmoid(x), [ChannelAffine, nn.Hardtanh]),
        (lambda x: F.silu(x), [nn.Sigmoid, Multiply]),
        (lambda x: x.sigmoid(), [nn.Sigmoid]),
        (lambda x: torch.sigmoid(x), [nn.Sigmoid]),
        (lambda x: x.flatten(1), [nn.Flatten]),
        (lambda x: torch.flatten(x, start_dim=1), [nn.Flatten]),
        (lambda x: x.view(x.size(0), -1), [nn.Flatten]),
        (lambda x: x.reshape((x.shape[0], 576)), [nn.Flatten]),
        (lambda x: x.mean((2, 3)), POOLED),
        (lambda x: x.mean(dim=[-1, -2]), POOLED),
        (lambda x: torch.mean(x, (2, 3), True), POOLED[:1]),
        (lambda x: x.amax((2, 3)), [nn.MaxPool2d, nn.Flatten]),
        (lambda x: F.adaptive_avg_pool2d(x, (2, 3)), [nn.AvgPool2d]),
        (lambda x: F.adaptive_max_pool2d(x, (2, 3)), [nn.MaxPool2d]),
        (lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(3).squeeze(2), [nn.AdaptiveAvgPool2d, Reshape, nn.Flatten]),
        (lambda x: F.avg_pool2d(x, 2), [nn.AvgPool2d]),
        (lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), [nn.AvgPool2d]),
        (lambda x: F.max_pool2d(x, kernel_size=3, stride=2, padding=1), [nn.MaxPool2d]),
        (lambda x: F.normalize(x.flatten(1)), [nn.Flatten, L2Normalize]),
        (lambda x: F.dropout(F.dropout(x, 0.5, False), p=0.3, training=False), []),
        (lambda x: F.dropout(input=x, training=False) + x, [Add]),
        (lambda x: x.contiguous().float(), []),
        (lambda x: x * 2 + 1, [ChannelAffine]),
        (lambda x: 1 - x / 2, [ChannelAffine]),
        (lambda x: -x, [ChannelAffine]),
        (lambda x: torch.add(x, x, alpha=2), [ChannelAffine, Add]),
        (lambda x: x.relu() - x, [nn.ReLU, ChannelAffine, Add]),
        (lambda x: torch.maximum(x, torch.zeros(1)), [nn.ReLU]),
        (lambda x: torch.minimum(torch.tensor(2.0), x), [nn.Hardtanh]),
        (lambda x: x.mean(1), [ATEN.mean.dim]),
        (lambda x: x.flatten(2), [Reshape]),
        (lambda x: x.permute(0, 2, 3, 1), [Permute]),
        (lambda x: x[:, 1:], [Slice]),
        (lambda x: torch.maximum(x, x + x), [Add, Maximum]),
        (lambda x: F.pad(x, (0, 1, 2, 3)), [Pad]),
        (lambda x: F.interpolate(x, scale_factor=2), [UpsampleNearest]),
        (lambda x: F.softmax(x, 1), [nn.Softmax]),
        (lambda x: x.clamp(min=0), [nn.ReLU]),
        (lambda x: x.clamp(-1, 2), [nn.Hardtanh]),
        (lambda x: F.linear(x, torch.ones(3, 12)), [Reshape, nn.Linear, Reshape]),
        (lambda x: x @ x.transpose(2, 3), [Permute, ATEN.matmul.default]),
        (lambda x: F.conv_transpose2d(x, torch.ones(3, 4, 2, 2)), ["get_attr", ATEN.conv_transpose2d.input]),
    ],
)
def test_a_function_becomes_a_layer(function: Callable[[Tensor], Any], expected: list[Any]) -> None:
    canonical = check(with_preprocessing(Function(function).eval(), SMALL))
    found = kinds(canonical)
    assert found[: len(expected)] == expected
    assert found[len(expected) :] in ([], [nn.Flatten])  # of Function itself


@pytest.mark.parametrize(
    "overwrite",
    [
        nn.ReLU(inplace=True),
        nn.Hardswish(inplace=True),
        lambda x: F.relu(x, inplace=True),
        lambda x: F.relu6(x, True),
        lambda x: x.relu_(),
        lambda x: x.add_(x),
    ],
)
def test_what_is_read_after_it_was_overwritten_is_the_new_value(overwrite: Callable[[Tensor], Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.overwrite = overwrite

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            before = x * 1
            after = self.overwrite(x)
            return torch.cat([before, x, after], 1).flatten(1)

    canonical = check(small(Net()))
    assert not any(getattr(module, "inplace", False) for module in canonical.modules())


def test_what_a_model_carries_is_carried_on() -> None:
    model = record_step(small(Twice()), "made", {"by": "hand"})
    canonical = canonicalize(model)
    assert preprocessing_of(canonical) == SMALL
    assert provenance_of(canonical) == provenance_of(model) != ()


def test_a_network_of_another_size_is_refused() -> None:
    model = with_preprocessing(tiny_face_net(size=(32, 32)), Preprocessing(size=(64, 64)))
    with pytest.raises(TraceError, match="64x64") as caught:
        canonicalize(model)
    assert "\n" not in str(caught.value)


def test_a_batch_norm_without_running_statistics_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten())
    with pytest.raises(UnsupportedLayerError, match="'1' is a BatchNorm without running statistics") as caught:
        canonicalize(with_preprocessing(model.eval(), SMALL))
    assert "\n" not in str(caught.value)


class Parametrized(nn.Module):
    """Two convolutions, of which some are made in one of torch's special ways."""

    def __init__(self, first: nn.Module, second: nn.Module, tied: bool = False) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 4, 1), first, second
        if tied:
            second.weight = first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(F.relu(self.stem(x))))).flatten(1)


def square() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_parametrized_weights_become_plain(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    canonical = check(small(Parametrized(wrap(square()), square())))
    assert kinds(canonical)[0] is nn.Conv2d
    assert all("weight" in canonical.get_submodule(name)._parameters for name in ("first", "second"))


def test_layers_that_share_a_weight_get_their_own() -> None:
    torch.manual_seed(0)
    canonical = check(small(Parametrized(square(), square(), tied=True)))
    first, second = (layer for layer in canonical.modules() if getattr(layer, "kernel_size", None) == (3, 3))
    assert first.weight.data_ptr() != second.weight.data_ptr()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_weights_that_a_hook_computes_become_plain(
    wrap: Callable[[nn.Module], nn.Module], with_gradients: bool
) -> None:
    model = small(Parametrized(wrap(square()), square()))
    with torch.set_grad_enabled(with_gradients):
        model(images())
    assert kinds(check(model)) == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.Conv2d, nn.Flatten]


class Shuffled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.last(x).flatten(1)


def test_a_view_that_needed_contiguous_memory_still_works() -> None:
    check(small(Shuffled()))


class Shortcut(nn.Module):
    """An identity beside an activation in place, which overwrites what the identity gave too."""

    def __init__(self, alias: nn.Module) -> None:
        super().__init__()
        self.first, self.conv, self.alias, self.relu = square_of(3), square_of(3), alias, nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        shortcut = self.alias(x)
        return (self.conv(self.relu(x)) + shortcut).flatten(1)


def square_of(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1)


@pytest.mark.parametrize("alias", [nn.Identity(), nn.Dropout(0.5)])
def test_an_alias_is_overwritten_too(alias: nn.Module) -> None:
    check(small(Shortcut(alias)))


class Kept(nn.Module):
    """``+=`` on a tensor that has another name."""

    def __init__(self, another: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.another = square_of(3), another

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        keep = self.another(z)
        z += torch.ones_like(x)
        return (z * keep.view_as(z)).flatten(1)


def test_a_sum_in_place_changes_the_value_under_its_other_name() -> None:
    check(small(Kept(lambda z: z)))


def test_a_sum_in_place_that_changes_a_view_is_right_or_refused() -> None:
    with pytest.raises(TraceError, match="in-place operation"):
        canonicalize(small(Kept(lambda z: z.flatten(1))))


def test_an_average_pool_may_have_its_own_divisor() -> None:
    model = small(Function(lambda x: F.avg_pool2d(x, 2, divisor_override=1)))
    assert kinds(check(model)) == [nn.AvgPool2d, ChannelAffine, nn.Flatten]


def test_parts_may_be_joined_in_another_order() -> None:
    check(small(Function(lambda x: torch.cat(x.chunk(3, 1)[::-1], 1))))


class Pooled(nn.Module):
    """Its pool is as large as its map, whatever that is."""

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.pool, self.fc = nn.Conv2d(3, 4, 3, stride=2), pool, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(self.body(x)), 1))


@pytest.mark.parametrize(
    ("pool", "layer"),
    [
        (lambda x: F.avg_pool2d(x, x.size()[2:]), nn.AvgPool2d),
        (lambda x: F.avg_pool2d(x, x.shape[-2:]), nn.AvgPool2d),
        (lambda x: F.avg_pool2d(x, kernel_size=(x.size(2), x.size(3))), nn.AvgPool2d),
        (lambda x: F.max_pool2d(x, x.size()[2:]), nn.MaxPool2d),
        (lambda x: F.adaptive_avg_pool2d(x, (x.shape[2] // 7, x.shape[3] // 5)), nn.AdaptiveAvgPool2d),
        (lambda x: F.avg_pool2d(x, (x.size(2) // 2, x.size(3)))[:, :, :1], nn.AvgPool2d),
    ],
)
def test_a_pool_whose_window_is_computed(pool: Callable[[Tensor], Tensor], layer: type) -> None:
    found = kinds(check(small(Pooled(pool))))
    assert [kind for kind in found if kind is not Slice] == [nn.Conv2d, layer, nn.Flatten, nn.Linear]


class Tokens(nn.Module):
    """Parts of a map, which a linear layer and a norm take one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.linear = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(12, 6)
        self.norm, self.fc = nn.BatchNorm1d(8), nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.linear(self.body(x).flatten(2))).flatten(1))


def test_a_norm_is_folded_into_a_linear_layer_along_its_outputs_only() -> None:
    assert ChannelAffine in kinds(check(small(Tokens())))


def test_weights_that_are_no_numbers_are_refused() -> None:
    model = small(Tokens())
    with torch.no_grad():
        model.body.weight[0] = torch.nan
    with pytest.raises(
        CheckpointError, match=r"this network: 1 of \d+ tensors have NaN or infinity \(first: body.weight\)"
    ):
        canonicalize(model)


class WithOptions(nn.Module):
    """Reads images, and says more if asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        return_features: bool = False,
        mode: str = "mean",
        unused: int = 3,
    ) -> Tensor:
        features = self.body(x)
        if return_features or mode != "mean":
            return features
        return self.fc((features if mask is None else features * mask).mean((2, 3)))


def test_options_keep_their_defaults() -> None:
    canonical = check(small(WithOptions()))
    assert kinds(canonical) == [nn.Conv2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]
    assert sum(node.op == "placeholder" for node in canonical.graph.nodes) == 1


class FlatTokens(nn.Module):
    """A BatchNorm of tokens that are laid in one row each, as LeViT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.fc = nn.Linear(12, 6), nn.BatchNorm1d(6), nn.Linear(6 * 48, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.linear(x.flatten(1).reshape(len(x), 48, 12))
        return self.fc(self.norm(tokens.flatten(0, 1)).reshape_as(tokens).flatten(1))


def test_a_norm_is_folded_into_a_linear_layer_before_a_reshape() -> None:
    assert ChannelAffine not in kinds(check(small(FlatTokens())))


def test_a_factor_is_folded_into_a_convolution_before_a_flatten() -> None:
    model = small(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), Function(lambda x: 0.5 * x - 1)))
    assert kinds(check(model)) == [nn.Conv2d, nn.Flatten]


def test_a_norm_of_flattened_maps_is_not_folded() -> None:
    model = small(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.BatchNorm1d(4 * 14 * 10)))
    assert kinds(check(model)) == [nn.Conv2d, nn.Flatten, ChannelAffine]


class Amplifying(nn.Module):
    """Subtracts most of what a convolution makes, so that the rounding of its weights counts a thousand times."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        self.right.load_state_dict(self.left.state_dict())
        self.right.weight.data *= 1 + 1e-4

    def forward(self, x: Tensor) -> Tensor:
        left, right = (norm(each(x)) for norm, each in zip(self.norms, (self.left, self.right), strict=True))
        return (left - right).flatten(1)


def test_a_network_that_amplifies_rounding_is_no_other_network() -> None:
    torch.manual_seed(0)
    model = Amplifying()
    with_statistics(model)
    model.norms[1].load_state_dict(model.norms[0].state_dict())
    canonicalize(with_preprocessing(model.eval(), SMALL))
