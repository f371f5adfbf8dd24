"""The server's side of the page: it listens, and starts the page's process when somebody looks.

The sockets are the server's, so the address can be printed at once; a browser that connects waits
for the moment that the process takes to start. A run at which nobody looks has no such process.

The process ends with its server: its standard input is a pipe from the server, whose end it sees,
also where the server was killed. Tabs that are open keep what they have, and try again.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from paramserver import notify
from paramserver.errors import UserError
from paramserver.net.address import listen
from paramserver.program import command
from paramserver.settings import Settings
from paramserver.transport.sockets import is_loopback

PORTS = 50  # that are tried, beginning with `page_port`
WAITING = 16  # connections until the process is there
PATIENCE_S = 3.0  # for its end
LAST_S = 1.0  # for it to read the last state
RESTARTS_APART_S = 1.0


class Orders(msgspec.Struct, frozen=True):
    """What the process is told, as a line of JSON on its standard input."""

    folder: str
    watch_port: int
    open_to_all: list[int]
    """Descriptors of the sockets where no token is needed."""
    guarded: list[int]
    secret: bytes | None = None
    """Of the watch token."""


class Page:
    """The sockets of the page, and its process if there is one.

    `guarded`: the addresses where only holders of the watch token see the run. Without sockets
    there is no page; `problem` says why, if that is not what was asked for.
    """

    def __init__(
        self, sockets: Sequence[socket.socket] = (), guarded: Sequence[str] = (), problem: str = ""
    ) -> None:
        self.sockets = list(sockets)
        self.port: int = sockets[0].getsockname()[1] if sockets else 0
        self.guarded = list(guarded)
        self.problem = problem
        self._orders: Orders | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._again_at = 0.0

    def address(self, host: str) -> str:
        """As a person opens it."""
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def serve(self, folder: Path, watch_port: int, secret: bytes | None) -> None:
        """From now on `look` starts the process for this run; `secret`: of the watch token."""
        self._end()
        near = [s.fileno() for s in self.sockets if is_loopback(s.getsockname()[0])]
        self._orders = Orders(
            folder=str(folder.absolute()),
            watch_port=watch_port,
            open_to_all=near,
            guarded=[s.fileno() for s in self.sockets if s.fileno() not in near],
            secret=secret,
        )

    def look(self, now: float) -> None:
        """Start the process where somebody connects and there is none. Returns at once."""
        if self._orders is None or now < self._again_at or not self.sockets:
            return
        if self._process is not None:
            if self._process.poll() is None:
                return
            self._end()
        if not any(_ready(s.fileno(), select.POLLIN, 0) for s in self.sockets):
            return
        self._again_at = now + RESTARTS_APART_S
        with suppress(OSError):  # no room for a process: tried again in a while
            self._process = subprocess.Popen(
                command("paramserver.page"),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[s.fileno() for s in self.sockets],
                start_new_session=True,  # Ctrl-C is for the server
                env={k: v for k, v in os.environ.items() if k != notify.VARIABLE},
            )
            assert self._process.stdin is not None
            with suppress(BrokenPipeError):
                self._process.stdin.write(msgspec.json.encode(self._orders) + b"\n")
                self._process.stdin.flush()  # it stays open: its end means that the server is gone

    def last(self, status: bytes) -> None:
        """Show the last state of the run. A process that does not read gets none."""
        if self._process is None or self._process.stdin is None:
            return
        pipe, left = self._process.stdin.fileno(), memoryview(status + b"\n")
        deadline = time.monotonic() + LAST_S
        with suppress(OSError):
            os.set_blocking(pipe, False)
            while left and _ready(pipe, select.POLLOUT, deadline - time.monotonic()):
                left = left[os.write(pipe, left[: select.PIPE_BUF]) :]

    def close(self) -> None:
        """End the process, and stop listening; may be called twice."""
        for each in self.sockets:
            each.close()
        self.sockets = []
        self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.close()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready(descriptor: int, kind: int, limit_s: float) -> bool:
    """Without the limit that `select` has on the number of a descriptor."""
    poller = select.poll()
    poller.register(descriptor, kind)
    return bool(poller.poll(max(0.0, 1000 * limit_s)))


def opened(settings: Settings) -> Page:
    """The page that the settings ask for, listening. Raises `UserError` where `page_ip` is not an
    address of this machine; a port that is taken is no mistake of anybody's."""
    if not settings.page or not settings.port_of_watchers:
        return Page()
    plain, guarded = listen(settings.page_ip)
    first = settings.page_port
    for port in range(first, min(first + PORTS, 65536)):
        found: list[socket.socket] = []
        try:
            for host in (*plain, *guarded):
                found.append(_listening(host, port))
            return Page(found, guarded)
        except OSError as error:
            for each in found:
                each.close()
            if error.errno not in (errno.EADDRINUSE, errno.EACCES) and settings.page_ip:
                raise UserError(
                    f"the page cannot be shown at {settings.page_ip}: {error.strerror or error}",
                    "page_ip takes addresses of this machine; null = loopback only",
                ) from None
    return Page(problem=f"there is no page: no port from {first} on is free (page_port)")


def _listening(host: str, port: int) -> socket.socket:
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(kind, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(WAITING)
    except BaseException:
        made.close()
        raise
    return made
