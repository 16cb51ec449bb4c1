"""``prune``: which channels go, what is left, and what the smaller network is good for."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qface
from qface.errors import ConfigError, ImagesError, UnsupportedLayerError
from qface.models import MobileFaceNet, iresnet
from qface.preprocessing import Preprocessing, preprocessing_of, with_preprocessing
from qface.provenance import provenance_of
from qface.pruning import Budget, PruningConfig, cost_of, prune
from tests.networks import foreign_net, random_faces, tiny_face_net, with_statistics

SMALL = Preprocessing(size=(32, 32))


def tiny() -> nn.Module:
    return with_preprocessing(tiny_face_net(size=SMALL.size), SMALL)


def channels(model: nn.Module) -> dict[str, int]:
    return {
        name: layer.weight.shape[0]
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    }


def embeds(model: nn.Module) -> torch.Size:
    with torch.no_grad():
        return model.eval()(torch.zeros(2, 3, *preprocessing_of(model).size)).shape


# The paper's networks


@pytest.mark.parametrize(("depth", "parameters", "paper_mb"), [(18, 15_323_708, 61.39), (50, 27_766_968, 111.32)])
def test_the_papers_counts(depth: int, parameters: int, paper_mb: float) -> None:
    network = with_preprocessing(iresnet(depth).eval(), Preprocessing())
    cut = prune(network, 0.2, config=PruningConfig(keep_embedding=False))
    assert cost_of(cut).parameters == parameters
    assert cost_of(cut).mb == pytest.approx(paper_mb, rel=0.003)
    assert [layer.out_channels for layer in (cut.conv1, cut.layer2[0].conv1)] == [51, 102]
    assert [layer.out_channels for layer in (cut.layer3[0].conv1, cut.layer4[0].conv1)] == [204, 409]


def test_the_papers_counts_with_the_embedding_kept() -> None:
    pruned = prune(with_preprocessing(iresnet(18).eval(), Preprocessing()), 0.2)
    assert cost_of(pruned).parameters == 17_388_240
    assert [layer.out_channels for layer in (pruned.conv1, pruned.layer2[0].conv1)] == [51, 102]
    assert [layer.out_channels for layer in (pruned.layer3[0].conv1, pruned.layer4[0].conv1)] == [204, 409]


# What is pruned


@pytest.mark.parametrize("make", [tiny, lambda: with_preprocessing(foreign_net(size=SMALL.size), SMALL)])
def test_a_pruned_network_is_smaller_and_its_original_untouched(make) -> None:
    original = make()
    before = copy.deepcopy(original.state_dict())
    pruned = prune(original, 0.5)
    assert type(pruned) is type(original)
    assert cost_of(pruned).parameters < cost_of(original).parameters
    assert cost_of(pruned).macs < cost_of(original).macs
    assert embeds(pruned) == embeds(original)
    assert preprocessing_of(pruned) == SMALL
    assert [step["step"] for step in provenance_of(pruned)] == ["prune"]
    assert original.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    assert all(parameter.grad is None for model in (original, pruned) for parameter in model.parameters())


def test_what_trained_before_trains_afterwards() -> None:
    original = tiny()
    original.features.weight.requires_grad = False
    frozen = [name for name, parameter in prune(original, 0.5).named_parameters() if not parameter.requires_grad]
    assert frozen == ["features.weight"]


@pytest.mark.parametrize("norm", [1, 2])
def test_the_weakest_channels_go(norm: int) -> None:
    original = tiny()
    with torch.no_grad():
        for name, parameter in original.block1.named_parameters():
            if parameter.ndim and name.split(".")[0] in ("conv1", "bn2"):
                parameter[[1, 4]] *= 1e-3
        original.block1.conv2.weight[:, [1, 4]] *= 1e-3
    pruned = prune(original, 0.25, config=PruningConfig(norm=norm))
    kept = [0, 2, 3, 5, 6, 7]
    assert torch.equal(pruned.block1.bn2.running_mean, original.block1.bn2.running_mean[kept])
    assert torch.equal(pruned.block1.prelu.weight, original.block1.prelu.weight[kept])


def test_named_layers_and_the_embedding_stay() -> None:
    original = tiny()
    pruned = prune(original, 0.5, config=PruningConfig(ignored_layers=("block1.conv1",)))
    assert channels(pruned)["block1.conv1"] == 8
    assert channels(pruned)["block2.conv1"] == 4
    assert embeds(pruned) == (2, 16)
    assert embeds(prune(original, 0.5, config=PruningConfig(keep_embedding=False))) == (2, 8)


def test_widths_are_multiples_of_round_to() -> None:
    torch.manual_seed(0)
    network = with_preprocessing(with_statistics(MobileFaceNet(16, SMALL.size)).eval(), SMALL)
    pruned = prune(network, 0.2, config=PruningConfig(round_to=8))
    layers = [layer for layer in pruned.modules() if isinstance(layer, nn.Conv2d)]
    assert all(layer.out_channels % 8 == 0 for layer in layers)
    assert all(layer.groups in (1, layer.out_channels) for layer in layers)
    assert embeds(pruned) == (2, 16)


def test_global_pruning_takes_more_where_weak_channels_are() -> None:
    original = tiny()
    with torch.no_grad():
        original.block1.conv1.weight[:4] *= 1e-3
        original.block1.bn2.weight[:4] *= 1e-3
        original.block1.conv2.weight[:, :4] *= 1e-3
    layers = channels(prune(original, 0.2, config=PruningConfig(global_pruning=True, max_pruning_ratio=0.6)))
    assert layers["block1.conv1"] == 4
    assert layers["block2.conv1"] > 6


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "hessian", "fpgm", "bn_scale"])
def test_every_importance_prunes_the_same_share(importance) -> None:
    config = PruningConfig(importance=importance, num_images=4, repair=False)
    pruned = prune(tiny(), 0.25, random_faces(4), config)
    assert channels(pruned) == channels(prune(tiny(), 0.25))


@pytest.mark.parametrize("importance", ["taylor", "hessian"])
def test_channels_that_reach_nothing_go_first_by_gradients(importance) -> None:
    original = tiny()
    with torch.no_grad():
        original.block1.conv1.weight[[2, 5]] *= 100  # large, and unused
        original.block1.conv2.weight[:, [2, 5]] = 0
    pruned = prune(original, 0.25, random_faces(4), PruningConfig(importance=importance, repair=False))
    kept = [0, 1, 3, 4, 6, 7]
    assert torch.equal(pruned.block1.prelu.weight, original.block1.prelu.weight[kept])


# Budgets and steps


@pytest.mark.parametrize(("unit", "part"), [("parameters", 0.5), ("macs", 0.6), ("mb", 0.7)])
def test_a_budget_is_met_and_hardly_undercut(unit, part: float) -> None:
    torch.manual_seed(0)
    network = with_preprocessing(MobileFaceNet(16, SMALL.size).eval(), SMALL)
    limit = part * getattr(cost_of(network), unit)
    cost = getattr(cost_of(prune(network, Budget(limit, unit))), unit)
    assert 0.97 * limit < cost <= limit


def test_gradients_are_measured_once_for_all_shares_that_a_budget_tries() -> None:
    def images_seen(ratio: float | Budget) -> int:
        network, seen = tiny(), list[Tensor]()
        network.conv.register_forward_hook(
            lambda layer, inputs, output: seen.append(inputs[0])
        )  # also while it is captured
        prune(network, ratio, faces, PruningConfig("hessian", repair=False))
        real = [part for part in seen if type(part) is Tensor]  # others while the network is captured
        return sum(bool((part == face).all()) for part in real for face in normalized)

    faces = random_faces(4)
    normalized = preprocessing_of(tiny())(faces).split(1)
    assert images_seen(0.2) == 4
    assert images_seen(Budget(0.8 * cost_of(tiny()).parameters, "parameters")) == 8


def test_steps_remove_what_one_step_does_and_may_train_between() -> None:
    seen: list[tuple[int, int]] = []
    config = PruningConfig(iterative_steps=2)
    pruned = prune(
        tiny(), 0.5, config=config, on_step_end=lambda model, step: seen.append((step, channels(model)["conv"]))
    )
    assert seen == [(1, 6)]
    assert channels(pruned) == channels(prune(tiny(), 0.5))


@pytest.mark.parametrize(
    ("make", "ratio", "fields"),
    [
        (lambda: MobileFaceNet(16, SMALL.size), 0.2, {"round_to": 16, "iterative_steps": 3}),
        (lambda: MobileFaceNet(16, SMALL.size), 0.2, {"iterative_steps": 10}),
        (lambda: tiny_face_net(size=SMALL.size), 0.5, {"iterative_steps": 40}),  # more than there are channels
    ],
)
def test_many_steps_end_with_the_widths_of_one(make: Callable[[], nn.Module], ratio: float, fields) -> None:
    network = with_preprocessing(make().eval(), SMALL)
    config = PruningConfig(**fields)
    assert channels(prune(network, ratio, config=config)) == channels(
        prune(network, ratio, config=replace(config, iterative_steps=1))
    )


@pytest.mark.parametrize("part", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("global_pruning", [False, True])
def test_a_budget_is_met_whatever_happens_between_steps(part: float, global_pruning) -> None:
    def shuffle(model: nn.Module, step: int) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(torch.rand_like(parameter) + 0.5)

    torch.manual_seed(0)
    limit = int(part * cost_of(tiny()).parameters)
    config = PruningConfig(global_pruning=global_pruning, iterative_steps=3)
    pruned = prune(tiny(), Budget(limit, "parameters"), random_faces(4), config, on_step_end=shuffle)
    assert 0.6 * limit < cost_of(pruned).parameters <= limit


class Narrowing(nn.Module):
    """Its middle is wider than what is before and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 64, 3), nn.Conv2d(64, 16, 3)
        self.fc = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.middle(self.first(x).relu()).relu())
        return self.fc(x.mean((2, 3)))


def test_great_shares_leave_a_channel_of_each_layer() -> None:
    network = with_preprocessing(Narrowing().eval(), SMALL)
    before = cost_of(network).parameters
    for ratio in (0.9, 0.93, 0.95, 0.9999):
        pruned = prune(network, ratio)
        assert cost_of(pruned).parameters <= before
        before = cost_of(pruned).parameters
    assert channels(pruned) == {"first": 1, "middle": 1, "last": 1, "fc": 8}
    rounded = prune(network, 0.95, config=PruningConfig(round_to=4))
    assert channels(rounded) == {"first": 4, "middle": 4, "last": 4, "fc": 8}
    with pytest.raises(ConfigError, match=f"below {before:g} parameters"):
        prune(network, Budget(before - 1, "parameters"))


class Grouped(nn.Module):
    """Groups of channels, shuffled or not, and an embedding that a grouped convolution makes."""

    def __init__(self, shuffled: bool = False) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, groups=4)
        self.shuffle = nn.ChannelShuffle(4) if shuffled else nn.Identity()
        self.second, self.embedding = nn.Conv2d(32, 32, 3, groups=4), nn.Conv2d(32, 16, 1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shuffle(self.first(self.stem(x).relu()).relu())
        return self.embedding(self.second(x).relu()).mean((2, 3))


@pytest.mark.parametrize("shuffled", [False, True])
def test_grouped_convolutions_are_pruned_and_their_embedding_stays(shuffled: bool) -> None:
    torch.manual_seed(0)
    network = with_preprocessing(Grouped(shuffled).eval(), SMALL)
    with torch.no_grad():  # a channel of each group that says nothing
        for layer in (network.stem, network.first, network.second):
            layer.weight[::8] = 0
            layer.bias[::8] = 0
    x = torch.randn(2, 3, 32, 32)
    pruned = prune(network, 0.125)
    assert channels(pruned)["second"] < 32
    with torch.no_grad():
        torch.testing.assert_close(pruned(x), network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_networks_in_other_types_are_pruned_and_repaired(dtype: torch.dtype) -> None:
    pruned = prune(tiny().to(dtype), 0.3, random_faces(8))
    assert {parameter.dtype for parameter in pruned.parameters()} == {dtype}
    assert channels(pruned) == channels(prune(tiny(), 0.3))


def test_it_prunes_where_no_gradients_are_wanted() -> None:
    with torch.no_grad():
        assert channels(prune(tiny(), 0.3)) == channels(prune(tiny(), 0.3))


# With everything else


def test_a_pruned_network_is_saved_with_its_shape_and_loads_in_another_process(tmp_path: Path) -> None:
    pruned = prune(tiny(), 0.5)
    qface.save(pruned, tmp_path / "pruned.safetensors")
    images = torch.randn(2, 3, *SMALL.size, generator=torch.Generator().manual_seed(0))
    torch.save(images, tmp_path / "images.pt")
    script = (
        "import sys, torch, qface; folder = sys.argv[1]\n"
        "model = qface.load(folder + '/pruned.safetensors')\n"
        "torch.save(model(torch.load(folder + '/images.pt')).detach(), folder + '/embeddings.pt')"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "embeddings.pt"), pruned(images))


def test_prune_distill_quantize_distill_export(tmp_path: Path) -> None:
    teacher, faces = tiny(), random_faces(16)
    training = qface.DistillConfig(
        epochs=1, batch_size=8, optimizer=qface.OptimizerConfig(learning_rate=1e-3), device="cpu"
    )
    pruned = prune(teacher, 0.5, faces, PruningConfig(round_to=4))
    qface.distill(pruned, teacher, faces, training, progress=False)
    student = qface.calibrate(qface.quantize(pruned, 6), faces)
    qface.distill(student, teacher, faces, training, progress=False)
    qface.export(student, tmp_path / "net.onnx")
    assert qface.verify(student, tmp_path / "net.onnx", faces).agrees
    steps = [step["step"] for step in provenance_of(student)]
    assert steps == ["prune", "distill", "quantize", "calibrate", "distill"]


# Refusals


def test_what_cannot_be_pruned_is_told_why() -> None:
    with pytest.raises(ConfigError, match="prune the float network"):
        prune(qface.quantize(tiny()), 0.2)
    for ratio in (0.0, 1.0, -0.1, 2):
        with pytest.raises(ConfigError, match="ratio must be > 0 and < 1"):
            prune(tiny(), ratio)
    with pytest.raises(ConfigError, match=r"'nothing'.*conv"):
        prune(tiny(), 0.2, config=PruningConfig(ignored_layers=("nothing",)))
    with pytest.raises(ImagesError, match="taylor"):
        prune(tiny(), 0.2, config=PruningConfig(importance="taylor"))
    with pytest.raises(ConfigError, match="already meets the budget"):
        prune(tiny(), Budget(1e9, "parameters"))
    with pytest.raises(ConfigError, match="increase the budget"):
        prune(tiny(), Budget(1, "parameters"))


@pytest.mark.parametrize(
    "fields",
    [
        {"importance": "luck"},
        {"global_pruning": "world"},
        {"norm": 3},
        {"max_pruning_ratio": 1.0},
        {"round_to": 0},
        {"iterative_steps": 0},
        {"seed": -1},
        {"seed": 2**64},
        {"num_images": 0},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(fields) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        replace(PruningConfig(), **fields)


@pytest.mark.parametrize(("limit", "unit"), [(0, "macs"), (-1, "mb"), (1, "acres")])
def test_impossible_budgets_are_refused(limit: float, unit) -> None:
    with pytest.raises(ConfigError, match="limit" if limit <= 0 else "unit"):
        Budget(limit, unit)


class Shuffled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.second, self.fc = nn.Conv2d(8, 8, 3, stride=2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(torch.relu(self.second(x)).mean((2, 3)))


def test_channels_that_are_shuffled_stay() -> None:
    torch.manual_seed(0)
    network = with_preprocessing(Shuffled().eval(), SMALL)
    pruned = prune(network, 0.5)
    assert (pruned.first.out_channels, pruned.second.out_channels) == (8, 4)


@pytest.mark.parametrize("importance", ["taylor", "hessian"])
def test_a_frozen_network_is_pruned_by_gradients_too(importance) -> None:
    network = tiny()
    network.requires_grad_(False)
    pruned = prune(network, 0.3, random_faces(4), PruningConfig(importance, repair=False))
    assert cost_of(pruned).parameters < cost_of(network).parameters
    assert not any(parameter.requires_grad for parameter in pruned.parameters())


def test_a_share_that_removes_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no channel was removed"):
        prune(tiny(), 0.2, config=PruningConfig(round_to=64))


@pytest.mark.parametrize("ratio", ["0.2", None])
def test_other_shares_are_refused(ratio) -> None:
    with pytest.raises(ConfigError, match="ratio must be > 0 and < 1"):
        prune(tiny(), ratio)


class BeforeDepthwise(nn.Module):
    """Convolutions with PReLUs of one slope before a depthwise one, whose 2x2 outputs are flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.prelu = nn.PReLU()
        self.second = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.other = nn.PReLU()
        self.depthwise = nn.Conv2d(16, 16, 7, stride=7, groups=16, bias=False)
        self.linear = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.other(self.second(self.prelu(self.first(x))))
        return self.linear(self.depthwise(x).flatten(1))


@pytest.mark.parametrize("global_pruning", [False, True])
def test_convolutions_before_a_flattened_depthwise_layer_and_slopes_for_all_channels(global_pruning: bool) -> None:
    torch.manual_seed(0)
    model = with_preprocessing(BeforeDepthwise().eval(), Preprocessing(size=(28, 28)))
    images = random_faces(8)
    pruned = prune(model, 0.5, images, config=PruningConfig(global_pruning=global_pruning))
    assert pruned.second.out_channels == pruned.depthwise.groups < 16
    assert pruned.linear.in_features == 4 * pruned.second.out_channels
    x = Preprocessing(size=(28, 28))(images)
    with torch.no_grad():
        assert torch.cosine_similarity(pruned(x), model(x)).min() > 0.9


def test_one_slope_behind_layers_of_two_widths_is_named() -> None:
    model = with_preprocessing(BeforeDepthwise().eval(), Preprocessing(size=(28, 28)))
    model.other = model.prelu
    with pytest.raises(UnsupportedLayerError, match="the PReLU 'prelu' is called on 8 and 16 channels"):
        prune(model, 0.5)
