"""Serialization of FX graphs as JSON.

An allow-list of layers and functions ensures that files cannot run code. Other layers must be registered with
:func:`register_layer`. Names and targets are checked on reading, since torch.fx pastes them into Python source.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from qface.errors import CheckpointError, LimitError, UnsupportedLayerError, one_line
from qface.graph.aten import FLOAT_FUNCTIONS
from qface.graph.dry_run import BuildGuard, dry_run
from qface.graph.layers import (
    Add,
    ChannelAffine,
    Concat,
    L2Normalize,
    Maximum,
    Multiply,
    Pad,
    Permute,
    Reshape,
    Slice,
    UpsampleNearest,
)
from qface.graph.queries import SYMBOLIC_FUNCTIONS
from qface.limits import Allowance, check
from qface.signals import signals_noted

__all__ = ["check_rebuilt", "graph_from_data", "graph_to_data", "on_rebuild", "register_layer", "registered_layers"]

CONVOLUTION_ARGUMENTS = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "bias",
    "padding_mode",
)
LINEAR_ARGUMENTS = ("in_features", "out_features", "bias")
_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
_POOL = ("kernel_size", "stride", "padding")

# Constructor arguments, which are saved from the attributes of the same names.
_LAYERS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv1d: CONVOLUTION_ARGUMENTS,
    nn.Conv2d: CONVOLUTION_ARGUMENTS,
    nn.Linear: LINEAR_ARGUMENTS,
    nn.BatchNorm1d: _NORM,
    nn.BatchNorm2d: _NORM,
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine", "bias"),
    nn.GroupNorm: ("num_groups", "num_channels", "eps", "affine"),
    nn.PReLU: ("num_parameters",),
    nn.ReLU: ("inplace",),
    nn.ReLU6: ("inplace",),
    nn.LeakyReLU: ("negative_slope", "inplace"),
    nn.ELU: ("alpha", "inplace"),
    nn.GELU: ("approximate",),
    nn.SiLU: ("inplace",),
    nn.Hardswish: ("inplace",),
    nn.Hardsigmoid: ("inplace",),
    nn.Hardtanh: ("min_val", "max_val", "inplace"),
    nn.Mish: ("inplace",),
    nn.Sigmoid: (),
    nn.Softplus: ("beta", "threshold"),
    nn.Tanh: (),
    nn.Softmax: ("dim",),
    nn.MaxPool2d: (*_POOL, "dilation", "ceil_mode"),
    nn.AvgPool2d: (*_POOL, "ceil_mode", "count_include_pad", "divisor_override"),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.AdaptiveMaxPool2d: ("output_size",),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Dropout: ("p", "inplace"),
    nn.Dropout2d: ("p", "inplace"),
    nn.Identity: (),
    nn.PixelShuffle: ("upscale_factor",),
    Add: (),
    Multiply: (),
    Concat: ("dim",),
    L2Normalize: (),
    Maximum: (),
    Pad: ("padding", "mode"),
    Permute: ("dims",),
    Reshape: ("shape",),
    Slice: ("dim", "start", "stop", "step"),
    UpsampleNearest: ("scale",),
    ChannelAffine: ("num_channels", "dim"),
}

_SYMBOLIC = {f"symbolic.{function.__name__}": function for function in (*SYMBOLIC_FUNCTIONS, operator.getitem)}
_NAME_OF_SYMBOLIC = {function: name for name, function in _SYMBOLIC.items()}
_LAYER_OF = {layer.__name__: layer for layer in _LAYERS}

_PATH = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64)
}


_REBUILD_HOOKS: list[Callable[[fx.GraphModule], None]] = []


def on_rebuild(hook: Callable[[fx.GraphModule], None]) -> None:
    """Register ``hook`` to be called with every graph module that :func:`graph_from_data` rebuilds."""
    _REBUILD_HOOKS.append(hook)


def register_layer(layer: type[nn.Module], arguments: tuple[str, ...]) -> None:
    """Allow a layer class in saved graphs, as a single node.

    Args:
        layer: the module class.
        arguments: names of its constructor's keyword arguments. Each must also be an attribute of the instance, with
            values that JSON supports.
    """
    _LAYERS[layer] = arguments
    _LAYER_OF[layer.__name__] = layer


def registered_layers() -> tuple[type[nn.Module], ...]:
    """Return all layer classes that saved graphs may contain."""
    return tuple(_LAYERS)


# ---- writing


def graph_to_data(model: fx.GraphModule) -> dict[str, Any]:
    """Convert the graph and layers of ``model``, without tensors, to lists, dicts, numbers and strings.

    Raises:
        UnsupportedLayerError: a layer or function is not on the allow-list; the message names it.
    """
    layers: dict[str, Any] = {}
    tensors: dict[str, str] = {}
    nodes = []
    for node in model.graph.nodes:
        if node.op == "call_module":
            layers[node.target] = _layer_to_data(node.target, model.get_submodule(node.target))
        elif node.op == "get_attr":
            tensors[node.target] = _tensor_kind(model, node.target)
        nodes.append(
            {
                "name": node.name,
                "op": node.op,
                "target": _target_to_data(node),
                "args": _value_to_data(node.args, node),
                "kwargs": _value_to_data(dict(node.kwargs), node),
            }
        )
    frozen = sorted(name for name, parameter in model.named_parameters() if not parameter.requires_grad)
    return {"nodes": nodes, "layers": layers, "tensors": tensors, "frozen": frozen}


def _layer_to_data(path: str, layer: nn.Module) -> dict[str, Any]:
    if type(layer) not in _LAYERS:
        raise UnsupportedLayerError(
            f"layer {path!r} is a {type(layer).__name__}, which qface cannot save; build it from standard torch.nn "
            "layers, or register it with qface.graph.register_layer"
        )
    arguments = {name: getattr(layer, name) for name in _LAYERS[type(layer)]}
    if "bias" in arguments:
        arguments["bias"] = arguments["bias"] is not None
    return {"type": type(layer).__name__, "arguments": _value_to_data(arguments, path)}


def _tensor_kind(model: nn.Module, path: str) -> str:
    owner, _, name = path.rpartition(".")
    return "parameter" if name in model.get_submodule(owner)._parameters else "buffer"


def _target_to_data(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    symbolic = _NAME_OF_SYMBOLIC.get(node.target)  # type: ignore[arg-type]
    name = symbolic or str(node.target)
    if symbolic is None and _aten_function(name) is not node.target:
        raise UnsupportedLayerError(
            f"node {node.name!r} calls {getattr(node.target, '__name__', node.target)}, which qface cannot save; "
            "use a standard torch function or layer"
        )
    return name


def _aten_function(name: str) -> Any:
    """Return the operator ``aten.name.overload`` if it is on the allow-list, else None."""
    _, _, rest = name.partition("aten.")
    operator_name, _, overload = rest.partition(".")
    if operator_name not in FLOAT_FUNCTIONS or not overload.isidentifier():
        return None
    found = getattr(getattr(torch.ops.aten, operator_name), overload, None)
    known = isinstance(found, torch._ops.OpOverload) and not found._schema.is_mutable
    return found if known else None


def _value_to_data(value: Any, where: object) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list):
        return [_value_to_data(item, where) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_value_to_data(item, where) for item in value]}
    if isinstance(value, slice):
        return {"slice": [_value_to_data(item, where) for item in (value.start, value.stop, value.step)]}
    if isinstance(value, dict):
        return {"dict": {str(key): _value_to_data(item, where) for key, item in value.items()}}
    if isinstance(value, torch.dtype) and str(value).removeprefix("torch.") in _DTYPES:
        return {"dtype": str(value).removeprefix("torch.")}
    raise UnsupportedLayerError(
        f"{where}: an argument of type {type(value).__name__} cannot be saved; use numbers, strings, tuples or lists"
    )


def check_rebuilt(
    model: fx.GraphModule, data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], size: tuple[int, int]
) -> None:
    """Check that ``data`` and ``tensors`` rebuild ``model`` for images of height and width ``size``.

    Raises:
        UnsupportedLayerError: ``data`` cannot be read, or a layer has a setting that is not saved.
    """
    try:
        rebuilt = graph_from_data(data, tensors, size)
    except CheckpointError as error:
        raise UnsupportedLayerError(f"the network cannot be saved: {error}") from error
    for path in data["layers"]:
        layer, again = model.get_submodule(path), rebuilt.get_submodule(path)
        lost = [name for name in _settings(layer) if getattr(layer, name, None) != getattr(again, name, None)]
        if lost:
            raise UnsupportedLayerError(
                f"layer {path!r}, a {type(layer).__name__}, has {lost[0]}={getattr(layer, lost[0])}, which qface "
                "cannot save; create it with the default"
            )


def _settings(layer: nn.Module) -> tuple[str, ...]:
    """Return the attributes that a layer declares as settings for torch.jit."""
    return tuple(getattr(layer, "__constants__", ()))


# ---- reading


def graph_from_data(
    data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], size: tuple[int, int]
) -> fx.GraphModule:
    """Rebuild a network from the data of :func:`graph_to_data`, and check it with a dry run.

    Args:
        data: the graph, possibly from an untrusted file.
        tensors: the state dict, possibly from an untrusted file.
        size: height and width of the images, for the dry run.

    Raises:
        CheckpointError: the data is malformed, names something outside the allow-list, does not fit the tensors, or
            does not run.
        LimitError: the data asks for more operators or memory than :mod:`qface.limits` allows.
    """
    try:
        with signals_noted():
            return _rebuilt(data, tensors, size)
    except (CheckpointError, LimitError):
        raise
    except Exception as error:  # untrusted data may cause any error
        reason = f"{type(error).__name__}: {one_line(error, 300)}"
        raise CheckpointError(f"the saved graph is damaged or of another version: {reason}") from error


def _rebuilt(data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], size: tuple[int, int]) -> fx.GraphModule:
    check("operators", max(len(data["nodes"]), len(data["layers"])), "the saved graph")
    with BuildGuard(Allowance("the saved graph", sum(each.nbytes for each in tensors.values()))):
        model = _build(data, tensors)
    model.load_state_dict(dict(tensors))
    frozen = set(data["frozen"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    for hook in _REBUILD_HOOKS:
        hook(model)
    dry_run(model.eval(), size)
    return model


@torch.random.fork_rng(devices=[])  # building layers draws initial weights
def _build(data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> fx.GraphModule:
    root = nn.Module()
    for path, layer in data["layers"].items():
        owner, name = _owner(root, path)
        owner.add_module(name, _layer_from_data(layer))
    for path, kind in data["tensors"].items():
        _add_tensor(root, path, kind, tensors)
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in data["nodes"]:
        nodes[entry["name"]] = _node_from_data(graph, entry, nodes)
    _check_paths(graph, set(data["layers"]), {name for name, _ in (*root.named_parameters(), *root.named_buffers())})
    graph.lint()
    return fx.GraphModule(root, graph)


def _check_paths(graph: fx.Graph, layers: set[str], tensors: set[str]) -> None:
    """Reject nodes that access other attributes, such as ``__init__.__builtins__``, which could run code."""
    for node in graph.nodes:
        known = {"call_module": layers, "get_attr": tensors}.get(node.op)
        if known is not None and node.target not in known:
            raise ValueError(f"node {node.name!r} uses {node.target!r}, which is not a layer or tensor of the file")


def _owner(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    if not _PATH.fullmatch(path):
        raise ValueError(f"{path!r} is not a module path")
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    return root, name


def _layer_from_data(data: Mapping[str, Any]) -> nn.Module:
    layer = _LAYER_OF.get(data["type"])
    if layer is None:
        raise CheckpointError(
            f"the file uses the layer {data['type']!r}, which this version of qface does not support; update qface"
        )
    return layer(**_value_from_data(data["arguments"], {}))


def _add_tensor(root: nn.Module, path: str, kind: str, tensors: Mapping[str, torch.Tensor]) -> None:
    owner, name = _owner(root, path)
    if hasattr(owner, name):
        return  # a layer that was built before owns it
    value = torch.empty_like(tensors[path])
    if kind == "parameter":
        owner.register_parameter(name, nn.Parameter(value, requires_grad=value.is_floating_point()))
    else:
        owner.register_buffer(name, value)


def _node_from_data(graph: fx.Graph, entry: Mapping[str, Any], nodes: Mapping[str, fx.Node]) -> fx.Node:
    op, name, target = entry["op"], entry["name"], entry["target"]
    if not name.isidentifier():
        raise ValueError(f"{name!r} is not a node name")
    args = _value_from_data(entry["args"], nodes)
    kwargs = _value_from_data(entry["kwargs"], nodes)
    if not all(key.isidentifier() for key in kwargs):
        raise ValueError(f"node {name!r} has an invalid keyword")
    return graph.create_node(op, _target_from_data(op, target), args, kwargs, name)


def _target_from_data(op: str, target: str) -> Any:
    if op == "call_function":
        function = _SYMBOLIC.get(target) or _aten_function(target)
        if function is None:
            raise CheckpointError(
                f"the file calls the function {target!r}, which this version of qface does not support; update qface"
            )
        return function
    if op not in ("placeholder", "output", "call_module", "get_attr"):
        raise ValueError(f"{op!r} is not a node type")
    if not _PATH.fullmatch(target):
        raise ValueError(f"{target!r} is not a valid target")
    return target


def _value_from_data(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_value_from_data(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "tuple":
        return tuple(_value_from_data(item, nodes) for item in content)
    if kind == "slice":
        return slice(*(_value_from_data(item, nodes) for item in content))
    if kind == "dict":
        return {key: _value_from_data(item, nodes) for key, item in content.items()}
    if kind == "dtype":
        return _DTYPES[content]
    raise ValueError(f"{kind!r} is not a value type")
