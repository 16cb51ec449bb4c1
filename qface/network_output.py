"""Selection of the embedding among the outputs of a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from qface.errors import UnsupportedLayerError

__all__ = ["as_rows", "embedding_of", "is_embedding", "position_of_embedding", "written_shape"]


def embedding_of(outputs: Any) -> Tensor:
    """Return the embedding [N, D] among the outputs of a network.

    Args:
        outputs: a tensor, or a tuple, list or dict of tensors; [N, D, 1, 1] is flattened.

    Raises:
        UnsupportedLayerError: no output, or more than one, can be the embedding.
    """
    tensors = [each for each in tree_leaves(outputs) if isinstance(each, Tensor)]
    return tensors[position_of_embedding([tuple(each.shape) for each in tensors])].flatten(1)


def position_of_embedding(shapes: Sequence[Sequence[int | None]]) -> int:
    """Return the index of the embedding among the outputs; norms of shape [N, 1] or [N] are ignored.

    Args:
        shapes: shape of each output; None stands for the batch size.

    Raises:
        UnsupportedLayerError: no output, or more than one, can be the embedding.
    """
    found = [position for position, shape in enumerate(shapes) if is_embedding(shape)]
    # [N, D, 1, 1] is often the embedding before it is flattened, so [N, D] is preferred.
    rows = [position for position in found if len(shapes[position]) == 2] or found
    if len(rows) == 1:
        return rows[0]
    what = "several outputs [N, D]" if rows else "no output [N, D]"
    returned = ", ".join(map(written_shape, shapes)) or "no tensor"
    raise UnsupportedLayerError(
        f"the network returns {returned}: {what}, but exactly one embedding is needed; "
        "wrap the network in a module that returns only the embedding"
    )


def as_rows(output: Tensor) -> Tensor:
    """Return ``output``, flattened to [N, D] if it is an embedding [N, D, 1, 1]."""
    return output.flatten(1) if is_embedding(output.shape) else output


def is_embedding(shape: Sequence[Any]) -> bool:
    """True for [N, D] and [N, D, 1, 1] with D > 1."""
    return len(shape) in (2, 4) and shape[1] != 1 and all(size == 1 for size in shape[2:])


def written_shape(shape: Sequence[int | None]) -> str:
    """Format a shape like ``[N, 512]``; None is written as N."""
    return "[" + ", ".join("N" if size is None else str(size) for size in shape) + "]"
