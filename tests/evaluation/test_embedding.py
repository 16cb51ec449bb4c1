import numpy as np
import pytest
import torch
from torch import nn
from torch.ao.quantization import FakeQuantize, FusedMovingAvgObsFakeQuantize

from qface.data import ImageFolder, LoaderImages, TensorImages
from qface.errors import CheckpointError, ConfigError, ImagesError, QFaceError
from qface.evaluation import Embedder, TorchEmbedder, as_embedder, embed
from qface.preprocessing import Preprocessing, with_preprocessing


class Pixels(nn.Module):
    """Embeds an image as its first four pixels."""

    def forward(self, images):
        return images[:, 0, 0, :4]


class Constant(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, images):
        return self.output


class Doubler:
    """An embedder that is no module."""

    preprocessing = Preprocessing()

    def __call__(self, batch):
        return 2 * batch[:, 0, 0, :4]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


FLOATS = 2 * torch.rand(5, 3, 8, 8) - 1


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_rows_have_length_one_and_the_order_of_the_images(batch_size):
    rows = embed(Pixels(), TensorImages(FLOATS), batch_size)
    assert rows.dtype == np.float32
    assert np.allclose(rows, unit(FLOATS[:, 0, 0, :4].numpy()))


def test_flip_adds_the_mirrored_image():
    rows = embed(Pixels(), TensorImages(FLOATS), flip=True)
    assert np.allclose(rows, unit((FLOATS[:, 0, 0, :4] + FLOATS.flip(-1)[:, 0, 0, :4]).numpy()))


def test_crops_are_normalized_for_the_model(crops):
    source = ImageFolder(crops({"Ann": 3}))
    preprocessing = Preprocessing(crop=(4, 0, 108, 112), size=(104, 112), mean=(1.0, 2.0, 3.0))
    model = with_preprocessing(Pixels(), preprocessing)
    expected = preprocessing(source.read(range(3)))[:, 0, 0, :4].numpy()
    assert np.allclose(embed(model, source), unit(expected))


def test_loader_and_embedder_that_is_no_module_work():
    rows = embed(Doubler(), LoaderImages([(FLOATS[:2], 0), FLOATS[2:]]))
    assert np.allclose(rows, unit(FLOATS[:, 0, 0, :4].numpy()))


def test_module_runs_in_eval_mode_and_keeps_its_modes():
    model = network().train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (embed(model, TensorImages(FLOATS)) for _ in range(2))
    assert np.array_equal(first, second)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_modes_are_restored_after_an_error():
    model = network().train()
    with pytest.raises(RuntimeError):
        TorchEmbedder(model)(torch.zeros(1, 1, 8, 8))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("make", [FakeQuantize, FusedMovingAvgObsFakeQuantize])
def test_observers_see_nothing_and_stay_on(make):
    quantizer = make()
    quantizer(torch.linspace(-1, 1, 9).view(1, 1, 1, 9))
    state = {name: value.clone() for name, value in quantizer.state_dict().items()}
    wide = with_preprocessing(nn.Sequential(quantizer, Pixels()), Preprocessing(std=(20.0,) * 3))
    embed(wide, TensorImages(4 + FLOATS))
    assert quantizer.observer_enabled.item() == 1
    assert all(torch.equal(value, state[name]) for name, value in quantizer.state_dict().items())


def test_outputs_carry_no_gradient():
    assert not TorchEmbedder(network())(FLOATS).requires_grad


def test_as_embedder_tells_runtime_and_protocol():
    embedder = as_embedder(network())
    assert isinstance(embedder, Embedder)
    assert embedder.runtime == "torch cpu"
    doubler = Doubler()
    assert as_embedder(doubler) is doubler
    with pytest.raises(ConfigError, match="got int"):
        as_embedder(5)


@pytest.mark.parametrize("name", ["none.onnx", "none.safetensors"])
def test_missing_files_are_errors(tmp_path, name):
    with pytest.raises(CheckpointError):
        as_embedder(tmp_path / name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_unusable_embeddings_are_named(value):
    output = torch.ones(5, 4)
    output[2:4, 1] = value
    if value == 0:
        output[2:4] = 0
    with pytest.raises(QFaceError, match=r"^the embedding of image 2 is zero or not finite"):
        embed(Constant(output), TensorImages(FLOATS))


def test_images_after_an_unusable_one_are_not_embedded():
    seen = []

    class Failing(Doubler):
        def __call__(self, batch):
            seen.append(len(batch))
            return torch.zeros(len(batch), 4) if len(seen) == 2 else torch.ones(len(batch), 4)

    with pytest.raises(QFaceError, match=r"^the embedding of image 2 "):
        embed(Failing(), TensorImages(FLOATS), batch_size=2)
    assert seen == [2, 2]


def test_images_that_the_network_cannot_read_are_one_line():
    with pytest.raises(QFaceError, match=r"^the model cannot embed images \[5, 3, .*: ") as error:
        embed(nn.Sequential(nn.Flatten(), nn.Linear(7, 4)), TensorImages(FLOATS))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_no_images_at_a_time_is_an_error(batch_size):
    with pytest.raises(ConfigError, match="batch_size"):
        embed(Doubler(), TensorImages(FLOATS), batch_size)


def test_large_embeddings_do_not_overflow():
    assert np.allclose(embed(Constant(torch.full((5, 4), 1e30)), TensorImages(FLOATS)), 0.5)


@pytest.mark.parametrize(
    "output", [torch.ones(5, 4, 2, 1), torch.ones(4, 4), (torch.ones(5, 4), torch.ones(5, 4)), None]
)
def test_other_outputs_are_errors(output):
    with pytest.raises(QFaceError, match=r"for 5 images|returns .* exactly one embedding is needed"):
        embed(Constant(output), TensorImages(FLOATS))


@pytest.mark.parametrize(
    "several", [lambda x: (x, x.norm(dim=1)), lambda x: {"norm": x.norm(dim=1, keepdim=True), "x": x}]
)
def test_the_embedding_is_found_among_several_outputs(several):
    embedding = torch.randn(5, 4)
    for output in (several(embedding), embedding[:, :, None, None]):
        assert np.array_equal(
            embed(Constant(output), TensorImages(FLOATS)), embed(Constant(embedding), TensorImages(FLOATS))
        )


def test_no_images_is_an_error():
    with pytest.raises(ImagesError, match="no images"):
        embed(Pixels(), LoaderImages([]))


def test_progress_changes_nothing_and_leaves_stdout_alone(capfd):
    shown = embed(Pixels(), TensorImages(FLOATS), 2, progress=True)
    assert np.array_equal(shown, embed(Pixels(), TensorImages(FLOATS), 2))
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_networks_and_images_in_other_types_are_embedded(dtype):
    expected = embed(network(), TensorImages(FLOATS))
    assert np.allclose(embed(network().to(dtype), TensorImages(FLOATS)), expected, atol=0.02)
    assert np.allclose(embed(network(), TensorImages(FLOATS.to(dtype))), expected, atol=0.02)
