"""The only place that makes ZeroMQ sockets: linger, buffers and high-water marks are set here.

High-water marks count messages, so they are derived from buckets: a worker may have
`BUCKETS_WAITING` buckets waiting at the server before TCP holds it back, and a subscriber that
falls far behind loses messages (it notices the gap and fetches); see `mark`.
"""

from __future__ import annotations

import errno
import math
import os
import socket
import stat
from pathlib import Path
from typing import cast

import psutil
import zmq

from paramserver.errors import UserError

BUCKETS_WAITING = 8
SMALL_MESSAGES = 64  # room for what is not a bucket
HISTORY_MIN_MB = 64.0
FRAME_OVERHEAD = 4096
_EVENTS, _POLLIN = zmq.EVENTS, int(zmq.POLLIN)


def context(io_threads: int = 1) -> zmq.Context[zmq.Socket[bytes]]:
    """A context of one's own; end it with `term()` after closing its sockets."""
    return zmq.Context(io_threads)


def _make(
    ctx: zmq.Context[zmq.Socket[bytes]], kind: int, frame_bytes_max: int
) -> zmq.Socket[bytes]:
    s = ctx.socket(kind)
    s.linger = 0
    s.setsockopt(zmq.MAXMSGSIZE, frame_bytes_max)
    s.setsockopt(zmq.HANDSHAKE_IVL, 5000)
    s.setsockopt(zmq.TCP_KEEPALIVE, 1)
    s.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 5)
    s.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 2)
    s.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
    s.setsockopt(zmq.RECONNECT_IVL, 50)
    s.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    return s


def router(
    ctx: zmq.Context[zmq.Socket[bytes]], endpoints: list[str], frame_bytes_max: int
) -> zmq.Socket[bytes]:
    """The server's ROUTER, bound. A message to a peer that is gone raises EHOSTUNREACH."""
    s = _make(ctx, zmq.ROUTER, frame_bytes_max)
    s.setsockopt(zmq.ROUTER_MANDATORY, 1)
    s.setsockopt(zmq.RCVHWM, BUCKETS_WAITING)
    s.setsockopt(zmq.SNDHWM, 0)  # what is sent here was asked for piece by piece
    _bind(s, endpoints)
    return s


def publisher(
    ctx: zmq.Context[zmq.Socket[bytes]], endpoints: list[str], frame_bytes_max: int, mark: int
) -> zmq.Socket[bytes]:
    """The server's PUB, bound."""
    s = _make(ctx, zmq.PUB, frame_bytes_max)
    s.setsockopt(zmq.SNDHWM, mark)
    _bind(s, endpoints)
    return s


def mark(history_mb: float, bucket_mb: float) -> int:
    """Messages that a PUB and a SUB each hold for a slow reader: twice what the history keeps.

    For the whole life of a socket: to change the mark of one with connections is not safe. libzmq
    4.3 tells the other end of a pipe that may be gone already (a crash in its I/O thread), and
    takes a pipe for full for ever where more was under way than a mark that was lowered.
    """
    return SMALL_MESSAGES + 2 * math.ceil(max(history_mb, HISTORY_MIN_MB) / bucket_mb)


def dealer(
    ctx: zmq.Context[zmq.Socket[bytes]], endpoint: str, frame_bytes_max: int = -1
) -> zmq.Socket[bytes]:
    """A peer's door or link."""
    s = _make(ctx, zmq.DEALER, frame_bytes_max)
    s.setsockopt(zmq.SNDHWM, 0)  # a push of all buckets must never block the training loop
    s.setsockopt(zmq.RCVHWM, 0)
    s.connect(endpoint)
    return s


def subscriber(ctx: zmq.Context[zmq.Socket[bytes]], endpoint: str, mark: int) -> zmq.Socket[bytes]:
    """A peer's SUB; `subscribe` tells to what."""
    s = _make(ctx, zmq.SUB, -1)
    s.setsockopt(zmq.RCVHWM, mark)
    s.connect(endpoint)
    return s


def subscribe(s: zmq.Socket[bytes], prefix: bytes) -> None:
    """Hear what begins like this too; PUB sends nothing else."""
    s.setsockopt(zmq.SUBSCRIBE, prefix)


def readable(s: zmq.Socket[bytes]) -> bool:
    """Is there something to receive? A tenth of the cost of catching an empty receive."""
    return bool(cast(int, s.getsockopt(_EVENTS)) & _POLLIN)


def tcp(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def ipc_endpoints(folder: str) -> tuple[str, str]:
    """Endpoints of ROUTER and PUB in a server's ipc folder."""
    return f"ipc://{folder}/router", f"ipc://{folder}/pub"


def ipc_usable(folder: str) -> bool:
    """May this process use these sockets? They must be ours: the folder private and our own.

    Only asked when the dialled address belongs to this host; a file alone proves nothing, since
    network namespaces and containers may share /tmp.
    """
    if not hasattr(os, "getuid"):
        return False
    try:
        status = os.stat(folder)
        return status.st_uid == os.getuid() and stat.S_IMODE(status.st_mode) == 0o700
    except OSError:
        return False


def is_local(host: str) -> bool:
    """Does this address belong to this host (to this network namespace)?"""
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    if any(str(a).startswith("127.") or a == "::1" for a in addresses):
        return True
    own = {a.address.split("%")[0] for nic in psutil.net_if_addrs().values() for a in nic}
    return bool(addresses & own)


def _bind(s: zmq.Socket[bytes], endpoints: list[str]) -> None:
    for endpoint in endpoints:
        try:
            s.bind(endpoint)
        except zmq.ZMQError as e:
            s.close()
            raise _bind_error(endpoint, e) from None


def _bind_error(endpoint: str, e: zmq.ZMQError) -> UserError:
    where = endpoint.removeprefix("tcp://")
    if e.errno == errno.EADDRINUSE:
        port = int(where.rsplit(":", 1)[1]) if ":" in where else 0
        owner = listener(port)
        return UserError(
            f"port {port} is taken{f' by {owner}' if owner else ''} ({where})",
            "stop that, or choose another: port=65500",
        )
    if e.errno in (errno.EADDRNOTAVAIL, errno.ENODEV):
        own = sorted(
            a.address
            for nic in psutil.net_if_addrs().values()
            for a in nic
            if a.family in (socket.AF_INET,)
        )
        return UserError(
            f"{where}: this host has no such address", f"its addresses: {', '.join(own)}"
        )
    return UserError(f"cannot listen at {where}: {e.strerror or e}")


def listener(port: int) -> str:
    """Who listens at this port, as far as this user may know."""
    try:
        for c in psutil.net_connections(kind="tcp"):
            if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == port and c.pid:
                process = psutil.Process(c.pid)
                line = " ".join(process.cmdline())[:80]
                return f"pid {c.pid} ({line or process.name()})"
    except (psutil.Error, OSError):
        pass
    return ""


def private_folder(prefix: str) -> Path:
    """A new folder that only this user may enter, for ipc sockets (their paths must be short)."""
    import tempfile

    return Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp" if os.path.isdir("/tmp") else None))
