"""Separation of parameters that layers share."""

from __future__ import annotations

from torch import fx, nn

__all__ = ["own_parameters"]


def own_parameters(graph_module: fx.GraphModule) -> None:
    """Copy parameters that layers share, since each layer is folded, equalized and quantized alone."""
    seen: set[int] = set()
    for layer in graph_module.modules():
        for name, parameter in layer._parameters.items():
            if parameter is None:
                continue
            if id(parameter) in seen:
                layer._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            seen.add(id(parameter))
