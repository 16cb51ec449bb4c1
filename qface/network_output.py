"""The embedding among what a network returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from qface.errors import UnsupportedLayerError

__all__ = ["as_rows", "embedding_of", "is_embedding", "position_of_embedding", "written_shape"]


def embedding_of(outputs: Any) -> Tensor:
    """The embedding [N, D] among what a network returns: a tensor, or several of them in a tuple, list or dict.

    A map of one pixel, [N, D, 1, 1], is flattened.

    Raises:
        UnsupportedLayerError: none of them, or several, can be one.
    """
    tensors = [each for each in tree_leaves(outputs) if isinstance(each, Tensor)]
    return tensors[position_of_embedding([tuple(each.shape) for each in tensors])].flatten(1)


def position_of_embedding(shapes: Sequence[Sequence[int | None]]) -> int:
    """The position of the output [N, D]; a norm beside it is [N, 1] or [N].

    Args:
        shapes: of all outputs; None is the number of images.

    Raises:
        UnsupportedLayerError: none of them, or several, can be it.
    """
    found = [position for position, shape in enumerate(shapes) if is_embedding(shape)]
    # Maps of one pixel are what rows are often made of.
    rows = [position for position in found if len(shapes[position]) == 2] or found
    if len(rows) == 1:
        return rows[0]
    what = "several outputs [N, D]" if rows else "no output [N, D]"
    returned = ", ".join(map(written_shape, shapes)) or "no tensor"
    raise UnsupportedLayerError(
        f"the network returns {returned}: {what}, where one embedding is needed; "
        "wrap it in a module that returns the embedding alone"
    )


def as_rows(output: Tensor) -> Tensor:
    """``output`` as it is, or an embedding that is a map of one pixel, [N, D, 1, 1], as [N, D]."""
    return output.flatten(1) if is_embedding(output.shape) else output


def is_embedding(shape: Sequence[Any]) -> bool:
    """True of [N, D], and of [N, D, 1, 1], a map of one pixel."""
    return len(shape) in (2, 4) and shape[1] != 1 and all(size == 1 for size in shape[2:])


def written_shape(shape: Sequence[int | None]) -> str:
    """``[N, 512]``, where None is the number of images."""
    return "[" + ", ".join("N" if size is None else str(size) for size in shape) + "]"
