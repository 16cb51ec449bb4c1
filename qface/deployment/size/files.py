"""Size entries of an ONNX file, exact to the byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
from onnx import TensorProto
from onnx.external_data_helper import uses_external_data

from qface.deployment.size.report import KINDS, SizeEntry
from qface.deployment.size.tensor_roles import TensorRoles
from qface.deployment.size.wire_format import Field, fields, name_of, size_of
from qface.errors import CheckpointError
from qface.models.onnx_import.onnx_file import telling_damage

__all__ = ["entries_of_file"]


def entries_of_file(path: Path) -> list[SizeEntry]:
    """Return all size entries of an ONNX file, ordered by kind; their bytes add up to the file size.

    Args:
        path: the ``.onnx`` file.

    Raises:
        CheckpointError: the file is missing, damaged, or stores weights in external files.
    """
    data, model = _read(path)
    with telling_damage(path):
        return _entries(data, model)


def _entries(data: bytes, model: onnx.ModelProto) -> list[SizeEntry]:
    roles = TensorRoles(model.graph)
    collector = _Collector()
    nodes, tensors = iter(model.graph.node), iter(model.graph.initializer)
    properties = iter(model.metadata_props)
    for field in fields(memoryview(data)):
        tag = name_of(onnx.ModelProto, field)
        if tag != "graph":
            collector.add(f"{tag}[{next(properties).key}]" if tag == "metadata_props" else tag, "metadata", field.size)
            continue
        collector.add("frame", "graph", field.size - len(field.payload))
        for part in fields(field.payload):
            tag = name_of(onnx.GraphProto, part)
            if tag == "node":
                collector.add_node(next(nodes), part)
            elif tag == "initializer":
                collector.add_tensor(next(tensors), part, roles)
            else:
                collector.add(tag, "graph", part.size)
    return collector.entries()


def _read(path: Path) -> tuple[bytes, onnx.ModelProto]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; pass an ONNX file") from error
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf has several error classes
        raise CheckpointError(f"{path} is no ONNX file, or damaged; export it again") from error
    if not model.HasField("graph"):
        raise CheckpointError(f"{path} holds no graph, so it is no ONNX model; export it again")
    if any(map(uses_external_data, model.graph.initializer)):
        raise CheckpointError(f"{path} stores weights in external files; save it as one file to measure it")
    return data, model


class _Collector:
    """Size entries by kind and name, in file order."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], SizeEntry] = {}

    def entries(self) -> list[SizeEntry]:
        """Return all entries, ordered by kind."""
        return sorted(self._entries.values(), key=lambda entry: KINDS.index(entry.kind))

    def add(self, name: str, kind: str, size: int) -> None:
        """Add an occurrence of anything but a tensor."""
        before = self._entries.get((kind, name), SizeEntry(name, kind, 0, 0))
        self._entries[kind, name] = replace(before, bytes=before.bytes + size, elements=before.elements + 1)

    def add_node(self, node: onnx.NodeProto, field: Field) -> None:
        """Add a node, with its names apart from the rest."""
        names = size_of(field.payload, onnx.NodeProto, ("input", "output", "name"))
        self.add(node.op_type, "node", field.size - names)
        self.add(node.op_type, "name", names)

    def add_tensor(self, tensor: TensorProto, field: Field, roles: TensorRoles) -> None:
        """Add an initializer: data, split among the tensors packed in it, name, and header."""
        data = sum(len(part.payload) for part in fields(field.payload) if name_of(TensorProto, part) in _DATA)
        name = size_of(field.payload, TensorProto, ("name",))
        parts = roles.parts(tensor, data)
        for part in parts:
            before = self._entries.get((part.kind, part.name))
            self._entries[part.kind, part.name] = part if before is None else _joined(before, part)
        self.add(parts[0].kind, "header", field.size - data - name)
        self.add(parts[0].kind, "name", name)


_DATA = frozenset({"raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data"})


def _joined(one: SizeEntry, other: SizeEntry) -> SizeEntry:
    """Merge two bit planes of one tensor."""
    return replace(one, bytes=one.bytes + other.bytes, bits=(one.bits or 0) + (other.bits or 0))
