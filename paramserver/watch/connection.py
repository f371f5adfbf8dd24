"""A watcher's connection to a server: asks for the run's status, and takes the newest.

It needs no torch. A watcher takes no part in a run, and cannot: see `paramserver.server.watching`.
"""

from __future__ import annotations

import time
from contextlib import suppress

import zmq

from paramserver.errors import PeerError, UserError
from paramserver.net.address import Address
from paramserver.status.value import ASK, ASK_S, STATUS_BYTES_MAX, Status, from_json
from paramserver.transport import sockets
from paramserver.transport.handshake import HandshakeMonitor


class Connection:
    """The status of the run at this address; a context manager. ZeroMQ connects again by itself
    where the server was away."""

    def __init__(self, there: Address) -> None:
        self.there = there
        self.heard_at: float | None = None
        """When the last status came, by the monotonic clock."""
        self._ctx = sockets.context()
        self._socket = sockets.watch_dealer(self._ctx, STATUS_BYTES_MAX)
        self._handshake = HandshakeMonitor(
            self._ctx,
            self._socket,
            there.host,
            there.port,
            with_keys=there.keys is not None,
            token="this token",
        )
        sockets.connect(self._socket, sockets.tcp(there.host, there.port), there.keys)
        self._ask_at = 0.0

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def poll(self, timeout_s: float) -> Status | None:
        """The newest status that has come, waiting up to `timeout_s` for one; None where there is
        none. Raises `UserError` where the server does not let this watcher in, or is another
        program."""
        deadline = time.monotonic() + timeout_s
        while True:
            now = time.monotonic()
            if now >= self._ask_at:
                self._ask_at = now + ASK_S
                self._handshake.check()
                with suppress(zmq.Again):  # not connected for long: it asks again
                    sockets.send(self._socket, [ASK], wait=False)
            left = min(deadline, self._ask_at) - now
            if self._socket.poll(max(0, round(1000 * left))):
                return self._newest()
            if time.monotonic() >= deadline:
                return None

    def _newest(self) -> Status | None:
        frames = []
        while sockets.readable(self._socket):
            frames = sockets.receive(self._socket)
        self.heard_at = time.monotonic()
        try:
            if len(frames) != 1:
                raise PeerError(f"{len(frames)} frames are no status")
            return from_json(frames[0].buffer)
        except PeerError as e:
            raise UserError(
                f"{self.there.host}:{self.there.port} does not send the status of a run: {e}",
                "is another program listening there, or another version of this one?",
            ) from None

    @property
    def silent_s(self) -> float:
        """Seconds since the last status; infinity before the first."""
        return float("inf") if self.heard_at is None else time.monotonic() - self.heard_at

    def close(self) -> None:
        """Safe to call twice."""
        self._handshake.close()
        self._socket.close()
        self._ctx.term()


__all__ = ["Connection"]
