"""Which peers a guarded server admits, and sentences about failed handshakes.

A server that listens for other machines binds sockets that speak CURVE (`sockets.bind`). A peer
whose handshake comes that far has proven that it knows the server's public key; pyzmq's
authenticator then asks `Authenticator.callback` whether the peer's own key is the one of the join
token. ZeroMQ refuses a failed handshake in silence, on both sides; the classes here turn the events
of its sockets into sentences.
"""

from __future__ import annotations

import errno
import hmac
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from paramserver.errors import UserError
from paramserver.transport import sockets
from paramserver.transport.inflow import Inflow
from paramserver.typed import printing_token, typed
from paramserver.words import host_port

PEERS_TOLD = 100  # refused peers that are logged, so that a scanner does not fill the log
HUNG_UP_TIMES = 3  # in the middle of a handshake; then the peer reads the server's greeting
LOOK_S = 2.0

_AUTH, _PROTOCOL, _NO_DETAIL, _SUCCEEDED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_HANDSHAKE_SUCCEEDED,
)
_ACCEPTED, _DISCONNECTED = zmq.EVENT_ACCEPTED, zmq.EVENT_DISCONNECTED
_HUNG_UP = (errno.EPIPE, errno.ECONNRESET, errno.ECONNABORTED)


class Authenticator:
    """Admits peers to the guarded sockets of one server; it answers as soon as it is made, so make
    it before binding.

    `watch` every guarded socket; `refused` then gives a sentence for each peer that was refused,
    once, with the reason. Poll `watches` for it.
    """

    def __init__(self, ctx: zmq.Context[zmq.Socket[bytes]], keys: sockets.ServerKeys) -> None:
        self._ctx = ctx
        self._keys = {
            sockets.ZAP_DOMAIN: (keys.workers,),
            sockets.ZAP_WATCH: (keys.workers, keys.watchers),
        }
        self._watched: dict[zmq.Socket[bytes], tuple[zmq.Socket[bytes], _Listener]] = {}
        self._told: set[str] = set()
        self._zap = ThreadAuthenticator(ctx)
        self._zap.start()
        for domain in self._keys:
            self._zap.configure_curve_callback(domain, self)

    def callback(self, domain: str, key: bytes) -> bool:
        """Is this the public key of the join token; or, where people may only watch, that of the
        watch token? pyzmq's authenticator calls it, in its own thread."""
        return any(hmac.compare_digest(key, known) for known in self._keys.get(domain, ()))

    def watch(self, s: zmq.Socket[bytes], guarded: list[str]) -> None:
        """Watch the handshakes at these endpoints of `s`, which is not bound yet."""
        events = _ACCEPTED | _AUTH | _PROTOCOL | _NO_DETAIL | _DISCONNECTED
        watch = sockets.monitor(self._ctx, s, events)
        self._watched[watch] = s, _Listener(frozenset(guarded))

    @property
    def watches(self) -> list[zmq.Socket[bytes]]:
        return list(self._watched)

    def refused(self) -> Iterator[str]:
        """Sentences about the peers that were refused since the last call."""
        for watch, (_, listener) in self._watched.items():
            while sockets.readable(watch):
                who, why = listener.event(recv_monitor_message(watch))
                if why and who not in self._told and len(self._told) < PEERS_TOLD:
                    self._told.add(who)
                    yield f"{who} was refused: {why}"

    def close(self) -> None:
        """Stop answering: from now on no peer is admitted. Call it before the guarded sockets are
        closed."""
        for watch, (s, _) in self._watched.items():
            sockets.end_monitor(s, watch)
        self._watched.clear()
        self._zap.stop()


class _Listener:
    """Finds in the events of one bound socket which peer was refused, and why.

    The event of a failed handshake does not name its peer. The next event, the end of the
    connection, names the file descriptor, whose peer address was read when the connection was
    accepted. A peer that hangs up at once may be gone by then.
    """

    def __init__(self, guarded: frozenset[str]) -> None:
        self._guarded = guarded
        self._addresses: dict[int, str] = {}  # by file descriptor
        self._why = ""

    def event(self, told: Mapping[str, Any]) -> tuple[str, str]:
        """The address of a refused peer and the reason, or empty strings."""
        kind, value = told["event"], told["value"]
        if told["endpoint"].decode() not in self._guarded:
            return "", ""
        if kind == _ACCEPTED:
            self._addresses[value] = _address(value)
        elif kind == _DISCONNECTED:
            who, why, self._why = self._addresses.pop(value, ""), self._why, ""
            return who or "somebody", why
        elif kind == _AUTH:
            self._why = "its key is not the one of the join token"
        elif kind == _PROTOCOL and value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            self._why = "it has no join token"
        elif kind == _PROTOCOL and value == zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC:
            self._why = "its join token is an old one, or another server's"
        else:
            self._why = "it did not show a join token"
        return "", ""


def _address(descriptor: int) -> str:
    """The peer's address in a connection that ZeroMQ has just accepted; empty if it is gone."""
    with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as s:
        return str(s.getpeername()[0]).removeprefix("::ffff:")
    return ""


class Strangers:
    """Bounds what the connections to a bound socket can make ZeroMQ hold.

    Each one that has proven nothing may leave one frame here until its handshake is over. Beyond
    `most` of them the oldest are ended, since those who belong here have proven it within a moment.
    Of each connection, proven or not, at most `most_bytes` may wait here, of a message that is not
    complete, too. Make it before the socket is bound, call `look` when `watch` is readable, and
    `measure` from time to time.
    """

    def __init__(
        self,
        ctx: zmq.Context[zmq.Socket[bytes]],
        s: zmq.Socket[bytes],
        most: int,
        most_bytes: int,
    ) -> None:
        self.ended = 0
        """Connections that were too many."""
        self._socket, self._most, self._most_bytes = s, most, most_bytes
        self._inflows: dict[int, Inflow] = {}  # of all connections, by file descriptor
        self._waiting: dict[int, None] = {}  # those that have proven nothing, the oldest first
        self.watch = sockets.monitor(ctx, s, _ACCEPTED | _DISCONNECTED)

    def __len__(self) -> int:
        return len(self._waiting)

    def heard(self, frame: zmq.Frame) -> None:
        """This message came over one of the connections."""
        inflow = self._inflows.get(sockets.descriptor(frame) or 0)
        if inflow is not None:
            inflow.heard()

    def proven(self, frame: zmq.Frame) -> None:
        """The connection that this message came over belongs here."""
        descriptor = sockets.descriptor(frame)
        if descriptor is not None:
            self._waiting.pop(descriptor, None)

    def look(self) -> None:
        """Take in who has come and gone, and end what is too many."""
        while sockets.readable(self.watch):
            told = recv_monitor_message(self.watch)
            descriptor = told["value"]
            self._waiting.pop(descriptor, None)
            self._inflows.pop(descriptor, None)
            if told["event"] == _ACCEPTED:
                self._waiting[descriptor] = None
                self._inflows[descriptor] = Inflow(descriptor, self._most_bytes)
        while len(self._waiting) > self._most:
            descriptor = next(iter(self._waiting))
            del self._waiting[descriptor]
            self.ended += self._inflows[descriptor].end()

    def measure(self) -> list[str]:
        """End the connections of which too much waits here; returns the addresses of those who
        sent it."""
        full = [inflow for inflow in self._inflows.values() if inflow.too_much()]
        return [inflow.sender or "somebody" for inflow in full if inflow.end()]

    def close(self) -> None:
        """Call it before the socket is closed."""
        sockets.end_monitor(self._socket, self.watch)


class HandshakeMonitor:
    """Watches the handshakes of a peer's socket; make it before the socket connects."""

    def __init__(
        self,
        ctx: zmq.Context[zmq.Socket[bytes]],
        s: zmq.Socket[bytes],
        host: str,
        port: int,
        *,
        with_keys: bool,
        token: str = "this worker's join token",
        port_of: str = "port",
    ) -> None:
        """`port_of`: which setting this port is of."""
        self._socket = s
        self._watch = sockets.monitor(ctx, s, _AUTH | _PROTOCOL | _NO_DETAIL | _SUCCEEDED)
        self._host, self._port, self._port_of = host, port, port_of
        self._with_keys = with_keys
        self._token = token  # in sentences
        self._hung_up = 0
        self.proven = False  # a handshake succeeded; with keys, it proved the server's

    def check(self) -> None:
        """Raise `UserError` if the server has refused, with the reason. Does not wait, except for a
        server that hangs up without a reason: this reads its greeting once."""
        while sockets.readable(self._watch):
            told = recv_monitor_message(self._watch)
            kind, value = told["event"], told["value"]
            if kind == _SUCCEEDED:
                self._hung_up = 0
                self.proven = True
            elif kind == _AUTH:
                raise self._refused(f"refuses the key of {self._token}")
            elif kind == _PROTOCOL and value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
                raise self._mismatch()
            elif kind == _PROTOCOL and self._with_keys:
                raise self._refused(f"does not prove that it has the key in {self._token}")
            elif kind == _NO_DETAIL and value in _HUNG_UP:
                self._hung_up += 1
        if self._hung_up >= HUNG_UP_TIMES:
            self._hung_up = 0
            wanted = mechanism(self._host, self._port)
            if wanted == ("NULL" if self._with_keys else "CURVE"):
                raise self._mismatch()
            if wanted == "CURVE":
                raise self._refused(
                    f"has other keys than {self._token}, an old one or another server's"
                )
            # else no server is there yet: a tunnel, for example, whose other end is still closed

    def _refused(self, why: str) -> UserError:
        return UserError(
            f"the server at {host_port(self._host, self._port)} {why}",
            f"take the token that `{typed('server')}` prints there, or "
            f"`{printing_token(self._host, self._port, of=self._port_of)}`",
        )

    def _mismatch(self) -> UserError:
        if not self._with_keys:
            return UserError(
                f"the server at {host_port(self._host, self._port)} wants a join token",
                f"{typed('worker', 'id=...', 'join=...')} as `{typed('server')}` prints it, "
                "without security=none",
            )
        return UserError(
            f"the server at {host_port(self._host, self._port)} takes no join token: "
            "it was started with security=none",
            "start it without that; or, if you trust everybody who reaches it, give security=none "
            "to this worker too",
        )

    def close(self) -> None:
        """Call it before the peer's socket is closed."""
        sockets.end_monitor(self._socket, self._watch)


def mechanism(host: str, port: int) -> str:
    """The security mechanism in the greeting of the program that listens there: NULL, CURVE, or
    empty where that is not ZeroMQ. (The greeting is ZMTP's, https://rfc.zeromq.org/spec/37.)"""
    greeting, deadline = b"", time.monotonic() + LOOK_S
    try:
        with socket.create_connection((host, port), LOOK_S) as s:
            s.sendall(b"\xff" + bytes(7) + b"\x01\x7f\x03")  # signature, major version
            while len(greeting) < 64 and (more := s.recv(64 - len(greeting))):
                greeting += more
                s.settimeout(max(0.001, deadline - time.monotonic()))
    except OSError:
        return ""
    signed = len(greeting) == 64 and greeting[0] == 0xFF and greeting[9] == 0x7F
    return greeting[12:32].rstrip(b"\0").decode("ascii", "replace") if signed else ""


__all__ = ["Authenticator", "HandshakeMonitor", "Strangers", "mechanism"]
