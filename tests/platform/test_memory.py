"""Freed memory stays with the process."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from haltscale.platform.memory import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
for _ in range(32):  # until malloc has found places that fit
    torch.ones(1 << 24)  # 64 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an order to glibc's malloc")
def test_pages_that_were_freed_are_not_taken_from_the_kernel_again():
    faults = {}
    for how in ("kept", "given back"):
        done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    assert faults["given back"] >= 8 * 32, "64 MiB in pages of at most 2 MiB, eight times"
    assert faults["kept"] < 8 * 32 / 2
