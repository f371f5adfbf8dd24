"""A signal that asks a worker's program to leave is heard wherever Python stands."""

from __future__ import annotations

import subprocess
import sys

import pytest

FREED = """
import os, signal, sys, time
from workers import __main__ as program

class Freed:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
        time.sleep(0)  # the signal is handled here at the latest

def train(settings, given):
    Freed()
    signal.pause()

import workers.builtin.train
workers.builtin.train.train = train
sys.argv = ["worker", "id=1"]
program.main()
"""


@pytest.mark.parametrize(
    ("name", "told"), [("SIGINT", "stopped by Ctrl-C"), ("SIGTERM", "stopped from outside")]
)
def test_a_signal_is_not_lost_where_an_object_is_freed(name: str, told: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FREED.replace("{name}", name)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"left the run: {told}" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
