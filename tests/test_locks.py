"""A lock belongs to one process, ends with it, and is seen by processes that only ask."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from paramserver import locks

HOLD = """
import os, sys
from paramserver import locks
fd = os.open(sys.argv[1], os.O_RDONLY)
print(locks.take(fd), flush=True)
sys.stdin.read()
"""

PATIENCE_S = 60.0


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def taken(path: Path) -> bool:
    """Can another process take the lock? It gives it back."""
    with opened(path) as fd:
        return locks.take(fd)


@pytest.fixture(params=["file", "folder"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Something to lock, with a content."""
    if request.param == "folder":
        return tmp_path
    (tmp_path / "number").write_text("7")
    return tmp_path / "number"


def test_one_holds_a_lock_until_its_descriptor_is_closed(path: Path) -> None:
    with opened(path) as held:
        assert locks.take(held) and not taken(path)
    assert taken(path)
    assert path.is_dir() or (path.read_text(), os.listdir(path.parent)) == ("7", ["number"])


def test_those_who_ask_do_not_see_each_other(path: Path) -> None:
    with opened(path) as asking, opened(path) as other:
        fcntl.flock(asking, fcntl.LOCK_SH)  # in the middle of `is_held`
        assert not locks.is_held(other)
    with opened(path) as held, opened(path) as one, opened(path) as another:
        assert locks.take(held)
        assert locks.is_held(one) and locks.is_held(another)


def test_who_asked_holds_nothing(path: Path) -> None:
    with opened(path) as asked:
        assert not locks.is_held(asked)
        assert taken(path)


def test_a_killed_process_leaves_no_lock(path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == "True\n"
        assert not taken(path)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert taken(path)


def test_a_child_that_keeps_the_descriptor_keeps_the_lock(path: Path) -> None:
    """As a supervisor does, which is forked by the program that took the lock."""
    with opened(path) as held:
        assert locks.take(held)
        child = subprocess.Popen(
            [sys.executable, "-c", "input()"], pass_fds=[held], stdin=subprocess.PIPE
        )
    with child:
        assert not taken(path)
        child.kill()
        child.wait()
        assert taken(path)


def test_patience_waits_for_whoever_holds_it(path: Path) -> None:
    with ThreadPoolExecutor(1) as pool, opened(path) as mine:
        with opened(path) as held:
            assert locks.take(held) and not locks.take(mine, 0.01)
            waiting = pool.submit(locks.take, mine, PATIENCE_S)
            assert not waiting.done()
        assert waiting.result(PATIENCE_S)
