"""The processes of one measurement: started together, waited for within a deadline, never left.

Functions run in processes forked from one that has imported torch already, so that starting five of
them does not take longer than what they measure. Programs are started as users start them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait as wait_for
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from benchmarks import network

CLONE = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["benchmarks.contenders"])

MARK = "PARAMSERVER_BENCH"
"""Environment variable that every process started here inherits, so that orphans are found."""

ENDING_S = 30.0
LOG_TAIL = 2000
BY_SIGTERM = (-signal.SIGTERM, 128 + signal.SIGTERM)


class Failed(Exception):
    """A process of a measurement ended badly or not in time; its last words."""


class Team:
    """Use it as a context: whoever is left at its end is killed, whatever happened.

    All of it may take `seconds`. `folder` is the team's own, and is removed.
    """

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self.folder = Path(tempfile.mkdtemp(prefix="bench-"))
        self._forked: dict[str, BaseProcess] = {}
        self._told = set[str]()  # to end
        self._programs: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Team:
        os.environ[MARK] = str(os.getpid())
        return self

    def __exit__(self, *_: object) -> None:
        for name in (*self._forked, *self._programs):
            kill(self.pid(name))
        for process in self._forked.values():
            process.join(ENDING_S)
            process.close()
        for program in self._programs.values():
            program.wait(ENDING_S)
        shutil.rmtree(self.folder, ignore_errors=True)

    # ------------------------------------------------------------------ starting

    def start(
        self,
        name: str,
        function: Callable[..., Any],
        *arguments: Any,
        host: str | None = None,
        **more: Any,
    ) -> None:
        """Run `function` in a process of its own; `host` is one of `network.Hosts`."""
        process = CONTEXT.Process(
            target=_run,
            args=(
                self._log(name),
                self._answer(name),
                host,
                self.left(),
                function,
                arguments,
                more,
            ),
            name=name,
        )
        process.start()
        self._forked[name] = process

    def program(self, name: str, *arguments: str) -> None:
        """Run `python -m <arguments>` as a user does, in the clone."""
        with self._log(name).open("wb") as log:
            self._programs[name] = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=CLONE,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def pid(self, name: str) -> int:
        if name in self._programs:
            return self._programs[name].pid
        pid = self._forked[name].pid
        assert pid is not None
        return pid

    def name(self, pid: int) -> str | None:
        """Of the process that was started here."""
        return next((n for n in (*self._forked, *self._programs) if self.pid(n) == pid), None)

    # ------------------------------------------------------------------ waiting

    def left(self) -> float:
        """Seconds left."""
        return self._deadline - time.monotonic()

    def wait(self, name: str, meanwhile: Callable[[], None] = lambda: None) -> Any:
        """Wait for its end and return what its function returned.

        `meanwhile` runs every hundredth of a second. Raises `Failed` if it, or any other of the
        team, ends with an error, or when the time is over.
        """
        while self._code(name) is None:
            self._check(f"waiting for {name}")
            meanwhile()
            time.sleep(0.01)
        self._check(f"at the end of {name}")
        with suppress(FileNotFoundError):
            return json.loads(self._answer(name).read_text())

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until something is so. Raises `Failed` as `wait` does."""
        while not condition():
            self._check(f"waiting {what}")
            time.sleep(0.01)

    def stop(self, name: str) -> Any:
        """Ask it to end (SIGTERM), and `wait`. One that had done its work just before, and was
        about to exit, ends by the signal."""
        self._told.add(name)
        with suppress(psutil.NoSuchProcess):  # it ended by itself meanwhile
            psutil.Process(self.pid(name)).terminate()
        return self.wait(name)

    def _check(self, doing: str) -> None:
        for name in (*self._forked, *self._programs):
            code = self._code(name)
            if code and not (name in self._told and code in BY_SIGTERM):
                raise Failed(f"{name} ended with code {code}:\n{self._said(name)}")
        if self.left() < 0:
            raise Failed("\n".join([f"out of time {doing}", *self._last_words()]))

    def _last_words(self) -> list[str]:
        """What those said last who still run."""
        left = [name for name in (*self._forked, *self._programs) if self._code(name) is None]
        return [f"{name} said last: {self._said(name)}" for name in left]

    def _said(self, name: str) -> str:
        with suppress(FileNotFoundError):  # it has not begun
            return self._log(name).read_text(errors="replace").strip()[-LOG_TAIL:]
        return ""

    def _code(self, name: str) -> int | None:
        if name in self._programs:
            return self._programs[name].poll()
        return self._forked[name].exitcode

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _answer(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def _run(
    log: Path,
    answer: Path,
    host: str | None,
    seconds: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    more: dict[str, Any],
) -> None:
    """What a forked process does."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    if host is not None:
        network.move_to(host)  # before there is any thread: each has its own namespace

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            wait_for([parent.sentinel], seconds)
        os._exit(70)

    threading.Thread(target=end_with_parent, daemon=True).start()
    answer.write_text(json.dumps(function(*arguments, **more)))


def prepare() -> None:
    """Let the process that others are forked from import what they need, before time counts."""
    with Team(300.0) as team:
        team.start("first", os.getpid)
        team.wait("first")


def kill(pid: int) -> None:
    """End a process and all that it started, now."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in (*process.children(recursive=True), process):
            with suppress(psutil.NoSuchProcess):
                each.kill()


def left_behind() -> list[psutil.Process]:
    """Processes of this benchmark that still run, except the one that others are forked from."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            ours = process.environ().get(MARK) == str(os.getpid())
            helper = any("multiprocessing" in word for word in process.cmdline())
            if ours and (not helper or process.ppid() != os.getpid()):
                found.append(process)
    return found
