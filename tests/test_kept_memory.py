from __future__ import annotations

import subprocess
import sys

import pytest

# In a process of its own, since the allocator is shared by all.
SCRIPT = """
import resource
import torch
from qface.kept_memory import memory_kept

TENSOR = 2**24  # floats, 64 MB: twice what glibc keeps at most

def pages_resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

torch.ones(TENSOR)
before = pages_resident()
with memory_kept():
    with memory_kept():
        pass
    torch.ones(TENSOR)
    print(pages_resident() - before)
print(pages_resident() - before)
print(4 * TENSOR // resource.getpagesize())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="about glibc")
def test_memory_is_kept_inside_and_given_back_behind() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    kept_inside, kept_behind, tensor = map(int, result.stdout.split())
    assert kept_inside > tensor / 2
    assert kept_behind < tensor / 4
