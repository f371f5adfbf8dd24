"""The sockets of a server's program. They stay bound from one run to the next, so that nobody else
gets the ports, and a worker that comes between two runs is told to wait."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress

import zmq

from paramserver.errors import PeerError, UserError
from paramserver.protocol import messages as wire
from paramserver.server.watching import WatchSocket
from paramserver.settings import Settings
from paramserver.tensors.bucket import SENT_BYTES
from paramserver.tensors.whole import BUFFER_BYTES
from paramserver.transport import sealing, sockets
from paramserver.transport.handshake import Authenticator, Strangers
from paramserver.transport.passwords import Passwords

ANSWER_MS = 100
STRANGERS_MAX = 64  # connections for sealed payloads that have not proven anything
EARLIER_MAX = 16  # runs whose ends are kept for peers that come late


class Ports:
    """Binds ROUTER and PUB at these `hosts`, and with `keys` at `guarded` ones; if `watched`, the
    socket of those who watch, too (`watch_problem` tells why there is none). Raises `UserError`
    where an address cannot be bound.

    One thread at a time uses the sockets: that of the server of a run or, between two runs, the one
    that `answer` starts.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        hosts: Sequence[str],
        guarded: Sequence[str] = (),
        keys: sockets.ServerKeys | None = None,
        watched: bool = False,
    ) -> None:
        bucket_mb = settings.bucket_size_mb
        bucket_bytes = int(bucket_mb * 2**20) + max(SENT_BYTES.values())
        self.largest = max(bucket_bytes, wire.HEADER_BYTES_MAX, BUFFER_BYTES)
        self.largest += sockets.FRAME_OVERHEAD
        self.earlier: dict[str, wire.End] = {}
        """How the newest runs before ended, by their ids."""
        self.guarded = tuple(guarded)
        self.ipc = sockets.ipc_folder()
        self._settings, self._hosts, self._watched = settings, tuple(hosts), watched
        self._between: tuple[threading.Event, threading.Thread] | None = None
        try:
            self._open(keys)
        except BaseException:
            self.close()
            raise

    def _open(self, keys: sockets.ServerKeys | None) -> None:
        settings, hosts, guarded = self._settings, self._hosts, self.guarded
        self.peers_key = "" if keys is None else keys.workers.decode()
        """The public key of those who hold the join token."""
        self.watch: WatchSocket | None = None
        self.passwords: Passwords | None = None
        self.channel: zmq.Socket[bytes] | None = None
        self.strangers: Strangers | None = None
        self.channel_port = 0
        self.channel_problem = self.watch_problem = ""
        self.authenticator: Authenticator | None = None
        self._channel_ctx: zmq.Context[zmq.Socket[bytes]] | None = None
        self.ctx = sockets.context()
        self.authenticator = Authenticator(self.ctx, keys) if keys is not None else None
        self.router = sockets.router(self.ctx, self.largest)
        mark = sockets.mark(settings.history_mb, settings.bucket_size_mb)
        self.pub = sockets.publisher(self.ctx, self.largest, mark)
        self._bind(settings.port, hosts, guarded, keys)
        if guarded:
            self._bind_channels(settings, guarded)
        if self._watched and settings.port_of_watchers:
            self._bind_watch(settings.port_of_watchers, hosts, guarded, keys)

    def renew(self, keys: sockets.ServerKeys) -> None:
        """Bind new sockets with these keys in place of all that there are: no connection that was
        let in with the old ones is left. Those over ipc and at loopback come again by themselves.
        Raises `UserError` where another program has taken a port in this moment."""
        self._close_sockets()
        self._open(keys)

    def _bind(
        self,
        port: int,
        hosts: Sequence[str],
        guarded: Sequence[str],
        keys: sockets.ServerKeys | None,
    ) -> None:
        routers = [sockets.tcp(h, port) for h in hosts]
        # Where others need keys, who has none hears nothing at loopback either: peers that belong
        # to this server's user come over ipc.
        pubs = [] if guarded else [sockets.tcp(h, port + 1) for h in hosts]
        if self.ipc is not None:
            for kind, endpoints in zip(
                sockets.ipc_endpoints(str(self.ipc.path)), (routers, pubs), strict=True
            ):
                endpoints.append(kind)
        for socket, plain, at in ((self.router, routers, port), (self.pub, pubs, port + 1)):
            closed = [sockets.tcp(h, at) for h in guarded]
            if self.authenticator is not None:
                self.authenticator.watch(socket, closed)
            sockets.bind(socket, plain, closed, keys)

    def _bind_channels(self, settings: Settings, guarded: Sequence[str]) -> None:
        """Let peers on other machines send sealed payloads; where that port is taken, theirs go
        through CURVE. The sockets have a context of their own, because ZeroMQ has one place in each
        to ask who may connect."""
        port = settings.port_of_channels
        record_bytes = sealing.RECORD_BYTES + sealing.OVERHEAD_BYTES
        unread, mark = sockets.channel_marks(
            settings.history_mb, settings.bucket_size_mb, sealing.RECORD_BYTES
        )
        ctx = self._channel_ctx = sockets.context()
        self.passwords = Passwords(ctx)
        self.channel = sockets.channel_router(ctx, record_bytes, unread, mark)
        most_bytes = (unread + sealing.RECORDS_SPARE) * record_bytes
        self.strangers = Strangers(ctx, self.channel, STRANGERS_MAX, most_bytes)
        try:
            sockets.bind_channels(self.channel, [sockets.tcp(h, port) for h in guarded])
        except UserError as e:
            self.channel_problem = (
                f"gradients of other machines go through CURVE, which is slower: {e.problem}"
            )
            self.strangers.close()
            self.channel = self.strangers = None
        else:
            self.channel_port = port

    def _bind_watch(
        self,
        port: int,
        hosts: Sequence[str],
        guarded: Sequence[str],
        keys: sockets.ServerKeys | None,
    ) -> None:
        """Let people watch; where that port is taken, the run goes on without."""
        try:
            self.watch = WatchSocket(self.ctx, port, hosts, guarded, keys, self.authenticator)
        except UserError as e:
            self.watch_problem = (
                f"this run cannot be watched: {e.problem}; watch_port=PORT chooses another port"
            )

    def answer(self, end: wire.End) -> None:
        """From now on until `resume`, tell peers of the run that has ended so how it did, and new
        ones to wait for the next."""
        self.earlier[end.run] = end
        while len(self.earlier) > EARLIER_MAX:
            del self.earlier[next(iter(self.earlier))]
        over = threading.Event()
        thread = threading.Thread(target=self._answer, args=(over,), name="between", daemon=True)
        self._between = over, thread
        thread.start()

    def resume(self) -> None:
        """The next server uses the sockets from now on; safe to call twice."""
        if self._between is not None:
            over, thread = self._between
            over.set()
            thread.join()
            self._between = None

    def look_at_strangers(self) -> list[str]:
        """Bound what connections for sealed payloads hold here; returns the addresses of those that
        were ended for what they sent. Call it from time to time."""
        if self.strangers is None:
            return []
        self.strangers.look()
        return self.strangers.measure()

    def _answer(self, over: threading.Event) -> None:
        while not over.is_set():
            self.look_at_strangers()
            if not self.router.poll(ANSWER_MS):
                continue
            frames = sockets.receive(self.router)
            try:
                message, _ = wire.from_frames(frames[1:])
            except PeerError:
                continue  # the next server tells it, if it comes again
            with suppress(zmq.ZMQError):  # it is gone, or does not read
                answer = self._told(message)
                sockets.send(self.router, [frames[0].bytes, *wire.to_frames(answer)], wait=False)

    def _told(self, message: wire.Message) -> wire.Message:
        if not isinstance(message, wire.Hello):
            return wire.Greet(session_known=False)
        end = self.earlier.get(message.run or "")
        if end is not None:
            return wire.Reject(f"the run has ended: {end.reason}", end=end)
        return wire.Later("writing the results of a run, the next one follows")

    def close(self) -> None:
        """Release sockets and files; safe to call twice."""
        self.resume()
        self._close_sockets()
        if self.ipc is not None:
            self.ipc.close()

    def _close_sockets(self) -> None:
        if self.authenticator is not None:
            self.authenticator.close()
        if self.watch is not None:
            self.watch.close()
        if self.strangers is not None:
            self.strangers.close()
        for name in ("router", "pub", "channel"):
            s = getattr(self, name, None)
            if s is not None:
                s.close(linger=1000)
        self.ctx.term()
        if self.passwords is not None:
            self.passwords.close()
        if self._channel_ctx is not None:
            self._channel_ctx.term()


__all__ = ["Ports"]
