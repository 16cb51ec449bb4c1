"""Load ``.pt2`` files of ``torch.export.save`` without running code from them.

``torch.export.load`` trusts its file: it unpickles example inputs, tensor subclasses and custom objects, evaluates
size expressions and guards as Python, looks up operators anywhere in torch, and pastes names into source code. This
module therefore writes a clean copy first: it drops example inputs, guards and stack traces and rejects everything
else that could be code. torch loads only the copy.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from qface.archives import names_in, opened
from qface.data.synthetic import synthetic_crops
from qface.errors import CheckpointError, LimitError, QFaceError, one_line
from qface.graph.capture import capture
from qface.limits import Allowance, check, elements_of, named, parse_json
from qface.models.checkpoints import preprocessing_for
from qface.network_output import embedding_of
from qface.preprocessing import Preprocessing, with_preprocessing
from qface.signals import signals_noted

__all__ = ["is_exported_program", "load_exported_program"]

_FORMAT = "archive_format"
_OLD_GRAPH = "serialized_exported_program.json"  # written by torch < 2.7
_NAME = re.compile(r"[\w.+]*")
_SYMBOL = re.compile(r"Symbol\('\w+'(, \w+=(True|False))*\)")
_EXPRESSION = re.compile(r"(\d+(\.\d+)?|[\s+\-*/%(),<>=]|\b[A-Za-z_]\w*\b)*")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_SIZE = re.compile(r"[su]\d+")
_FUNCTIONS = frozenset({"Max", "Min", "Mod", "PythonMod", "FloorDiv", "CeilDiv", "Eq", "Ne", "Ge", "Gt", "Le", "Lt"})
_OPERATORS = frozenset(
    {"getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "lt", "le"}
) | {
    "gt",
    "ge",
}
_HIGHER_ORDER = ("wrap_with_autocast", "wrap_with_set_grad_enabled")
_SPECS = frozenset({None, "builtins.tuple", "builtins.list", "builtins.dict"})
_MIN_COSINE = 0.9999


def is_exported_program(path: str | Path) -> bool:
    """True if ``torch.export.save`` wrote the file at ``path``; its name does not matter."""
    return any(name.rpartition("/")[2] in (_FORMAT, _OLD_GRAPH) for name in names_in(path))


def load_exported_program(path: str | Path) -> tuple[fx.GraphModule, Preprocessing]:
    """Load the network in a ``.pt2`` file as a graph of layers in eval mode, and its likely Preprocessing.

    Raises:
        CheckpointError: the file is damaged, contains code, has an input other than images [N, 3, H, W], or the
            captured layers compute something else than the file.
        LimitError: the file asks for more memory or operators than :mod:`qface.limits` allows.
        TraceError: the network cannot be captured.
        UnsupportedLayerError: the network calls an operator that qface does not support.
    """
    program = _program(path)
    preprocessing, count = _images_of(program, path)
    with _telling_damage(path), signals_noted():
        module = ExportedNetwork(program).float()
    try:
        network = capture(with_preprocessing(module, preprocessing))
    except QFaceError as error:
        fixed = f" (it was exported for a batch size of {count}; export it with a dynamic batch)" if count else ""
        raise type(error)(f"{path}: {error}{fixed}") from error
    _check_agreement(module, network, preprocessing, count or 1, path)
    return network.eval(), preprocessing


def _program(path: str | Path) -> ExportedProgram:
    with _telling_damage(path):
        with opened(path) as archive:
            content = _without_code(archive)
        with signals_noted(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(content)


@contextmanager
def _telling_damage(path: str | Path) -> Iterator[None]:
    """Convert any error that a damaged file causes to a CheckpointError."""
    try:
        with named(path):
            yield
    except LimitError:
        raise
    except _RefusedError as error:
        raise CheckpointError(
            f"{path} {error}, and qface does not run code from files; export the network to .onnx, or save its "
            "state_dict()"
        ) from None
    except Exception as error:  # damaged files may raise anything
        raise CheckpointError(
            f"{path} is not a valid exported program ({one_line(error, 200)}); export it again with torch "
            f"{torch.__version__.partition('+')[0]}"
        ) from error


class _RefusedError(Exception):
    """A file contains something that torch would run as code."""


def _without_code(archive: zipfile.ZipFile) -> io.BytesIO:
    """Copy the archive without the parts that torch would run or unpickle.

    Raises:
        _RefusedError: the network itself contains such parts.
    """
    names = archive.namelist()
    if _OLD_GRAPH in names:
        raise ValueError("it was written by torch < 2.7")
    (root,) = {name.removesuffix(_FORMAT) for name in names if name.rpartition("/")[2] == _FORMAT}
    if sum(name.startswith(f"{root}models/") for name in names) != 1:
        raise ValueError("it does not contain exactly one network")
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as clean:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError("it is compressed, but torch writes uncompressed files")
            name = info.filename.removeprefix(root)
            if not name.startswith("extra/"):
                clean.writestr(info.filename, _clean_part(name, archive, root))
    content.seek(0)
    return content


def _clean_part(name: str, archive: zipfile.ZipFile, root: str) -> bytes:
    """Return the content of the archive member ``name`` that is safe for torch to read."""
    content = b"" if name.startswith("data/sample_inputs/") else archive.read(root + name)
    if name.startswith("models/"):
        return json.dumps(_clean_graph(parse_json(content, "its graph"))).encode()
    if name.startswith("data/aotinductor/"):
        raise _RefusedError("contains compiled code")
    if name.startswith(("data/weights/", "data/constants/")):
        if name.endswith(".json"):
            _check_payloads(parse_json(content, "its list"), archive, f"{root}{name.rpartition('/')[0]}/")
        elif name.endswith(".pt"):
            raise _RefusedError("contains pickled tensors")
    return content


def _check_payloads(listed: dict[str, Any], archive: zipfile.ZipFile, folder: str) -> None:
    """Check that weights or constants are plain tensors that fit into their bytes.

    Raises:
        LimitError: the same bytes are referenced again and again.
    """
    allowance = Allowance("the list of its weights", sum(info.file_size for info in archive.infolist()))
    for name, payload in listed["config"].items():
        file, meta = payload["path_name"], payload["tensor_meta"]
        if payload["use_pickle"] or meta is None or not file.startswith(("weight_", "tensor_")):
            raise _RefusedError(f"contains {name!r} as a pickled object")
        sizes = [size["as_int"] for size in meta["sizes"]]
        size = archive.getinfo(folder + file).file_size
        allowance.spend(size)
        if elements_of(sizes, name) > size:
            raise ValueError(f"{name} has the shape {sizes}, which needs more bytes than the file has")
        _check_names(payload)


def _clean_graph(model: dict[str, Any]) -> dict[str, Any]:
    model["guards_code"] = []
    graph_module = model["graph_module"]
    graph_module["metadata"] = {}
    graph_module["treespec_namedtuple_fields"] = {}
    _drop_traces(graph_module)
    _check_names(model)
    return model


def _drop_traces(value: Any) -> None:
    """Drop each node's metadata except the module that calls it."""
    for each in _dicts(value):
        if isinstance(each.get("metadata"), dict):
            stack = each["metadata"].get("nn_module_stack")
            each["metadata"] = {} if stack is None else {"nn_module_stack": str(stack)}
        if each.get("custom_obj_values"):
            raise _RefusedError("contains custom objects")


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    for each in value if isinstance(value, list) else ():
        yield from _dicts(each)


def _check_names(value: Any, key: str = "") -> None:
    """Reject strings that torch could evaluate as code, at any depth of the graph."""
    if isinstance(value, dict):
        for name, each in value.items():
            _check_text(name, "name")
            _check_names(each, name)
    elif isinstance(value, list):
        for each in value:
            _check_names(each, key)
    elif isinstance(value, str):
        _check_text(value, key)


def _check_text(text: str, key: str) -> None:
    checks = {"target": _is_operator, "as_operator": _is_operator, "expr_str": _is_expression}
    checks |= {"in_spec": _is_plain_spec, "out_spec": _is_plain_spec, "as_string": _anything}
    checks |= {"nn_module_stack": _anything}  # torch only splits it
    if not checks.get(key, _is_name)(text):
        raise _RefusedError(f"contains {text[:60]!r} as {key!r}, which could be code")


def _anything(text: str) -> bool:
    return True


def _is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None


def _is_operator(text: str) -> bool:
    """True if ``text`` is an operator of networks that writes no file, not another function of torch."""
    if text.startswith("torch.ops.aten.") and text.count(".") == 4 and _is_name(text):
        name, overload = text.split(".")[3:]
        operator = getattr(getattr(torch.ops.aten, name, None), overload, None)
        if not isinstance(operator, torch._ops.OpOverload):
            return False
        return all(argument.name != "filename" for argument in operator._schema.arguments)
    module, _, name = text.rpartition(".")
    allowed = {"_operator": _OPERATORS, "torch.ops.higher_order": _HIGHER_ORDER, "torch": ("sym_max", "sym_min")}
    return name in allowed.get(module, ())


def _is_expression(text: str) -> bool:
    """True if ``text`` is arithmetic on sizes."""
    plain = _SYMBOL.sub("s0", text)
    names = _IDENTIFIER.findall(plain)
    known = all(name in _FUNCTIONS or _SIZE.fullmatch(name) for name in names)
    return known and len(plain) <= 200 and "**" not in plain and _EXPRESSION.fullmatch(plain) is not None


def _is_plain_spec(text: str) -> bool:
    """True if ``text`` describes nested tuples, lists and dictionaries with plain keys."""
    return all(
        each.get("type") in _SPECS and "__enum__" not in str(each.get("context"))
        for each in _dicts(parse_json(text, "its structure"))
        if "children_spec" in each
    )


def _images_of(program: ExportedProgram, path: str | Path) -> tuple[Preprocessing, int | None]:
    """Return the likely Preprocessing of the network and its batch size, None if that is dynamic."""
    inputs = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    values = [node.meta.get("val") for node in program.graph.nodes if node.name in inputs]
    if len(values) != 1 or not isinstance(values[0], Tensor) or values[0].ndim != 4:
        raise CheckpointError(
            f"{path} must have one input, images [N, 3, height, width], but has {len(values)} inputs or another shape; "
            "export the recognition network alone"
        )
    count, channels, height, width = values[0].shape
    _check_values(program, path)
    if channels != 3 or not isinstance(height, int) or not isinstance(width, int):
        raise CheckpointError(
            f"{path} must have an input [N, 3, height, width] with fixed height and width, got "
            f"{list(values[0].shape)}; export it with only the batch size dynamic"
        )
    return preprocessing_for(height, width), count if isinstance(count, int) else None


def _check_values(program: ExportedProgram, path: str | Path) -> None:
    """Check the sizes of all values in the graph against the limits."""
    check("operators", len(program.graph.nodes), f"{path}")
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, Tensor):
            size = value.itemsize * float(prod(side for side in value.shape if isinstance(side, int)))
            check("activations", size, f"{path}, at {node.name},")


class ExportedNetwork(nn.Module):
    """An exported program as a module for any batch size.

    The module that ``ExportedProgram.module`` returns checks the batch size and forbids ``eval``. This one shares its
    parameters and modules under their names. It is not a ``GraphModule``, so that ``capture`` exports it again.
    """

    _forward: Callable[[Tensor], Any]

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        module = program.module(check_guards=False).requires_grad_(True)
        module._forward_pre_hooks.clear()
        module._forward_pre_hooks_with_kwargs.clear()
        for each in ("_parameters", "_buffers", "_modules"):
            self.__dict__[each] = getattr(module, each)  # shared, so that a replaced parameter is replaced in both
        self.__dict__["_forward"] = module.forward

    def forward(self, images: Tensor) -> Any:
        """Return the output of the program for ``images`` [N, 3, H, W]."""
        return self._forward(images)


@torch.no_grad()
def _check_agreement(
    module: nn.Module, network: nn.Module, preprocessing: Preprocessing, count: int, path: str | Path
) -> None:
    """Compare the layers with the program, also at twice the program's batch size."""
    images = preprocessing(synthetic_crops(2 * count))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = torch.cat([embedding_of(module(part)) for part in torch.split(images, count)])
    cosine = -1.0
    with contextlib.suppress(RuntimeError):  # sizes that do not fit another batch size
        cosine = float(torch.cosine_similarity(wanted, network(images)).min())
    if not cosine >= _MIN_COSINE:
        raise CheckpointError(
            f"{path}: its layers and the file differ on {2 * count} images (minimum cosine {cosine:.4f}); export it "
            "in eval mode with dynamic_shapes=({0: Dim('batch')},)"
        )
