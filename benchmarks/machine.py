"""The machine that a measurement was made on, and how fast its loopback is."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import msgspec
import psutil
import torch
import zmq

from benchmarks import network
from benchmarks.team import CLONE, Team

LOOPBACK = "127.0.0.1"
CHUNK = 2**18
BUSY = 0.5
"""Load per core from which on other work is likely to disturb."""


class Machine(msgspec.Struct, frozen=True):
    """What results depend on. Rates in bytes per second, times in seconds."""

    taken: str
    commit: str
    cpu: str
    cores: int
    memory_gb: float
    system: str
    python: str
    torch: str
    pyzmq: str
    load: float
    """Processes that wanted a core in the minute before."""
    cores_gain: float
    """How much more Python all cores run together than one of them alone. Two threads of one core,
    as virtual machines often have, are little more than that one."""
    tcp_rate: float
    """The most that all streams over loopback carry together; data that stays in the caches."""
    copy_rate: float
    """The most that all cores copy together within memory, in the caches too."""
    round_trip_s: float
    """One byte there and back over TCP on loopback, by threads that sleep meanwhile."""

    def __str__(self) -> str:
        return (
            f"{self.taken}, commit {self.commit}: {self.cpu}, {self.cores} cores that run "
            f"{self.cores_gain:.1f} times the Python of one, {self.memory_gb:.0f} GB, "
            f"{self.system}, Python {self.python}, torch {self.torch}, {self.pyzmq}; load "
            f"{self.load:.1f} before the start; loopback carries {8e-9 * self.tcp_rate:.0f} Gbit/s "
            f"and one byte there and back in {1e6 * self.round_trip_s:.0f} µs; all cores copy "
            f"{1e-9 * self.copy_rate:.0f} GB/s"
        )

    @property
    def busy(self) -> bool:
        return self.load > BUSY * self.cores


def describe() -> Machine:
    load = os.getloadavg()[0]
    return Machine(
        taken=datetime.now().strftime("%Y-%m-%d %H:%M"),
        commit=_commit(),
        cpu=_cpu(),
        cores=_cores(),
        memory_gb=psutil.virtual_memory().total / 1e9,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        torch=str(torch.__version__),
        pyzmq=f"pyzmq {zmq.__version__} (libzmq {zmq.zmq_version()})",
        load=load,
        cores_gain=cores_gain(),
        tcp_rate=max(tcp_rate(streams) for streams in (1, 2, 1, 2)),
        copy_rate=copy_rate(),
        round_trip_s=round_trip(),
    )


def tcp_rate(streams: int, seconds: float = 0.6) -> float:
    """Bytes per second that plain sockets carry over loopback, all streams together."""
    with Team(30) as team:
        port = network.free_port()
        for stream in range(streams):
            address = (LOOPBACK, port + stream)
            team.start(f"receive-{stream}", network.receive, address, seconds)
            team.start(f"send-{stream}", network.send, address)
        return float(sum(team.wait(f"receive-{stream}") for stream in range(streams)))


def copy_rate() -> float:
    """Bytes per second that one process on each core copies, all together."""
    return _together(copy, _cores())


def _together(rate: Callable[[], float], processes: int) -> float:
    """The sum of what that many processes reach at once."""
    with Team(30) as team:
        names = [f"{rate.__name__}-{number}" for number in range(processes)]
        for name in names:
            team.start(name, rate)
        return float(sum(team.wait(name) for name in names))


def copy(seconds: float = 0.6) -> float:
    source, target = (memoryview(bytearray(CHUNK)) for _ in range(2))
    total, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        target[:] = source
        total += CHUNK
    return total / (time.perf_counter() - start)


def cores_gain() -> float:
    """Python's speed on all cores at once over that on one."""
    return _together(count, _cores()) / _together(count, 1)


def count(seconds: float = 0.6) -> float:
    """How far Python counts in a second."""
    total, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(1000):
            total += 1
    return total / (time.perf_counter() - start)


def link_rate(hosts: network.Hosts, one: str, other: str, seconds: float = 1.0) -> float:
    """Bytes per second from one host to another."""
    with Team(30) as team:
        address = (hosts.address(other), 20_000)
        team.start("receive", network.receive, address, seconds, host=hosts[other])
        team.start("send", network.send, address, host=hosts[one])
        return float(team.wait("receive"))


def round_trip(times: int = 1000) -> float:
    with Team(30) as team:
        address = (LOOPBACK, network.free_port())
        team.start("answer", network.answer, address)
        team.start("ask", network.ask, address, times)
        return float(team.wait("ask"))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _cpu() -> str:
    if sys.platform == "darwin":
        return _said("sysctl", "-n", "machdep.cpu.brand_string")
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    changed = "+" if _said("git", "status", "--porcelain", "-uno") else ""
    return (_said("git", "rev-parse", "--short", "HEAD") or "unknown") + changed


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=CLONE, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
