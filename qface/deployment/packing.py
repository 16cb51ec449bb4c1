"""Integers of 2 to 8 bits packed without a wasted bit, in a layout that standard ONNX operators unpack.

The b-bit integers that together fill whole bytes are a group, a string of bits, the low ones first: at 6 bits, four
integers in three bytes. What is first in its group lies in one run, what is second in the next; so do the bytes, in
planes. Unpacking makes whole runs of whole planes and shuffles nothing:

    runs[k] = (planes[i] >> s | planes[i + 1] << (8 - s)) & (2^b - 1)    where i, s = divmod(k * b, 8)

The integers are the runs, one behind the other, less an offset that made them unsigned.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Place", "offset", "pack", "places", "unpack"]

Bytes = npt.NDArray[np.uint8]
Int8 = npt.NDArray[np.int8]


class Place(NamedTuple):
    """The place of a run: from bit ``shift`` of ``plane`` on, and on into the next plane if it ``straddles``."""

    plane: int
    shift: int
    straddles: bool


def places(bits: int) -> tuple[Place, ...]:
    """The runs of integers of ``bits`` bits, in order."""
    starts = (divmod(run * bits, 8) for run in range(8 // math.gcd(bits, 8)))
    return tuple(Place(plane, shift, shift + bits > 8) for plane, shift in starts)


def offset(bits: int) -> int:
    """The number added before packing: half the range, or 0 at 8 bits, whose bytes need only be read as signed."""
    return 1 << (bits - 1) if bits < 8 else 0


def pack(integers: Int8, bits: int) -> Bytes:
    """Pack signed ``integers`` of any shape, each in -2^(bits-1) .. 2^(bits-1) - 1, in C order.

    Returns:
        uint8 [bits / d, ceil(integers x d / 8)], where d is the greatest common divisor of ``bits`` and 8.

    Raises:
        ValueError: an integer needs more than ``bits`` bits.
    """
    half = 1 << (bits - 1)
    if integers.size and (integers.min() < -half or integers.max() >= half):
        raise ValueError(f"integers from {integers.min()} to {integers.max()} do not fit into {bits} bits")
    runs = _runs((integers.reshape(-1).astype(np.int16) + offset(bits)).astype(np.uint8), len(places(bits)))
    planes = np.zeros((len(runs) * bits // 8, runs.shape[1]), np.uint8)
    for run, place in zip(runs, places(bits), strict=True):
        planes[place.plane] |= run << place.shift
        if place.straddles:
            planes[place.plane + 1] |= run >> (8 - place.shift)
    return planes


def _runs(values: Bytes, count: int) -> Bytes:
    """``values`` cut into ``count`` runs of equal length, the last one filled up with zeros."""
    runs = np.zeros((count, -(-values.size // count)), np.uint8)
    runs.reshape(-1)[: values.size] = values
    return runs


def unpack(planes: Bytes, bits: int, count: int) -> Int8:
    """The ``count`` integers of ``bits`` bits that :func:`pack` packed, int8 [count]."""
    runs = np.stack([_run(planes, place) for place in places(bits)]) & np.uint8((1 << bits) - 1)
    integers: Int8 = runs.reshape(-1)[:count].view(np.int8) - np.int8(offset(bits))
    return integers


def _run(planes: Bytes, place: Place) -> Bytes:
    """A run, with bits of others above it."""
    run: Bytes = planes[place.plane] >> place.shift
    if place.straddles:
        run = run | planes[place.plane + 1] << (8 - place.shift)
    return run
