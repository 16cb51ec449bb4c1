from __future__ import annotations

import subprocess
import sys

import pytest

# In a process of its own, since the allocator is shared by all.
SCRIPT = """
import resource
import torch
from qface.distillation.memory import memory_kept

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(2**24)  # 64 MB, twice what glibc keeps at most
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.ones(2**24)
print(page_faults())
with memory_kept():
    torch.ones(2**24)
    print(page_faults())
print(page_faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="about glibc")
def test_memory_is_paid_for_once_inside_and_given_back_behind() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    before, inside, behind = map(int, result.stdout.split())
    assert inside < before / 4
    assert behind > before / 4
