"""Python programs for tests without the seconds of processor time that importing torch takes.

One process of this session has imported what all programs import, and does nothing else: no
operation of torch, no ZeroMQ context, no thread. Each program is forked from it and then runs as
`python -m module`, `python -c code` or `python script.py` would. It is used on Linux only, since
macOS does not let a process that has loaded its frameworks go on after a fork.
"""

from __future__ import annotations

import atexit
import io
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

USABLE = sys.platform == "linux"

IMPORTED = (
    "filelock", "matplotlib.backends.backend_agg", "matplotlib.figure", "msgspec", "numpy",
    "omegaconf", "psutil", "rich.console", "rich.table", "safetensors.torch", "torch",
    "torch._dynamo", "torch.optim", "torch.utils.data", "yaml", "zeroconf", "zmq",
)  # fmt: skip

LENGTH = struct.Struct("!I")


class Process:
    """A forked program, as far as tests use a `subprocess.Popen`."""

    def __init__(self, pid: int, stdout: io.TextIOWrapper) -> None:
        self.pid = pid
        self.stdout = stdout
        self.returncode: int | None = None
        self._ended = threading.Event()

    def ended(self, code: int) -> None:
        self.returncode = code
        self._ended.set()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Forks:
    """The process that is forked, and those that were forked from it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._parent = subprocess.Popen(
                [sys.executable, str(Path(__file__)), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
        self.pid = self._parent.pid
        self._lock = threading.Lock()  # of two threads that start programs
        self._started: list[int] = []
        self._answer = threading.Condition()
        self._processes: dict[int, Process] = {}
        threading.Thread(target=self._listen, name="forks", daemon=True).start()
        atexit.register(self._socket.close)

    def start(self, words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Process:
        """Fork a program; `words` are what follows `python`. Its output is the process's."""
        told = json.dumps([list(words), str(folder), dict(environment)]).encode()
        ours, theirs = os.pipe()
        with self._lock, self._answer:
            socket.send_fds(self._socket, [LENGTH.pack(len(told)) + told], [theirs])
            os.close(theirs)
            if not self._answer.wait_for(lambda: self._started, 300):
                raise RuntimeError("no program was forked")
            pid = self._started.pop()
            output = open(ours, encoding="utf-8", errors="replace")  # noqa: SIM115 (the process's)
            process = self._processes[pid] = Process(pid, output)
        return process

    def _listen(self) -> None:
        """Answers are (pid, -1) for one that was started, (pid, code) for one that has ended."""
        reader = self._socket.makefile("rb")
        while line := reader.readline():
            pid, code = json.loads(line)
            with self._answer:
                if code is None:
                    self._started.append(pid)
                    self._answer.notify_all()
                else:
                    self._processes.pop(pid).ended(code)


_forks: Forks | None = None


def start(words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Process:
    """A program of this session; see `Forks.start`. The first one waits until all is imported."""
    global _forks
    if _forks is None:
        _forks = Forks()
    return _forks.start(words, folder, environment)


def parent() -> int | None:
    """The process that is forked, which stays to the end of the session; None before that."""
    return None if _forks is None else _forks.pid


# ------------------------------------------------------------------- in the process that is forked


def serve(control: socket.socket) -> tuple[list[str], str, dict[str, str], int] | None:
    """Fork for each request. Returns the request in a forked process; None at the end."""
    for name in IMPORTED:
        __import__(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would not be in the forked process"
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    received, descriptors = b"", list[int]()
    while True:
        ready, _, _ = select.select([control, wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
            for answer in _ended():
                control.sendall(answer)
        if control in ready:
            data, sent, _, _ = socket.recv_fds(control, 1 << 20, 8)
            if not data:
                return None
            received, descriptors = received + data, descriptors + list(sent)
            while len(received) >= LENGTH.size and descriptors:
                (length,) = LENGTH.unpack_from(received)
                if len(received) < LENGTH.size + length:
                    break
                request = json.loads(received[LENGTH.size : LENGTH.size + length])
                received, output = received[LENGTH.size + length :], descriptors.pop(0)
                pid = os.fork()
                if not pid:
                    signal.set_wakeup_fd(-1)
                    for descriptor in (wake, woken, *descriptors):
                        os.close(descriptor)
                    control.close()
                    return (*request, output)
                os.close(output)
                control.sendall(json.dumps([pid, None]).encode() + b"\n")


def _ended() -> list[bytes]:
    answers = []
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            code = os.waitstatus_to_exitcode(found[1])
            answers.append(json.dumps([found[0], code]).encode() + b"\n")
    return answers


def become(words: list[str], folder: str, environment: dict[str, str], output: int) -> Any:
    """Make this process what `python words ...` would be; returns what then runs the program."""
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", 0, closefd=False), write_through=True)
    sys.stderr = io.TextIOWrapper(
        os.fdopen(2, "wb", 0, closefd=False), "utf-8", "backslashreplace", write_through=True
    )
    if "OMP_NUM_THREADS" in environment:
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
    else:
        sys.modules["torch"].set_num_threads(os.cpu_count() or 1)
    paths = [p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p]
    sys.path[:] = [*paths, *sys.path[1:]]  # without this file's own folder
    first, *rest = words
    if first == "-m":
        sys.path.insert(0, folder)
        sys.argv = rest
        return lambda: runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    if first == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *rest[1:]]
        code = compile(rest[0], "<string>", "exec")
        return lambda: exec(code, sys.modules["__main__"].__dict__)
    sys.path.insert(0, str(Path(folder, first).parent))
    sys.argv = words
    return lambda: runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    wanted = serve(socket.socket(fileno=int(sys.argv[1])))
    if wanted is not None:
        become(*wanted)()
