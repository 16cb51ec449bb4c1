"""From any ``nn.Module`` to a torch.fx graph, with an error that says where tracing failed and what helps."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import fx, nn

from qface.errors import TraceError
from qface.models.layers import Add, ChannelAffine, Concat, L2Normalize, Multiply
from qface.preprocessing import dtype_of, preprocessing_of
from qface.training_mode import preserve_training_mode

__all__ = ["LEAF_LAYERS", "example_input", "trace"]

LEAF_LAYERS: tuple[type[nn.Module], ...] = (Add, ChannelAffine, Concat, L2Normalize, Multiply)
"""Layers of ours that stay one node when a network that contains them is traced."""


_PLAIN = (bool, int, float, str)


class _Tracer(fx.Tracer):
    def __init__(self, leaves: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self._leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, leaves: tuple[type[nn.Module], ...] = ()) -> fx.GraphModule:
    """The graph of ``model`` in eval mode, which shares its parameters; a GraphModule is returned as it is.

    What its forward asks ``self.training`` for is answered for good: ``F.dropout(x, p, self.training)`` drops nothing.
    So are its options: ``forward(self, x, return_features=False)`` is traced with the defaults, and reads images only.

    Args:
        model: any network; its own mode stays.
        leaves: layers that stay one node, beside torch's and those of :data:`LEAF_LAYERS`.

    Raises:
        TraceError: the forward pass depends on values of tensors, or on Python that torch.fx cannot see.
    """
    if isinstance(model, fx.GraphModule):
        return model
    tracer = _Tracer((*LEAF_LAYERS, *leaves))
    try:
        with preserve_training_mode(model):
            options = _options(model)
            graph = tracer.trace(model.eval(), concrete_args=options)
    except Exception as error:  # any Python of the user's forward may run, so anything may be raised
        raise TraceError(
            f"{type(model).__name__} cannot be traced{_place(error)}: {_first_line(error)}. "
            "Make its forward independent of tensor values (no if or loop on tensors, no len() or int() of them), or "
            "wrap that function with torch.fx.wrap"
        ) from error
    _drop_options(graph, options)
    return fx.GraphModule(tracer.root, graph, class_name=type(model).__name__)


def _options(model: nn.Module) -> dict[str, Any]:
    """What the forward of ``model`` takes beside images, where its default is no tensor or structure."""
    others = list(inspect.signature(model.forward).parameters.values())[1:]
    return {each.name: each.default for each in others if each.default is None or type(each.default) in _PLAIN}


def _drop_options(graph: fx.Graph, options: dict[str, Any]) -> None:
    """Remove what torch.fx leaves of ``options``: an input called ``name_1``, and a check that it is the default."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in inputs[1:]:
        name, _, number = str(node.target).rpartition("_")
        if name in options and number.isdigit():
            _erase_with_users(graph, node)


def _erase_with_users(graph: fx.Graph, node: fx.Node) -> None:
    for user in list(node.users):
        _erase_with_users(graph, user)
    graph.erase_node(node)


def _place(error: Exception) -> str:
    """File and line of the innermost frame outside torch, where the user can change something."""
    place = ""
    frame = error.__traceback__
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if f"{'/'}torch{'/'}" not in file.replace("\\", "/") and file != __file__:
            place = f" at {file}:{frame.tb_lineno} in {frame.tb_frame.f_code.co_name}"
        frame = frame.tb_next
    return place


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0].rstrip(".") if text else type(error).__name__


def example_input(model: nn.Module, batch: int = 2) -> torch.Tensor:
    """Zeros [batch, 3, height, width] of the size and on the device of ``model``."""
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    return torch.zeros(batch, 3, *preprocessing_of(model).size, device=device, dtype=dtype_of(model))
