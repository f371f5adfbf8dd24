"""What every test gets: a quiet environment, free ports, a check that nothing is left running."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import forked
import psutil
import pytest
import torch
from hypothesis import HealthCheck, settings

MARK = "PARAMSERVER_TESTS"
"""Environment variable that all processes of this session inherit, so that orphans are found."""

ENDING_S = 30.0
"""How long a process may take to end after its test, on a busy machine."""

STARTTIME = 19
"""The index of a thread's begin among the fields behind its name in /proc/*/stat (proc(5))."""

# A busy machine is slow, which says nothing about an example.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `root` where there are no network namespaces to make, and those of devices
    that this machine has not."""
    if item.get_closest_marker("root") and (sys.platform != "linux" or os.geteuid() != 0):
        pytest.skip("needs root on Linux")
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    if item.get_closest_marker("mps") and not torch.backends.mps.is_available():
        pytest.skip("needs MPS")


SLOW_FIRST = (
    "up",
    "ray",
    "whole",
    "results",
    "examples",
    "resume",
    "strangers",
    "page",
    "page_browser",
    "terminal",
    "ends",
    "loggers",
    "mdns",
    "handshake",
    "cables",
    "malloc",
    "messages",
    "cluster",
    "bench",
    "builders",
)
"""Files whose tests take longest: begun last, they would leave the other processes idle."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many processes run tests at once: most of a test's time is spent waiting."""
    return min(6, 1 + (os.cpu_count() or 1))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first."""
    first = {f"test_{name}.py": place for place, name in enumerate(SLOW_FIRST)}
    items.sort(key=lambda item: first.get(item.path.name, len(first)))


@pytest.fixture(scope="session", autouse=True)
def quiet_environment(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One torch thread; no W&B login and no make variables from outside, here and in children."""
    torch.set_num_threads(1)
    with suppress(ValueError):  # not in the main thread
        # A shell that starts tests in the background has SIGINT ignored in all that they start,
        # and nohup has SIGHUP ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for name in list(os.environ):
        if name.startswith("WANDB_") or name in {
            "MAKEFLAGS",
            "MAKELEVEL",
            "MAKEOVERRIDES",
            "MFLAGS",
        }:
            del os.environ[name]
    os.environ["WANDB_CONFIG_DIR"] = str(tmp_path_factory.mktemp("wandb-config"))
    os.environ["NETRC"] = os.devnull
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path_factory.mktemp("config"))  # keys are made there
    os.environ.pop("PARAMSERVER_JOIN", None)
    os.environ["MPLBACKEND"] = "Agg"
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ[MARK] = str(os.getpid())


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """Programs whose main is called here set handlers of signals."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    with suppress(ValueError):  # not in the main thread
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves processes or ZeroMQ contexts behind; the processes are killed."""
    processes, before = set(psutil.pids()), {*tasks(), *tasks()}
    begun = ticks()
    yield
    _, left = psutil.wait_procs(family(set(psutil.pids()) - processes), timeout=ENDING_S)
    names = [describe(process) for process in left]
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=ENDING_S)
    assert not names, f"left running, now killed: {'; '.join(names)}"
    # A thread that was joined may be listed a moment longer: Linux wakes the joiner first.
    deadline = time.monotonic() + ENDING_S
    while any(start >= begun and tid not in before for tid, start in zmq_threads().items()):
        assert time.monotonic() < deadline, (
            "left a ZeroMQ context open: close its sockets, then term()"
        )
        time.sleep(0.01)


def family(pids: set[int]) -> list[psutil.Process]:
    """Those that descend from this session, also where the parent is gone."""
    found = []
    children = psutil.Process().children(recursive=True) if pids else []
    for pid in pids:
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            ours = process in children or process.environ().get(MARK) == os.environ[MARK]
            # The standard library starts its tracker once and keeps it to the end, as we do the
            # process that programs are forked from.
            stays = pid == forked.parent() or "multiprocessing.resource_tracker" in describe(
                process
            )
            # A browser, which the tests of a file share, begins and ends processes as it likes.
            stays = stays or process.name().startswith("chrom")
            if ours and not stays:
                found.append(process)
    return found


def describe(process: psutil.Process) -> str:
    """A process in words: its id and its command line."""
    with suppress(psutil.Error):
        return f"{process.pid} {' '.join(process.cmdline()) or process.name()}"
    return f"{process.pid} (gone)"


def ticks() -> int:
    """The time since boot in the clock ticks in which Linux says when a thread began."""
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return 0
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def tasks() -> list[str]:
    """The threads of this process, whatever their names: one that has just begun has none of its
    own yet. Seen on Linux only. A look beside a thread that ends may miss another."""
    return [task.name for task in Path("/proc/self/task").glob("*")]


def zmq_threads() -> dict[str, int]:
    """The threads of this process's ZeroMQ contexts and when they began; seen on Linux only."""
    threads = {}
    for task in Path("/proc/self/task").glob("*"):
        with suppress(OSError):  # a thread that has ended meanwhile
            name, _, fields = (task / "stat").read_text().partition("(")[2].rpartition(")")
            if name.startswith("ZMQbg/"):
                threads[task.name] = int(fields.split()[STARTTIME])
    return threads
