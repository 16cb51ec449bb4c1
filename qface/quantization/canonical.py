"""The canonical form of a network: one named layer per operation, dropout gone, BatchNorm folded.

Quantization, lowering and everything behind them then need to know layers only, by their type. The result computes what
the network computes in eval mode.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from qface.errors import TraceError, UnsupportedLayerError, one_line
from qface.models.checkpoints import check_finite
from qface.models.layers import Add, ChannelAffine, Concat, L2Normalise, Multiply, batch_norm_affine
from qface.models.provenance import carry
from qface.models.tracing import example_input, trace
from qface.modes import modes_kept
from qface.preprocessing import dtype_of
from qface.quantization.layers import layer_of, makes_rows
from qface.quantization.slopes import flatten_slopes, one_slope_per_channel

__all__ = ["Inputs", "add_layer", "canonicalise", "shape_of"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_PRODUCTS = (nn.Conv2d, nn.Linear)
_NO_OPERATION = (nn.Dropout, nn.Dropout2d, nn.Identity)
_ALIASES = frozenset({"contiguous", "detach", "float"})
"""Methods that give the tensor itself, or one that shares its memory, where a network is called in float32."""

_SAME = 1e-3  # in parts of the embedding's length: how far its canonical form may be from a network
_SUPPORTED_WEIGHTS = (nn.Conv2d, nn.Linear, nn.PReLU, ChannelAffine, *_NORMS)

Inputs = tuple[fx.Node, ...]
Rewrite = Callable[[fx.Node], "tuple[nn.Module, Inputs] | None"]


def canonicalise(model: nn.Module) -> fx.GraphModule:
    """A new GraphModule in canonical form; ``model`` is untouched.

    Raises:
        CheckpointError: a weight is NaN or infinite.
        TraceError: the model cannot be traced or copied, does not run on images of its size, or its canonical form
            computes something else.
        UnsupportedLayerError: a layer with weights is neither convolution, linear, PReLU nor BatchNorm; it is named.
    """
    check_finite(model.state_dict(), "this network")
    model = _in_float32(model)
    copied = _copied(trace(model))
    graph_module = fx.GraphModule(copied, copied.graph)  # drops submodules that no node uses
    _own_layer_per_call(graph_module)
    _own_parameters(graph_module)
    _propagate_shapes(graph_module, example_input(model))
    _remove(graph_module, _gives_its_input)  # first, or what is overwritten would have two names
    _undo_in_place(graph_module)
    _remove(graph_module, _clones)
    _functions_to_layers(graph_module)
    _fold_batch_norms(graph_module)
    _convolutions_to_linear_layers(graph_module)
    _prepare_slopes(graph_module)
    _refuse_unknown_weights(graph_module)
    graph_module.graph.lint()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    _check_equal(model, graph_module)
    return carry(model, graph_module)


def _in_float32(model: nn.Module) -> nn.Module:
    """``model``, or a copy where it computes in another type: scales and integers are exact in float32."""
    if dtype_of(model) == torch.float32:
        return model
    return copy.deepcopy(model).float()


def _copied(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy whose weights are plain parameters: what parametrizations compute is written into them."""
    try:
        copied = copy.deepcopy(graph_module)
    except RuntimeError as error:
        raise TraceError(
            f"the network cannot be copied ({one_line(error, 200)}): undo torch.nn.utils.weight_norm and prune with "
            "remove_weight_norm and prune.remove first"
        ) from error
    for layer in list(copied.modules()):
        if parametrize.is_parametrized(layer):
            _make_plain(layer)
    return copied


def _make_plain(layer: nn.Module) -> None:
    """As ``remove_parametrizations``, which would break the layer that this one is a copy of: they share a class."""
    values = {name: getattr(layer, name).detach() for name in layer.parametrizations}  # type: ignore[union-attr]
    layer.__class__ = parametrize.type_before_parametrizations(layer)
    del layer.parametrizations
    for name, value in values.items():
        layer.register_parameter(name, nn.Parameter(value))


def _check_equal(model: nn.Module, canonical: fx.GraphModule) -> None:
    """Compare both on noise: an operation in place may have overwritten what another name stood for."""
    zeros = example_input(model)
    images = torch.rand(zeros.shape, generator=torch.Generator().manual_seed(0)).to(zeros) * 2 - 1
    with modes_kept(model), modes_kept(canonical), torch.no_grad():
        wanted, found = model.eval()(images), canonical.eval()(images)
    if isinstance(wanted, Tensor) and (found - wanted).norm() > _SAME * wanted.norm():
        raise TraceError(
            "the network's layers, one by one, compute something else than the network: look for an operation in place "
            "on a value that is still used"
        )


def _own_parameters(graph_module: fx.GraphModule) -> None:
    """Give each layer parameters of its own, where layers share them: each is folded, equalised and rounded alone."""
    seen: set[int] = set()
    for layer in graph_module.modules():
        for name, parameter in layer._parameters.items():
            if parameter is None:
                continue
            if id(parameter) in seen:
                layer._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            seen.add(id(parameter))


def _own_layer_per_call(graph_module: fx.GraphModule) -> None:
    """Give each call of a shared layer a copy of its own, since each needs ranges and foldings of its own."""
    seen: dict[int, int] = {}
    for node in graph_module.graph.nodes:
        if node.op != "call_module":
            continue
        layer = graph_module.get_submodule(node.target)
        calls = seen[id(layer)] = seen.get(id(layer), 0) + 1
        if calls > 1:
            node.target = add_layer(graph_module, f"{node.target}_call{calls}", copy.deepcopy(layer))


def add_layer(graph_module: fx.GraphModule, name: str, layer: nn.Module) -> str:
    """Put ``layer`` into ``graph_module`` under ``name``, or that with a number where it is taken; the name it got."""
    free = name
    suffix = 1
    while _exists(graph_module, free):
        suffix += 1
        free = f"{name}_{suffix}"
    graph_module.add_submodule(free, layer)
    return free


def _exists(graph_module: fx.GraphModule, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    return hasattr(graph_module.get_submodule(owner), name)


def _propagate_shapes(graph_module: fx.GraphModule, images: Tensor) -> None:
    training = graph_module.training
    try:
        with torch.no_grad():
            ShapeProp(graph_module.eval()).propagate(images)
    except Exception as error:  # the user's own code runs here
        shape = "x".join(str(side) for side in images.shape[1:])
        raise TraceError(
            f"the network does not run on an image of {shape}: {one_line(error, 200)}; "
            "attach the Preprocessing with the size it reads"
        ) from error
    graph_module.train(training)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of the tensor that ``node`` produces for a batch of two, or () where it produces none."""
    meta = node.meta.get("tensor_meta")
    return tuple(meta.shape) if meta is not None and hasattr(meta, "shape") else ()


# ---- operations in place


def _undo_in_place(graph_module: fx.GraphModule) -> None:
    """Let those that read a value after an operation overwrote it read the result, so that nothing is overwritten."""
    place = {node: number for number, node in enumerate(graph_module.graph.nodes)}
    for node in list(graph_module.graph.nodes):
        if _overwrites(graph_module, node):
            later = {user for user in _input(node)[0].users if place[user] > place[node]}
            _input(node)[0].replace_all_uses_with(node, delete_user_cb=later.__contains__)


def _overwrites(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    layer = layer_of(node)
    if layer is not None:
        in_place = getattr(layer, "inplace", False)
        if in_place:
            layer.inplace = False  # type: ignore[assignment]
        return bool(in_place)
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    return bool(node.kwargs.get("inplace"))


# ---- operations without effect


def _remove(graph_module: fx.GraphModule, has_no_effect: Callable[[fx.Node], bool]) -> None:
    for node in list(graph_module.graph.nodes):
        if has_no_effect(node):
            node.replace_all_uses_with(_input(node)[0])
            graph_module.graph.erase_node(node)


def _gives_its_input(node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(layer_of(node), _NO_OPERATION)
    if node.op == "call_function":
        return node.target in (F.dropout, F.dropout2d)
    return node.op == "call_method" and node.target in _ALIASES


def _clones(node: fx.Node) -> bool:
    return (node.op == "call_method" and node.target == "clone") or node.target is torch.clone


# ---- functions to layers


def _functions_to_layers(graph_module: fx.GraphModule) -> None:
    for node in list(graph_module.graph.nodes):
        rewrite = _rewrite_of(node)
        found = rewrite(node) if rewrite else None
        if found is not None:
            layer, inputs = found
            _replace_by_layer(graph_module, node, layer, inputs)
        elif node.op == "call_method" and node.target == "view":
            node.target = "reshape"  # the ``contiguous`` that a view may need is gone
    graph_module.graph.eliminate_dead_code()


def _rewrite_of(node: fx.Node) -> Rewrite | None:
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target)
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    return None


def _replace_by_layer(graph_module: fx.GraphModule, node: fx.Node, layer: nn.Module, inputs: Inputs) -> None:
    for part in layer if isinstance(layer, nn.Sequential) else (layer,):
        target = add_layer(graph_module, node.name, part.train(graph_module.training))
        with graph_module.graph.inserting_before(node):
            replacement = graph_module.graph.call_module(target, inputs)
        inputs = (replacement,)
    replacement.meta = dict(node.meta)
    node.replace_all_uses_with(replacement)
    graph_module.graph.erase_node(node)


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def _input(node: fx.Node) -> Inputs:
    return (cast(fx.Node, _argument(node, 0, "input")),)


def _simple(layer: Callable[[], nn.Module]) -> Rewrite:
    return lambda node: (layer(), _input(node))


def _leaky_relu(node: fx.Node) -> tuple[nn.Module, Inputs]:
    return nn.LeakyReLU(_argument(node, 1, "negative_slope", 0.01)), _input(node)


def _binary(layer: Callable[[], nn.Module]) -> Rewrite:
    """Two tensors; a tensor and a number stay a function."""

    def rewrite(node: fx.Node) -> tuple[nn.Module, Inputs] | None:
        left, right = _argument(node, 0, "input"), _argument(node, 1, "other")
        plain = isinstance(left, fx.Node) and isinstance(right, fx.Node) and "alpha" not in node.kwargs
        return (layer(), (left, right)) if plain and shape_of(left) and shape_of(right) else None

    return rewrite


def _concat(node: fx.Node) -> tuple[nn.Module, Inputs] | None:
    tensors = _argument(node, 0, "tensors")
    if not isinstance(tensors, (list, tuple)):  # the parts of something, which torch.fx does not see one by one
        return None
    return Concat(_argument(node, 1, "dim", 0) % len(shape_of(node))), tuple(tensors)


def _flatten(node: fx.Node) -> tuple[nn.Module, Inputs] | None:
    """Any reshape to [N, all the rest]."""
    inputs = _input(node)
    before, after = shape_of(inputs[0]), shape_of(node)
    return (nn.Flatten(1), inputs) if len(after) == 2 and before and before[0] == after[0] else None


def _mean(node: fx.Node) -> tuple[nn.Module, Inputs] | None:
    """The mean over height and width, which keeps both dimensions or drops them."""
    inputs = _input(node)
    before, after = shape_of(inputs[0]), shape_of(node)
    axes = _argument(node, 1, "dim")
    if len(before) != 4 or not isinstance(axes, (list, tuple)) or {axis % 4 for axis in axes} != {2, 3}:
        return None
    pool = nn.AdaptiveAvgPool2d(1)
    return (pool if len(after) == 4 else nn.Sequential(pool, nn.Flatten(1))), inputs


def _adaptive_pool(node: fx.Node) -> tuple[nn.Module, Inputs]:
    size = _argument(node, 1, "output_size")
    return nn.AdaptiveAvgPool2d(shape_of(node)[-2:] if _computed(size) else size), _input(node)


def _computed(value: Any) -> bool:
    """Whether ``value`` depends on the shape of a tensor, as in ``F.avg_pool2d(x, x.size()[2:])``."""
    if isinstance(value, (tuple, list)):
        return any(_computed(part) for part in value)
    return isinstance(value, fx.Node)


def _normalise(node: fx.Node) -> tuple[nn.Module, Inputs] | None:
    plain = _argument(node, 1, "p", 2.0) == 2 and _argument(node, 2, "dim", 1) in (1, -1) and len(shape_of(node)) == 2
    return (L2Normalise(), _input(node)) if plain else None


def _window(layer: Callable[..., nn.Module]) -> Rewrite:
    def rewrite(node: fx.Node) -> tuple[nn.Module, Inputs] | None:
        if len(node.args) > 4 or node.kwargs.get("divisor_override") or node.kwargs.get("return_indices"):
            return None
        kernel = _argument(node, 1, "kernel_size")
        stride = _argument(node, 2, "stride") or kernel
        if _computed((*node.args[1:], *node.kwargs.values())):
            return _over_the_map(layer, node)
        rest = {
            name: value for name, value in node.kwargs.items() if name in ("ceil_mode", "count_include_pad", "dilation")
        }
        return layer(kernel, stride, _argument(node, 3, "padding", 0), **rest), _input(node)

    return rewrite


def _over_the_map(layer: Callable[..., nn.Module], node: fx.Node) -> tuple[nn.Module, Inputs] | None:
    """What a pool of a computed window mostly is: one over the whole map."""
    inputs = _input(node)
    return (layer(shape_of(inputs[0])[-2:]), inputs) if shape_of(node)[-2:] == (1, 1) else None


_ADD, _MULTIPLY = _binary(Add), _binary(Multiply)
_FUNCTIONS: dict[Any, Rewrite] = {
    operator.add: _ADD,
    operator.iadd: _ADD,
    torch.add: _ADD,
    operator.mul: _MULTIPLY,
    operator.imul: _MULTIPLY,
    torch.mul: _MULTIPLY,
    torch.cat: _concat,
    torch.relu: _simple(nn.ReLU),
    F.relu: _simple(nn.ReLU),
    F.relu6: _simple(nn.ReLU6),
    F.leaky_relu: _leaky_relu,
    F.hardswish: _simple(nn.Hardswish),
    F.hardsigmoid: _simple(nn.Hardsigmoid),
    F.silu: _simple(nn.SiLU),
    F.sigmoid: _simple(nn.Sigmoid),
    torch.sigmoid: _simple(nn.Sigmoid),
    torch.flatten: _flatten,
    torch.reshape: _flatten,
    torch.squeeze: _flatten,
    torch.mean: _mean,
    F.adaptive_avg_pool2d: _adaptive_pool,
    F.avg_pool2d: _window(nn.AvgPool2d),
    F.max_pool2d: _window(nn.MaxPool2d),
    F.normalize: _normalise,
}
_METHODS: dict[str, Rewrite] = {
    "add": _ADD,
    "add_": _ADD,
    "mul": _MULTIPLY,
    "mul_": _MULTIPLY,
    "relu": _simple(nn.ReLU),
    "relu_": _simple(nn.ReLU),
    "sigmoid": _simple(nn.Sigmoid),
    "flatten": _flatten,
    "view": _flatten,
    "reshape": _flatten,
    "squeeze": _flatten,
    "mean": _mean,
}


# ---- BatchNorm


def _fold_batch_norms(graph_module: fx.GraphModule) -> None:
    for node in list(graph_module.graph.nodes):
        layer = layer_of(node)
        if not isinstance(layer, _NORMS):
            continue
        if layer.running_mean is None:
            raise UnsupportedLayerError(
                f"{node.target!r} is a BatchNorm without running statistics, which has no fixed form to quantize; "
                "build it with track_running_stats=True and estimate them"
            )
        producer = node.args[0]
        previous = layer_of(producer)
        if isinstance(previous, _PRODUCTS) and _makes_channels(producer) and len(producer.users) == 1:
            _fold(previous, layer)
            node.replace_all_uses_with(producer)
            graph_module.graph.erase_node(node)
        else:
            _set_layer(graph_module, node.target, ChannelAffine.from_batch_norm(layer).to(layer.running_mean.device))


def _makes_channels(node: fx.Node) -> bool:
    """Whether what the layer of ``node`` makes lies along dimension 1, which is what a norm behind it scales."""
    return isinstance(layer_of(node), nn.Conv2d) or len(shape_of(node)) == 2


def _set_layer(graph_module: fx.GraphModule, path: str, layer: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(graph_module.get_submodule(owner), name, layer.train(graph_module.training))


def _fold(layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
    """Multiply the norm into the layer in front of it, in float64."""
    scale, shift = batch_norm_affine(norm)
    weight = layer.weight.detach().double() * scale.view(-1, *(1,) * (layer.weight.ndim - 1))
    bias = shift if layer.bias is None else layer.bias.detach().double() * scale + shift
    layer.weight = nn.Parameter(weight.to(layer.weight.dtype))
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype))


# ---- embeddings and slopes


def _convolutions_to_linear_layers(graph_module: fx.GraphModule) -> None:
    """A convolution over a whole map that is flattened behind it is a linear layer.

    As the last layer, whose output stays float, only that has an integer kernel.
    """
    for node in list(graph_module.graph.nodes):
        if _covers_its_input(node) and all(makes_rows(user) for user in node.users):
            convolution = cast(nn.Conv2d, layer_of(node))
            _set_layer(graph_module, str(node.target), _as_linear(convolution))
            flatten = add_layer(graph_module, f"{node.name}_input", nn.Flatten(1))
            with graph_module.graph.inserting_before(node):
                node.args = (graph_module.graph.call_module(flatten, node.args),)
            for user in list(node.users):
                user.replace_all_uses_with(node)
                graph_module.graph.erase_node(user)


def _covers_its_input(node: fx.Node) -> bool:
    layer = layer_of(node)
    if not isinstance(layer, nn.Conv2d) or layer.groups > 1 or layer.dilation != (1, 1):
        return False
    return layer.padding in ("valid", (0, 0)) and layer.kernel_size == shape_of(_input(node)[0])[2:]


def _as_linear(layer: nn.Conv2d) -> nn.Linear:
    weight = layer.weight.detach().flatten(1)
    linear = nn.Linear(weight.shape[1], len(weight), layer.bias is not None, weight.device, weight.dtype)
    linear.weight = nn.Parameter(weight)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach())
    return linear


def _prepare_slopes(graph_module: fx.GraphModule) -> None:
    for node in graph_module.graph.nodes:
        layer = layer_of(node)
        if isinstance(layer, nn.PReLU):
            shape = shape_of(_input(node)[0])
            one_slope_per_channel(layer, shape[1])
            flatten_slopes(node, len(shape))


def _refuse_unknown_weights(graph_module: fx.GraphModule) -> None:
    for node in graph_module.graph.nodes:
        layer = layer_of(node)
        if (
            layer is not None
            and not isinstance(layer, _SUPPORTED_WEIGHTS)
            and any(p.ndim > 1 for p in layer.parameters())
        ):
            raise UnsupportedLayerError(
                f"layer {node.target!r} is a {type(layer).__name__}, whose weights qface cannot quantize; "
                "it takes Conv2d, Linear, PReLU and BatchNorm"
            )
        if isinstance(layer, _PRODUCTS) and "weight" not in layer._parameters:
            raise UnsupportedLayerError(
                f"layer {node.target!r} computes its weight when it is called, as torch.nn.utils.spectral_norm does; "
                "write the weight into it first, as with remove_spectral_norm"
            )
        if node.op == "call_function" and node.target in (
            F.conv2d,
            F.linear,
            torch.matmul,
            operator.matmul,
            torch.bmm,
        ):
            raise UnsupportedLayerError(
                f"node {node.name!r} multiplies by a function call, which has no layer to quantize; "
                "use nn.Conv2d or nn.Linear"
            )
