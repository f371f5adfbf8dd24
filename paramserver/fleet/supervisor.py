"""`python -m paramserver.fleet.supervisor start worker ..`: keeps one process of a run alive here.

A supervisor does not depend on a terminal or an ssh connection. It starts its process, writes the
process's output to a log, starts it again when it dies, keeps a Mac awake, and ends the process
when asked. It holds a lock as long as it lives: there is at most one supervisor for each name, and
a free lock means that there is none. Its folder (the last argument; `..` as seen from the code) has

    state/<name>.lock    held by the supervisor, whose process id is in it
    state/<name>.json    the process and its state: `State`
    state/<name>.notify  what the process reports to its supervisor: `paramserver.notify`
    logs/<name>.log      the output of the process

    start NAME FOLDER              orders (`Orders`, JSON) by standard input; answers a `State`
    status FOLDER [shown]          every `State`, as a JSON list; with `shown` the status of the run
                                   is in the server's
    follow NAME FOLDER [OFFSET]    the log from there on, until the process has ended for good or
                                   standard input ends; exits with 0 if all went well
    show NAME FOLDER               its status (`notify.show`), a line whenever it changes, likewise
    log NAME FOLDER LINES          the last LINES lines of this start's log
    stop NAME FOLDER PATIENCE      ends the process in order, after PATIENCE seconds by force;
                                   answers which processes it killed, and the last state; `worker`
                                   is `worker-1`, `worker-2` and so on, too

Secrets are in the environment that the orders give, never in arguments or files. Only the search
for processes that are left needs more than the standard library.
"""

from __future__ import annotations

import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

from paramserver import drafts, locks, notify
from paramserver.words import signal_name

MARK = "PARAMSERVER_KEPT"
"""Environment variable of every process under a supervisor, inherited by the processes that those
start."""
LOG_BYTES = 16 * 2**20  # a longer log makes room for a new one
LOOK_S = 0.1  # between two looks at a file that grows, or for what is waited for
TAIL_BYTES = 2**16  # of a log, where its last line is looked for
FORGIVEN_S = 600.0  # after this time the restarts are counted from 0 again
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0  # before it is started again
SHOWN_S = 1.5  # for a server to show its status
LOCK_S = 10.0  # a supervisor that was asked to start has its lock by then
FORCED_S = 10.0
LEFT_S = 15.0  # an observer whose server is gone writes a checkpoint first


@dataclass
class Orders:
    """What a supervisor shall start, and how often."""

    argv: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    restart: int = 3  # how often
    again: list[int] = field(default_factory=list)  # exit codes to restart after
    up: str = ""  # names the `make up` that started it
    folder: str = ""  # where it is started; "": in the code


@dataclass
class State:
    """The state of a process. `phase`: running, pausing (before the next start), ended (exit code
    0), failed, stopped (it was asked to)."""

    name: str
    argv: list[str]
    up: str
    phase: str = "running"
    supervisor: int = 0
    process: int = 0
    restarts: int = 0
    code: int | None = None
    since: float = 0.0  # seconds since the epoch
    log_from: int = 0  # where in the log this start begins
    alive: bool = False  # is there a supervisor? `status` sets it
    log_to: int = 0  # likewise, the log's length
    last: str = ""  # likewise, its last line
    warning: str = ""  # the newest warning, of the supervisor or
    warned_at: float = 0.0  # of the process; seconds since the epoch
    ready: bool = False  # has the process begun its work? `status` sets it
    run_folder: str = ""  # of a server, as seen from the code; `status` sets it
    shown: str = ""  # of a server: the status of its run, as JSON; `status` sets it where asked


class Files:
    """The files of one supervised process."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.folder = folder
        self.lock = folder / "state" / f"{name}.lock"
        self.state = folder / "state" / f"{name}.json"
        self.notify = folder / "state" / f"{name}.notify"
        self.log = folder / "logs" / f"{name}.log"

    @property
    def mark(self) -> str:
        return f"{self.folder.resolve()}:{self.name}"

    def make(self) -> None:
        for folder in (self.lock.parent, self.log.parent):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
        drafts.sweep(self.state.parent)

    def take(self) -> IO[str] | None:
        """The lock, held while the file is open; None where another process holds it."""
        file = open(self.lock, "a+")  # noqa: SIM115
        with suppress(OSError):
            if locks.take(file.fileno()):
                return file
        file.close()
        return None

    @property
    def alive(self) -> bool:
        """Does a supervisor hold the lock?"""
        try:
            with open(self.lock) as file:
                return locks.is_held(file.fileno())
        except FileNotFoundError:
            return False
        except OSError:
            return True

    def write(self, state: State) -> None:
        drafts.write(self.state, json.dumps(asdict(state)), synced=False)

    def read(self) -> State | None:
        """The state now, or the last one; None where no process of this name was ever started."""
        try:
            words = json.loads(self.state.read_text())
            if "keeper" in words:  # written by a version before
                words["supervisor"] = words.pop("keeper")
            state = State(**words)
        except (OSError, ValueError, TypeError):
            return None
        state.alive = self.alive
        if not state.alive and state.phase in ("running", "pausing"):
            state.phase = "failed"  # the supervisor itself was killed, or the machine was off
        with suppress(OSError):
            state.log_to = self.log.stat().st_size
            lines = _lines(self.log, max(state.log_from, state.log_to - TAIL_BYTES))
            state.last = next(lines, "")
        told = notify.read(self.notify)
        state.ready = state.alive and told.ready != ""
        state.run_folder = told.folder
        if told.warned_at > state.warned_at:
            state.warning, state.warned_at = told.warning, told.warned_at
        return state


def _lines(log: Path, offset: int) -> Iterator[str]:
    """The lines of a log from `offset` on, the last one first, without empty ones."""
    with log.open("rb") as file:
        file.seek(offset)
        lines = file.read().splitlines()
    return (line.decode(errors="replace") for line in reversed(lines) if line.strip())


# ---------------------------------------------------------------------------------------- keeping


class Supervisor:
    """The loop of a supervisor: start the process, wait for its end, decide whether to restart
    it."""

    def __init__(self, files: Files, orders: Orders, lock: IO[str]) -> None:
        self._files, self._orders, self._lock = files, orders, lock
        self._stopping = False  # set in a signal's handler, where nothing may wait for a lock
        self._process: subprocess.Popen[bytes] | None = None
        with suppress(OSError):
            if files.log.stat().st_size > LOG_BYTES:
                files.log.replace(files.log.with_suffix(".old.log"))
        self._log = open(files.log, "ab", buffering=0)  # noqa: SIM115
        self._state = State(
            files.name,
            orders.argv,
            orders.up,
            supervisor=os.getpid(),
            log_from=self._log.tell(),
            since=time.time(),
        )

    def started(self) -> State:
        """Start the process for the first time; raises OSError where that fails."""
        self._start()
        return self._state

    def keep(self) -> None:
        """Supervise the process until it has ended for good."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGALRM, self._kill)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        awake = _hold_off_sleep()
        pause_s = FIRST_PAUSE_S
        while True:
            assert self._process is not None
            began = time.monotonic()
            self._state.code = code = self._process.wait()
            if time.monotonic() - began > FORGIVEN_S:
                self._state.restarts, pause_s = 0, FIRST_PAUSE_S
            again = code < 0 or code in self._orders.again
            if self._is_stopping() or not again or self._state.restarts >= self._orders.restart:
                break
            self._state.restarts += 1
            self._warn(
                f"warning: the {self._files.name} died ({died(code)}): starting it again "
                f"({self._state.restarts} of {self._orders.restart})",
                "pausing",
            )
            until = time.monotonic() + pause_s
            while not self._is_stopping() and time.monotonic() < until:
                time.sleep(LOOK_S)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            if self._is_stopping():
                break
            try:
                self._start()
            except OSError as e:  # no memory, or too many processes
                self._warn(f"error: the {self._files.name} cannot be started again: {e}")
                self._state.code = code
                break
        signal.alarm(0)
        if self._is_stopping():
            self._note("stopped")
        else:
            self._note("failed" if code else "ended")
        if awake is not None:
            awake.terminate()
            awake.wait()
        sweep(self._files.mark, min(self._patience(LEFT_S), LEFT_S))

    def _start(self) -> None:
        self._files.notify.unlink(missing_ok=True)  # the process before wrote it
        own = {MARK: self._files.mark, notify.VARIABLE: str(self._files.notify.resolve())}
        self._process = subprocess.Popen(
            self._orders.argv,
            cwd=self._orders.folder or None,
            env={**os.environ, **self._orders.environment, **own},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        self._state.process = self._process.pid
        self._note("running")
        if self._is_stopping():  # a stop was asked for meanwhile
            self._process.terminate()

    def _note(self, phase: str) -> None:
        self._state.phase, self._state.since = phase, time.time()
        with suppress(OSError):  # a full disk must not end the process
            self._files.write(self._state)

    def _warn(self, line: str, phase: str = "") -> None:
        """Log a line of the supervisor itself. The state has it by then where there is a new
        `phase`; else the next `_note` writes it."""
        self._state.warning, self._state.warned_at = line, time.time()
        if phase:
            self._note(phase)
        with suppress(OSError):
            self._log.write(f"{line}\n".encode())

    def _is_stopping(self) -> bool:
        return self._stopping  # by a call: a checker of types does not know of signals

    def _stop(self, *_: Any) -> None:
        self._stopping = True
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
        signal.alarm(max(1, int(self._patience(0))))

    def _patience(self, unasked: float) -> float:
        """Seconds that the process may take to end: `stop` writes them into the lock file.
        `unasked`: where no `stop` did."""
        with suppress(OSError, ValueError, IndexError):
            self._lock.seek(0)
            return float(self._lock.read().split()[1])
        return unasked

    def _kill(self, *_: Any) -> None:
        if self._process is not None and self._process.poll() is None:
            self._warn(f"warning: the {self._files.name} does not end: killed")
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


def died(code: int) -> str:
    """An exit code in words."""
    return f"killed by {signal_name(-code)}" if code < 0 else f"exit code {code}"


def _hold_off_sleep() -> subprocess.Popen[bytes] | None:
    """Keep a Mac awake as long as this supervisor lives."""
    if platform.system() != "Darwin" or shutil.which("caffeinate") is None:
        return None
    return subprocess.Popen(
        ["caffeinate", "-is", "-w", str(os.getpid())],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def kept(mark: str) -> list[Any]:
    """The processes of this user with this mark in their environment."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def sweep(mark: str, patience_s: float, orphan: State | None = None) -> list[str]:
    """End the processes that are left under this mark, like the observer of a server that was
    killed: they have `patience_s` to end by themselves. Where the supervisor itself is gone,
    `orphan` is its last state, and its process gets a SIGTERM at once. Returns the command lines of
    the processes that had to be killed."""
    import psutil

    left = kept(mark)
    for process in left:
        if orphan is not None and process.pid == orphan.process:
            with suppress(psutil.Error):
                process.terminate()
    _, left = psutil.wait_procs(left, timeout=patience_s)
    for process in left:
        with suppress(psutil.Error):
            process.terminate()
    _, left = psutil.wait_procs(left, timeout=FORCED_S)
    told = []
    for process in left:
        with suppress(psutil.Error):
            told.append(" ".join(process.cmdline())[:120])
            process.kill()
    psutil.wait_procs(left, timeout=FORCED_S)
    return told


# ---------------------------------------------------------------------------------------- commands


def start(files: Files, orders: Orders) -> State:
    """Start a supervisor that outlives this process. Where there is one already, return its state.

    Raises OSError where the process cannot be started.
    """
    files.make()
    deadline = time.monotonic() + LOCK_S
    while (lock := files.take()) is None:
        state = files.read()
        if state is not None and state.alive:
            return state
        if time.monotonic() > deadline:
            raise OSError(f"the supervisor of the {files.name} does not answer")
        time.sleep(LOOK_S)  # another process asks just now, or another start is not done
    sweep(files.mark, LEFT_S, files.read())  # a supervisor that was killed leaves its processes
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.close(reader)
            _become_supervisor(files, orders, lock, writer)
        os._exit(0)
    os.wait()
    os.close(writer)
    lock.close()  # the supervisor holds it too
    with open(reader, encoding="utf-8") as answer:
        told = json.loads(answer.read() or '{"problem": "the supervisor ended at once"}')
    if "problem" in told:
        raise OSError(told["problem"])
    return State(**told)


def _become_supervisor(files: Files, orders: Orders, lock: IO[str], writer: int) -> NoReturn:
    code = 1
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        lock.seek(0)
        lock.truncate()
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        with open(writer, "w", encoding="utf-8") as answer:
            try:
                supervisor = Supervisor(files, orders, lock)
                state = supervisor.started()
            except OSError as e:
                answer.write(json.dumps({"problem": f"{e.strerror}: {e.filename}"}))
                raise
            answer.write(json.dumps(asdict(state)))
        supervisor.keep()
        code = 0
    finally:
        os._exit(code)


def stop(files: Files, patience_s: int) -> dict[str, Any]:
    """End a supervisor and its process: in order, after `patience_s` by force. Then look for
    processes that are left."""
    was = files.read()
    ran = was is not None and was.alive
    deadline = time.monotonic() + patience_s + LEFT_S + 3 * FORCED_S
    killed = []
    asked = False
    while ran and files.alive:
        with suppress(OSError, ValueError, IndexError):
            if not asked:
                pid = int(files.lock.read_text().split()[0])
                files.lock.write_text(f"{pid}\n{patience_s}\n")
                os.kill(pid, signal.SIGTERM)
                asked = True
        if time.monotonic() > deadline:
            with suppress(OSError, ValueError, IndexError):
                os.kill(int(files.lock.read_text().split()[0]), signal.SIGKILL)
            killed.append(f"the supervisor of {files.name}")
            break
        time.sleep(LOOK_S)
    if asked:
        killed += sweep(files.mark, min(patience_s, LEFT_S))
    else:
        killed += sweep(files.mark, patience_s, was)
    left = [p.pid for p in kept(files.mark)]
    now = files.read()
    return {"ran": ran, "killed": killed, "left": left, "state": asdict(now) if now else None}


def stop_all(folder: Path, name: str, patience_s: int) -> dict[str, Any]:
    """`stop` for every process of this name, numbered ones too, at once: the answers as one, with
    the last states of those that ran as ``ended``."""
    there = {path.stem for path in (folder / "state").glob(f"{name}-*.json")}
    names = sorted({name, *there})
    with ThreadPoolExecutor(max_workers=len(names)) as pool:
        told = list(pool.map(lambda each: stop(Files(folder, each), patience_s), names))
    return {
        "ran": any(each["ran"] for each in told),
        "killed": [line for each in told for line in each["killed"]],
        "left": [pid for each in told for pid in each["left"]],
        "state": told[0]["state"],
        "ended": [each["state"] for each in told if each["ran"]],
    }


def status(folder: Path, shown: bool = False) -> list[State]:
    """The state of every process that runs or ran here."""
    names = sorted(path.stem for path in (folder / "state").glob("*.json"))
    states = []
    for files in (Files(folder, name) for name in names):
        if (state := files.read()) is None:
            continue
        if shown and state.ready and state.name == "server":
            with suppress(OSError):
                state.shown = notify.newest(files.notify, SHOWN_S).decode(errors="replace")
        states.append(state)
    return states


def follow(files: Files, offset: int | None, until: int = 0) -> Iterator[bytes]:
    """The log from `offset` on (None: where this start begins) as it grows, until the supervisor is
    gone, or until file `until` (standard input) ends."""
    state = files.read()
    if state is None:
        return
    at = state.log_from if offset is None else offset
    while True:
        alive = files.alive  # asked before reading, so that its last lines are read too
        try:
            with files.log.open("rb") as file:
                if file.seek(0, os.SEEK_END) < at:
                    at = 0  # a new log
                file.seek(at)
                while data := file.read(2**16):
                    at += len(data)
                    yield data
        except FileNotFoundError:
            pass
        if not alive:
            return
        if select.select([until], [], [], LOOK_S)[0] and not os.read(until, 4096):
            return


def show(files: Files, until: int = 0) -> Iterator[bytes]:
    """The process's status as it changes, one line each, until the supervisor is gone, or until
    file `until` (standard input) ends."""
    before = notify.watch(files.notify)  # of an earlier time
    while files.alive:
        if select.select([until], [], [], LOOK_S)[0] and not os.read(until, 4096):
            return
        if (now := notify.watch(files.notify)) != before:
            before = now
            yield now.strip() + b"\n"


def tail(files: Files, lines: int) -> bytes:
    """The last lines of this start's log."""
    state = files.read()
    if state is None:
        return b""
    with suppress(FileNotFoundError), files.log.open("rb") as file:
        file.seek(state.log_from)
        return b"".join(file.read().splitlines(keepends=True)[-lines:])
    return b""


def main(words: list[str]) -> int:
    if len(words) < 2:
        print("error: make up and the like start this program", file=sys.stderr)
        return 2
    command, *rest = words
    if command == "status":
        states = status(Path(rest[0]), rest[1:] == ["shown"])
        print(json.dumps([asdict(state) for state in states]))
        return 0
    files = Files(Path(rest[1]), rest[0])
    if command == "start":
        try:
            state = start(files, Orders(**json.loads(sys.stdin.read())))
        except OSError as e:
            print(f"cannot start the {files.name}: {e}", file=sys.stderr)
            return 1
        print(json.dumps(asdict(state)))
    elif command == "stop":
        print(json.dumps(stop_all(files.folder, files.name, int(rest[2]))))
    elif command == "log":
        sys.stdout.buffer.write(tail(files, int(rest[2])))
    elif command in ("follow", "show"):
        offset = int(rest[2]) if len(rest) > 2 else None
        with suppress(OSError):  # a closed pipe, a full disk
            for data in show(files) if command == "show" else follow(files, offset):
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
        now = files.read()
        return 0 if now is not None and (now.phase == "stopped" or not now.code) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
