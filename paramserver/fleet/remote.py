"""Runs `commands` on the machines: one at a time, on all at once, or line by line."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any, Self, TypeVar

import psutil

from paramserver.fleet import commands
from paramserver.fleet.commands import Command, Trouble
from paramserver.net.hosts import HERE, Host

SSH_FAILED = 255
ENDING_S = 5.0
STATUS_OF = "status of "
RUNNING: list[subprocess.Popen[str]] = []
"""What this program has started and not seen end; they are in sessions of their own."""
CONNECT_S = 1.0  # at least, for a hasty command
FOLLOWED_S = 0.5  # to end a connection that may be broken; the other end ends by itself

T = TypeVar("T")


class Failed(Exception):
    """A machine could not do what was asked; `trouble` explains it to a person."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__(str(trouble))
        self.trouble = trouble


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


def on_all(work: Callable[[Host], T], hosts: Iterable[Host]) -> tuple[dict[str, T], list[Trouble]]:
    """Run `work` for every machine at once; returns the results by name, and the faults of the
    others."""
    hosts = list(hosts)
    results: dict[str, T] = {}
    troubles: list[Trouble] = []
    with ThreadPoolExecutor(max_workers=max(1, len(hosts))) as pool:
        running = [(host, pool.submit(work, host)) for host in hosts]
        for host, future in running:
            try:
                results[host.name] = future.result()
            except Failed as e:
                troubles.append(e.trouble)
            except KeyboardInterrupt:
                end_all()  # else their threads, which are waited for, go on
                raise
    return results, troubles


def end_all() -> None:
    """End all that was started here, for a program that does not wait."""
    for process in list(RUNNING):
        if process.poll() is None:
            _terminate(process)


def run(host: Host, command: Command, tell: Callable[[str], None] | None = None) -> Done:
    """Run it to its end; `tell` gets each line as it comes. Raises `Failed` where ssh itself
    fails, or the command takes too long."""
    process = _start(command)
    lines: list[str] = []
    errors: list[str] = []
    readers = [
        threading.Thread(target=_read, args=(process.stdout, lines, tell)),
        threading.Thread(target=_read, args=(process.stderr, errors, None)),
    ]
    try:
        for reader in readers:
            reader.start()
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.write(command.stdin)
            process.stdin.close()
        if command.hasty and host.ssh != HERE:
            _wait_for_connection(host, process, lines)
        code = process.wait(command.limit_s)
    except subprocess.TimeoutExpired:
        raise Failed(
            Trouble(host.name, f"no answer within {command.limit_s:g} s", f"it was: {command}")
        ) from None
    finally:
        _end(process, readers)
    done = Done(code, "".join(lines), "".join(errors))
    if code == SSH_FAILED and host.ssh != HERE:
        raise Failed(commands.ssh_trouble(host, done.err))
    return done


def _wait_for_connection(host: Host, ssh: subprocess.Popen[str], lines: list[str]) -> None:
    """Wait for the end of this ssh, at most until `HASTY_S` after the start of this program, which
    takes seconds itself where a machine is busy. Raises `Failed` where it has no connection then:
    its own limit does not hold for the search for a name, 5 s for a .local one that is off."""
    left_s = psutil.Process().create_time() + commands.HASTY_S - time.time()
    with suppress(subprocess.TimeoutExpired):
        ssh.wait(max(CONNECT_S, left_s))
    if ssh.poll() is None and not lines and not _is_connected(ssh.pid):
        raise Failed(commands.ssh_trouble(host, "timed out"))


def _is_connected(pid: int) -> bool:
    """Has this ssh, or one through which it goes, a connection? True where it cannot be known."""
    try:
        ssh = psutil.Process(pid)
        return any(
            connection.status == psutil.CONN_ESTABLISHED
            for process in (ssh, *ssh.children(recursive=True))
            for connection in process.net_connections("tcp")
        )
    except psutil.Error:
        return True


def _start(command: Command) -> subprocess.Popen[str]:
    """Start it in a session of its own, so that Ctrl-C reaches this program only."""
    try:
        process = subprocess.Popen(
            command.argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except FileNotFoundError:
        raise Failed(
            Trouble(command.host, f"{command.argv[0]} is not installed on this machine")
        ) from None
    RUNNING.append(process)
    return process


def _read(stream: IO[str], lines: list[str], tell: Callable[[str], None] | None) -> None:
    with suppress(ValueError):  # another thread has closed it
        for line in stream:
            lines.append(line)
            if tell is not None:
                tell(line.rstrip("\n"))


def _terminate(process: subprocess.Popen[str]) -> None:
    """Ask it to end, with all that it has started: on this machine that may be make and uv."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)


def _end(process: subprocess.Popen[str], readers: list[threading.Thread]) -> None:
    if process.poll() is None:
        _terminate(process)
        try:
            process.wait(ENDING_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    with suppress(ValueError):
        RUNNING.remove(process)
    for reader in readers:
        if reader.ident is not None:
            reader.join(ENDING_S)
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with suppress(OSError, ValueError):
                stream.close()


def must(host: Host, command: Command, what: str, tell: Callable[[str], None] | None = None) -> str:
    """`run`, returning the output; raises `Failed` where it does not exit with 0."""
    done = run(host, command, tell)
    if done.code:
        said = (done.err or done.out).strip().splitlines()
        raise Failed(Trouble(host.name, f"{what} failed", "\n  ".join(said[-5:])))
    return done.out


def ask(host: Host, command: Command, what: str) -> Any:
    """The JSON in the last line of a command's output: login scripts may print before it."""
    lines = must(host, command, what).strip().splitlines()
    try:
        return json.loads(lines[-1])
    except (IndexError, ValueError):
        raise Failed(Trouble(host.name, f"{what}: no answer", "\n  ".join(lines[-5:]))) from None


class Agent:
    """A conversation with `paramserver.fleet.agent` on a machine; as a `with` block."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._process = _start(commands.agent(host))
        self._errors: list[str] = []
        self._reader = threading.Thread(
            target=_read, args=(self._process.stderr, self._errors, None)
        )
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()  # it ends with its standard input
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(ENDING_S)
        _end(self._process, [self._reader])

    def ask(self, do: str, limit_s: float = commands.ANSWER_S, **words: Any) -> dict[str, Any]:
        """The agent's answer. Raises `Failed` where there is none in time."""
        assert self._process.stdin is not None and self._process.stdout is not None
        late = threading.Timer(limit_s, self._process.kill)
        late.start()
        try:
            self._process.stdin.write(json.dumps({"do": do, **words}) + "\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                if line.startswith("{"):  # login scripts may print before it
                    answer: dict[str, Any] = json.loads(line)
                    return answer
        except (OSError, ValueError):
            pass
        finally:
            late.cancel()
        code = self._process.wait()
        self._reader.join(ENDING_S)
        said = "".join(self._errors)
        if code == SSH_FAILED and self.host.ssh != HERE:
            raise Failed(commands.ssh_trouble(self.host, said))
        last = "\n  ".join(said.strip().splitlines()[-3:])
        raise Failed(Trouble(self.host.name, f"it gave no answer to `{do}`", last))


class Follower:
    """Reads the log of one process on a machine, or its status, line by line, in a thread of its
    own."""

    def __init__(
        self, host: Host, name: str, offset: int | None, tell: Callable[[str, str, str], None]
    ) -> None:
        """That thread calls `tell(host, name, line)`. The name of a status is `STATUS_OF` and that
        of its process."""
        self.host, self.name = host, name
        self._tell = tell
        words = [] if offset is None else [str(offset)]
        shows = name.startswith(STATUS_OF)
        ask = ("show", name.removeprefix(STATUS_OF)) if shows else ("follow", name, *words)
        self._process = _start(commands.supervisor(host, *ask))
        self._errors: list[str] = []
        self._threads = [
            threading.Thread(target=self._read),
            threading.Thread(target=_read, args=(self._process.stderr, self._errors, None)),
        ]
        self.code: int | None = None
        self.seen_bytes = 0
        self.began = time.monotonic()
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        assert isinstance(self._process.stdout, io.TextIOWrapper)
        with suppress(ValueError):
            for line in self._process.stdout.buffer:
                self.seen_bytes += len(line)
                self._tell(self.host.name, self.name, line.decode(errors="replace").rstrip("\n"))
        self.code = self._process.wait()

    @property
    def lost(self) -> Trouble | None:
        """Why the connection is lost; None where it is not."""
        if self.code in (None, 0, 1) or (self.host.ssh == HERE and self.code != SSH_FAILED):
            return None
        return commands.ssh_trouble(self.host, "".join(self._errors))

    def close(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(FOLLOWED_S)
        _end(self._process, self._threads)


def environment(names: Iterable[str], own: Mapping[str, str]) -> dict[str, str]:
    """The environment variables of this process that a process there needs."""
    return {name: own[name] for name in names if own.get(name)}
