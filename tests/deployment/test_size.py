"""The report: every byte of a file is an entry, tensors are known by their use, and networks are predicted."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import fx, nn

import qface
from qface import measure_size
from qface.cli import main
from qface.deployment import SizeReport
from qface.deployment.size import KINDS, TENSORS, SizeEntry
from qface.deployment.size.tensor_roles import shares_of
from qface.errors import CheckpointError, ConfigError
from qface.graph.capture import capture
from qface.models import iresnet
from qface.preprocessing import Preprocessing, with_preprocessing
from qface.quantization import LayerBits, QuantizationConfig, calibrate, quantize
from qface.quantization.quantized_layers import WeightedLayer
from qface.quantization.weight_qparams import takes_offsets
from tests.benchmarks.scripts import script
from tests.deployment.networks import CHANNELS, Sum, calibrated, framed, prelu
from tests.networks import foreign_net, random_faces, tiny_face_net

BITS = range(2, 9)
SIZE = (32, 28)


def network(build: Callable[..., nn.Module] = tiny_face_net) -> nn.Module:
    return with_preprocessing(build(size=SIZE), Preprocessing(size=SIZE))


@cache
def captured(build: Callable[..., nn.Module] = tiny_face_net) -> fx.GraphModule:
    """The layers of :func:`network`, found once for all students."""
    return capture(network(build))


def weights(student: fx.GraphModule) -> list[tuple[int, int]]:
    """Elements and bits of every weight, in order."""
    layers = [module for module in student.modules() if isinstance(module, WeightedLayer)]
    return sorted((layer.weight.numel(), layer.weight_fake_quant.bits) for layer in layers)


def found_weights(report: SizeReport) -> list[tuple[int, int | None]]:
    return sorted((entry.elements, entry.bits) for entry in report.of_kind("weight").entries)


def elements(report: SizeReport, *kinds: str) -> int:
    return sum(entry.elements for entry in report.entries if entry.kind in kinds)


def checked(path: Path) -> SizeReport:
    """The report of a file, whose entries add up to it."""
    report = measure_size(path)
    assert report.source == "file"
    assert sum(entry.bytes for entry in report.entries) == report.bytes == path.stat().st_size
    assert sum(part.bytes for part in report.kinds.values()) == report.bytes
    assert all(entry.bytes >= 0 for entry in report.entries)
    return report


# ---- files


@pytest.mark.parametrize("bits", BITS)
def test_files_of_students_add_up_and_tell_their_bits(bits: int, tmp_path: Path) -> None:
    student = calibrated(captured(), bits)
    for weight_format in ("packed", "int8"):
        report = checked(qface.export(student, tmp_path / f"{weight_format}.onnx", weight_format))
        assert found_weights(report) == weights(student)
        count = elements(report, "weight")
        expected = count * bits / 8 if weight_format == "packed" else count
        assert expected <= report.of_kind("weight").bytes < expected + 3
        assert report.of_kind("weight").fp32_bytes == 4 * count
        packed = sum(entry.packed_bytes for entry in report.of_kind("weight").entries)
        assert count * bits / 8 <= packed < count * bits / 8 + len(weights(student))


@pytest.mark.parametrize("weight_format", ["packed", "int8"])
def test_layers_of_several_bits_keep_their_own(weight_format: str, tmp_path: Path) -> None:
    config = QuantizationConfig(overrides={"block1.conv2": LayerBits(weight=3), "fc": LayerBits(weight=7)})
    student = calibrated(captured(), config)
    report = checked(qface.export(student, tmp_path / "net.onnx", weight_format))
    assert found_weights(report) == weights(student)
    assert {bits for _, bits in found_weights(report)} == {3, 6, 7}


@pytest.mark.parametrize("weight_format", ["packed", "int8"])
@pytest.mark.parametrize("build", [tiny_face_net, foreign_net])
def test_a_file_holds_the_tensors_that_its_student_foretells(
    build: Callable[..., nn.Module], weight_format: str, tmp_path: Path
) -> None:
    student = calibrated(captured(build))
    report, foretold = checked(qface.export(student, tmp_path / "net.onnx", weight_format)), measure_size(student)
    for kind in ("weight", "bias", "slope", "affine"):
        assert elements(report, kind) == elements(foretold, kind), kind
    assert report.fp32_bytes == foretold.fp32_bytes
    assert report.kinds.keys() >= foretold.kinds.keys()


SLOPES: dict[str, tuple[float, ...]] = {"one": (0.2,), "below": (0.2, 0.4), "above": (1.5, 2.0), "mixed": (0.2, 1.5)}


@pytest.mark.parametrize("slopes", SLOPES.values(), ids=SLOPES)
def test_slopes_are_told_from_affine_layers(slopes: tuple[float, ...], tmp_path: Path) -> None:
    body = lambda: nn.Sequential(prelu(*slopes), nn.BatchNorm2d(8))  # noqa: E731
    report = checked(qface.export(calibrated(framed(lambda: Sum(body()))), tmp_path / "net.onnx"))
    assert elements(report, "slope") == 8
    assert elements(report, "affine") == 8  # scales; the shifts are biases


@pytest.mark.parametrize("build", [tiny_face_net, foreign_net])
def test_float_files_add_up(build: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = network(build)
    report = checked(qface.export(model, tmp_path / "net.onnx"))
    assert elements(report, "weight") == elements(measure_size(model), "weight")
    assert {entry.bits for entry in report.of_kind("weight").entries} == {32}
    assert not elements(report, "scale", "zero_point")


def test_what_others_add_to_a_file_is_counted(tmp_path: Path) -> None:
    path = qface.export(calibrated(captured()), tmp_path / "net.onnx")
    model = onnx.load(path)
    del model.graph.value_info[:]
    model.graph.ClearField("doc_string")
    onnx.save(model, path)
    before = checked(path)
    model = onnx.shape_inference.infer_shapes(model)
    model.doc_string = "of the model"
    model.graph.doc_string = "of the graph"
    model.graph.node[0].doc_string = "of a node"
    onnx.save(model, path)
    path.write_bytes(
        path.read_bytes() + b"\xfa\x3e\x03abc" + b"\xf8\x3e\x96\x01" + b"\xfd\x3e1234" + b"\xf9\x3e12345678"
    )
    after = checked(path)
    names = {entry.name for entry in after.entries} - {entry.name for entry in before.entries}
    assert names == {"value_info", "doc_string", "field 1007"}
    assert found_weights(after) == found_weights(before)


def test_renaming_everything_changes_names_only(tmp_path: Path) -> None:
    path = qface.export(calibrated(captured()), tmp_path / "net.onnx")
    before = checked(path)
    model = onnx.load(path)
    values = [tensor.name for tensor in model.graph.initializer]
    values += [name for node in model.graph.node for name in node.output if name != "embedding"]
    short = {name: f"{number:x}" for number, name in enumerate(dict.fromkeys(values))}
    for tensor in model.graph.initializer:
        tensor.name = short[tensor.name]
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [short.get(name, name) for name in names]
    onnx.save(model, path)
    after = checked(path)
    assert after.bytes < before.bytes
    for kind in TENSORS:
        assert after.of_kind(kind).bytes == before.of_kind(kind).bytes, kind
        assert elements(after, kind) == elements(before, kind)


@st.composite
def models(draw: st.DrawFn) -> onnx.ModelProto:
    """Any model of constants, shared buffers and operators, not necessarily a valid one."""
    names = st.sampled_from(["", "a", "b", "c/:é"])
    arrays = st.lists(st.integers(-128, 127), max_size=200).map(lambda values: np.array(values, np.int8))
    tensors = [numpy_helper.from_array(draw(arrays), name) for name in draw(st.lists(names, max_size=3, unique=True))]
    tensors.append(helper.make_tensor("typed", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0]))
    tensors.append(helper.make_tensor("typed_ints", TensorProto.INT32, [2], [1, -300]))
    values_read = st.sampled_from(["", "typed_ints", *(tensor.name for tensor in tensors), "out0", "out1", "out2"])
    operators = st.sampled_from(["Conv", "Split", "Reshape", "Mul", "Add", "Max", "DequantizeLinear", "PRelu"])
    nodes = [
        helper.make_node(draw(operators), draw(st.lists(values_read, min_size=1, max_size=4)), [f"out{number % 3}"])
        for number in range(draw(st.integers(0, 6)))
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in draw(st.lists(names, max_size=3))]
    graph = helper.make_graph(nodes, draw(names), values[:1], values[1:], tensors, value_info=values)
    model = helper.make_model(graph, producer_name=draw(names))
    helper.set_model_props(model, {draw(names): draw(names)})
    return model


@settings(max_examples=100, deadline=None)
@given(model=models())
def test_any_model_adds_up(model: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.onnx"
    path.write_bytes(model.SerializeToString())
    checked(path)


@given(total=st.integers(0, 10**9), lengths=st.lists(st.integers(0, 10**6), min_size=1, max_size=50))
def test_shares_add_up_and_are_in_proportion(total: int, lengths: list[int]) -> None:
    lengths = [*lengths, 1]
    shares = shares_of(total, lengths)
    assert sum(shares) == total
    for share, length in zip(shares, lengths, strict=True):
        assert abs(share - total * length / sum(lengths)) <= 1 + 1e-6


@pytest.mark.parametrize("given", [True, False], ids=["kernel_shape", "no kernel_shape"])
@pytest.mark.parametrize("cast", [True, False], ids=["of halves", "of floats"])
@pytest.mark.parametrize("group", [1, 3])
def test_convolutions_of_others_may_leave_out_the_shape_of_their_kernels(
    group: int, cast: bool, given: bool, tmp_path: Path
) -> None:
    values = np.ones((3, 3 // group, 1, 1), np.float16 if cast else np.float32)
    shape = {"kernel_shape": [1, 1]} if given else {}
    nodes = [helper.make_node("Cast", ["stored"], ["weight"], to=TensorProto.FLOAT)] if cast else []
    nodes.append(helper.make_node("Conv", ["images", "weight"], ["maps"], group=group, **shape))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, 8, 8]) for name in ("images", "maps")]
    tensor = numpy_helper.from_array(values, "stored" if cast else "weight")
    model = helper.make_model(helper.make_graph(nodes, "net", ends[:1], ends[1:], [tensor]))
    onnx.checker.check_model(model)
    onnx.save(model, tmp_path / "net.onnx")
    assert found_weights(checked(tmp_path / "net.onnx")) == [(values.size, 16 if cast else 32)]


# ---- networks


def test_iresnet_at_six_bits() -> None:
    model = iresnet(18).eval()
    report = measure_size(model, 6)
    assert report.source == "prediction"
    slopes = sum(layer.num_parameters for layer in model.modules() if isinstance(layer, nn.PReLU))
    # By hand: packed weights, folded BatchNorm, and scales, biases and slopes in float32; here a slope takes a byte.
    # Zero points of channels: a byte for what a convolution pads, and two for each slope in front of it.
    blocks = [layer for layer in model.modules() if hasattr(layer, "conv2")]
    shifted = sum(block.conv1.in_channels + 3 * block.conv2.in_channels for block in blocks)
    expected = 18.073e6 - 3 * slopes + shifted
    assert report.mb == pytest.approx(expected / 1e6, rel=0.0005)
    assert report.mib == pytest.approx(expected / 2**20, rel=0.0005)


def test_a_float_network_counts_as_its_student() -> None:
    model = captured()
    for bits in BITS:
        foretold, student = measure_size(model, bits), quantize(model, bits)
        assert foretold == measure_size(student)
        assert found_weights(foretold) == weights(student)
        entries = measure_size(calibrate(student, random_faces(8))).entries
        assert [entry for entry in foretold.entries if entry not in entries] == unused_offsets(student)
    assert measure_size(quantize(model, 3), 8) == measure_size(model, 3)
    config = QuantizationConfig(overrides={"fc": LayerBits(weight=2)})
    assert found_weights(measure_size(model, config)) == weights(quantize(model, config))


def unused_offsets(student: fx.GraphModule) -> list[SizeEntry]:
    """Return the predicted entries of weights whose channels all stay symmetric in calibration."""
    quantizers = {
        name: layer.weight_fake_quant for name, layer in student.named_modules() if isinstance(layer, WeightedLayer)
    }
    return [
        SizeEntry(f"{name}.weight_offset", "zero_point", len(each.offset), len(each.offset), 8)
        for name, each in quantizers.items()
        if takes_offsets(each) and not each.offset.any()
    ]


def test_the_prediction_is_the_formula() -> None:
    student = quantize(network(), 5)
    report = measure_size(student)
    words = elements(report, "bias", "scale")
    packed = sum(-(-count * bits // 8) for count, bits in weights(student))
    zero_points = sum(entry.bytes for entry in report.of_kind("zero_point").entries)
    assert report.bytes == packed + 4 * words + elements(report, "slope", "affine") + zero_points
    assert {entry.bits for entry in report.of_kind("slope").entries} == {8}


def test_the_prediction_counts_the_zero_points_of_channels(tmp_path: Path) -> None:
    model = framed(
        lambda: nn.Sequential(prelu(0.2, -0.3), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), prelu(0.1, 0.2))
    )
    student = calibrate(quantize(model, 4), random_faces(8))
    qface.export(student, tmp_path / "net.onnx")

    def bytes_of(model: Path | fx.GraphModule, ending: str) -> int:
        entries = measure_size(model).of_kind("zero_point").entries
        return sum(entry.bytes for entry in entries if entry.name.endswith(ending))

    assert bytes_of(student, "slope_bias") == bytes_of(tmp_path / "net.onnx", "slope_bias") == 2 * CHANNELS
    assert bytes_of(student, "zero_points") == CHANNELS  # in the file they are operands of a Where


def test_saved_networks_are_read(tmp_path: Path) -> None:
    model = network()
    qface.save(model, tmp_path / "teacher.safetensors")
    student = calibrated(model, 4)
    qface.save(student, tmp_path / "student.safetensors")
    assert measure_size(tmp_path / "teacher.safetensors", 4).bytes == measure_size(model, 4).bytes
    assert measure_size(str(tmp_path / "student.safetensors")) == measure_size(student)


# ---- refusals


def test_files_that_are_no_models_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    for content in (b"no model at all", b"", b"\x08\x09", b"\x3a\xff\xff\xff"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"net\.onnx") as caught:
            measure_size(path)
        assert "\n" not in str(caught.value)
    for missing in (tmp_path / "missing.onnx", tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(CheckpointError):
            measure_size(missing)
    with pytest.raises(ConfigError):
        measure_size(network(), 9)


def test_weights_in_other_files_are_refused(tmp_path: Path) -> None:
    model = onnx.load(qface.export(network(), tmp_path / "net.onnx"))
    onnx.save(model, tmp_path / "parts.onnx", save_as_external_data=True, size_threshold=0)
    with pytest.raises(CheckpointError, match="one file"):
        measure_size(tmp_path / "parts.onnx")


# ---- command line, table, benchmark


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["size", *map(str, arguments)])


def test_the_command_prints_tables_or_json(tmp_path: Path) -> None:
    path = qface.export(calibrated(captured()), tmp_path / "net.onnx")
    qface.save(network(), tmp_path / "net.safetensors")
    table = run(path)
    assert table.exit_code == 0, table.output
    assert f"{path.stat().st_size:,} bytes" in table.stdout

    record = json.loads(run(path, "--json").stdout)
    assert record == {"schema_version": 1, **measure_size(path).to_dict()}
    assert record["bytes"] == path.stat().st_size
    assert list(record["kinds"]) == [kind for kind in KINDS if kind in record["kinds"]]
    assert sum(entry["bytes"] for entry in record["entries"]) == record["bytes"]

    predicted = [json.loads(run(tmp_path / "net.safetensors", "--json", "--bits", bits).stdout) for bits in "36"]
    assert predicted == [{"schema_version": 1, **measure_size(network(), bits).to_dict()} for bits in (3, 6)]
    assert "predicted" in run(tmp_path / "net.safetensors").stdout


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    for arguments in ((tmp_path / "missing.onnx",), ("no_such_model",), ("mobilefacenet", "--bits", "9")):
        result = run(*arguments)
        assert result.exit_code == 2
        assert len(result.stderr.strip().splitlines()) == 1


def test_every_published_size_is_a_formula() -> None:
    sizes = script("size")
    with torch.device("meta"):
        numbers = {depth: sizes.file_tensors(iresnet(depth)) for depth in sizes.DEPTHS}
    for figure in sizes.PUBLISHED:
        row = sizes.published_row(figure, sizes.by_formula(numbers[figure.depth], figure.bits))
        assert row["explained"], row
