"""What watching a run costs: `python -m benchmarks.watched`.

Two workers train SimpleNN, on one machine with their server. In one and the same run they are
watched for some seconds, by a viewer of the page and by `make watch` on a terminal, then not
watched for as long, and so on: so a neighbour that comes and goes disturbs both alike. Printed are
the steps a second of both, for each pair and over all, and the processor time that page, watcher
and server take for it.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import psutil

from benchmarks.network import free_port
from benchmarks.runs import _runs, step_lines
from benchmarks.team import CLONE, Failed, Team
from paramserver.net.address import LOOPBACK, Address
from paramserver.watch.connection import Connection

WORKERS = 2
LIMIT_S = 3600.0
BEGIN_STEP = 300
SETTLE_S = 1.5  # after a change, before what counts
COLUMNS, ROWS = 120, 40
DEADLINE_S = 30.0


@contextmanager
def viewer(port: int) -> Iterator[Callable[[], int]]:
    """A browser at rest, for the block: it reads the page's stream. Gives how many bytes came."""
    count = 0
    with socket.create_connection((LOOPBACK, port), DEADLINE_S) as stream:

        def read() -> None:
            nonlocal count
            with suppress(OSError):
                while piece := stream.recv(2**16):
                    count += len(piece)

        stream.sendall(f"GET /events HTTP/1.1\r\nHost: {LOOPBACK}:{port}\r\n\r\n".encode())
        reading = threading.Thread(target=read)
        reading.start()
        try:
            yield lambda: count
        finally:
            stream.shutdown(socket.SHUT_RDWR)
            reading.join()


@contextmanager
def watcher(port: int) -> Iterator[Callable[[], int]]:
    """`make watch` on a terminal, for the block. Gives how many bytes it has drawn."""
    count = 0
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    words = [sys.executable, "-m", "paramserver.watch", f"port={port}"]
    own = {**os.environ, "TERM": "xterm-256color"}
    process = subprocess.Popen(words, cwd=CLONE, stdin=slave, stdout=slave, env=own)
    os.close(slave)

    def read() -> None:
        nonlocal count
        with suppress(OSError):
            while piece := os.read(master, 2**16):
                count += len(piece)

    reading = threading.Thread(target=read)
    reading.start()
    try:
        yield lambda: count
    finally:
        process.kill()
        process.wait()
        reading.join()
        os.close(master)


@dataclass(frozen=True)
class Phase:
    """Some seconds of the run: from and to when, since 1970, and the processor time of each program
    in them."""

    begin: float
    end: float
    took: dict[str, float]
    memory_mb: dict[str, float]

    def rate(self, lines: list[dict[str, Any]], began: float) -> float:
        """Steps a second, of the metrics of a run that `began` then."""
        found = sum(self.begin <= began + line["seconds"] < self.end for line in lines)
        return found / (self.end - self.begin)

    def share(self, name: str) -> float:
        """Of one core."""
        return self.took.get(name, 0.0) / (self.end - self.begin)


def phase(team: Team, seconds: float) -> Phase:
    """Let the run go on for so long."""
    programs = _programs(team)
    before = {name: _took(process) for name, process in programs.items()}
    begin = time.time()
    _pause(team, seconds)
    end = time.time()
    took = {name: _took(process) - before[name] for name, process in programs.items()}
    memory = {name: process.memory_info().rss / 1e6 for name, process in programs.items()}
    return Phase(begin, end, took, memory)


def _programs(team: Team) -> dict[str, psutil.Process]:
    """The programs of the run and those that watch it, by name."""
    names = ("server", *(f"worker-{number}" for number in range(1, WORKERS + 1)))
    found = {name: psutil.Process(team.pid(name)) for name in names}
    for each in psutil.Process().children(recursive=True):
        for name in ("page", "watch"):
            if f"paramserver.{name}" in each.cmdline():
                found[name] = each
    return found


def _took(process: psutil.Process) -> float:
    """Seconds of the processor, of all its threads, so far."""
    times = process.cpu_times()
    return times.user + times.system


def measured(pairs: int, seconds: float) -> Iterator[tuple[Phase, Phase, float, float]]:
    """Pairs of phases with their rates, the one that nobody watches first."""
    with Team(LIMIT_S) as team:
        port, page = free_port(), free_port()
        words = [f"port={port}", f"num_workers={WORKERS}", f"run_dir={_runs(team)}"]
        words += ["dataset.name=digits", "num_epochs=100000", "wandb.mode=disabled"]
        team.program("server", "paramserver", *words, f"page_port={page}", "observer=false")
        for number in range(1, WORKERS + 1):
            team.program(f"worker-{number}", "workers", f"id={number}", f"port={port}")
        began = _began(team, port)
        for place in range(pairs):
            found: dict[bool, Phase] = {}
            for watched in (False, True) if place % 2 else (True, False):
                with ExitStack() as stack:
                    for start in (viewer(page), watcher(port)) if watched else ():
                        _until_drawn(team, stack.enter_context(start))
                    _pause(team, SETTLE_S)
                    found[watched] = phase(team, seconds)
            _pause(team, SETTLE_S)  # until metrics.jsonl has the last steps
            lines = step_lines(_runs(team))
            plain, seen = found[False], found[True]
            yield plain, seen, plain.rate(lines, began), seen.rate(lines, began)


def _began(team: Team, port: int) -> float:
    """When the run's first round was opened, since 1970, once it has begun in earnest."""
    with Connection(Address(LOOPBACK, port + 2)) as connection:
        while True:
            status = connection.poll(0.1)
            team.until(lambda: True, "for the run")
            if status is not None and status.step >= BEGIN_STEP:
                return status.made_at - status.seconds


def _until_drawn(team: Team, count: Callable[[], int]) -> None:
    """Wait until a watcher has got a status, and more than an empty screen."""
    team.until(lambda: count() > 2000, "for a status")


def _pause(team: Team, seconds: float) -> None:
    until = time.monotonic() + seconds
    team.until(lambda: time.monotonic() >= until, "for the run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.watched")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each half of a pair")
    options = parser.parse_args()
    found: list[tuple[Phase, Phase, float, float]] = []
    try:
        for pair in measured(options.pairs, options.seconds):
            found.append(pair)
            *_, before, after = pair
            print(f"{before:,.1f} steps/s, watched {after:,.1f} ({after / before:.3f})", flush=True)
    except (Failed, KeyboardInterrupt) as error:
        print(error or "stopped", file=sys.stderr)
    if not found:
        sys.exit(1)
    print(f"steps/s, watched over not watched: {spread([a / b for *_, b, a in found])}")
    steps = [a / b for plain, seen, b, a in found for b, a in [(_cost(plain, b), _cost(seen, a))]]
    print(f"processor time of all programs for a step, the same: {spread(steps)}")
    took = []
    for name in ("server", "page", "watch"):
        more = median(seen.share(name) - plain.share(name) for plain, seen, *_ in found)
        memory = max(seen.memory_mb.get(name, 0.0) for _, seen, *_ in found)
        took.append(f"{name} {100 * more:+.1f} % of a core ({memory:.0f} MB)")
    print(f"what is watched takes, over what is not: {', '.join(took)}")


def _cost(of: Phase, rate: float) -> float:
    """Seconds of the processor for a step."""
    return sum(of.took.values()) / (of.end - of.begin) / rate


def spread(values: list[float]) -> str:
    low, _, high = quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{median(values):.3f} (median of {len(values)}; half of them {low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
