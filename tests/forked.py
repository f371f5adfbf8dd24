"""Python programs for tests without the seconds of processor time that importing torch takes.

One process of this session has imported what all programs import, and does nothing else: no
operation of torch, no ZeroMQ context, no thread. Each program is forked from it and then runs as
`python -m module`, `python -c code`, `python script.py` or `python -P script.py` would. A program
that starts others (a server its observer, the launcher a server and workers) forks as many
processes before it begins. They wait, and one of them becomes what the program starts: its child,
with its own process id.

It is used on Linux only, since macOS does not let a process that has loaded its frameworks go on
after a fork.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import gc
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
from typing import Any, NamedTuple

USABLE = sys.platform == "linux"

IMPORTED = (
    "filelock", "matplotlib.backends.backend_agg", "matplotlib.figure", "msgspec", "numpy",
    "omegaconf", "psutil", "rich.console", "rich.table", "safetensors.torch", "torch",
    "torch._dynamo", "torch.optim", "torch.utils.data", "yaml", "zeroconf", "zmq",
)  # fmt: skip

STARTS = {"paramserver": 2, "paramserver.launch": 5}
"""How many Python programs a module starts; what it starts beyond that is not forked."""

PYTHON = sys.executable
SPARE = "spare"
LISTENER = "forks"  # a thread of the tests' process, to its end
"""The name of a process that waits to become a program."""

LENGTH = struct.Struct("!I")
SET_NAME = 15  # of Linux's prctl.h
NEW_NETWORK, NEW_MOUNTS = 0x40000000, 0x00020000  # of Linux's sched.h
SLAVE, DETACH = 1 << 19 | 1 << 14, 2  # of its mount.h: MS_SLAVE | MS_REC, MNT_DETACH


def waiting(words: Sequence[str]) -> int:
    """How many processes wait for what the program `python words ...` starts."""
    module = words[1] if words[0] == "-m" else words[2] if words[0] == "-P" else ""
    return STARTS.get(module, 0)


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
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        with theirs:
            self._parent = subprocess.Popen(
                [sys.executable, str(Path(__file__)), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**environment, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
        self.pid = self._parent.pid
        self._lock = threading.Lock()  # of two threads that start programs
        self._started: list[int] = []
        self._answer = threading.Condition()
        self._processes: dict[int, Process] = {}
        threading.Thread(target=self._listen, name=LISTENER, daemon=True).start()
        atexit.register(self._socket.close)

    def start(
        self,
        words: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        host: str | None = None,
    ) -> Process:
        """Fork a program; `words` are what follows `python`. Its output is the process's. With a
        `host`, it lives in that network namespace."""
        own = list(words), str(folder), dict(environment), host, waiting(words)
        told = json.dumps(own).encode()
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


def start(
    words: Sequence[str], folder: Path, environment: Mapping[str, str], host: str | None = None
) -> Process:
    """A program of this session; see `Forks.start`. The first one waits until all is imported."""
    global _forks
    if _forks is None:
        _forks = Forks()
    return _forks.start(words, folder, environment, host)


def parent() -> int | None:
    """The process that is forked, which stays to the end of the session; None before that."""
    return None if _forks is None else _forks.pid


# ------------------------------------------------------------------- in the process that is forked


class Order(NamedTuple):
    """What a process shall become."""

    words: list[str]
    """What follows `python`."""
    folder: str
    environment: dict[str, str]
    host: str | None
    """The network namespace to live in, if not this one."""
    waiting: int
    """How many processes wait for what it starts."""
    session: bool
    """Whether it begins a session of its own."""
    descriptors: list[int]
    """What become stdin, stdout and stderr."""


def serve(control: socket.socket) -> Order | None:
    """Fork for each request. Returns the order in a forked process; None at the end."""
    # Triton, which torch imports where it is there, complains at the end of each program that has
    # not let go all of it, as these do not.
    sys.modules["triton"] = None  # type: ignore[assignment]
    for name in IMPORTED:
        __import__(name)
    del sys.modules["triton"]
    # Each program's collector would look through all that was imported, and at its end copy it:
    # more than a second of processor time.
    gc.collect()
    gc.freeze()
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
                    return Order(*request, session=False, descriptors=[0, output, output])
                os.close(output)
                control.sendall(json.dumps([pid, None]).encode() + b"\n")


def _ended() -> list[bytes]:
    answers = []
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            code = os.waitstatus_to_exitcode(found[1])
            answers.append(json.dumps([found[0], code]).encode() + b"\n")
    return answers


def enter(host: str) -> None:
    """Let this process live in a network namespace, as `ip netns exec` does: /sys shows its
    devices."""
    libc = ctypes.CDLL(None, use_errno=True)

    def must(code: int) -> None:
        if code != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {host}")

    namespace = os.open(f"/run/netns/{host}", os.O_RDONLY)
    must(libc.setns(namespace, NEW_NETWORK))
    os.close(namespace)
    must(libc.unshare(NEW_MOUNTS))
    must(libc.mount(b"", b"/", b"none", SLAVE, None))
    must(libc.umount2(b"/sys", DETACH))
    must(libc.mount(host.encode(), b"/sys", b"sysfs", 0, None))


class Spares:
    """Processes that wait to become what this one starts, as its children."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, socket.socket]] = []
        self._host: str | None = None

    def fork(self, order: Order) -> Order | None:
        """Those that wait for what it starts. Returns None; in one of them, once it is asked for,
        what it shall become."""
        self._host = order.host
        name(SPARE)  # so that those that wait have this name from their beginning
        for _ in range(order.waiting):
            ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
            pid = os.fork()
            if not pid:
                for end in (ours, *(end for _, end in self._waiting)):
                    end.close()
                self._waiting.clear()
                _close(order.descriptors)
                return _awaited(theirs)
            theirs.close()
            self._waiting.append((pid, ours))
        name("python")
        return None

    def become(self, order: Order) -> int | None:
        """The process that becomes it, on this one's host; None where none is left."""
        order = order._replace(host=self._host)
        while self._waiting:
            pid, end = self._waiting.pop(0)
            with end, suppress(OSError):  # it may have been killed
                socket.send_fds(end, [json.dumps(order[:-1]).encode()], order.descriptors)
                return pid
        return None


def _awaited(control: socket.socket) -> Order:
    """What this process shall become; where nothing comes, it ends with the other side."""
    with control:
        data, descriptors, _, _ = socket.recv_fds(control, 1 << 20, 3)
    if not data:
        os._exit(0)
    name("python")
    return Order(*json.loads(data), list(descriptors))


def _close(descriptors: list[int]) -> None:
    for descriptor in {*descriptors} - {0, 1, 2}:
        os.close(descriptor)


def name(own: str) -> None:
    """Change the name of this process, as it is listed."""
    ctypes.CDLL(None).prctl(SET_NAME, own.encode(), 0, 0, 0)


spares = Spares()


class Popen(subprocess.Popen[Any]):
    """In a forked program: a new Python is forked, too, where a process waits for that."""

    def _execute_child(self, args: Any, *more: Any) -> None:
        (executable, preexec, _, descriptors, folder, environment, _, _, shell, *pipes) = more
        *ends, _, group, groups, user, _, session, process_group = pipes
        words = [args] if isinstance(args, str) else [os.fspath(word) for word in args]
        usual = not (executable or preexec or descriptors or shell or group or groups or user)
        if words[0] == PYTHON and usual and process_group == -1:
            order = Order(
                words[1:],
                os.path.abspath(folder or "."),
                dict(os.environ if environment is None else environment),
                None,
                waiting(words[1:]),
                session,
                [own if end == -1 else end for own, end in enumerate(ends[i] for i in (0, 3, 5))],
            )
            if (pid := spares.become(order)) is not None:
                self.pid, self._child_created = pid, True
                self._close_pipe_fds(*ends)
                return
        super()._execute_child(args, *more)


def become(order: Order) -> Any:
    """Make this process what `python words ...` would be; returns what then runs the program."""
    words, folder, environment, host, _, session, descriptors = order
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if session:
        os.setsid()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    _close(descriptors)
    faulthandler.register(signal.SIGUSR1, 2)  # a test that waits in vain asks where it stands
    if host is not None:
        enter(host)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    subprocess.Popen = Popen  # type: ignore[misc]
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
    if first == "-P":  # a script, whose folder is not a place for imports
        sys.argv = rest
        return lambda: runpy.run_path(rest[0], run_name="__main__")
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
    order = serve(socket.socket(fileno=int(sys.argv[1])))
    if order is not None:
        while (other := spares.fork(order)) is not None:
            order = other  # this process is one that waited
        become(order)()
