import pytest
import torch

from qface.models import IResNet, MobileFaceNet, iresnet

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}


def norm(name: str) -> set[str]:
    return {f"{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}


def names_of_arcface_torch(blocks: tuple[int, ...]) -> set[str]:
    """The keys of InsightFace's published checkpoints."""
    names = {"conv1.weight", "prelu.weight", "fc.weight", "fc.bias"} | norm("bn1") | norm("bn2") | norm("features")
    for stage, count in enumerate(blocks, start=1):
        for block in range(count):
            prefix = f"layer{stage}.{block}"
            names |= {f"{prefix}.conv1.weight", f"{prefix}.conv2.weight", f"{prefix}.prelu.weight"}
            names |= norm(f"{prefix}.bn1") | norm(f"{prefix}.bn2") | norm(f"{prefix}.bn3")
        names |= {f"layer{stage}.0.downsample.0.weight"} | norm(f"layer{stage}.0.downsample.1")
    return names


@pytest.mark.parametrize(("depth", "count"), [(18, 24_025_600), (34, 34_139_328), (50, 43_590_848), (100, 65_156_160)])
def test_parameters_are_those_of_the_paper(depth: int, count: int) -> None:
    with torch.device("meta"):
        model = iresnet(depth)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert set(model.state_dict()) == names_of_arcface_torch(BLOCKS[depth])


def test_embedding_size_and_fixed_last_scale() -> None:
    model = IResNet((1, 1, 1, 1), num_features=8).eval()
    assert model(torch.zeros(1, 3, 112, 112)).shape == (1, 8)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["features.weight"]
    assert bool((model.features.weight == 1).all())


@pytest.mark.parametrize("size", [(112, 112), (112, 96), (64, 48)])
def test_mobilefacenet_reads_the_size_it_was_made_for(size: tuple[int, int]) -> None:
    model = MobileFaceNet(8, size).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, *size)).shape == (1, 8)


def test_mobilefacenet_has_about_a_million_parameters() -> None:
    with torch.device("meta"):
        counts = [sum(p.numel() for p in MobileFaceNet(size=size).parameters()) for size in ((112, 112), (112, 96))]
    assert 0.9e6 < counts[1] < counts[0] < 1.1e6
    assert counts[0] - counts[1] == 512 * (7 * 7 - 7 * 6)
