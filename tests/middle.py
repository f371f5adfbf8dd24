"""Somebody in the path: a relay of a ZeroMQ connection that sees each frame and may do with it
what it likes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Self

GREETING_BYTES = 64
COMMAND, LONG = 4, 2
UP, DOWN = "up", "down"


class More(bytes):
    """A frame whose message goes on."""


Tamper = Callable[[str, int, bytes], Iterable[bytes]]
"""Gets the way, the frame's number on that way, and the frame; returns what goes on instead."""


class Middle:
    """Relays the connections that come to `port` to another one, as a `with` block."""

    def __init__(self, to: int = 0, host: str = "127.0.0.1") -> None:
        self.tamper: Tamper = lambda way, number, frame: [frame]
        self.seen: dict[str, list[bytes]] = {UP: [], DOWN: []}
        """The frames of messages, as they came."""
        self.handshakes: list[bytes] = []
        """The commands, which come before them."""
        self.to, self._host = to, host
        self._listener = socket.create_server((host, 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join(30)  # it accepts: no connection comes any more
        self.cut()
        for thread in self._threads:
            thread.join(30)
        for s in self._sockets:
            s.close()

    def cut(self) -> None:
        """End all connections."""
        for s in self._sockets:
            with suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)

    def _start(self, function: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                outer = self._listener.accept()[0]
                try:
                    inner = socket.create_connection((self._host, self.to))
                except OSError:  # the server is gone
                    outer.close()
                    continue
                self._sockets += outer, inner
                self._start(self._relay, UP, outer, inner)
                self._start(self._relay, DOWN, inner, outer)

    def _relay(self, way: str, source: socket.socket, sink: socket.socket) -> None:
        try:
            with source.makefile("rb") as stream:
                for _ in range(GREETING_BYTES):  # each end waits for the other's first bytes
                    sink.sendall(_exactly(stream, 1))
                while True:
                    head = _exactly(stream, 1)
                    size = _exactly(stream, 8 if head[0] & LONG else 1)
                    body = _exactly(stream, int.from_bytes(size))
                    if head[0] & COMMAND:
                        self.handshakes.append(body)
                        sink.sendall(head + size + body)
                        continue
                    self.seen[way].append(body)
                    for frame in self.tamper(way, len(self.seen[way]) - 1, body):
                        sink.sendall(framed(frame, isinstance(frame, More)))
        except (OSError, EOFError):
            pass
        finally:
            with suppress(OSError):
                sink.shutdown(socket.SHUT_RDWR)


def framed(body: bytes, more: bool = False) -> bytes:
    """A frame of a message, as ZMTP sends it."""
    flags = int(more) | (LONG if len(body) > 255 else 0)
    return bytes([flags]) + len(body).to_bytes(8 if flags & LONG else 1) + body


def flipped(frame: bytes) -> bytes:
    """The same with one other bit, before the tag of a record."""
    return frame[:-20] + bytes([frame[-20] ^ 1]) + frame[-19:]


def _exactly(stream: object, size: int) -> bytes:
    read = stream.read(size)  # type: ignore[attr-defined]
    if len(read) < size:
        raise EOFError
    return bytes(read)
