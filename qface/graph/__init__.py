"""A network as a graph of named layers: captured, made canonical, asked and changed, and written as data."""

from qface.graph.canonicalize import canonicalize
from qface.graph.capture import capture
from qface.graph.graph_data import register_layer
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

__all__ = [
    "Add",
    "ChannelAffine",
    "Concat",
    "L2Normalize",
    "Maximum",
    "Multiply",
    "Pad",
    "Permute",
    "Reshape",
    "Slice",
    "UpsampleNearest",
    "canonicalize",
    "capture",
    "register_layer",
]
