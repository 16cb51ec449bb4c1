"""Integers of 2 to 8 bits packed without a wasted bit, in a layout that standard ONNX operators unpack.

A b-bit integer is split into planes whose widths are powers of two, the low bits first: 6 = 4 + 2. A plane of width w
holds 8 / w values a byte, and the values of one byte lie one byte count apart, so that unpacking is one broadcast shift
and one mask, without shuffling:

    values[k * bytes + j] = (plane[j] >> (k * w)) & (2^w - 1)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Plane", "pack", "plane_widths", "unpack"]

Bytes = npt.NDArray[np.uint8]
Int8 = npt.NDArray[np.int8]


@dataclass(frozen=True)
class Plane:
    """Bits ``shift`` .. ``shift + width - 1`` of every value; ``data`` is uint8 [ceil(values x width / 8)]."""

    width: int
    shift: int
    data: Bytes


def plane_widths(bits: int) -> tuple[int, ...]:
    """Powers of two, greatest first, that add up to ``bits``."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def pack(integers: Int8, bits: int) -> tuple[Plane, ...]:
    """Pack signed ``integers`` of any shape, each in -2^(bits-1) .. 2^(bits-1) - 1, in C order.

    Raises:
        ValueError: an integer needs more than ``bits`` bits.
    """
    values = integers.reshape(-1).astype(np.int16) + (1 << (bits - 1))
    if values.size and (values.min() < 0 or values.max() >= 1 << bits):
        raise ValueError(f"integers from {integers.min()} to {integers.max()} do not fit into {bits} bits")
    planes = []
    shift = 0
    for width in plane_widths(bits):
        planes.append(Plane(width, shift, _pack_plane((values >> shift) & ((1 << width) - 1), width)))
        shift += width
    return tuple(planes)


def _pack_plane(values: npt.NDArray[np.int16], width: int) -> Bytes:
    per_byte = 8 // width
    rows = np.zeros((per_byte, -(-values.size // per_byte)), np.uint8)
    rows.reshape(-1)[: values.size] = values
    shifts = np.arange(per_byte, dtype=np.uint8)[:, None] * np.uint8(width)
    packed: Bytes = np.bitwise_or.reduce(rows << shifts, axis=0)
    return packed


def unpack(planes: tuple[Plane, ...], count: int) -> Int8:
    """The ``count`` integers that :func:`pack` packed, int8 [count]."""
    values = np.zeros(count, np.int16)
    for plane in planes:
        shifts = np.arange(8 // plane.width, dtype=np.uint8)[:, None] * np.uint8(plane.width)
        parts = (plane.data[None, :] >> shifts) & np.uint8((1 << plane.width) - 1)
        values |= parts.reshape(-1)[:count].astype(np.int16) << plane.shift
    bits = sum(plane.width for plane in planes)
    return (values - (1 << (bits - 1))).astype(np.int8)
