"""Constant folding with ONNX's reference evaluator, for a list of operators and up to a size limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from onnx import helper
from onnx.reference import ReferenceEvaluator

from qface.errors import UnsupportedLayerError, one_line
from qface.limits import Allowance, check
from qface.models.onnx_import.onnx_file import Array, Node, OnnxFile

__all__ = ["COMPUTED", "ConstantFolder"]

COMPUTED = frozenset(
    "Abs Add And Cast Ceil Clip Concat Constant ConstantOfShape Cos CumSum Div Equal Erf Exp Expand Flatten Floor "
    "Gather GatherElements Gemm Greater GreaterOrEqual Identity Less LessOrEqual Log MatMul Max Min Mod Mul Neg "
    "NonZero Not Or Pad Pow Range Reciprocal ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum "
    "ReduceSumSquare Relu Reshape Round ScatterND Shape Sigmoid Sign Sin Size Slice Split Sqrt Squeeze Sub Sum Tanh "
    "Tile Transpose Trilu Unsqueeze Where".split()
)
"""Operators that may be folded; none of them has a subgraph."""


class ConstantFolder:
    """Compute nodes whose inputs are all constants.

    Args:
        file: the file, for its opset and for messages.
    """

    def __init__(self, file: OnnxFile) -> None:
        self._file = file
        size = sum(each.nbytes for each in file.constants.values())
        # A cast from fp16 doubles the size, and a Transpose or Reshape after it copies that.
        self._made = Allowance(f"{file.path}, in its constants,", 4 * size)
        self._multiplications = 0.0

    def compute(self, node: Node, inputs: dict[str, Array]) -> list[Array]:
        """Compute the outputs of ``node`` like :meth:`evaluate`, and convert floats to float32."""
        return [_in_float32(each) for each in self.evaluate(node, inputs)]

    def evaluate(self, node: Node, inputs: dict[str, Array]) -> list[Array]:
        """Compute the outputs of ``node``.

        Args:
            node: a node.
            inputs: the values of its inputs by name.

        Raises:
            LimitError: the outputs or the number of multiplications are too large.
            UnsupportedLayerError: the operator is not in :data:`COMPUTED`, or the reference evaluator fails.
        """
        if node.op not in COMPUTED:
            raise UnsupportedLayerError(
                f"{self._file.path}: node {node.name} is a {node.op}, which cannot be computed on constants; "
                "export the network again with constant folding"
            )
        self._made.spend(_bytes_made(node, inputs))
        self._multiplications += _multiplications(node, inputs)
        check("multiplications", self._multiplications, f"{self._file.path}, at {node.op} {node.name},")
        if node.op == "Identity":
            return list(inputs.values())
        return self._run(node, inputs)

    def _run(self, node: Node, inputs: dict[str, Array]) -> list[Array]:
        given = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), None)
            for name, value in inputs.items()
        ]
        names = [name for name in node.outputs if name]
        outputs = [helper.make_empty_tensor_value_info(name) for name in names]
        graph = helper.make_graph([node.proto], "constant", given, outputs)
        model = helper.make_model(graph, opset_imports=self._file.model.opset_import)
        try:
            return [np.asarray(each) for each in ReferenceEvaluator(model).run(names, inputs)]
        except Exception as error:  # the operator's implementation may raise anything
            raise UnsupportedLayerError(
                f"{self._file.path}: the constant {node.name} ({node.op}) cannot be computed: {one_line(error, 200)}; "
                "export the network again with constant folding"
            ) from error


def _in_float32(value: Array) -> Array:
    return value.astype(np.float32) if value.dtype in (np.float16, np.float64) else value


def _bytes_made(node: Node, inputs: dict[str, Array]) -> float:
    """Return an upper bound of the size of the outputs in bytes, at 8 bytes per element."""
    given = [inputs[name] for name in node.inputs if name]
    estimate = _ELEMENTS.get(node.op)
    try:
        elements = _broadcast(node, given) if estimate is None else estimate(node, given)
    except (ValueError, IndexError, ArithmeticError):  # invalid inputs, which the reference evaluator reports
        elements = 0.0
    return 8 * max(elements, float(sum(each.size for each in given)))


def _multiplications(node: Node, inputs: dict[str, Array]) -> float:
    """Return an upper bound of the multiplications of a matrix product; 0 for other operators."""
    if node.op not in ("Gemm", "MatMul"):
        return 0.0
    left, right = (inputs[name] for name in node.inputs[:2])
    return float(left.size) * right.size / max(1, min(right.shape, default=1))


def _broadcast(node: Node, given: list[Array]) -> float:
    return _product(np.broadcast_shapes(*(each.shape for each in given)))


def _filled(node: Node, given: list[Array]) -> float:
    return _product(given[0].tolist())


def _expanded(node: Node, given: list[Array]) -> float:
    return _product(np.broadcast_shapes(given[0].shape, tuple(given[1].tolist())))


def _tiled(node: Node, given: list[Array]) -> float:
    return float(given[0].size * _product(given[1].tolist()))


def _counted(node: Node, given: list[Array]) -> float:
    start, stop, step = (float(each.item()) for each in given)
    return abs((stop - start) / step)


def _padded(node: Node, given: list[Array]) -> float:
    pads = given[1].tolist() if len(given) > 1 else list(node.get("pads", []))
    return _product([size + sum(map(abs, pads)) for size in given[0].shape])


def _multiplied(node: Node, given: list[Array]) -> float:
    left, right = given[:2]
    return float(left.size / min(left.shape) * right.size / min(right.shape))


def _gathered(node: Node, given: list[Array]) -> float:
    data, indices = given
    return float(data.size / data.shape[node.get("axis", 0)] * indices.size)


def _found(node: Node, given: list[Array]) -> float:
    return float(given[0].ndim * given[0].size)


def _product(sizes: Sequence[float]) -> float:
    return math.prod(max(abs(float(size)), 1.0) for size in sizes)


_ELEMENTS: dict[str, Callable[[Node, list[Array]], float]] = {
    "ConstantOfShape": _filled,
    "Expand": _expanded,
    "Gather": _gathered,
    "Gemm": _multiplied,
    "MatMul": _multiplied,
    "NonZero": _found,
    "Pad": _padded,
    "Range": _counted,
    "Tile": _tiled,
}
"""Upper bounds of the number of output elements; for other operators it is that of the broadcast inputs."""
