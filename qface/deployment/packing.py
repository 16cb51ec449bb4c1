"""Packing of 2-bit to 8-bit integers in a layout that standard ONNX operators unpack.

There are no padding bits. A group is the smallest number of b-bit integers that fills complete bytes, low bits first:
at 6 bits, four integers in three bytes. Run k holds the k-th integer of every group, plane i the i-th byte of every
group. Unpacking computes each run from one or two planes, without reordering:

    runs[k] = (planes[i] >> s | planes[i + 1] << (8 - s)) & (2^b - 1)    where i, s = divmod(k * b, 8)

The integers are the concatenated runs, minus the offset that made them unsigned.
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
    """Position of a run: it starts at bit ``shift`` of ``plane`` and may continue in the next plane."""

    plane: int
    shift: int
    straddles: bool


def places(bits: int) -> tuple[Place, ...]:
    """Return the positions of all runs of ``bits``-bit integers, in order."""
    starts = (divmod(run * bits, 8) for run in range(8 // math.gcd(bits, 8)))
    return tuple(Place(plane, shift, shift + bits > 8) for plane, shift in starts)


def offset(bits: int) -> int:
    """Return the offset added before packing: half the range, or 0 at 8 bits."""
    return 1 << (bits - 1) if bits < 8 else 0


def pack(integers: Int8, bits: int) -> Bytes:
    """Pack signed integers in C order.

    Args:
        integers: int8 of any shape, in -2^(bits-1) .. 2^(bits-1) - 1.
        bits: bits per integer, 2 to 8.

    Returns:
        The planes, uint8 [bits / d, ceil(integers x d / 8)], with d = gcd(bits, 8).

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
    """Split ``values`` into ``count`` runs of equal length; the last one is padded with zeros."""
    runs = np.zeros((count, -(-values.size // count)), np.uint8)
    runs.reshape(-1)[: values.size] = values
    return runs


def unpack(planes: Bytes, bits: int, count: int) -> Int8:
    """Unpack ``count`` integers of ``bits`` bits from the planes of :func:`pack`, int8 [count]."""
    runs = np.stack([_run(planes, place) for place in places(bits)]) & np.uint8((1 << bits) - 1)
    integers: Int8 = runs.reshape(-1)[:count].view(np.int8) - np.int8(offset(bits))
    return integers


def _run(planes: Bytes, place: Place) -> Bytes:
    """Return a run whose high bits may still hold bits of other runs."""
    run: Bytes = planes[place.plane] >> place.shift
    if place.straddles:
        run = run | planes[place.plane + 1] << (8 - place.shift)
    return run
