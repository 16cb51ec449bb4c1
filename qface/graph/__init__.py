"""Graphs of named layers: capture, canonicalization, queries, edits and serialization."""

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
