from __future__ import annotations

import subprocess
import sys

import pytest

# In a process of its own, since the allocator is shared by all.
SCRIPT = """
import resource
import torch
from qface.distillation.memory import memory_kept

TENSOR = 2**24  # floats, 64 MB: twice what glibc keeps at most

def pages_resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(TENSOR)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.ones(TENSOR)
print(page_faults())
before = pages_resident()
with memory_kept():
    torch.ones(TENSOR)
    print(page_faults())
    print(pages_resident() - before)
print(pages_resident() - before)
print(4 * TENSOR // resource.getpagesize())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="about glibc")
def test_memory_is_paid_for_once_inside_and_given_back_behind() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    faults_before, faults_inside, kept_inside, kept_behind, tensor = map(int, result.stdout.split())
    assert faults_inside < faults_before / 4
    assert kept_inside > tensor / 2
    assert kept_behind < tensor / 4
