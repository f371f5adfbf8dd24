"""Starts the observer's process beside the server, and starts it again where it dies."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import msgspec

from paramserver import notify
from paramserver.errors import UserError
from paramserver.net.address import LOOPBACK
from paramserver.output.runfolder import RunFolder
from paramserver.program import command as program
from paramserver.server.control import Control
from paramserver.settings import Settings
from paramserver.words import signal_name

OBSERVER_RESTARTS = 3
OBSERVER_PROVEN_S = 60.0  # after running for longer, earlier deaths do not count
OBSERVER_PATIENCE_S = 90.0
OBSERVER_PAUSE_S = 5.0  # before the next try to make its process
LOG_LINES, LOG_BYTES = 5, 4096  # of the observer's log, to say why it ended


def check(settings: Settings) -> None:
    """Raise `UserError` for what the observer could not build of these settings, as far as that
    shows without its process."""
    from paramserver import workers_package

    importlib.import_module(f"{workers_package().__name__}.builtin.beforehand").check(settings)


class ObserverProcess:
    """The observer beside the server; it is started again when it dies."""

    def __init__(
        self,
        settings: Settings,
        folder: RunFolder,
        run: str,
        key: str,
        resume: Path | None,
        problem: Callable[[str], None],
        token: str | None = None,
    ) -> None:
        """`token`: the join token, for a server that lets nobody in at loopback without ipc."""
        self._folder = folder
        self._problem = problem
        self._orders = {
            "host": LOOPBACK,
            "port": settings.port,
            "key": key,
            "run": run,
            "folder": str(folder.path),
            "settings": asdict(settings),
            "resume": None if resume is None else str(resume),
        }
        self._token = token
        self._began_with: str | None = None  # the token that its process was given at the start
        self._untold = ""  # a newer one, which it has not been given yet
        self._deaths = 0  # in a row, without a proven run in between
        self._started_at = 0.0
        self._again_at = 0.0  # do not start it before: there was no room for a process
        self._here_at: float | None = None  # when this process was last known to the server
        self.problem: UserError | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def renew(self, token: str) -> None:
        """This is the join token from now on. The process that runs gets it at the next `look`: by
        then the server must have the keys."""
        self._token = self._untold = token

    def _start(self) -> subprocess.Popen[bytes]:
        self._started_at, self._here_at = time.monotonic(), None
        self._began_with, self._untold = self._token, ""
        with suppress(OSError):
            self._exit.unlink(missing_ok=True)  # of an earlier process
        with self._open_log() as log:
            process = subprocess.Popen(
                program("workers.observer.observer"),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the server, which ends its observer
                env={**os.environ, "OMP_NUM_THREADS": "1", notify.VARIABLE: str(self._exit)},
            )
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it may die at once, which `look` finds
            orders = {**self._orders, "token": self._token}
            process.stdin.write(msgspec.json.encode(orders) + b"\n")
            process.stdin.flush()  # it stays open: its end means that the server is gone
        return process

    def _open_log(self) -> BinaryIO:
        try:
            return open(self._log, "ab")
        except OSError as error:
            self._problem(f"{self._log} cannot be written, the observer runs without: {error}")
            return open(os.devnull, "ab")

    def look(self, control: Control) -> None:
        """Has it ended? Then start it again, or end the run where that cannot help."""
        now, ended = time.monotonic(), control.rounds.ended is not None
        if self._process is None:
            awaited = control.rounds.coming_back  # the replicas that hold the run come first
            if not awaited and not ended and self.problem is None and now >= self._again_at:
                self._begin(control, now)
            return
        self._tell_token()
        here, hung = control.rounds.observer, False
        if here is not None and here.pid == self._process.pid:  # not an earlier process
            self._here_at = now
        elif control.rounds.ending and not ended and self._hangs(now, control):
            control.watcher.say("the observer does not answer: it is ended", True)
            self._process.kill()
            self._process.wait()
            hung = True
        code = self._process.poll()
        control.rounds.observer_comes = code is None
        if code is None or ended or self.problem is not None:
            return
        well = now - self._started_at > OBSERVER_PROVEN_S
        self._deaths = 1 if well else self._deaths + 1
        how = "it did not answer" if hung else _how(code)
        # With an old token it was refused, perhaps before it had read the new one.
        if code == 2 and self._began_with == self._token:
            self._cannot(control, "the observer could not start", self._last_error())
        elif self._deaths > OBSERVER_RESTARTS:
            why = f"the observer ended {self._deaths} times in a row, the last time {how}"
            last_chance = control.rounds.log_begun and control.rounds.ending is None
            self._cannot(
                control, "the observer cannot be kept running", (why, _last_lines(self._log))
            )
            if last_chance:  # one more try: workers hold the last step until the end
                self._begin(control, now)
        else:
            control.watcher.say(f"the observer ended ({how}): starting it again", True)
            self._begin(control, now)

    def _tell_token(self) -> None:
        """Through the pipe, as its orders: no list of processes shows what is in there."""
        if self._untold and self._process is not None:
            assert self._process.stdin is not None
            with suppress(BrokenPipeError):
                self._process.stdin.write(self._untold.encode() + b"\n")
                self._process.stdin.flush()
            self._untold = ""

    def _begin(self, control: Control, now: float) -> None:
        """Start a process; where the system has no room for one, try again in a while."""
        if control.rounds.log_begun:
            self._orders["resume"] = None  # workers hold a newer state: it takes a snapshot
        control.rounds.observer_comes = True
        try:
            self._process = self._start()
        except OSError as error:  # no memory, or too many processes
            self._process, self._again_at = None, now + OBSERVER_PAUSE_S
            self._deaths += 1
            why = f"the observer cannot be started: {error.strerror or error}"
            if self.problem is None and self._deaths <= OBSERVER_RESTARTS:
                control.watcher.say(f"{why}: trying again", True)
                return
            control.rounds.observer_comes = False
            if self.problem is None:
                self._cannot(control, why, (why, "end other programs, or use observer=false"))

    def _hangs(self, now: float, control: Control) -> bool:
        """Has it joined, and been silent for so long that the run's end does not wait for it?"""
        silence = control.rounds.rules.heartbeat_timeout
        return self._here_at is not None and now - self._here_at > silence

    def _cannot(self, control: Control, reason: str, problem: tuple[str, str]) -> None:
        """There cannot be an observer: end the run, or let it end without one."""
        self.problem = UserError(*problem)
        self._problem(f"{reason}: {problem[0]}")
        control.stop(reason, error=True)

    def _last_error(self) -> tuple[str, str]:
        """Problem and hint of the error that ended it with exit code 2."""
        told = notify.read(self._exit)
        if told.problem:
            return told.problem, told.hint
        return "the observer could not start", _last_lines(self._log)

    @property
    def _exit(self) -> Path:
        return self._folder.observer_exit.absolute()

    @property
    def _log(self) -> Path:
        return self._folder.observer_log

    def finish(self) -> None:
        """Wait for its end, which includes its loggers' last upload; then kill it."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        # A thread wakes up at once when it ends; `wait` with a limit polls.
        waiting = threading.Thread(target=self._process.wait, name="observer's end", daemon=True)
        waiting.start()
        waiting.join(OBSERVER_PATIENCE_S)
        if waiting.is_alive():
            self._process.kill()
            waiting.join()
        with suppress(OSError):
            self._exit.unlink(missing_ok=True)


def _how(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"exit code {code}"
    name = signal_name(-code)
    memory = ", perhaps since memory was short" if -code == signal.SIGKILL else ""
    return f"exit code {code}: {name}{memory}"


def _last_lines(log: Path) -> str:
    """The end of an observer's log, as a hint."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        lines = []
    told = [line.rstrip() for line in lines if line.strip()][-LOG_LINES:]
    return "\n".join([*told, f"see {log}"])
