"""Average pooling with ``ceil_mode`` over padding that counts, as explicit padding and pooling that does not count it.

onnxruntime divides such windows by other numbers than torch does.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["padding_of_ceil_windows"]

Sizes = Sequence[int]


def padding_of_ceil_windows(
    sizes: Sizes, counts: Sizes, kernel: Sizes, stride: Sizes, padding: Sizes, whole: bool = False
) -> tuple[int, int, int, int]:
    """Return the padding after which pooling without padding has the windows of ``ceil_mode``.

    Args:
        sizes: height and width of the image.
        counts: number of windows along them.
        kernel: height and width of a window.
        stride: vertical and horizontal stride.
        padding: padding at top and bottom, and at left and right.
        whole: True to complete windows that reach beyond the padding, False to leave them smaller.

    Returns:
        Pixels at the left, right, top and bottom, in the order of ``torch.nn.functional.pad``.
    """
    behind = []
    for size, count, side, step, edge in zip(sizes, counts, kernel, stride, padding, strict=True):
        needed = (count - 1) * step + side - edge - size
        behind.append(max(0, needed if whole else min(needed, edge)))
    return padding[1], behind[1], padding[0], behind[0]
