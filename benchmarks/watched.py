"""What watching a run costs: `python -m benchmarks.watched`.

Two workers train SimpleNN with page, a viewer of it and `make watch` on a terminal, and without, in
turn. Printed are the steps a second of both, and the processor time that page and watcher take for
each second of the run. `--once` makes one pair only.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import time
import urllib.request
from contextlib import suppress
from statistics import median

import psutil

from benchmarks.network import free_port
from benchmarks.runs import TRAINING_SAMPLES, _runs, step_lines
from benchmarks.team import CLONE, Team, prepare
from paramserver.net.address import LOOPBACK

WORKERS, BATCH = 2, 32
STEPS, SKIPPED = 3000, 300
LIMIT_S = 300.0
COLUMNS, ROWS = 120, 40


def viewer(port: int) -> int:
    """A browser at rest: reads the page's stream to its end; returns how many bytes that were."""
    count = 0
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        with suppress(OSError):
            stream = urllib.request.urlopen(f"http://{LOOPBACK}:{port}/events", timeout=30)
            while line := stream.readline():
                count += len(line)
                if line.startswith(b"event: end"):
                    return count
        time.sleep(0.1)  # the server is not there yet
    return count


def watcher(port: int) -> None:
    """`make watch` on a terminal, until its end."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    words = [sys.executable, "-m", "paramserver.watch", f"port={port}"]
    own = {**os.environ, "TERM": "xterm-256color"}
    with subprocess.Popen(words, cwd=CLONE, stdin=slave, stdout=slave, env=own):
        os.close(slave)
        with suppress(OSError):
            while os.read(master, 65536):
                pass


class Meter:
    """The processor time of the processes of these modules, while a run trains."""

    def __init__(self, modules: tuple[str, ...]) -> None:
        self._modules = modules
        self._first: dict[str, tuple[float, float]] = {}
        self._last: dict[str, tuple[float, float]] = {}
        self.memory_mb: dict[str, float] = {}
        self._due = 0.0

    def look(self) -> None:
        """To be called often; looks once a second."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + 1.0
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                words = process.cmdline()
                module = next((m for m in self._modules if m in words), None)
                if module is not None:
                    times = process.cpu_times()
                    mark = (time.monotonic(), times.user + times.system)
                    self._first.setdefault(module, mark)
                    self._last[module] = mark
                    self.memory_mb[module] = process.memory_info().rss / 1e6

    def share(self, module: str) -> float:
        """Of one core: seconds of the processor for a second of the run, without the start."""
        if module not in self._first:
            return 0.0
        (since, before), (now, after) = self._first[module], self._last[module]
        return (after - before) / (now - since) if now > since else 0.0


def run(watched: bool) -> tuple[float, Meter]:
    """Steps a second of a run, and what its watchers took."""
    meter = Meter(("paramserver.page", "paramserver.watch"))
    epochs = -(-(STEPS + SKIPPED) * WORKERS * BATCH // TRAINING_SAMPLES)
    with Team(LIMIT_S) as team:
        port, page = free_port(), free_port()
        words = [f"port={port}", f"num_workers={WORKERS}", f"run_dir={_runs(team)}"]
        words += ["dataset.name=digits", f"num_epochs={epochs}", "wandb.mode=disabled"]
        words += [f"page_port={page}"] if watched else ["page=false", "watch_port=0"]
        team.program("server", "paramserver", *words)
        for number in range(1, WORKERS + 1):
            team.program(f"worker-{number}", "workers", f"id={number}", f"port={port}")
        if watched:
            team.start("viewer", viewer, page)
            team.start("watcher", watcher, port)
        team.wait("server", meter.look)
        for number in range(1, WORKERS + 1):
            team.wait(f"worker-{number}")
        lines = [line for line in step_lines(_runs(team)) if line["step"] > SKIPPED]
    return len(lines[1:]) / (lines[-1]["seconds"] - lines[0]["seconds"]), meter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.watched")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--once", action="store_true", help="one pair only")
    options = parser.parse_args()
    prepare()
    ratios = []
    for _ in range(1 if options.once else options.pairs):
        plain, _ = run(watched=False)
        seen, meter = run(watched=True)
        ratios.append(seen / plain)
        took = ", ".join(
            f"{module}: {100 * meter.share(module):.1f} % of a core, {memory:.0f} MB"
            for module, memory in meter.memory_mb.items()
        )
        print(f"{plain:,.1f} steps/s, watched {seen:,.1f} ({seen / plain:.3f}); {took}", flush=True)
    print(f"watched over not watched, median of {len(ratios)}: {median(ratios):.3f}")


if __name__ == "__main__":
    main()
