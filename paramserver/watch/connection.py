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
from paramserver.words import host_port

SILENT_S = 5 * ASK_S
"""After which all addresses are tried again, and not only the one that last had a status."""


class Connection:
    """The status of the run at one of these addresses of its server; a context manager.

    The first address from which a status comes is taken, and the connections to the others are
    closed. ZeroMQ connects again by itself where the server was away.
    """

    def __init__(self, *ways: Address) -> None:
        self.heard_at: float | None = None
        """When the last status came, by the monotonic clock."""
        self._ways = ways
        self._ctx = sockets.context()
        self._open = {way: _Way(self._ctx, way) for way in ways}
        self._ask_at = 0.0

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __str__(self) -> str:
        """Where it looks, for a person."""
        return " or ".join(f"{host_port(way.host, way.port)}" for way in self._ways)

    def poll(self, timeout_s: float) -> Status | None:
        """The newest status that has come, waiting up to `timeout_s` for one; None where there is
        none. Raises `UserError` where no address lets this watcher in, or is a server's."""
        deadline = time.monotonic() + timeout_s
        while True:
            now = time.monotonic()
            if now >= self._ask_at:
                self._ask_at = now + ASK_S
                self._ask()
            left = max(0.0, min(deadline, self._ask_at) - now)
            ways = list(self._open.values())
            came = zmq.zmq_poll([(way.socket, zmq.POLLIN) for way in ways], round(1000 * left))
            for way in [way for way in ways if any(socket is way.socket for socket, _ in came)]:
                status = self._newest(way)
                if status is not None:
                    return status
            if time.monotonic() >= deadline:
                return None

    def _ask(self) -> None:
        if self.heard_at is not None and self.silent_s > SILENT_S:
            for there in self._ways:
                if there not in self._open:
                    self._open[there] = _Way(self._ctx, there)
        for way in list(self._open.values()):
            try:
                way.ask()
            except UserError as error:
                self._drop(way, error)

    def _newest(self, way: _Way) -> Status | None:
        try:
            status = way.newest()
        except UserError as error:
            self._drop(way, error)
            return None
        self.heard_at = time.monotonic()
        for other in list(self._open.values()):
            if other is not way:
                self._close(other)
        return status

    def _drop(self, way: _Way, error: UserError) -> None:
        """Do without this address; raises the error if it was the last one."""
        if len(self._open) == 1:
            raise error
        self._close(way)

    def _close(self, way: _Way) -> None:
        way.close()
        del self._open[way.there]

    @property
    def silent_s(self) -> float:
        """Seconds since the last status; infinity before the first."""
        return float("inf") if self.heard_at is None else time.monotonic() - self.heard_at

    def close(self) -> None:
        """Safe to call twice."""
        for way in self._open.values():
            way.close()
        self._ctx.term()


class _Way:
    """The connection to one address."""

    def __init__(self, ctx: zmq.Context[zmq.Socket[bytes]], there: Address) -> None:
        self.there = there
        self.socket = sockets.watch_dealer(ctx, STATUS_BYTES_MAX)
        self._handshake = HandshakeMonitor(
            ctx,
            self.socket,
            there.host,
            there.port,
            with_keys=there.keys is not None,
            token="this token",
            port_of="watch_port",
        )
        sockets.connect(self.socket, sockets.tcp(there.host, there.port), there.keys)

    def ask(self) -> None:
        """Ask for statuses. Raises `UserError` where the server does not let this watcher in."""
        self._handshake.check()
        with suppress(zmq.Again):  # not connected for long: it asks again
            sockets.send(self.socket, [ASK], wait=False)

    def newest(self) -> Status:
        """The newest status of those that have come; at least one message has. Raises `UserError`
        where it is none."""
        frames = []
        while sockets.readable(self.socket):
            frames = sockets.receive(self.socket)
        try:
            if len(frames) != 1:
                raise PeerError(f"{len(frames)} frames are no status")
            return from_json(frames[0].buffer)
        except PeerError as e:
            raise UserError(
                f"{host_port(self.there.host, self.there.port)} does not send the status of a "
                f"run: {e}",
                "is another program listening there, or another version of this one?",
            ) from None

    def close(self) -> None:
        self._handshake.close()
        self.socket.close()


__all__ = ["Connection"]
