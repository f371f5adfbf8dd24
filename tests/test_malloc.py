"""paramserver/memory.py: what was freed need not be fetched from the system again."""

import os
import resource
import subprocess
import sys

import pytest

ROUNDS = """
import resource
import torch
from paramserver.transport import malloc as memory
if KEEP:
    memory.keep_freed()
torch.set_num_threads(1)
base = torch.zeros(2**19)

def one_round():
    made = [base.clone() for _ in range(16)]

for _ in range(20):  # the first few may still find no hole that fits
    one_round()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    one_round()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_rounds_of_equal_tensors_take_no_new_pages() -> None:
    faults = {}
    # glibc's defaults, which it does not adapt then: with luck it would do without help.
    defaults = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
    for keep in (True, False):
        code = ROUNDS.replace("KEEP", str(keep))
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **defaults},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        faults[keep] = int(done.stdout)
    pages = 5 * 16 * 4 * 2**19 // resource.getpagesize()
    assert faults[True] < 0.05 * pages
    assert faults[False] > 0.5 * pages
