"""``capture``: convert any network to a graph of named layers with ``torch.export``.

torch.export runs the network once on an example and records its ATen operators. The rules in :mod:`qface.graph.aten`
turn them into layers; operators without a layer remain float functions. Operators that depend only on parameters,
such as weight normalization, are folded into constants.
"""

from __future__ import annotations

import inspect
import io
import logging
import operator
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.node import map_arg

from qface.errors import TraceError, UnsupportedLayerError, one_line
from qface.graph.aten import FLOAT_FUNCTIONS, LAYER_RULES, Call, Constant, as_parameter, operator_name, plain_shape
from qface.graph.batch_sizes import EXPORTED_BATCHES, BatchDependent, BatchMultiple, compare_batches
from qface.graph.layer_graph import LayerGraph
from qface.graph.places import module_of, place_of, place_of_error
from qface.graph.queries import SYMBOLIC_FUNCTIONS, is_layer_graph
from qface.network_output import position_of_embedding, written_shape
from qface.preprocessing import example_input
from qface.provenance import carry
from qface.signals import signals_noted
from qface.training_mode import eval_mode

__all__ = ["Converter", "capture", "unwrapped"]

_LOGGER = logging.getLogger("qface")

_LEAF_MODULES = ("torch.nn.modules.", "qface.graph.layers.")
_DROPPED_KEYWORDS = ("device", "layout", "pin_memory")  # the same as those of the images
_NO_VALUE = ("_assert", "sym_constrain")
_WITH_SUBGRAPH = (torch.ops.higher_order.wrap_with_autocast, torch.ops.higher_order.wrap_with_set_grad_enabled)
"""Operators with a subgraph, which is inlined; autocast and gradient mode do not change a captured network."""


def capture(model: nn.Module) -> fx.GraphModule:
    """Convert ``model`` in eval mode to a graph of named layers that share its parameters.

    Layers are named after their parameters, or after their module or operator if they have none. A captured graph is
    returned unchanged. Does not change ``model``.

    Args:
        model: a network from images [N, 3, H, W], of the size in its Preprocessing, to embeddings [N, D].

    Returns:
        A graph module of layers and float functions for any batch size.

    Raises:
        TraceError: torch.export cannot capture the network; the message names the line of code.
        UnsupportedLayerError: the network calls an operator that qface does not support, or its output is not one
            embedding.
    """
    if isinstance(model, fx.GraphModule) and is_layer_graph(model):
        return model
    images, network = example_input(model), unwrapped(model)
    program, batch_dependent = _exported(network, images)
    captured = Converter(program, images, batch_dependent).run(type(network).__name__)
    return carry(model, captured)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside DataParallel, DistributedDataParallel or torch.compile."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(model, "_orig_mod"):
        model = cast(nn.Module, model._orig_mod if hasattr(model, "_orig_mod") else model.module)
    return model


def _exported(model: nn.Module, images: Tensor) -> tuple[ExportedProgram, BatchDependent]:
    """Export ``model`` with a dynamic batch size, or for two images with batch-dependent arguments."""
    with signals_noted(), eval_mode(model), _quiet(), torch.no_grad():
        _check_runs(model, images)
        try:
            return torch.export.export(model, (images,), dynamic_shapes=_any_number(model), strict=False), {}
        except Exception as error:  # user code may raise anything
            if not _fixes_the_batch(error):
                raise _refusal_of(model, error) from error
        try:
            programs = [torch.export.export(model, (_of(count, images),), strict=False) for count in EXPORTED_BATCHES]
            return programs[0], compare_batches(*programs)
        except Exception as error:
            raise _refusal_of(model, error) from error


def _any_number(model: nn.Module) -> Any:
    """Return ``dynamic_shapes`` with a dynamic batch size, structured like the arguments of ``forward``."""
    free = ({0: Dim("batch")},)
    first = next(iter(inspect.signature(model.forward).parameters.values()))
    return (free,) if first.kind is inspect.Parameter.VAR_POSITIONAL else free


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress torch's warnings, and the programs that it prints and logs with its errors."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)  # torch's log handlers keep an earlier stderr, which redirect_stderr misses
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _fixes_the_batch(error: Exception) -> bool:
    """True if the error is about the batch size rather than about values of the images."""
    text = f"{type(error).__name__} {error}"
    return "batch" in text or "specializ" in text.lower()


def _of(count: int, images: Tensor) -> Tensor:
    return images[:1].expand(count, -1, -1, -1).contiguous()


def _refusal_of(model: nn.Module, error: Exception) -> TraceError:
    return TraceError(
        f"{type(model).__name__} cannot be captured{place_of_error(error)}: {_first_line(error)}. "
        "Its forward must not branch on values of the images and must not fix the batch size"
    )


def _check_runs(model: nn.Module, images: Tensor) -> None:
    try:
        model(images)
    except Exception as error:  # user code may raise anything
        size = "x".join(str(side) for side in images.shape[1:])
        raise TraceError(
            f"the network does not run on an image of {size}: {one_line(error, 200)}; "
            "set the size of its Preprocessing to its input size with qface.with_preprocessing"
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0].rstrip(".") if text else type(error).__name__


class Converter(LayerGraph):
    """Builder of a layer graph from one exported program.

    Args:
        program: a program in inference or training IR.
        images: the example images of the export.
        batch_dependent: arguments that depend on the batch size, if the program has a fixed one.
    """

    def __init__(self, program: ExportedProgram, images: Tensor, batch_dependent: BatchDependent) -> None:
        super().__init__()
        self.program = program
        self._batch_dependent = batch_dependent
        self._batch: fx.Node | None = None
        self._multiples: dict[int, fx.Node] = {}
        self._stored_tensors: dict[str, Tensor] = {}
        self.example_parameter = images.new_zeros(())
        self.images: fx.Node | None = None
        self._values: dict[fx.Node, Any] = {}
        self._made: list[Any] = []  # keeps folded constants alive, since constants are identified by id()

    def run(self, class_name: str) -> fx.GraphModule:
        """Convert the program to a graph of layers.

        Args:
            class_name: name of the graph module's class.

        Raises:
            TraceError: the network changes its own buffers.
            UnsupportedLayerError: the network calls an unsupported operator, or its output is not one embedding.
        """
        self._read_inputs()
        with torch.no_grad():
            for node in self.program.graph.nodes:
                if node.op not in ("placeholder", "output"):
                    self._values[node] = self._convert(node, self.program.graph_module)
        return self.finish(self._embedding(), class_name)

    def refusal(self, node: fx.Node, message: str) -> UnsupportedLayerError:
        """Return an error with ``message`` and the line of user code that ``node`` comes from."""
        return UnsupportedLayerError(f"{message}{place_of(node)}")

    # ---- inputs and outputs

    def _read_inputs(self) -> None:
        signature = self.program.graph_signature
        tensors = self._stored_tensors = dict((*self.program.named_parameters(), *self.program.named_buffers()))
        nodes = {node.name: node for node in self.program.graph.nodes if node.op == "placeholder"}
        for spec in signature.input_specs:
            node = nodes[spec.arg.name]
            if spec.kind.name == "USER_INPUT":
                self._values[node] = self.images = self._with_shape(self.graph.placeholder("images"), node)
                if self._batch_dependent:
                    self._batch = self.function(torch.ops.aten.sym_size.int, (self.images, 0), {}, "batch")
                continue
            target = spec.target or ""
            tensor = tensors.get(target, self.program.constants.get(target))
            if spec.kind.name == "PARAMETER" and tensor is not None and not isinstance(tensor, nn.Parameter):
                tensor = as_parameter(tensor)
            self._values[node] = Constant(tensor, target) if isinstance(tensor, Tensor) else None

    def _embedding(self) -> fx.Node:
        """Return the only output [N, D] or [N, D, 1, 1], D > 1; a norm [N, 1] is dropped."""
        specs = self.program.graph_signature.output_specs
        changed = [spec.target for spec in specs if spec.kind.name.endswith("MUTATION")]
        if changed:
            raise TraceError(f"the network changes its buffer {changed[0]!r} in eval mode; do so only in training mode")
        (output,) = (node for node in self.program.graph.nodes if node.op == "output")
        found = [self._value(node) for node in output.args[0] if isinstance(node, fx.Node)]
        tensors = list(dict.fromkeys(value for value in found if isinstance(value, fx.Node) and "shape" in value.meta))
        chosen = position_of_embedding([each.meta["shape"] for each in tensors])
        if len(tensors) > 1:
            _LOGGER.warning(
                "the network returns %d tensors; the one %s is the embedding",
                len(tensors),
                written_shape(tensors[chosen].meta["shape"]),
            )
        shape = tensors[chosen].meta["shape"]
        return self.layer(nn.Flatten(1), (tensors[chosen],), "embedding") if len(shape) > 2 else tensors[chosen]

    @staticmethod
    def with_shape_of(made: fx.Node, like: fx.Node) -> fx.Node:
        """Set the shape of ``made`` to that of ``like`` and return it."""
        made.meta |= {name: like.meta[name] for name in ("shape", "float")}
        return made

    # ---- nodes

    def _convert(self, node: fx.Node, owner: nn.Module) -> Any:
        if node.op == "get_attr":
            return self._attribute(node, owner)
        if node.target is operator.getitem:
            source, index = self._value(node.args[0]), cast(int, node.args[1])
            return source[index] if isinstance(source, (list, tuple)) else self._function(node, (source, index), {})
        if node.target in _WITH_SUBGRAPH:
            return self._inlined(node, owner)
        if node.target in SYMBOLIC_FUNCTIONS:
            return self._function(node, *self._given(node))
        if not isinstance(node.target, torch._ops.OpOverload):
            raise self.refusal(
                node, f"{node.name!r} calls {node.target}, which qface does not support; use another function"
            )
        name = operator_name(node.target)
        return None if name.startswith(_NO_VALUE) else self._operator(node, name)

    def _attribute(self, node: fx.Node, owner: nn.Module) -> Any:
        at: Any = owner
        for part in str(node.target).split("."):
            at = getattr(at, part)
        return Constant(at, str(node.target)) if isinstance(at, Tensor) else at

    def _operator(self, node: fx.Node, name: str) -> Any:
        call = Call(node, name, self._arguments(node), self._path(node))
        if _is_computable(call.arguments):
            return self._computed(node, call)
        rule = LAYER_RULES.get(name)
        made = rule(self, call) if rule is not None else None
        if made is None:
            made = self._float_function(node, name)
        self._overwrite(node, made)
        return self._with_shapes(made, node)

    def _arguments(self, node: fx.Node) -> dict[str, Any]:
        """Return all arguments by name, including the operator's defaults."""
        found: dict[str, Any] = {}
        given, kwargs = self._given(node)
        for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
            if position < len(given):
                found[argument.name] = given[position]
            elif argument.name in kwargs:
                found[argument.name] = kwargs[argument.name]
            else:
                found[argument.name] = argument.default_value if argument.has_default_value() else None
        return found

    def _computed(self, node: fx.Node, call: Call) -> Any:
        """Fold an operator whose arguments are constants."""
        names = [each.name for each in _constants(call.arguments) if each.name]
        target: Any = node.target
        if target._schema.is_mutable:
            self._check_changes(self._value(node.args[0]))
            args = map_arg(list(node.args), lambda each: _bare_copy(self._value(each)))
        else:
            args = map_arg(list(node.args), lambda each: _bare(self._value(each)))
        kwargs = map_arg(dict(node.kwargs), lambda each: _bare(self._value(each)))
        result = target(*args, **kwargs)
        self._made.append(result)
        name = names[0] if names else node.name
        if isinstance(result, Tensor):
            made: Any = Constant(result, name)
            self._overwrite(node, made)
            return made
        return [Constant(each, name) for each in result] if isinstance(result, (list, tuple)) else result

    def _check_changes(self, value: Any) -> None:
        """Reject an in-place operator on a tensor of the model."""
        changed = [name for name, tensor in self._stored_tensors.items() if tensor is getattr(value, "tensor", None)]
        if changed:
            raise TraceError(f"the network changes its buffer {changed[0]!r} in eval mode; do so only in training mode")

    def _float_function(self, node: fx.Node, name: str) -> fx.Node:
        target: Any = node.target
        if name not in FLOAT_FUNCTIONS:
            raise self.refusal(
                node,
                f"{node.name!r} calls the operator {name}{module_of(node)}, which qface does not support; "
                "use another operator",
            )
        if target._schema.is_mutable:
            target = _out_of_place(target)
            if target is None:
                raise self.refusal(
                    node, f"{node.name!r} calls {name} in place, which qface does not support; call it out of place"
                )
        args, kwargs = self._given(node)
        return self._function(node, args, {key: kwargs[key] for key in kwargs if key not in _DROPPED_KEYWORDS}, target)

    def _function(self, node: fx.Node, args: Any, kwargs: Any, target: Any = None) -> fx.Node:
        args, kwargs = self._stored(args), self._stored(kwargs)
        made = self.function(target or node.target, tuple(args), dict(kwargs), node.name)
        return self._with_shape(made, node) if hasattr(node.meta.get("val"), "shape") else made

    def _stored(self, value: Any) -> Any:
        """Replace constants in ``value`` by nodes."""
        if isinstance(value, Constant):
            return self.constant(value.tensor, value.name or "constant")
        if isinstance(value, (list, tuple)):
            return type(value)(self._stored(each) for each in value)
        return {name: self._stored(each) for name, each in value.items()} if isinstance(value, dict) else value

    def _inlined(self, node: fx.Node, owner: nn.Module) -> Any:
        """Inline the subgraph of an operator, whose arguments are settings, subgraph and subgraph inputs."""
        settings = [each for each in node.args if isinstance(each, fx.Node) and each.op == "get_attr"]
        body = self._value(settings[0])
        inputs = list(node.args)[list(node.args).index(settings[0]) + 1 :]
        placeholders = [each for each in body.graph.nodes if each.op == "placeholder"]
        for placeholder, given in zip(placeholders, inputs, strict=True):
            self._values[placeholder] = self._value(given)
        for inner in body.graph.nodes:
            if inner.op == "output":
                return self._values_of(inner.args[0])
            if inner.op != "placeholder":
                self._values[inner] = self._convert(inner, body)
        return None

    # ---- values

    def _value(self, argument: Any) -> Any:
        return self._values[argument] if isinstance(argument, fx.Node) else argument

    def _values_of(self, arguments: Any) -> Any:
        return map_arg(arguments, self._value)

    def _given(self, node: fx.Node) -> tuple[Any, Any]:
        """Return the converted arguments and keyword arguments of ``node``."""
        args, kwargs = self._batch_dependent.get(node, (node.args, node.kwargs))
        return self._with_multiples(self._values_of(args)), self._with_multiples(self._values_of(kwargs))

    def _with_multiples(self, value: Any) -> Any:
        """Replace multiples of the batch size in ``value`` by nodes."""
        if isinstance(value, BatchMultiple):
            if value.factor not in self._multiples:
                assert self._batch is not None
                product = self.function(operator.mul, (self._batch, value.factor), {}, f"batch_{value.factor}")
                self._multiples[value.factor] = self._batch if value.factor == 1 else product
            return self._multiples[value.factor]
        if isinstance(value, (list, tuple)):
            return type(value)(self._with_multiples(each) for each in value)
        if isinstance(value, dict):
            return {name: self._with_multiples(each) for name, each in value.items()}
        return value

    def _overwrite(self, node: fx.Node, made: Any) -> None:
        """Redirect later consumers of a value that an in-place operator overwrote to the operator's result."""
        if node.target._schema.is_mutable and isinstance(node.args[0], fx.Node):  # type: ignore[union-attr]
            overwritten = _without_dropout(self.root, self._value(node.args[0]))
            for each, value in self._values.items():
                if value is not None and _without_dropout(self.root, value) is overwritten:
                    self._values[each] = made

    def _with_shapes(self, made: Any, node: fx.Node) -> Any:
        if isinstance(made, fx.Node) and hasattr(node.meta.get("val"), "shape") and "shape" not in made.meta:
            return self._with_shape(made, node)
        if isinstance(made, list):
            for part, value in zip(made, node.meta["val"], strict=True):
                if isinstance(part, fx.Node):
                    part.meta |= {"shape": plain_shape(value), "float": value.is_floating_point()}
        return made

    @staticmethod
    def _with_shape(made: fx.Node, node: fx.Node) -> fx.Node:
        value = node.meta["val"]
        made.meta |= {"shape": plain_shape(value), "float": value.is_floating_point()}
        made.meta["source"] = place_of(node)
        return made

    def _path(self, node: fx.Node) -> str | None:
        """Return the path of the calling module if it is a layer of torch.nn or qface, else None."""
        stack = node.meta.get("nn_module_stack")
        if not stack:
            return None
        path, kind = list(stack.values())[-1]
        kind = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        return path.partition("@")[0] if path and kind.startswith(_LEAF_MODULES) else None


def _constants(arguments: Any) -> list[Constant]:
    if isinstance(arguments, Constant):
        return [arguments]
    if isinstance(arguments, dict):
        arguments = list(arguments.values())
    return [found for each in arguments for found in _constants(each)] if isinstance(arguments, (list, tuple)) else []


def _is_computable(arguments: Any) -> bool:
    """True if no argument depends on the images or their batch size."""
    if isinstance(arguments, fx.Node):
        return False
    if isinstance(arguments, dict):
        arguments = list(arguments.values())
    return all(_is_computable(each) for each in arguments) if isinstance(arguments, (list, tuple)) else True


def _bare(value: Any) -> Any:
    return value.tensor.detach() if isinstance(value, Constant) else value


def _bare_copy(value: Any) -> Any:
    return value.tensor.detach().clone() if isinstance(value, Constant) else value


def _without_dropout(root: nn.Module, value: Any) -> Any:
    """Return ``value`` without dropouts before it, which return the same memory in eval mode."""
    while isinstance(value, fx.Node) and value.op == "call_module":
        if not isinstance(root.get_submodule(str(value.target)), (nn.Dropout, nn.Dropout2d)):
            break
        value = value.args[0]
    return value


def _out_of_place(target: Any) -> Any:
    """Return the out-of-place overload of the in-place operator ``target``."""
    packet = getattr(torch.ops.aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
    return getattr(packet, target._overloadname, None) if packet is not None else None
