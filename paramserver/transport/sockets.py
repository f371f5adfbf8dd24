"""The only place that makes ZeroMQ sockets: linger, buffers and high-water marks are set here.

High-water marks count messages, so they are derived from buckets: a worker may have
`BUCKETS_WAITING` buckets waiting at the server before TCP holds it back, and a subscriber that
falls far behind loses messages (it notices the gap and fetches); see `mark`.
"""

from __future__ import annotations

import errno
import ipaddress
import math
import os
import resource
import socket
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import zmq

from paramserver.errors import UserError
from paramserver.transport.private_dir import PrivateFolder, is_private
from paramserver.words import host_port

BUCKETS_WAITING = 8
SMALL_MESSAGES = 64  # room for messages that are not buckets
HISTORY_MIN_MB = 64.0
MARK_MAX = 2**31 - 1  # ZeroMQ's own
FRAME_OVERHEAD = 4096
MESSAGES_UNREAD = 16_384  # small ones that wait for a peer that does not read
LARGE_BYTES = 2**16  # from this size on, `Unread` follows a frame until the kernel has it
CONNECTIONS = 10_000  # macOS allows 10,240 by default
ZAP_DOMAIN, ZAP_PLAIN = "paramserver", "paramserver-plain"
ZAP_WATCH = "paramserver-watch"
ZAP_CHANNEL = "paramserver-channel"
ZAP_ENDPOINT = "inproc://zeromq.zap.01"  # of RFC 27
WATCH_BYTES_MAX = 2**12  # of what a watcher sends, its handshake included
WATCH_UNREAD = 2  # statuses that wait for a watcher that does not read
_POLLIN, _NOBLOCK, _SNDMORE = int(zmq.POLLIN), int(zmq.NOBLOCK), int(zmq.SNDMORE)


@dataclass(frozen=True)
class ServerKeys:
    """Curve25519 keys of a server, and the public key of the workers that it admits; in Z85."""

    public: bytes
    secret: bytes = field(repr=False)
    workers: bytes
    watchers: bytes = b""
    """The public key of those who may only watch."""


@dataclass(frozen=True)
class PeerKeys:
    """A peer's keys for a server with CURVE: the server's public key and its own pair; in Z85."""

    server: bytes
    secret: bytes = field(repr=False)


def context(io_threads: int = 1) -> zmq.Context[zmq.Socket[bytes]]:
    """A new context; end it with `term()` after closing its sockets."""
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


def allow_connections() -> None:
    """Raise this process's limit of connections to what its user may have, at most `CONNECTIONS`.

    Without free file descriptors ZeroMQ's I/O thread spins until one is free: strangers could slow
    a run by some hundred silent connections.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS if hard == resource.RLIM_INFINITY else min(hard, CONNECTIONS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):  # the system has another limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def router(ctx: zmq.Context[zmq.Socket[bytes]], frame_bytes_max: int) -> zmq.Socket[bytes]:
    """The server's ROUTER, to be bound. A message to a peer that is gone raises EHOSTUNREACH."""
    s = _make(ctx, zmq.ROUTER, frame_bytes_max)
    s.setsockopt(zmq.ROUTER_MANDATORY, 1)
    s.setsockopt(zmq.RCVHWM, BUCKETS_WAITING)
    s.setsockopt(zmq.SNDHWM, MESSAGES_UNREAD)  # large frames are bounded by `Unread`
    return s


def publisher(
    ctx: zmq.Context[zmq.Socket[bytes]], frame_bytes_max: int, mark: int
) -> zmq.Socket[bytes]:
    """The server's PUB, to be bound."""
    s = _make(ctx, zmq.PUB, frame_bytes_max)
    s.setsockopt(zmq.SNDHWM, mark)
    return s


def relay_publisher(
    ctx: zmq.Context[zmq.Socket[bytes]], folder: str, mark: int
) -> zmq.Socket[bytes]:
    """A relay's socket, bound in its private folder. It reads who begins to listen there. Raises
    `zmq.ZMQError`."""
    s = _make(ctx, zmq.XPUB, -1)
    s.setsockopt(zmq.SNDHWM, mark)
    s.setsockopt(zmq.XPUB_VERBOSE, 1)
    try:
        s.bind(relay_endpoint(folder))
    except zmq.ZMQError:
        s.close()
        raise
    return s


def watch_router(ctx: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    """The server's ROUTER for those who watch, to be bound. What each of them may leave here is a
    few short messages: after that TCP holds it back."""
    s = _make(ctx, zmq.ROUTER, WATCH_BYTES_MAX)
    s.setsockopt(zmq.ROUTER_MANDATORY, 1)
    s.setsockopt(zmq.RCVHWM, BUCKETS_WAITING)
    s.setsockopt(zmq.SNDHWM, WATCH_UNREAD)
    s.setsockopt(zmq.RCVBUF, 2**16)
    return s


def watch_dealer(ctx: zmq.Context[zmq.Socket[bytes]], frame_bytes_max: int) -> zmq.Socket[bytes]:
    """A watcher's socket, to be connected."""
    s = _make(ctx, zmq.DEALER, frame_bytes_max)
    s.setsockopt(zmq.SNDHWM, SMALL_MESSAGES)
    s.setsockopt(zmq.RCVHWM, SMALL_MESSAGES)
    return s


def channel_router(
    ctx: zmq.Context[zmq.Socket[bytes]], record_bytes: int, unread: int, mark: int
) -> zmq.Socket[bytes]:
    """The server's ROUTER for sealed payloads, for `bind_channels`: `unread` records of a peer wait
    here, and `mark` ones for a peer."""
    s = _make(ctx, zmq.ROUTER, record_bytes)
    s.setsockopt(zmq.ROUTER_MANDATORY, 1)
    s.setsockopt(zmq.RCVHWM, unread)
    s.setsockopt(zmq.SNDHWM, mark)
    return s


def channel_dealer(
    ctx: zmq.Context[zmq.Socket[bytes]], record_bytes: int, mark: int, user: str, password: str
) -> zmq.Socket[bytes]:
    """A peer's socket for sealed payloads, to be connected. The password opens one connection; a
    second one takes another, so ZeroMQ makes none by itself. Without a user nobody asks for one."""
    s = _make(ctx, zmq.DEALER, record_bytes)
    s.setsockopt(zmq.SNDHWM, 0)
    s.setsockopt(zmq.RCVHWM, mark)
    s.setsockopt(zmq.RECONNECT_IVL, -1)
    if user:
        s.setsockopt(zmq.PLAIN_USERNAME, user.encode())
        s.setsockopt(zmq.PLAIN_PASSWORD, password.encode())
    return s


def zap_handler(ctx: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    """The socket on which ZeroMQ asks who may connect to the sockets of this context."""
    s = ctx.socket(zmq.REP)
    s.linger = 0
    s.bind(ZAP_ENDPOINT)
    return s


def bind_channels(s: zmq.Socket[bytes], endpoints: Sequence[str]) -> None:
    """Listen at these endpoints; who connects needs a password that the `zap_handler` knows. Raises
    `UserError` where an address cannot be bound, and closes the socket."""
    s.setsockopt(zmq.PLAIN_SERVER, 1)
    s.setsockopt(zmq.ZAP_DOMAIN, ZAP_CHANNEL.encode())
    s.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    _bind(s, endpoints)


def bind_shard(s: zmq.Socket[bytes], host: str, *, guarded: bool) -> int:
    """Listen at any free port of this address; if `guarded` as `bind_channels` does. Returns the
    port; raises `UserError` where none can be had, and closes the socket."""
    bind_channels(s, [tcp(host, 0)]) if guarded else _bind(s, [tcp(host, 0)])
    endpoint = s.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(endpoint, bytes)
    return int(endpoint.rstrip(b"\0").rpartition(b":")[2])


def bind(
    s: zmq.Socket[bytes],
    plain: Sequence[str],
    guarded: Sequence[str] = (),
    keys: ServerKeys | None = None,
    domain: str = ZAP_DOMAIN,
) -> None:
    """Listen at these endpoints; the guarded ones, with `keys`, admit only peers with a worker's
    key, or with one that fits to the `domain` (see `Authenticator`).

    An endpoint keeps the options that the socket had when it was bound, so plain ones come first.
    Plain ones have a ZAP domain too, although every peer is admitted: ZeroMQ then refuses the
    protocol's old versions, in which any bytes count as a peer. ZeroMQ never reads a peer that
    takes another one's identity, and never ends its connection.
    Without an `Authenticator` a guarded endpoint admits no peer. Raises `UserError` where an
    address cannot be bound, and closes the socket.
    """
    s.setsockopt(zmq.ZAP_DOMAIN, ZAP_PLAIN.encode())
    _bind(s, plain)
    if guarded:
        if keys is None:
            raise ValueError("a guarded endpoint without keys")
        s.setsockopt(zmq.CURVE_SERVER, 1)
        s.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
        s.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        s.setsockopt(zmq.ZAP_DOMAIN, domain.encode())
        s.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    _bind(s, guarded)


def mark(history_mb: float, bucket_mb: float) -> int:
    """Messages that a PUB and a SUB each hold for a slow reader: twice what the history keeps,
    where buckets are as large as they may be. Of a small model, in smaller buckets, it is less.

    It holds for a socket's whole life: changing the mark of a socket with connections is not safe.
    libzmq 4.3 may then notify the other end of a pipe that is gone already (a crash in its I/O
    thread), and blocks a pipe for ever where more was under way than a lowered mark.
    """
    waiting = 2 * math.ceil(max(history_mb, HISTORY_MIN_MB) / bucket_mb)
    return min(SMALL_MESSAGES + waiting, MARK_MAX)


def channel_marks(history_mb: float, bucket_mb: float, record_bytes: int) -> tuple[int, int]:
    """Records that wait at a channel's socket: the server's for its own thread, of one peer; and
    each end for a slow reader, as many bytes as `mark` allows."""
    records = max(1, math.ceil(bucket_mb * 2**20 / record_bytes))
    waiting = 2 * math.ceil(max(history_mb, HISTORY_MIN_MB) / bucket_mb)
    return BUCKETS_WAITING * records, min(waiting * records, MARK_MAX)


def dealer(ctx: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    """A peer's door or link, to be connected."""
    s = _make(ctx, zmq.DEALER, -1)
    s.setsockopt(zmq.SNDHWM, 0)  # a push of all buckets must never block the training loop
    s.setsockopt(zmq.RCVHWM, 0)
    return s


def subscriber(ctx: zmq.Context[zmq.Socket[bytes]], mark: int) -> zmq.Socket[bytes]:
    """A peer's SUB, to be connected; `subscribe` chooses the topics."""
    s = _make(ctx, zmq.SUB, -1)
    s.setsockopt(zmq.RCVHWM, mark)
    return s


def connect(s: zmq.Socket[bytes], endpoint: str, keys: PeerKeys | None = None) -> None:
    """Connect to a server's endpoint; to a guarded one, with keys."""
    if keys is not None:
        s.setsockopt(zmq.CURVE_SERVERKEY, keys.server)
        s.setsockopt(zmq.CURVE_PUBLICKEY, zmq.curve_public(keys.secret))
        s.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
    s.setsockopt(zmq.IPV6, int(_takes_ipv6(endpoint)))
    s.connect(endpoint)


def monitor(
    ctx: zmq.Context[zmq.Socket[bytes]], s: zmq.Socket[bytes], events: int
) -> zmq.Socket[bytes]:
    """A socket that gets these events of `s`, for `zmq.utils.monitor`; make it before `s` is
    connected.

    It has no mark, because the I/O thread would wait for a reader that is slow.
    """
    endpoint = f"inproc://monitor.{s.FD}.{id(s)}"
    s.monitor(endpoint, events)
    watch = ctx.socket(zmq.PAIR)
    watch.linger = 0
    watch.setsockopt(zmq.RCVHWM, 0)
    watch.connect(endpoint)
    return watch


def end_monitor(s: zmq.Socket[bytes], watch: zmq.Socket[bytes]) -> None:
    """Close the socket that `monitor` returned, before `s` is closed: an I/O thread with an event
    for a socket that is not read waits for ever, and its whole context with it."""
    if not s.closed:
        s.disable_monitor()
    watch.close()


def subscribe(s: zmq.Socket[bytes], prefix: bytes) -> None:
    """Receive messages with this prefix too; PUB sends no others."""
    s.setsockopt(zmq.SUBSCRIBE, prefix)


def unsubscribe(s: zmq.Socket[bytes], prefix: bytes) -> None:
    """Take back one `subscribe`."""
    s.setsockopt(zmq.UNSUBSCRIBE, prefix)


def readable(*sockets: zmq.Socket[bytes]) -> bool:
    """Is there something to receive at one of these? A tenth of the cost of catching an empty
    receive."""
    return bool(zmq.zmq_poll([(s, _POLLIN) for s in sockets], 0))


def wait(limit_s: float, *sockets: zmq.Socket[bytes]) -> None:
    """Wait until there is something to receive at one of these, or the time is over."""
    zmq.zmq_poll([(s, _POLLIN) for s in sockets], math.ceil(1000 * limit_s))


def send(
    s: zmq.Socket[bytes], frames: Sequence[Any], *, copy: bool = True, wait: bool = True
) -> None:
    """Send one message; raises `zmq.Again` instead of waiting for room where `wait` is false.

    It does the same as `send_multipart` (and `receive` the same as `recv_multipart`), which take
    more than twice as long for the few frames of a step, because they handle flags and options as
    members of enumerations.
    """
    flags = 0 if wait else _NOBLOCK
    for frame in frames[:-1]:
        s.send(frame, flags | _SNDMORE, copy=copy)
    s.send(frames[-1], flags, copy=copy)


class Unread:
    """Counts the bytes that wait in this process for each peer, by its route.

    (ZeroMQ counts messages, and an answer may be large.) It follows large frames until the kernel
    has them; the socket's mark bounds small ones.
    """

    def __init__(self) -> None:
        self._waiting: dict[bytes, deque[tuple[zmq.MessageTracker, int]]] = {}

    def send(self, s: zmq.Socket[bytes], route: bytes, frames: Sequence[Any], *, own: bool) -> None:
        """Send to this peer without waiting; raises as `send`. Where the frames are not the
        message's `own`, because they will be written over, large ones are copied."""
        s.send(route, _NOBLOCK | _SNDMORE)
        for i, frame in enumerate(frames):
            flags = _NOBLOCK if i == len(frames) - 1 else _NOBLOCK | _SNDMORE
            if len(frame) < LARGE_BYTES:
                s.send(frame, flags)
                continue
            tracker = s.send(frame if own else bytes(frame), flags, copy=False, track=True)
            assert tracker is not None
            self._waiting.setdefault(route, deque()).append((tracker, len(frame)))

    def waiting(self, route: bytes) -> int:
        waiting = self._waiting.get(route)
        if waiting is None:
            return 0
        while waiting and waiting[0][0].done:
            waiting.popleft()
        if not waiting:
            del self._waiting[route]
        return sum(size for _, size in waiting)

    def forget(self, route: bytes) -> None:
        self._waiting.pop(route, None)


def receive(s: zmq.Socket[bytes]) -> list[zmq.Frame]:
    """Receive one message, as frames whose memory is not copied."""
    frames = [s.recv(0, copy=False)]
    while frames[-1].more:
        frames.append(s.recv(0, copy=False))
    return frames


def sender(frame: zmq.Frame) -> str:
    """The address that a received message came from; "" where it came over no network."""
    try:
        address = str(frame.get("Peer-Address")).removeprefix("::ffff:")
        ipaddress.ip_address(address)  # over ipc it is "localhost" with numbers
        return address
    except (zmq.ZMQError, KeyError, ValueError):
        return ""


def user(frame: zmq.Frame) -> str:
    """As whom the handshake of the connection has let in the sender of a received message: the
    public key of CURVE, the name of PLAIN; "" or "anonymous" where it has asked nothing."""
    try:
        return str(frame.get("User-Id"))
    except (zmq.ZMQError, KeyError, ValueError):
        return ""


def descriptor(frame: zmq.Frame) -> int | None:
    """The file descriptor of the connection that a message came over; None if it is unknown."""
    try:
        return int(frame.get(int(zmq.SRCFD)))
    except (zmq.ZMQError, KeyError, ValueError):
        return None


def tcp(host: str, port: int) -> str:
    return f"tcp://{host_port(host, port)}"


def ipc_endpoints(folder: str) -> tuple[str, str]:
    """Endpoints of ROUTER and PUB in a server's ipc folder."""
    return f"ipc://{folder}/router", f"ipc://{folder}/pub"


def relay_endpoint(folder: str) -> str:
    """Of a relay's socket, in its folder."""
    return f"ipc://{folder}/relay"


def ipc_usable(folder: str) -> bool:
    """May this process use these sockets? They must be ours: the folder private and our own.

    Call it only where the dialled address belongs to this host: the files alone prove nothing,
    because network namespaces and containers may share /tmp.
    """
    return is_private(folder)


def is_local(host: str) -> bool:
    """Does this address belong to this host (to this network namespace)?"""
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except (OSError, ValueError):  # what can be no name is an error of the second kind
        return False
    if any(str(a).startswith("127.") or a == "::1" for a in addresses):
        return True
    try:
        own = {a.address.split("%")[0] for nic in psutil.net_if_addrs().values() for a in nic}
    except OSError:  # a sandbox forbids the question
        return False
    return bool(addresses & own)


def towards(host: str) -> str:
    """The address of this host that it uses to send there; "" where no route leads there. Sends
    nothing."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as s:
            s.connect((host, 9))
            return str(s.getsockname()[0])
    except OSError:
        return ""


def is_loopback(host: str) -> bool:
    """Is this an address that only processes of one host can reach?"""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def own_addresses(family: int = socket.AF_INET) -> list[str]:
    """IPv4 addresses of this host, or its IPv6 addresses, without loopback and those that hold on
    one link only."""
    own = [
        a.address
        for nic in psutil.net_if_addrs().values()
        for a in nic
        if a.family == family and "%" not in a.address
    ]
    return sorted(address for address in own if not is_loopback(address))


def addresses_of(host: str) -> list[str]:
    """The addresses of a host's name, IPv4 first; the address itself where it is one, and nothing
    where the name is unknown."""
    try:
        ipaddress.ip_address(host.split("%")[0])
        return [host]
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    addresses = [str(info[4][0]) for info in sorted(found, key=lambda info: info[0])]
    return list(dict.fromkeys(addresses))


def _takes_ipv6(endpoint: str) -> bool:
    """Is this an IPv6 address, or a name that has no other?"""
    if not endpoint.startswith("tcp://"):
        return False
    host = endpoint.removeprefix("tcp://").rsplit(":", 1)[0]
    if host.startswith("[") or host.replace(".", "").isdigit():
        return host.startswith("[")
    with suppress(OSError, UnicodeError):
        return {info[0] for info in socket.getaddrinfo(host, None)} == {socket.AF_INET6}
    return False


def _bind(s: zmq.Socket[bytes], endpoints: Sequence[str]) -> None:
    for endpoint in endpoints:
        s.setsockopt(zmq.IPV6, int(_takes_ipv6(endpoint)))
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
        own = ", ".join(("127.0.0.1", *own_addresses()))
        return UserError(f"{where}: this host has no such address", f"its addresses: {own}")
    if where.lower().startswith("[fe80:") and "%" not in where:
        return UserError(
            f"cannot listen at {where}: fe80 addresses are of one cable or network each",
            "name its interface, too: host_ip=fe80::1%eth0",
        )
    return UserError(f"cannot listen at {where}: {e.strerror or e}")


def listener(port: int) -> str:
    """The program that listens at this port, as far as this user may know."""
    try:
        for c in psutil.net_connections(kind="tcp"):
            if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == port and c.pid:
                process = psutil.Process(c.pid)
                line = " ".join(process.cmdline())[:80]
                return f"pid {c.pid} ({line or process.name()})"
    except (psutil.Error, OSError):
        pass
    return ""


def ipc_folder() -> PrivateFolder | None:
    """A folder for ipc sockets (their paths must be short); None where no folder for temporary
    files can be written, or none takes sockets."""
    if not zmq.has("ipc") or os.name != "posix":
        return None
    for parent in _temporary():
        with suppress(OSError):
            folder = PrivateFolder(parent)
            try:
                with socket.socket(socket.AF_UNIX) as s:
                    s.bind(str(folder.path / "router"))  # a path that is too long fails here too
                (folder.path / "router").unlink()
                return folder
            except OSError:
                folder.close()
    return None


def _temporary() -> Iterator[Path]:
    """Folders for temporary files, the shortest name first."""
    yield Path("/tmp")
    if given := os.environ.get("XDG_RUNTIME_DIR"):
        yield Path(given)
    with suppress(OSError):  # there is none
        yield Path(tempfile.gettempdir())
    yield Path("/dev/shm")
