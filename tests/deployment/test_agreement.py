"""A file that computes what its student computes is told from one that does not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper
from torch import Tensor, fx, nn

import qface
from qface.choices import TargetName
from qface.cli import main
from qface.deployment import LayerAgreement
from qface.errors import ExportError, ImagesError
from qface.graph.queries import layer_of
from qface.preprocessing import Preprocessing, with_preprocessing
from tests.deployment.networks import calibrated, framed
from tests.networks import random_faces, tiny_face_net


def network() -> nn.Module:
    return with_preprocessing(tiny_face_net(size=(32, 32)), Preprocessing(size=(32, 32)))


@pytest.fixture(scope="module")
def student() -> fx.GraphModule:
    return calibrated(network(), 6)


@pytest.fixture
def file(student: fx.GraphModule, tmp_path: Path) -> Path:
    return qface.export(student, tmp_path / "net.onnx", weight_format="int8")


def with_changed(model: onnx.ModelProto, name: str, change: int) -> onnx.ModelProto:
    """``change`` added to every integer of one initializer."""
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((values + change).astype(values.dtype), name))
    return model


def a_bias(model: onnx.ModelProto) -> str:
    return next(tensor.name for tensor in model.graph.initializer if tensor.name.endswith("conv2.bias"))


def test_a_file_agrees_with_its_student(student: fx.GraphModule, file: Path) -> None:
    agreement = qface.verify(student, file, random_faces(80, seed=5))
    assert agreement.agrees
    assert agreement.images == 80
    assert "32x32" in agreement.preprocessing
    assert agreement.min_cosine > 0.9999
    assert len(agreement.layers) > 5
    for layer in agreement.layers:
        assert layer.different == 0
        least, greatest = layer.integer_range
        assert 256 - 2**layer.bits <= least <= greatest < 256
    assert json.loads(json.dumps(agreement.to_dict()))["agrees"] is True


def test_a_difference_is_found_in_the_layer_where_it_arises(student: fx.GraphModule, file: Path) -> None:
    model = onnx.load(file)
    name = a_bias(model)
    onnx.save(with_changed(model, name, 5000), file)
    agreement = qface.verify(student, file, random_faces(8))
    assert not agreement.agrees
    assert [layer.layer for layer in agreement.layers if layer.different] == [name.removesuffix(".bias")]


def test_one_integer_that_differs_is_a_difference(student: fx.GraphModule, file: Path) -> None:
    model = onnx.load(file)
    onnx.save(with_changed(model, a_bias(model), 1), file)
    agreement = qface.verify(student, file, random_faces(8))
    (layer,) = (layer for layer in agreement.layers if layer.different)
    assert layer.exact
    assert layer.max_difference == 1
    assert not agreement.agrees


def test_a_rounding_is_forgiven_where_floats_are_rounded() -> None:
    layer = LayerAgreement("a", "Quantize", 8, 10_000, 9, 1, (0, 255), exact=False)
    assert layer.agrees
    assert not replace(layer, exact=True).agrees
    assert not replace(layer, different=11).agrees
    assert not replace(layer, max_difference=2).agrees


def test_integers_near_a_tie_are_forgiven_where_floats_are_rounded() -> None:
    """Many pixels may have one value, which then round differently together."""
    layer = LayerAgreement("a", "Quantize", 8, 10_000, 300, 1, (0, 255), exact=False, near_ties=295)
    assert layer.agrees
    assert not replace(layer, near_ties=280).agrees
    assert not replace(layer, max_difference=2).agrees
    assert not replace(layer, exact=True).agrees


def test_values_near_a_tie_are_counted(tmp_path: Path) -> None:
    """A float layer that is a little off, less than a thousandth of a step, rounds only values at ties differently."""
    student = calibrated(framed(lambda: nn.Sequential(nn.GroupNorm(8, 8), nn.Conv2d(8, 8, 1))), 8)
    qface.export(student, tmp_path / "net.onnx")
    (node,) = [node for node in student.graph.nodes if isinstance(layer_of(node), nn.GroupNorm)]
    (quantizer,) = node.users
    step = float(layer_of(quantizer).qparams().scale)
    layer_of(node).bias.data.add_(8e-4 * step)
    found = qface.verify(student, tmp_path / "net.onnx", random_faces(8))
    different = [layer for layer in found.layers if layer.different]
    assert different
    assert all(layer.near_ties == layer.different for layer in different)


def test_too_many_integers_are_found(student: fx.GraphModule, file: Path) -> None:
    model = onnx.load(file)
    (level,) = (tensor for tensor in model.graph.initializer if tensor.name == "level_192")
    level.CopyFrom(numpy_helper.from_array(np.uint8(100), "level_192"))
    onnx.save(model, file)
    agreement = qface.verify(student, file, random_faces(8))
    assert any(layer.integer_range[0] < 192 for layer in agreement.layers if layer.bits == 6)
    assert not agreement.agrees


def test_the_file_of_another_network_is_refused(student: fx.GraphModule, tmp_path: Path) -> None:
    other = qface.export(network(), tmp_path / "float.onnx")
    with pytest.raises(ExportError, match="not exported from this network"):
        qface.verify(student, other, random_faces(4))


@pytest.mark.parametrize("images", [None, random_faces(3)])
def test_export_leaves_no_file_that_computes_something_else(
    images: torch.Tensor | None, student: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qface.deployment.onnx_writer as writer

    def faulty(*arguments: object) -> onnx.ModelProto:
        model = writer.to_onnx(*arguments)
        return with_changed(model, a_bias(model), 5000)

    monkeypatch.setitem(qface.export.__globals__, "to_onnx", faulty)
    with pytest.raises(ExportError, match=r"conv2"):
        qface.export(student, tmp_path / "net.onnx", images=images)
    assert not list(tmp_path.iterdir())


def test_the_file_says_on_which_images_it_was_checked(student: fx.GraphModule, tmp_path: Path) -> None:
    said = {}
    for name, images in (("default", None), ("given", random_faces(3))):
        path = qface.export(student, tmp_path / f"{name}.onnx", images=images)
        said[name] = {prop.key: prop.value for prop in onnx.load(path).metadata_props}["verified"]
    assert said == {"default": "4 synthetic images", "given": "3 given images"}


@pytest.mark.parametrize("target", get_args(TargetName))
def test_no_images_are_an_error(target: str, student: fx.GraphModule, tmp_path: Path) -> None:
    path = qface.export(student, tmp_path / "net.onnx", target=target)
    with pytest.raises(ImagesError, match="no images"):
        qface.verify(student, path, iter([]))
    with pytest.raises(ImagesError, match="no images"):
        qface.export(student, tmp_path / "another.onnx", target=target, images=iter([]))
    assert not (tmp_path / "another.onnx").exists()


class LateActivation(nn.Module):
    """A branch runs between a convolution and its ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Conv2d(8, 8, 3, padding=1)
        self.between = nn.Conv2d(8, 8, 1)
        self.slope = nn.PReLU(8)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        early = self.early(x)
        between = self.slope(self.between(x))
        return self.act(early) + between


def test_activations_may_run_late(tmp_path: Path) -> None:
    student = calibrated(framed(LateActivation), 6)
    path = qface.export(student, tmp_path / "net.onnx")
    assert qface.verify(student, path, random_faces(8)).agrees


def test_verifying_changes_nothing(student: fx.GraphModule, file: Path) -> None:
    before = {name: value.clone() for name, value in student.state_dict().items()}
    student.train()
    qface.verify(student, file, random_faces(4))
    assert all(module.training for module in student.modules())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    student.eval()


def test_the_command_line_tells_by_its_exit_code(student: fx.GraphModule, file: Path, crops, tmp_path: Path) -> None:
    qface.save(student, tmp_path / "student.safetensors")
    arguments = ["verify", str(tmp_path / "student.safetensors"), str(file), "--images", str(crops({"Ann": 3}))]
    agreeing = CliRunner().invoke(main, [*arguments, "--json"])
    assert agreeing.exit_code == 0, agreeing.output
    assert json.loads(agreeing.stdout)["agrees"] is True
    model = onnx.load(file)
    onnx.save(with_changed(model, a_bias(model), 5000), file)
    differing = CliRunner().invoke(main, arguments)
    assert differing.exit_code == 1
    assert "conv2" in differing.stdout
