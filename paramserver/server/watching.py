"""The socket of those who watch: they ask, and get the run's status a few times a second.

A watcher sends `value.ASK` about once a second; who has not asked for a while gets nothing more.
Nothing else that it sends is looked at, and no other socket of the server admits its key, so it
cannot take part, see gradients or averages, or slow a round: a few messages are read at each tick,
and when a few more wait, TCP holds it back. Who does not read misses statuses.
"""

from __future__ import annotations

from collections.abc import Sequence

import zmq

from paramserver.status.value import ASK, ASK_S
from paramserver.transport import sockets
from paramserver.transport.handshake import Authenticator

SEND_S = 0.4  # between two statuses
FORGET_S = 5 * ASK_S
WATCHERS_MAX = 64
READ_PER_TICK = 32


class WatchSocket:
    """Bound by the constructor, which raises `UserError` where the port is taken."""

    def __init__(
        self,
        ctx: zmq.Context[zmq.Socket[bytes]],
        port: int,
        hosts: Sequence[str],
        guarded: Sequence[str],
        keys: sockets.ServerKeys | None,
        authenticator: Authenticator | None,
    ) -> None:
        self._asked: dict[bytes, float] = {}  # by route: when it asked last
        self._send_at = 0.0
        self._socket = sockets.watch_router(ctx)
        plain = [sockets.tcp(host, port) for host in hosts]
        closed = [sockets.tcp(host, port) for host in guarded]
        if authenticator is not None:
            authenticator.watch(self._socket, closed)
        sockets.bind(self._socket, plain, closed, keys, sockets.ZAP_WATCH)

    def due(self, now: float) -> bool:
        """Is there anybody to send a status to now?"""
        for _ in range(READ_PER_TICK):
            if not sockets.readable(self._socket):
                break
            route, *rest = sockets.receive(self._socket)
            if len(rest) != 1 or rest[0].bytes != ASK:
                continue
            if route.bytes in self._asked or len(self._asked) < WATCHERS_MAX:
                if route.bytes not in self._asked:
                    self._send_at = now  # it has nothing to show yet
                self._asked[route.bytes] = now
        if now < self._send_at or not self._asked:
            return False
        self._send_at = now + SEND_S
        return True

    def send(self, status: bytes, now: float) -> None:
        """To all who have asked lately."""
        for route, asked_at in list(self._asked.items()):
            if now - asked_at > FORGET_S:
                del self._asked[route]
                continue
            try:
                sockets.send(self._socket, [route, status], wait=False)
            except zmq.Again:
                pass  # it does not read: it misses this one
            except zmq.ZMQError:  # it is gone
                del self._asked[route]

    def close(self) -> None:
        self._socket.close(linger=1000)


__all__ = ["WatchSocket"]
