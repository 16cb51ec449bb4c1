"""Memory allocator settings for work that runs a network many times.

glibc returns every freed tensor above 32 MiB to the system, and the next allocation of that size faults in each page
again. A training step frees and allocates the same gigabytes; without returning them it took half as long
(MobileFaceNet), and so did 64 images through an IResNet-18 of 4 bits.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

from qface.shared_context import shared_by_threads

__all__ = ["memory_kept"]

# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_ALL = 2**31 - 1
# glibc raises its thresholds up to 32 MiB and twice that, as soon as a large tensor is freed.
_LARGEST_MMAP_THRESHOLD = 32 * 2**20


@contextmanager
def memory_kept() -> Iterator[None]:
    """Let glibc keep freed memory within the block; do nothing with another C library."""
    library = _glibc()
    with nullcontext() if library is None else shared_by_threads(library, _memory_kept):
        yield


@contextmanager
def _memory_kept(library: ctypes.CDLL) -> Iterator[None]:
    _set_thresholds(library, _ALL, _ALL)
    try:
        yield
    finally:
        _set_thresholds(library, _LARGEST_MMAP_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)
        library.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    """Return the C library of this process, or None if it is not glibc."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None


def _set_thresholds(library: ctypes.CDLL, mmap: int, trim: int) -> None:
    library.mallopt(_M_MMAP_THRESHOLD, mmap)
    library.mallopt(_M_TRIM_THRESHOLD, trim)
