"""The integers that a student and its file compute, to be compared tensor by tensor."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from torch import Tensor, fx

from qface.deployment import OnnxEmbedder, export, lower
from qface.graph.layers import along_channels
from qface.preprocessing import preprocessing_of
from qface.quantization.quantized_layers import Quantizer
from tests.networks import random_faces


@dataclass(frozen=True)
class Compared:
    """One tensor: the layer that makes it, the kind of operation, and its integers on both sides."""

    layer: str
    kind: str
    student: npt.NDArray[np.float32]
    file: npt.NDArray[np.float32]

    @property
    def greatest_difference(self) -> float:
        return float(np.abs(self.student - self.file).max())


def session(path: Path, extra_outputs: list[str] | None = None, optimized: Path | None = None):
    """An onnxruntime session on one thread, which also returns ``extra_outputs`` (uint8)."""
    model = onnx.load(path)
    for name in extra_outputs or []:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if {entry.key: entry.value for entry in model.metadata_props}["weight_bits"] == "8":
        options.add_session_config_entry("session.x64quantprecision", "1")  # as docs/formats.md asks of users
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def optimized_operators(path: Path, folder: Path) -> Counter[str]:
    """How often each operator is left after onnxruntime optimized the file."""
    session(path, optimized=folder / "optimized.onnx")
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def run_student(student: fx.GraphModule, images: Tensor) -> tuple[list[npt.NDArray[np.float32]], Tensor]:
    """The integers behind each quantizer of activations, in the order they run, and the embeddings."""
    found = []

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            quantizer = student.get_submodule(str(n.target)) if n.op == "call_module" else None
            if isinstance(quantizer, Quantizer):
                scale, zero_point, *_ = quantizer.qparams()
                found.append(((result / scale).round() + along_channels(zero_point, result)).numpy())
            return result

    with torch.no_grad():
        embeddings = Recorder(student.eval()).run(images)
    return found, embeddings


def compare(student: fx.GraphModule, path: Path, images: int = 4) -> tuple[list[Compared], Tensor, Tensor]:
    """Every quantized tensor, of the student and of its file; then the embeddings of both."""
    export(student, path)
    made = [
        operation
        for operation in lower(student).operations
        if operation.output.qparams is not None and operation.kind not in ("MaxPool", "Flatten")
    ]
    batch = preprocessing_of(student)(random_faces(images, seed=1))
    expected, embeddings = run_student(student, batch)
    outputs = session(path, [operation.output.name for operation in made]).run(None, {"images": batch.numpy()})
    compared = [
        Compared(operation.name, getattr(operation, "function", operation.kind), integers, output.astype("f4"))
        for operation, integers, output in zip(made, expected, outputs[1:], strict=True)
    ]
    return compared, embeddings, OnnxEmbedder(path, threads=1)(batch)


def assert_exact(student: fx.GraphModule, path: Path) -> None:
    """The file computes every integer of the student, and the embeddings that follow from them."""
    compared, expected, embeddings = compare(student, path)
    assert compared
    for tensor in compared:
        assert tensor.greatest_difference == 0, f"{tensor.kind} {tensor.layer}"
    assert torch.allclose(embeddings, expected, rtol=1e-5, atol=1e-6)


def read_by_multiplications(path: Path) -> dict[str, list[str]]:
    """For each uint8 tensor that a convolution or matrix product of the network reads: the layers that read it.

    Slopes and BatchNorms are written as convolutions too, which are none of the network's.
    """
    graph = onnx.load(path).graph
    makers = {output: node for node in graph.node for output in node.output}
    found: dict[str, list[str]] = {}
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            assert makers[node.input[0]].op_type == "DequantizeLinear"
            layer, _, kind = makers[node.input[1]].input[0].rpartition(".")
            if kind == "weight":
                found.setdefault(makers[node.input[0]].input[0], []).append(layer)
    return found
