"""What was freed need not be fetched from the system again, in the programs."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable

import pytest

from paramserver.server import program
from paramserver.settings import Settings
from paramserver.transport import malloc
from workers import __main__ as worker
from workers.observer import observer

KEEPS = "malloc.keep_freed()"

ROUNDS = """
import resource
import torch
from paramserver.transport import malloc
from workers.link.client import Client
BEFORE
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
    a_users = "Client('127.0.0.1', 1).close()"
    for before in (KEEPS, "", a_users):
        code = ROUNDS.replace("BEFORE", before)
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **defaults},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        faults[before] = int(done.stdout)
    pages = 5 * 16 * 4 * 2**19 // resource.getpagesize()
    assert faults[KEEPS] < 0.05 * pages
    assert faults[""] > 0.5 * pages
    assert faults[a_users] > 0.5 * pages, "the allocator of a user's own process was set"


class Reached(Exception):
    pass


@pytest.mark.parametrize(
    "run",
    [lambda: program.serve(Settings()), worker.main, observer.main],
    ids=["server", "worker", "observer"],
)
def test_the_programs_keep_what_was_freed(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]
) -> None:
    """Only the time of a round would show that one of them does not."""

    def reached() -> None:
        raise Reached

    monkeypatch.setattr(malloc, "keep_freed", reached)
    monkeypatch.setattr("workers.observer.observer._step_aside", lambda: None)
    with pytest.raises(Reached):
        run()
