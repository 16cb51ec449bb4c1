"""Convert an ONNX graph: fold constants, and turn other nodes into layers by the rule of their operator."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from qface.errors import CheckpointError, UnsupportedLayerError, one_line
from qface.graph.layer_graph import LayerGraph
from qface.graph.layers import Permute, Reshape
from qface.limits import check
from qface.models.onnx_import.constants import ConstantFolder
from qface.models.onnx_import.image_input import ImageInput
from qface.models.onnx_import.onnx_file import Array, Node, OnnxFile, needed_nodes, telling_damage
from qface.network_output import is_embedding
from qface.signals import signals_noted

__all__ = ["Importer", "Rule"]

_BATCH, _OTHER_BATCH = 100003, 100019
"""Batch sizes for shape inference: primes, so that exactly the sizes that depend on the batch are multiples of them.

Constants are computed with both to detect other dependencies on the batch size.
"""

_SIZES = frozenset("ConstantOfShape Expand Range Reshape Resize Slice Split Tile Upsample".split())
"""Operators with shape or index inputs, which may depend on the batch size."""


class Importer(LayerGraph):
    """Builder of a layer graph from one ONNX graph.

    Args:
        file: the ONNX graph.
        image: its input format, and the tensor at which the network starts.
        rules: conversion rules by operator.
    """

    def __init__(self, file: OnnxFile, image: ImageInput, rules: Mapping[str, Rule]) -> None:
        super().__init__()
        self.file = file
        self.opset = file.opset
        self._image = image
        self._rules = rules
        self._folder = ConstantFolder(file)
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._constants: dict[str, Array] = dict(file.constants)  # type: ignore[assignment]
        self._stored: dict[str, Tensor] = {}
        self._origins: dict[str, str] = {}
        self._counts: set[str] = set()
        self._for_two: dict[str, Array] = {}  # constants with rows for each image, for two; ``_constants`` has one's
        self._values: dict[str, fx.Node] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._readers = Counter(name for node in file.nodes for name in node.inputs)
        self._node: Node | None = None

    # ---- conversion of nodes

    def network(self) -> fx.GraphModule:
        """Convert the graph to a network from images [N, 3, H, W] to embeddings [N, D].

        Raises:
            CheckpointError: the graph is damaged.
            LimitError: a tensor is too large.
            UnsupportedLayerError: a node cannot be imported; the message names it.
        """
        with telling_damage(self.file.path, self._where), signals_noted():
            self.file.check_importable()
            self._start()
            for node in needed_nodes(self.file.nodes, self.file.output, self._image.start):
                self._convert(node)
            return self._with_embedding(self.file.output)

    def _with_embedding(self, output: str) -> fx.GraphModule:
        """Finish the graph with the value ``output``, as [N, D]."""
        if output not in self._values:
            raise CheckpointError(
                f"{self.file.path}: the output {output} is not computed from the image; export it again"
            )
        shape, embedding = self.shape(output), self._values[output]
        self._check_embedding(shape)
        if len(shape) > 2:
            embedding = self.layer(nn.Flatten(1), (embedding,), "embedding")
        return self.finish(embedding, "ImportedNetwork")

    def _where(self) -> str:
        return "the image" if self._node is None else f"{self._node.op} {self._node.name}"

    def _start(self) -> None:
        height, width = self._image.preprocessing.size
        images = self._with_value(self.graph.placeholder("images"), lambda: torch.empty(_BATCH, 3, height, width))
        self._shapes[self.file.image.name] = (
            (_BATCH, height, width, 3) if self._image.channels_last else (_BATCH, 3, height, width)
        )
        if self._image.starts_channels_last:
            images = self.layer(Permute((0, 2, 3, 1)), (images,), "channels_last")
        self._values[self._image.start] = images

    def _check_embedding(self, shape: tuple[int, ...]) -> None:
        if not (len(shape) == 2 or is_embedding(shape)) or shape[0] != _BATCH:
            written = ", ".join("N" if size % _BATCH == 0 else str(size) for size in shape)
            raise UnsupportedLayerError(
                f"{self.file.path}: the output {self.file.output} has the shape [{written}] instead of [N, D]; export "
                "the network with the embedding as its output"
            )

    def _convert(self, node: Node) -> None:
        self._node = node
        if node.op in ("Shape", "Size") and not self._is_plain_constant(node.inputs[0]):
            self._read_shape(node)
        elif all(name in self._constants for name in node.inputs if name):
            self._compute(node)
        elif node.op not in self._rules:
            raise UnsupportedLayerError(
                f"{self.file.path}: node {node.name} is a {node.op}, which cannot be imported; "
                f"supported are {', '.join(sorted(self._rules))}"
            )
        else:
            self._repeat_rows(node)
            made = self._rules[node.op](self, node)
            if made is None:
                raise self.file.refusal(node, "unsupported attributes")
            results = made if isinstance(made, list) else [made]
            self._values.update(zip((name for name in node.outputs), results, strict=False))

    # ---- constants and shapes

    def _read_shape(self, node: Node) -> None:
        shape = np.array(self.shape(node.inputs[0]), np.int64)
        if node.op == "Size":
            shape = np.array(shape.prod())
        else:
            shape = shape[node.get("start", 0) : node.get("end")]
        self._add_constant(node.outputs[0], shape, counts=True)

    def _compute(self, node: Node) -> None:
        given = {name: self._constants[name] for name in node.inputs if name}
        counts = any(self._counts_images(name) for name in given)
        outputs = [name for name in node.outputs if name]
        if (counts and node.op in ("ConstantOfShape", "Expand")) or any(name in self._for_two for name in given):
            counts = False
            results = self._compute_for_each_image(node, outputs, given)
        else:
            results = self._folder.compute(node, given)
            if counts:
                self._check_counts(node, given, results)
        for name, value in zip(outputs, results, strict=True):
            if node.inputs:
                self._origins[name] = self._origins.get(node.inputs[0], node.inputs[0])
            self._add_constant(name, value, counts)

    def _compute_for_each_image(self, node: Node, outputs: Sequence[str], given: Iterable[str]) -> list[Array]:
        """Return the outputs for one image; those for two tell later how they depend on the number of images."""
        one, two = (
            self._folder.compute(node, {name: self._for_images(name, count) for name in given}) for count in (1, 2)
        )
        for name, first, second in zip(outputs, one, two, strict=True):
            if not np.array_equal(first, second):
                self._for_two[name] = second
        return one

    def _check_counts(self, node: Node, given: dict[str, Array], results: list[Array]) -> None:
        """Reject a node whose results are neither constant in the batch size nor proportional to it."""
        others = self._folder.compute(node, {name: self._for_other_batch(name) for name in given})
        for one, other in zip(results, others, strict=True):
            if one.shape != other.shape or not bool(((one == other) | (_in_batch(one, _OTHER_BATCH) == other)).all()):
                raise self.refuse(node, "a constant that depends on the batch size")

    def _for_other_batch(self, name: str) -> Array:
        value = self._constants[name]
        return _in_batch(value, _OTHER_BATCH) if self._counts_images(name) else value

    def _for_images(self, name: str, count: int) -> Array:
        """Return a constant for ``count`` images, 1 or 2."""
        if count == 2 and name in self._for_two:
            return self._for_two[name]
        value = self._constants[name]
        return _in_batch(value, count) if self._counts_images(name) else value

    def _repeat_rows(self, node: Node) -> None:
        """Turn constant inputs of ``node`` with several rows for each image into values; a single row is broadcast.

        Raises:
            UnsupportedLayerError: a constant depends on the batch size in another way.
        """
        for name in self._for_two.keys() & set(node.inputs):
            one, two = self._constants[name], self._for_two[name]
            if not one.ndim or not np.array_equal(two, np.concatenate([one, one])):
                raise self.refuse(node, "a constant that depends on the batch size")
            if len(one) > 1:
                repeats = [self.count_of_images(), *(1 for _ in one.shape[1:])]
                kept = self.keep(torch.from_numpy(np.array(one)), self._origins.get(name, name))
                self._values[name] = self.function(
                    torch.ops.aten.repeat.default, (kept, repeats), {}, f"{_plain(name)}_repeated"
                )
                del self._for_two[name], self._constants[name]

    def _add_constant(self, name: str, value: Array, counts: bool) -> None:
        self._constants[name] = value
        if counts:
            self._counts.add(name)

    def _is_plain_constant(self, name: str) -> bool:
        return name in self._constants and name not in self._for_two

    def _counts_images(self, name: str) -> bool:
        """True if an element of a constant is a multiple of the batch size."""
        value = self._constants.get(name)
        if name not in self._counts or value is None:
            return False
        return value.dtype != np.bool_ and bool(((value != 0) & (value % _BATCH == 0)).any())

    # ---- inputs of nodes, for rules

    def is_constant(self, node: Node, position: int) -> bool:
        """True if input ``position`` exists and is constant."""
        return node.has(position) and node.inputs[position] in self._constants

    def array(self, node: Node, position: int) -> Array | None:
        """Return the constant input ``position``; None if it is omitted.

        Raises:
            CheckpointError: no node computes the input.
            UnsupportedLayerError: the input is not constant.
        """
        if not node.has(position):
            return None
        name = node.inputs[position]
        if name not in self._constants and name not in self._values:
            raise CheckpointError(f"{self.file.path}: {name} of {node.op} {node.name} is undefined; export it again")
        if name not in self._constants:
            raise UnsupportedLayerError(
                f"{self.file.path}: {node.op} {node.name} has the input {name} that is computed from the image, which "
                "cannot be imported; it must be constant"
            )
        if node.op not in _SIZES and self._counts_images(name):
            raise self.refuse(node, "an input that depends on the batch size")
        return self._constants[name]

    def weights(self, node: Node, position: int) -> Tensor | None:
        """Return the constant input ``position`` as a float32 tensor; None if it is omitted."""
        found = self.array(node, position)
        return None if found is None else torch.from_numpy(np.array(found, np.float32))

    def required(self, node: Node, position: int) -> Tensor:
        """Return the constant input ``position``, which must exist, as a float32 tensor."""
        found = self.weights(node, position)
        if found is None:
            raise CheckpointError(f"{self.file.path}: {node.op} {node.name} has no input {position}; export it again")
        return found

    def integers(self, node: Node, position: int, attribute: str | None = None) -> list[int] | None:
        """Return sizes, axes or indices from an attribute (older opsets) or a constant input (newer opsets)."""
        if attribute is not None and attribute in node.attributes:
            value = node.attributes[attribute]
            return list(value) if isinstance(value, (list, tuple)) else [int(value)]
        found = self.array(node, position)
        return None if found is None else [int(each) for each in found.flatten()]

    def value(self, node: Node, position: int = 0) -> fx.Node:
        """Return the node of input ``position``, which must not be constant.

        Raises:
            CheckpointError: no node computes the input.
            UnsupportedLayerError: the input is constant.
        """
        name = node.inputs[position] if node.has(position) else ""
        if name in self._constants:
            raise self.refuse(node, f"the constant input {name} instead of one computed from the image")
        if name not in self._values:
            raise CheckpointError(
                f"{self.file.path}: {name or 'an input'} of {node.op} {node.name} is undefined; export it again"
            )
        return self._values[name]

    def tensor(self, node: Node, position: int) -> fx.Node:
        """Return the node of input ``position``, constant or not."""
        return self.stored(node, position) if self.is_constant(node, position) else self.value(node, position)

    def stored(self, node: Node, position: int) -> fx.Node:
        """Return the node of the constant input ``position``."""
        name = node.inputs[position]
        self.array(node, position)
        if name not in self._stored:
            self._stored[name] = torch.from_numpy(np.array(self._constants[name]))
        return self.keep(self._stored[name], self._origins.get(name, name))

    def keep(self, tensor: Tensor, name: str) -> fx.Node:
        """Store a constant under ``name`` and return its node."""
        node = self.constant(tensor, _plain(name) or "constant")
        return node if "value" in node.meta else self._with_value(node, lambda: tensor)

    def repeated(self, node: Node, position: int) -> fx.Node:
        """Return the node of input ``position``; a constant for one image is repeated for the batch."""
        made = self.tensor(node, position)
        if node.inputs[position] not in self._for_two:
            return made
        sizes = [self.count_of_images(), *made.meta["value"].shape[1:]]
        return self.function(torch.ops.aten.expand.default, (made, sizes), {}, f"{self.name_of(node)}_repeated")

    def count_of_images(self) -> fx.Node:
        """Add a node that computes the batch size at run time."""
        images = next(each for each in self.graph.nodes if each.op == "placeholder")
        return self.function(torch.ops.aten.sym_size.int, (images, 0), {}, "count")

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor that is no plain constant, with :attr:`batch` as its batch size."""
        if name in self._for_two:
            return self._shape_of_rows(name)
        if name in self._values:
            return self.sizes(self._values[name])
        if name not in self._shapes:
            raise CheckpointError(f"{self.file.path}: the tensor {name} is undefined; export it again")
        return self._shapes[name]

    def _shape_of_rows(self, name: str) -> tuple[int, ...]:
        one, two = self._constants[name].shape, self._for_two[name].shape
        if one[1:] != two[1:] or not one or two[0] not in (one[0], 2 * one[0]):
            assert self._node is not None
            raise self.refuse(self._node, "a shape that depends on the batch size")
        return one if one == two else (_BATCH * one[0], *one[1:])

    def shape_of(self, node: Node, position: int = 0) -> tuple[int, ...]:
        """Return the shape of input ``position``."""
        if self.is_constant(node, position):
            return tuple(self._constants[node.inputs[position]].shape)
        return self.sizes(self.value(node, position))

    @property
    def batch(self) -> int:
        """Batch size in all inferred shapes."""
        return _BATCH

    @property
    def declared_batch(self) -> int:
        """Batch size in the file; 0 if it is dynamic."""
        return int(self.file.image.type.tensor_type.shape.dim[0].dim_value)

    def name_value(self, name: str, value: fx.Node) -> None:
        """Make ``value`` available to rules under a name that is not in the file."""
        self._values[name] = value

    def named_value(self, name: str) -> fx.Node:
        """Return the node that :meth:`name_value` assigned last to ``name``."""
        return self._values[name]

    @staticmethod
    def sizes(node: fx.Node) -> tuple[int, ...]:
        """Return the shape of the output of ``node``, a node of the new graph."""
        return tuple(node.meta["value"].shape)

    @staticmethod
    def counts(size: int) -> bool:
        """True if ``size`` is a multiple of the batch size."""
        return size != 0 and size % _BATCH == 0

    def refuse(self, node: Node, what: str) -> UnsupportedLayerError:
        """Return the error for a supported operator with the unsupported property ``what``."""
        return self.file.refusal(node, what)

    def name_of(self, node: Node) -> str:
        """Return a layer name: the weight's without ``.weight``, like torch's exporter, or the node's own."""
        if len(node.inputs) > 1:
            weight = self._origins.get(node.inputs[1], node.inputs[1])
            if weight.endswith(".weight") and node.inputs[1] in self._constants:
                return weight.removesuffix(".weight")
        return _plain(node.name)

    def readers(self, name: str) -> int:
        """Return the number of consumers of the tensor ``name``, including the graph's output."""
        return self._readers[name] + (name == self.file.output)

    # ---- new nodes, for rules

    def layer(self, layer: nn.Module, inputs: Sequence[fx.Node], name: str) -> fx.Node:
        """Call ``layer`` on ``inputs`` and infer the shape of the result."""
        node = super().layer(layer.eval(), inputs, name)
        return self._with_value(node, lambda: _shaped(layer, [each.meta["value"] for each in inputs]))

    def function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> fx.Node:
        """Call ``target``, a function without parameters, and infer the shape of the result."""
        node = super().function(target, args, kwargs, re.sub(r"\W", "_", name))
        values = fx.map_arg((args, kwargs), lambda each: each.meta["value"])
        return self._with_value(node, lambda: target(*values[0], **values[1]))

    def before_permutation(self, x: fx.Node) -> tuple[fx.Node, tuple[int, ...]]:
        """Return the input and dimension order of ``x`` if it is a Permute, else ``x`` and the identity order."""
        layer = self.layer_of(x)
        if isinstance(layer, Permute):
            return x.all_input_nodes[0], layer.dims
        return x, tuple(range(len(self.sizes(x))))

    def permuted(self, x: fx.Node, dims: Sequence[int], name: str) -> fx.Node:
        """Permute the dimensions of ``x``; consecutive permutations are merged, and the identity is dropped."""
        x, before = self.before_permutation(x)
        dims = [before[dim] for dim in dims]
        return x if dims == sorted(dims) else self.layer(Permute(tuple(dims)), (x,), name)

    def elementwise(self, layer: nn.Module, x: fx.Node, name: str) -> fx.Node:
        """Call the elementwise ``layer`` before a permutation, so that the latter can merge with its inverse."""
        x, dims = self.before_permutation(x)
        return self.permuted(self.layer(layer, (x,), name), dims, f"{name}_permuted")

    def layer_of(self, x: fx.Node) -> nn.Module | None:
        """Return the layer that computes ``x``; None for a function."""
        return self.root.get_submodule(str(x.target)) if x.op == "call_module" else None

    def call(self, node: Node, layer: nn.Module, suffix: str = "") -> fx.Node:
        """Call ``layer`` on the first input of ``node``."""
        return self.layer(layer, (self.value(node),), self.name_of(node) + suffix)

    def reshape(self, x: fx.Node, shape: Sequence[int], name: str) -> fx.Node:
        """Reshape ``x`` to ``shape``, in which exactly one size depends on the batch size."""
        before, after = self.sizes(x), tuple(shape)
        if before == after:
            return x
        assert self._node is not None
        counting = [size for size in after if self.counts(size)]
        if len(counting) != 1 or int(np.prod(before, dtype=object)) != int(np.prod(after, dtype=object)):
            raise self.refuse(self._node, f"the shape {_written(after)} for an input {_written(before)}")
        if len(after) == 2 and len(before) > 2 and before[0] == after[0] == _BATCH:
            return self.layer(nn.Flatten(1), (x,), name)
        return self.layer(Reshape(tuple(-1 if self.counts(size) else size for size in after)), (x,), name)

    def per_image(self, sizes: Sequence[int], before: Sequence[int]) -> list[int]:
        """Scale the first size of a reshape from the file's fixed batch size to :attr:`batch`."""
        declared = self.declared_batch
        total = int(np.prod(before, dtype=object))
        if declared and sizes and sizes[0] % declared == 0:
            scaled = [sizes[0] // declared * _BATCH, *sizes[1:]]
            if int(np.prod(scaled, dtype=object)) == total:
                return scaled
        return list(sizes)

    def _with_value(self, node: fx.Node, compute: Callable[[], Any]) -> fx.Node:
        try:
            with self._fake, torch.no_grad():
                node.meta["value"] = compute()
        except Exception as error:  # torch may raise anything
            raise UnsupportedLayerError(
                f"{self.file.path}: {self._where()} cannot be imported, torch reports: {one_line(error, 200)}"
            ) from error
        self._check_size(node.meta["value"])
        return node

    def _check_size(self, value: Any) -> None:
        size = sum(each.nbytes for each in tree_leaves(value) if isinstance(each, Tensor) and len(each.shape))
        check("activations", size / _BATCH, f"{self.file.path}, at {self._where()},")


def _shaped(layer: nn.Module, inputs: Sequence[Any]) -> Any:
    """Run ``layer`` with fake parameters, since FakeTensorMode caches output shapes of fake tensors only."""
    tensors = dict(chain(layer.named_parameters(), layer.named_buffers()))
    fakes = {name: torch.empty(each.shape, dtype=each.dtype) for name, each in tensors.items()}
    return torch.func.functional_call(layer, fakes, tuple(inputs))


def _in_batch(value: Array, batch: int) -> Array:
    """Return sizes for another batch size."""
    if value.dtype == np.bool_:
        return value
    return np.where(value % _BATCH == 0, value // _BATCH * batch, value).astype(value.dtype)


def _plain(name: str) -> str:
    """Convert a name in the file to the name of a layer."""
    return re.sub(r"\W+", "_", name.strip("/")).strip("_")


def _written(shape: Sequence[int]) -> str:
    sizes = ("N" if size == _BATCH else f"{size // _BATCH}N" if size and size % _BATCH == 0 else size for size in shape)
    return f"[{', '.join(map(str, sizes))}]"


Rule = Callable[[Importer, Node], "fx.Node | list[fx.Node] | None"]
"""Function that adds layers for a node and returns its outputs; None if the node's attributes are not supported."""
