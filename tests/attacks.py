"""Files that ask for far more than they hold; each function writes one and returns its path."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.torch import save_file

import qface
from tests.models.onnx_graphs import Graph, network
from tests.networks import tiny_face_net

Attack = Callable[[Path], Path]

DEPTH = 300_000


def nested_tuples(depth: int = DEPTH) -> bytes:
    """A pickle of a set that holds one tuple, in which ``depth`` others lie: adding it asks for its hash."""
    nested = b")" + pickle.TUPLE1 * depth
    return pickle.PROTO + b"\x02c__builtin__\nset\n" + pickle.EMPTY_LIST + nested + b"a" + pickle.TUPLE1 + b"R."


def nested_key(depth: int = DEPTH) -> bytes:
    """A pickle of a dictionary whose key is nested as deep."""
    return pickle.PROTO + b"\x02}" + b")" + pickle.TUPLE1 * depth + b"K\x01s."


def zipped(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED, **parts: bytes) -> Path:
    """A torch file whose object is ``pickled``."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
        for name, content in parts.items():
            archive.writestr(f"archive/data/{name}", content)
    return path


def legacy(path: Path, pickled: bytes) -> Path:
    """A file as torch wrote it before 1.6 whose object is ``pickled``."""
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [pickle.dumps(each, 2) for each in (0x1950A86A20F9469CFC6C, 1001, machine)]
    path.write_bytes(b"".join(parts) + pickled + pickle.dumps([], 2))
    return path


def deep_bin(folder: Path) -> Path:
    path = folder / "deep.bin"
    path.write_bytes(nested_key())
    return path


def deep_zip(folder: Path) -> Path:
    return zipped(folder / "deep.pth", nested_key())


def deep_zip_of_set(folder: Path) -> Path:
    return zipped(folder / "deep_set.pth", nested_tuples())


def deep_legacy(folder: Path) -> Path:
    return legacy(folder / "deep_legacy.pth", nested_key())


def repeated_array(folder: Path) -> Path:
    """A ``.bin`` in which one encoded image of 300 KB is named 20,000 times."""
    image = np.frombuffer(np.random.default_rng(0).bytes(300_000), np.uint8)
    path = folder / "repeated.bin"
    path.write_bytes(pickle.dumps(([image] * 20_000, [True, False] * 5_000), 4))
    return path


def repeated_text(folder: Path) -> Path:
    """A ``.bin`` in which Python 3's spelling of bytes is called 5,000 times on one text of 1 MB."""
    call = b"h\x00h\x01R"
    text = "a" * 1_000_000
    content = b"".join((
        pickle.PROTO, b"\x02(c_codecs\nencode\nq\x000X", struct.pack("<I", len(text)), text.encode(),
        pickle.TUPLE1, b"q\x010]", b"(", call * 5_000, b"e](", b"\x88\x89" * 1_250, b"et.",
    ))  # fmt: skip
    path = folder / "repeated_text.bin"
    path.write_bytes(content)
    return path


def long_numbers(folder: Path) -> Path:
    """A ``.bin`` with an array whose shape is one number of 4,000 bytes, 60,000 times."""
    number = pickle.LONG4 + struct.pack("<i", 4000) + b"\x7f" * 4000
    kind = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
    shape = b"(" + number + b"q\x05" + b"h\x05" * 59_999 + b"t"
    array = b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01" + shape + kind + b"\x89U\x01atb"
    path = folder / "numbers.bin"
    path.write_bytes(pickle.PROTO + b"\x02](" + array + array + b"e](\x88e\x86.")
    return path


class _Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def huge_bytearray(folder: Path) -> Path:
    """A checkpoint that asks for a bytearray of 6 GB, which torch.load would make."""
    return zipped(folder / "bytearray.pth", pickle.dumps({"a": _Call(bytearray, 6 * 10**9)}, 2))


def expanded(folder: Path) -> Path:
    """One number that claims to be a network's weight of 10^9."""
    tensors = dict(tiny_face_net().state_dict())
    tensors["extra"] = torch.zeros(1).expand(10**9)
    path = folder / "expanded.pth"
    torch.save(tensors, path)
    return path


def transposed(folder: Path) -> Path:
    """3,000 transposed views of one storage."""
    matrix = torch.zeros(500, 1000)
    path = folder / "transposed.pth"
    torch.save({f"weight{number}": matrix.T for number in range(3_000)}, path)
    return path


def transposed_module(folder: Path) -> Path:
    """The same within a whole module."""
    module, matrix = torch.nn.Module(), torch.zeros(500, 1000)
    for number in range(3_000):
        module.register_buffer(f"weight{number}", matrix.T)
    path = folder / "transposed_module.pth"
    torch.save(module, path)
    return path


def deflated(folder: Path) -> Path:
    """A checkpoint whose one storage is 1.2 GB of zeros, compressed."""
    plain, path = folder / "plain.pth", folder / "deflated.pth"
    torch.save({"a": torch.zeros(1)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for info in source.infolist():
            content = source.read(info)
            if info.filename.endswith("data.pkl"):
                content = content.replace(b"K\x01tq", b"J" + struct.pack("<i", 3 * 10**8) + b"tq", 1)
            if not info.filename.endswith("data/0"):
                archive.writestr(info.filename, content)
                continue
            with archive.open(info.filename, "w", force_zip64=True) as part:
                for _ in range(1_200):
                    part.write(bytes(10**6))
    plain.unlink()
    return path


def _saved(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str], dict[str, Any]]:
    """Tensors, metadata and graph of an honest file."""
    path = folder / "honest.safetensors"
    qface.save(tiny_face_net(), path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata())
    return tensors, metadata, json.loads(metadata["graph"])


def with_graph(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> Path:
    """A saved network whose graph ``change`` has changed."""
    tensors, metadata, graph = _saved(folder)
    change(graph)
    save_file(tensors, folder / name, {**metadata, "graph": json.dumps(graph)})
    return folder / name


def _insert_layer(graph: dict[str, Any], kind: str, arguments: dict[str, Any], count: int = 1) -> None:
    """Put ``count`` layers of a kind between the image and the network."""
    nodes = graph["nodes"]
    before, made = nodes[0]["name"], []
    for number in range(count):
        name = f"more_{number}"
        graph["layers"][name] = {"type": kind, "arguments": {"dict": arguments}}
        source = {"node": made[-1]["name"] if made else before}
        made.append({"name": name, "op": "call_module", "target": name, "args": {"tuple": [source]},
                     "kwargs": {"dict": {}}})  # fmt: skip
    text = json.dumps(nodes[1:]).replace(json.dumps({"node": before}), json.dumps({"node": made[-1]["name"]}))
    graph["nodes"] = [nodes[0], *made, *json.loads(text)]


def huge_layer(folder: Path) -> Path:
    """A saved graph with a PReLU of 4 * 10^8 slopes."""
    return with_graph(
        folder, "prelu.safetensors", lambda graph: _insert_layer(graph, "PReLU", {"num_parameters": 4 * 10**8})
    )


def huge_map(folder: Path) -> Path:
    """A saved graph that enlarges its images 200 times each way."""
    return with_graph(
        folder,
        "map.safetensors",
        lambda graph: _insert_layer(graph, "UpsampleNearest", {"scale": {"tuple": [200, 200]}}),
    )


def long_chain(folder: Path) -> Path:
    """A saved graph that begins with 5,000 ReLUs."""
    return with_graph(
        folder, "chain.safetensors", lambda graph: _insert_layer(graph, "ReLU", {"inplace": False}, 5_000)
    )


def deep_graph(folder: Path) -> Path:
    """A saved graph whose JSON is nested 100,000 times."""
    tensors, metadata, _ = _saved(folder)
    path = folder / "deep.safetensors"
    save_file(tensors, path, {**metadata, "graph": "[" * 100_000 + "]" * 100_000})
    return path


def wide_graph(folder: Path) -> Path:
    """A saved graph whose JSON is 30 million empty lists."""
    tensors, metadata, _ = _saved(folder)
    path = folder / "wide.safetensors"
    save_file(tensors, path, {**metadata, "graph": "[" + "[]," * 30_000_000 + "[]]"})
    return path


def huge_preprocessing(folder: Path) -> Path:
    """A saved network that reads images of 10^6 x 10^6."""
    tensors, metadata, _ = _saved(folder)
    path = folder / "preprocessing.safetensors"
    record = {**json.loads(metadata["preprocessing"]), "size": [10**6, 10**6]}
    save_file(tensors, path, {**metadata, "preprocessing": json.dumps(record)})
    return path


# ---- ONNX


def _onnx(folder: Path, name: str, make: Callable[[Graph], str]) -> Path:
    """A network to whose images a constant is added, the sum of all that ``make`` computes."""
    graph = Graph(opset=17)
    constant = make(graph)
    graph.last = "data"
    graph.add("Add", constant)
    network(graph)
    return graph.save(folder / name)


def _summed(graph: Graph, name: str) -> str:
    return graph.add("ReduceSum", after=name, keepdims=0)


def onnx_filled(folder: Path) -> Path:
    def make(graph: Graph) -> str:
        made = graph.add("ConstantOfShape", after=graph.constant(value=np.array([10**9])))
        return _summed(graph, made)

    return _onnx(folder, "filled.onnx", make)


def onnx_expanded(folder: Path) -> Path:
    def make(graph: Graph) -> str:
        made = graph.add("Expand", graph.constant(value=np.array([10**9])), after=graph.constant(1))
        return _summed(graph, made)

    return _onnx(folder, "expanded.onnx", make)


def onnx_tiled(folder: Path) -> Path:
    def make(graph: Graph) -> str:
        made = graph.add("Tile", graph.constant(value=np.array([10**9])), after=graph.constant(1))
        return _summed(graph, made)

    return _onnx(folder, "tiled.onnx", make)


def onnx_padded(folder: Path) -> Path:
    def make(graph: Graph) -> str:
        made = graph.add("Pad", graph.constant(value=np.array([0, 10**9])), after=graph.constant(1))
        return _summed(graph, made)

    return _onnx(folder, "padded.onnx", make)


def onnx_doubled(folder: Path) -> Path:
    def make(graph: Graph) -> str:
        made = graph.constant(16)
        for _ in range(26):
            made = graph.add("Concat", made, after=made, axis=0)
        return _summed(graph, made)

    return _onnx(folder, "doubled.onnx", make)


def onnx_range(folder: Path) -> Path:
    def make(graph: Graph) -> str:
        start, stop, step = (graph.constant(value=np.array(each)) for each in (0.0, 1e9, 1.0))
        return _summed(graph, graph.add("Range", stop, step, after=start))

    return _onnx(folder, "range.onnx", make)


def onnx_poisoned_range(folder: Path) -> Path:
    """A range up to NaN, in the hope that the count of what is left becomes NaN, and then a large constant."""

    def make(graph: Graph) -> str:
        start, stop, step = (graph.constant(value=np.array(each)) for each in (0.0, float("nan"), 1.0))
        graph.add("Range", stop, step, after=start)
        first = graph.add("ReduceSum", keepdims=0)
        made = graph.add("ConstantOfShape", after=graph.constant(value=np.array([10**9])))
        return graph.add("Add", first, after=_summed(graph, made))

    return _onnx(folder, "poisoned.onnx", make)


def onnx_one_hot(folder: Path) -> Path:
    def make(graph: Graph) -> str:
        indices, depth = graph.constant(value=np.arange(1000)), graph.constant(value=np.array(10**6))
        values = graph.constant(value=np.array([0.0, 1.0]))
        return _summed(graph, graph.add("OneHot", depth, values, after=indices))

    return _onnx(folder, "one_hot.onnx", make)


def onnx_large_product(folder: Path) -> Path:
    """Products of constant matrices of whole numbers, which no BLAS computes."""

    def make(graph: Graph) -> str:
        sides = graph.constant(value=np.array([3000, 3000]))
        value = numpy_helper.from_array(np.array([1], np.int64))
        made = graph.add("ConstantOfShape", after=sides, value=value)
        return graph.add("Cast", after=_summed(graph, graph.add("MatMul", made, after=made)), to=TensorProto.FLOAT)

    return _onnx(folder, "product.onnx", make)


def _loop(rounds: int) -> onnx.GraphProto:
    inputs = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        helper.make_tensor_value_info("sum", TensorProto.FLOAT, [1]),
    ]
    outputs = [
        helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
        helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]),
    ]
    nodes = [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Add", ["sum", "sum"], ["more"])]
    return helper.make_graph(nodes, "body", inputs, outputs)


def _looped(graph: Graph) -> str:
    rounds, go = graph.constant(value=np.array(2**62)), graph.constant(value=np.array(True))
    return graph.add("Loop", go, graph.constant(1, value=np.zeros(1)), after=rounds, body=_loop(2**62))


def onnx_loop(folder: Path) -> Path:
    return _onnx(folder, "loop.onnx", _looped)


def onnx_idle_loop(folder: Path) -> Path:
    """A loop that the embedding does not need, in a second output, which a runtime would compute all the same."""
    graph = Graph(opset=17)
    extra = _looped(graph)
    graph.last = "data"
    network(graph)
    path = graph.save(folder / "idle_loop.onnx", outputs=(graph.last, extra))
    model = onnx.load(path)
    for value, shape in zip(model.graph.output, (["n", 6], [1]), strict=True):
        value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, shape))
    onnx.save(model, path)
    return path


def onnx_pattern(folder: Path) -> Path:
    def make(graph: Graph) -> str:
        text = graph.constant(value=np.array(["a" * 40 + "!"], object), name="text")
        made = graph.add("RegexFullMatch", after=text, pattern="(a+)+$")
        return graph.add("Cast", after=made, to=TensorProto.FLOAT)

    def with_new_opset(path: Path) -> Path:
        model = onnx.load(path)
        model.opset_import[0].version = 20
        onnx.save(model, path)
        return path

    return with_new_opset(_onnx(folder, "pattern.onnx", make))


def onnx_functions(folder: Path) -> Path:
    """Functions each of which calls the one before it twice, thirty times."""
    graph = Graph(opset=17)
    graph.add("F29")
    graph.nodes[-1].domain = "local"
    network(graph)
    path = graph.save(folder / "functions.onnx")
    model = onnx.load(path)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    for number in range(30):
        op, domain = (f"F{number - 1}", "local") if number else ("Relu", "")
        nodes = [
            helper.make_node(op, ["x"], ["y"], domain=domain),
            helper.make_node(op, ["y"], ["z"], domain=domain),
        ]
        model.functions.append(helper.make_function("local", f"F{number}", ["x"], ["z"], nodes, opsets))
    model.opset_import.append(helper.make_opsetid("local", 1))
    onnx.save(model, path)
    return path


def onnx_large_input(folder: Path) -> Path:
    graph = Graph(opset=17, shape=("n", 3, 20_000, 20_000))
    graph.add("GlobalAveragePool")
    graph.add("Flatten")
    return graph.save(folder / "input.onnx")


def onnx_large_map(folder: Path) -> Path:
    """Images are enlarged 200 times each way."""
    graph = Graph(opset=17)
    graph.add("Resize", "", graph.constant(value=np.array([1.0, 1.0, 200.0, 200.0])), mode="nearest",
              coordinate_transformation_mode="asymmetric", nearest_mode="floor")  # fmt: skip
    graph.add("GlobalAveragePool")
    graph.add("Flatten")
    return graph.save(folder / "large_map.onnx")


def onnx_long_list(folder: Path) -> Path:
    """A list of 10^9 numbers, of which the file has four."""
    path = _onnx(
        folder, "long_list.onnx", lambda graph: _summed(graph, graph.add("Mul", graph.constant(4), after="listed"))
    )
    model = onnx.load(path)
    listed = onnx.helper.make_tensor("listed", TensorProto.FLOAT, [4], bytes(16), raw=True)
    listed.dims[0] = 10**9
    model.graph.initializer.append(listed)
    path.write_bytes(model.SerializeToString())
    return path


def onnx_long_prefix(folder: Path) -> Path:
    """2,000 sums before the network, each of which may be a normalization."""
    graph = Graph(opset=17)
    one = graph.constant(value=np.array([1.0]))
    for _ in range(2_000):
        graph.add("Add", one)
    network(graph)
    return graph.save(folder / "prefix.onnx")


def onnx_long_chain(folder: Path) -> Path:
    """5,000 ReLUs before the network."""
    graph = Graph(opset=17)
    for _ in range(5_000):
        graph.add("Relu")
    network(graph)
    return graph.save(folder / "chain.onnx")


# ---- images


def large_photo(folder: Path) -> Path:
    """A PNG of 13,300 x 13,300, half a megabyte."""
    path = folder / "photos" / "large.png"
    path.parent.mkdir(exist_ok=True)
    Image.new("L", (13_300, 13_300)).save(path)
    return path.parent


def large_image_in_bin(folder: Path) -> Path:
    """A verification set whose images are squares of 13,000."""
    content = io.BytesIO()
    Image.new("1", (13_000, 13_000)).save(content, "PNG")
    path = folder / "large.bin"
    path.write_bytes(pickle.dumps(([content.getvalue()] * 2, [True]), 2))
    return path


PAIR_SETS: tuple[Attack, ...] = (deep_bin, repeated_array, repeated_text, long_numbers, large_image_in_bin)
CHECKPOINTS: tuple[Attack, ...] = (
    *(deep_zip, deep_zip_of_set, deep_legacy),
    *(huge_bytearray, expanded, transposed, transposed_module, deflated),
)
SAVED_GRAPHS: tuple[Attack, ...] = (huge_layer, huge_map, long_chain, deep_graph, wide_graph, huge_preprocessing)
ONNX_FILES: tuple[Attack, ...] = (
    *(onnx_filled, onnx_expanded, onnx_tiled, onnx_padded, onnx_doubled, onnx_range, onnx_poisoned_range),
    *(onnx_one_hot, onnx_large_product, onnx_loop, onnx_idle_loop, onnx_pattern, onnx_functions),
    *(onnx_large_input, onnx_large_map, onnx_long_list, onnx_long_prefix, onnx_long_chain),
)
