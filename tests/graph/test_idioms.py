"""Every idiom goes the whole way: captured, quantized, calibrated, exported, and the file computes what it should."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn

import qface
from qface.data.synthetic import synthetic_crops
from qface.deployment.runtime import OnnxEmbedder
from qface.graph import L2Normalize, canonicalize
from qface.network_output import embedding_of
from qface.preprocessing import preprocessing_of
from qface.quantization.placement import computes_in_float
from tests.graph.idioms import IDIOMS, Idiom, build
from tests.graph.kinds import kind_of, kinds
from tests.networks import RANGES_ONLY

BEHIND_ISLANDS = "Quantize"
"""The operation that rounds what a float island makes: torch and onnxruntime compute its floats a little otherwise."""


@pytest.mark.parametrize("name", IDIOMS)
def test_an_idiom_goes_the_whole_way(name: str, tmp_path: Path) -> None:
    idiom, crops = IDIOMS[name], synthetic_crops(8)
    model, layers, student = steps(name)
    check_layers(idiom, layers)
    check_floats(idiom, student)
    qface.save(student, tmp_path / "student.safetensors")
    check_file(qface.load(tmp_path / "student.safetensors"), tmp_path / "student.onnx", crops)
    check_student(model, student, crops)


@cache
def steps(name: str) -> tuple[nn.Module, fx.GraphModule, fx.GraphModule]:
    """An idiom's network, its layers, which were compared with it, and a calibrated student of them; made once."""
    model = build(IDIOMS[name])
    layers = canonicalize(model)
    student = qface.quantize(layers, 6)
    qface.calibrate(student, synthetic_crops(8), RANGES_ONLY)
    return model, layers, student


def check_file(student: nn.Module, file: Path, crops: Tensor) -> None:
    qface.export(student, file)
    agreement = qface.verify(student, file, crops)
    assert agreement.agrees
    assert [layer for layer in agreement.layers if layer.different and layer.operation != BEHIND_ISLANDS] == []


def check_layers(idiom: Idiom, layers: fx.GraphModule) -> None:
    found = Counter(kinds(layers))
    assert found == idiom.common + Counter(idiom.layers)


def check_floats(idiom: Idiom, student: fx.GraphModule) -> None:
    """L2 normalization at the end is float in any network."""
    found = {kind_of(student, node) for node in student.graph.nodes if computes_in_float(node)}
    assert found - {L2Normalize} == idiom.floats - {L2Normalize}


def check_student(model: nn.Module, student: nn.Module, crops: Tensor) -> None:
    """Its embeddings are those of the model, but for the rounding to 6 bits."""
    images = preprocessing_of(model)(crops)
    with torch.no_grad():
        expected = embedding_of(model.eval()(images)).float()
        found = student.eval()(images)
    assert float(torch.cosine_similarity(expected, found).min()) > 0.99


def exported(name: str, folder: Path) -> Path:
    file = folder / "student.onnx"
    qface.export(steps(name)[-1], file)
    return file


def optimized(file: Path, folder: Path) -> set[str]:
    """The kinds of nodes that onnxruntime makes of ``file``."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return {node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node}


@pytest.mark.parametrize("name", ["ReLU after a sum", "ReLU6 after a sum in place"])
def test_the_clamp_after_a_sum_is_a_part_of_it(name: str, tmp_path: Path) -> None:
    file = exported(name, tmp_path)
    assert "Relu" not in {node.op_type for node in onnx.load(file).graph.node}
    assert not {"DequantizeLinear", "Add", "Relu"} & optimized(file, tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "max feature map",
        "channel shuffle",
        "ECA",
        "squeeze and excite by view",
        "slices",
        "reflect padding",
        "nearest upsampling",
        "linear layer on tokens",
        "sum of a list",
        "gamma * f(x) + x",
    ],
)
def test_nothing_is_float_between_the_image_and_the_embedding(name: str, tmp_path: Path) -> None:
    assert not {"DequantizeLinear", "Conv", "FusedConv", "Gemm"} & optimized(exported(name, tmp_path), tmp_path)


def test_other_numbers_of_images_are_computed_too(tmp_path: Path) -> None:
    """The windows of Swin, whose code counts the images in Python, for numbers that it was not exported with."""
    embed = OnnxEmbedder(exported("Swin's windows", tmp_path), providers=["CPUExecutionProvider"])
    images = embed.preprocessing(synthetic_crops(5))
    torch.testing.assert_close(embed(images), torch.cat([embed(image[None]) for image in images]))
