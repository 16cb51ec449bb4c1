"""Memory allocator settings for work that runs a network many times.

glibc returns every freed tensor above 32 MiB to the system, and the next allocation of that size faults in each page
again. A training step frees and allocates the same gigabytes; without returning them it took half as long
(MobileFaceNet), and so did 64 images through an IResNet-18 of 4 bits.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

__all__ = ["memory_kept"]

# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_ALL = 2**31 - 1
# glibc raises its thresholds up to 32 MiB and twice that, as soon as a large tensor is freed.
_LARGEST_MMAP_THRESHOLD = 32 * 2**20


class _Users:
    """Blocks that want memory to be kept, in all threads; they may overlap."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0

    @contextmanager
    def counted(self, library: ctypes.CDLL) -> Iterator[None]:
        """Keep memory from the first block that enters to the last one that leaves."""
        with self._lock:
            self._count += 1
            if self._count == 1:
                _set_thresholds(library, _ALL, _ALL)
        try:
            yield
        finally:
            with self._lock:
                self._count -= 1
                if self._count == 0:
                    _set_thresholds(library, _LARGEST_MMAP_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)
                    library.malloc_trim(0)


_USERS = _Users()


@contextmanager
def memory_kept() -> Iterator[None]:
    """Let glibc keep freed memory within the block; do nothing with another C library."""
    library = _glibc()
    with nullcontext() if library is None else _USERS.counted(library):
        yield


def _glibc() -> ctypes.CDLL | None:
    """Return the C library of this process, or None if it is not glibc."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None


def _set_thresholds(library: ctypes.CDLL, mmap: int, trim: int) -> None:
    library.mallopt(_M_MMAP_THRESHOLD, mmap)
    library.mallopt(_M_TRIM_THRESHOLD, trim)
