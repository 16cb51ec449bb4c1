"""Parameters of which each belongs to one layer."""

from __future__ import annotations

from torch import fx, nn

__all__ = ["own_parameters"]


def own_parameters(graph_module: fx.GraphModule) -> None:
    """Give each layer parameters of its own, where layers share them: each is folded, equalized and rounded alone."""
    seen: set[int] = set()
    for layer in graph_module.modules():
        for name, parameter in layer._parameters.items():
            if parameter is None:
                continue
            if id(parameter) in seen:
                layer._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            seen.add(id(parameter))
