"""The sockets of a peer: it says hello at the door, gets a link and a SUB, and beats.

`workers.link.client` lets a replica follow the log over it; for the messages see docs/protocol.md.
One thread uses the link and SUB. A second one beats at the door, so that the server does not take a
long push or forward for the end of this process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import zmq

from paramserver.config.schema import from_wire
from paramserver.errors import PeerError, RunLost, UserError
from paramserver.net import address, machine
from paramserver.net.mdns import Search
from paramserver.protocol import messages as wire
from paramserver.settings import RunSettings, Settings
from paramserver.tensors.bucket import SENT_BYTES
from paramserver.tensors.whole import BUFFER_BYTES
from paramserver.transport import sealing, sockets
from paramserver.transport.handshake import HandshakeMonitor
from paramserver.typed import typed
from paramserver.words import host_port

from .channel import Channel
from .payloads import Payloads
from .relays import Relays
from .shards import Shards
from .shared import Shared

BEATS_PER_TIMEOUT = 5
PROBE_INTERVAL_S = 0.1
HELLO_INTERVAL_S = 2.0
NEW_DOOR_S = 10.0
ALWAYS = (wire.Close, wire.Open, wire.Pulse, wire.Probe, wire.End)
"""What every peer subscribes to."""
SEARCH_AFTER_S = 2.0  # of silence, at most; then the server may be somewhere else

log = logging.getLogger("workers")


class RunOver(RunLost):
    """The server says that the run which this peer asks for has ended, as `end` tells."""

    def __init__(self, end: wire.End) -> None:
        super().__init__(f"the run has ended: {end.reason}")
        self.end = end


class _NoSeat(UserError):
    """Here the server lets in, or has to prove itself to, nobody but those who have its keys."""


class Connection:
    """The connection of one peer to its server: `connect`, then send and receive, then `close`.

    `log` gets sentences for a person.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        role: str = "worker",
        id: int | None = None,
        key: str = "",
        keys: sockets.PeerKeys | None = None,
        outside: address.Address | None = None,
        search: Callable[..., Search] | None = None,
        shared_memory: bool = True,
        log: logging.Logger = log,
        after: str = "",
    ) -> None:
        """`keys` are needed for a server that admits only peers with keys; `key` proves to the
        server that this is its own observer. `outside` is dialed where whoever listens at `host`
        shares no private folder with this user. `search(run=...)` begins to look for the server of
        a run (None: any) where it does not answer any more. `shared_memory`: use it with a server
        on this host. `after`: a run that this process has finished; it waits for the next one."""
        self.host, self.port = host, port
        self.log = log
        self.welcome: wire.Welcome | None = None
        self.settings = RunSettings()
        """The run's settings, after a welcome."""
        self.run: str | None = None
        """The run that this peer has state of."""
        self.heartbeat_timeout = 10.0
        self.give_up_s = 60.0
        self.abandoned = threading.Event()
        """Set by another thread: do not go on connecting and joining."""
        self.greetings = 0
        """How often this peer was welcomed: a wait for a round of an earlier time is void."""
        self._keys, self._outside = keys, outside
        self.server_search = ServerSearch(self, search)
        self.hello = wire.Hello(
            protocol=wire.PROTOCOL,
            role=role,
            id=id,
            nonce=uuid.uuid4().hex,
            host=socket.gethostname(),
            pid=os.getpid(),
            key=key,
            secret=secrets.token_hex(16),
            versions=machine.versions(),
            after=after,
        )
        self.ctx = sockets.context()
        self._door: zmq.Socket[bytes] | None = None
        self.handshake: HandshakeMonitor | None = None  # of the door
        self.link: zmq.Socket[bytes] | None = None
        self.sub: zmq.Socket[bytes] | None = None
        self.kind = "tcp"
        self.payloads = Payloads(self)
        self.shards = Shards(self)
        self.relays = Relays(self)
        self.share_memory = shared_memory
        self.shared: Path | None = None  # where this host's server shares memory with us
        self._beating: threading.Event | None = None
        self._beat_thread: threading.Thread | None = None
        self._probed: set[str] = set()  # where our probe was seen: "sub", "link"
        self.must_greet = False  # the server does not know this session, or is silent
        self._end: wire.End | None = None  # came to the door, before link and SUB worked

    def connect(self, deadline_s: float, last_step: int | None = None) -> wire.Welcome:
        """Find the server and be welcomed, within `deadline_s`; logs what it waits for. Raises
        `UserError` where the server refuses or does not answer, and `RunLost` where `abandoned` is
        set meanwhile or where the server of a peer with a `last_step` does not come back."""
        start, blocked = time.monotonic(), False
        while True:
            welcome = self._be_welcomed(start, deadline_s, last_step)
            self.settings, self.welcome = self._checked(welcome), welcome
            self.heartbeat_timeout = self.settings.heartbeat_timeout
            self.give_up_s = self.settings.idle_timeout
            try:
                missing = self._open_link(welcome)
            except RunOver as e:
                if not e.end.more or self.run is not None:
                    raise
                missing = "run"  # it ended just now: the next one follows
            except _NoSeat:
                if self._outside is None:
                    raise
                there, self._outside = self._outside, None
                self.move(there.host, there.port, there.keys)
                missing = "seat"
            if not missing:
                self.server_search.over()
                self.greetings += 1
                return welcome
            # The server may have died just now; if it lives, a firewall is in between. A peer that
            # was let in before has a cable that comes and goes, or a server that is very busy.
            if blocked and missing in ("SUB", "ROUTER") and last_step is None:
                port = welcome.pub_port if missing == "SUB" else self.port
                raise UserError(
                    f"{self.host} answered at port {self.port}, but nothing comes through "
                    f"at port {port} ({missing})",
                    "a firewall between the two machines? both ports must be open",
                )
            blocked = missing in ("SUB", "ROUTER")

    def _be_welcomed(self, start: float, deadline_s: float, last_step: int | None) -> wire.Welcome:
        """Say hello at the door until it is answered, at most until `deadline_s` after `start` or
        after the last sign of a server that does not let us in yet. One that may have moved is
        searched for meanwhile."""
        door, handshake = self._open_door()
        deadline, hello_at, told = start + deadline_s, time.monotonic(), ""
        new_door_at, search_at = hello_at + NEW_DOOR_S, hello_at + self._search_after_s
        while True:
            handshake.check()
            now = time.monotonic()
            if now >= search_at and self.server_search.found(now):
                new_door_at = now  # dial the new address now
            if now >= new_door_at:  # ZeroMQ may have given up this socket's connection in silence
                door, handshake = self._open_door()
                hello_at, new_door_at = now, now + NEW_DOOR_S
            if now >= hello_at:  # a hello may be lost with a cut connection
                with contextlib.suppress(zmq.Again):  # the next check raises
                    sockets.send(door, wire.to_frames(self.hello), wait=False)
                hello_at = now + HELLO_INTERVAL_S
            if self.abandoned.is_set():
                raise RunLost("the run is over")
            if door.poll(min(500, max(0, int(1000 * (deadline - now))))):
                message = self.decode(sockets.receive(door))[0]
                if isinstance(message, wire.Welcome):
                    return message
                if isinstance(message, wire.Reject):
                    if not self.server_search.was_wrong(message):
                        if message.end is not None:
                            raise RunOver(message.end)
                        raise UserError(message.reason, message.hint)
                    new_door_at = now
                if isinstance(message, wire.Later):  # the server lives
                    hello_at = time.monotonic() + HELLO_INTERVAL_S
                    search_at = hello_at + self._search_after_s
                    deadline, new_door_at = hello_at + deadline_s, hello_at + NEW_DOOR_S
                    if told != message.reason:
                        told = message.reason
                        self.log.info(f"the server is {told}")
                continue
            now = time.monotonic()
            if now > deadline:
                if last_step is not None:
                    raise RunLost(
                        f"no server answered at {host_port(self.host, self.port)} for "
                        f"{deadline_s:g} s; last step here: {last_step}"
                    )
                if not sockets.addresses_of(self.host):
                    raise address.unknown(self.host)
                raise UserError(
                    f"no server answered at {host_port(self.host, self.port)} within "
                    f"{deadline_s:g} s",
                    f"is it running ({typed('server')})? another address: host_ip=..., another "
                    "port: port=..., a longer wait: join_timeout=...",
                )
            if not told and now > start + 1:
                told = f"waiting for a server at {host_port(self.host, self.port)}"
                self.log.info(f"{told} (for {deadline_s:g} s; start one with: {typed('server')})")

    def move(
        self, host: str, port: int, keys: sockets.PeerKeys | None
    ) -> tuple[str, int, sockets.PeerKeys | None]:
        """Use this address and these keys for the next doors; returns the former ones."""
        before = self.host, self.port, self._keys
        self.host, self.port, self._keys = host, port, keys
        return before

    def renew(self, outside: address.Address) -> None:
        """The server's keys were made anew, and `outside` is how to dial it with them: greet it
        again, if this peer came with the older ones. Another thread may say so."""
        if self._keys is None:
            self._outside = outside
        else:
            self._keys, self.must_greet = outside.keys, True

    def _open_door(self) -> tuple[zmq.Socket[bytes], HandshakeMonitor]:
        """A new socket for hello, with the monitor of its handshakes, in place of the last one."""
        self.close_sockets()
        door = self._door = sockets.dealer(self.ctx)
        with_keys = self._keys is not None
        handshake = self.handshake = HandshakeMonitor(
            self.ctx, door, self.host, self.port, with_keys=with_keys
        )
        sockets.connect(door, sockets.tcp(self.host, self.port), self._keys)
        return door, handshake

    def _checked(self, welcome: wire.Welcome) -> RunSettings:
        """The settings in a welcome. Raises `UserError` for impossible values: they go into names
        of files, ports and sizes."""
        if welcome.protocol != wire.PROTOCOL:
            raise UserError(
                f"the server speaks protocol {welcome.protocol}, this worker {wire.PROTOCOL}",
                "install the same version on both machines",
            )
        for what, is_right in (
            ("session", re.fullmatch(r"[A-Za-z0-9_ .:-]{1,128}", welcome.session)),
            ("worker's number", 0 <= welcome.id <= 65535),
            ("port of its PUB socket", 0 < welcome.pub_port <= 65535),
            ("place of its run", min(welcome.trial, welcome.runs) > 0),
        ):
            if not is_right:
                raise UserError(
                    f"the server at {host_port(self.host, self.port)} sent no {what}",
                    "is it this program, in the same version?",
                )
        run = RunSettings.of(from_wire(Settings(), welcome.settings))
        dataset = {part: value for part, value in run.dataset.items() if part != "root"}
        return replace(run, dataset=dataset)  # the server does not know this machine's folder

    def _open_link(self, welcome: wire.Welcome) -> str:
        """Open link and SUB, over ipc where the server is on this host; then wait until both work.

        Returns what is missing: nothing; the socket, ROUTER or SUB, of which nothing was heard; or
        the session, where the server has forgotten it since, or was found somewhere else.
        """
        router = sockets.tcp(self.host, self.port)
        pub = sockets.tcp(self.host, welcome.pub_port)
        self.kind = "tcp"
        if welcome.ipc and sockets.is_local(self.host) and sockets.ipc_usable(welcome.ipc):
            router, pub = sockets.ipc_endpoints(welcome.ipc)
            self.kind = "ipc"
            if self.share_memory and welcome.shared and sockets.ipc_usable(welcome.shared):
                self.shared = Path(welcome.shared)
        elif self._outside is not None and self._outside.host != self.host:
            raise _NoSeat("any user of this host may listen here: the token's address has keys")
        keys = None if self.kind == "ipc" else self._keys
        self.sub = sockets.subscriber(self.ctx, self.mark)
        for kind in (*ALWAYS, wire.Sharded, wire.Closing):
            sockets.subscribe(self.sub, wire.topic(kind))
        self.link = sockets.dealer(self.ctx)
        sockets.connect(self.sub, pub, keys)
        sockets.connect(self.link, router, keys)
        self.poller = zmq.Poller()
        self.poller.register(self.link, zmq.POLLIN)
        self.poller.register(self.sub, zmq.POLLIN)
        self.must_greet, self._end = False, None
        self._start_beating(welcome.session)
        self._probed.clear()
        start = heard_at = time.monotonic()
        probed = 0.0
        while self._probed != {"sub", "link"}:
            if time.monotonic() - probed >= PROBE_INTERVAL_S:
                self.probe()
                probed = time.monotonic()
            heard = self._poll_for_probe(PROBE_INTERVAL_S)
            if self._end is not None:
                raise RunOver(self._end)
            if self.must_greet or self.abandoned.is_set():
                return "session"
            now = time.monotonic()
            if heard:
                heard_at = now
            elif now - heard_at >= self._search_after_s and self.server_search.found(now):
                return "session"
            if now - start > self.heartbeat_timeout:
                return "SUB" if "link" in self._probed else "ROUTER"
        return ""

    @property
    def mark(self) -> int:
        """Messages with averages that wait here for a slow reader."""
        return sockets.mark(self.settings.history_mb, self.settings.bucket_size_mb)

    @property
    def with_keys(self) -> bool:
        """Is the link under CURVE?"""
        return self.kind != "ipc" and self._keys is not None

    @property
    def keys(self) -> sockets.PeerKeys | None:
        return self._keys

    def channel(self, told: wire.Channel, now: float, shared: Shared | None = None) -> Channel:
        """Connect a channel, to the server or to a shard, as the server has told; with a shard on
        this host memory may be `shared`. Raises `PeerError`."""
        assert self.welcome is not None
        s, welcome = self.settings, self.welcome
        bucket_bytes = int(s.bucket_size_mb * 2**20) + max(SENT_BYTES.values())
        _, mark = sockets.channel_marks(s.history_mb, s.bucket_size_mb, sealing.RECORD_BYTES)
        largest = max(bucket_bytes, BUFFER_BYTES)
        plain = bool(told.shard) and told.cipher == sealing.PLAIN and not self.with_keys
        host = told.host if told.shard else self.host
        return Channel(
            self.ctx,
            host,
            told,
            welcome.nonce,
            welcome.id,
            largest,
            mark,
            now,
            plain=plain,
            shared=shared,
            opened=partial(self.relays.opened, told.shard),
        )

    def relayed(self) -> None:
        """Whether averages come from a relay has changed."""
        self.payloads.relayed()

    def forgive(self, missing: int) -> None:
        """So many averages may be missing on each channel without harm."""
        self.shards.forgive(missing)
        self.payloads.forgive(missing)

    @property
    def _search_after_s(self) -> float:
        """Seconds of silence after which the server is looked for somewhere else, too. A server
        that was started again waits for its replicas for one heartbeat timeout."""
        return min(SEARCH_AFTER_S, self.heartbeat_timeout / 2)

    def probe(self) -> None:
        assert self.welcome is not None
        self.send(wire.Probe(session=self.welcome.session, secret=self.hello.secret))

    def drain(self, timeout_s: float = 0.0) -> list[tuple[Any, Any]]:
        """All messages on link and SUB, each with its socket; waits for one."""
        found = []
        for s, _ in self.poller.poll(int(1000 * timeout_s)):
            while sockets.readable(s):
                frames = sockets.receive(s)
                for each in wire.split(frames) if s is self.sub else [frames]:
                    found.append((s, self.decode(each)[0]))
        return found

    def _poll_for_probe(self, timeout_s: float) -> bool:
        """Has anything come?"""
        assert self.sub is not None and self.link is not None
        found = self.drain(timeout_s)
        for s, message in found:
            if isinstance(message, wire.Probe) and self.welcome is not None:
                if message.session == self.welcome.session:
                    self._probed.add("sub")
            elif isinstance(message, wire.Pulse):
                if s is self.link:
                    self._probed.add("link")
            elif isinstance(message, wire.Greet):
                self.must_greet |= not message.session_known
            elif isinstance(message, wire.Reject):
                kind = _NoSeat if message.keys else UserError
                raise kind(message.reason, message.hint)
            elif isinstance(message, wire.End):
                raise RunOver(message)
        return bool(found)

    def _start_beating(self, session: str) -> None:
        assert self._door is not None
        stop = self._beating = threading.Event()
        assert self.welcome is not None
        hello = self.hello
        own = wire.Beat(
            session=session, run=self.welcome.run, nonce=hello.nonce, secret=hello.secret
        )
        every_s = self.heartbeat_timeout / BEATS_PER_TIMEOUT
        door = self._door

        def beat() -> None:
            vitals = machine.vitals()
            told = wire.to_frames(msgspec.structs.replace(own, vitals=vitals))
            with contextlib.suppress(UserError):
                sockets.send(door, told, wait=False)
                while sockets.readable(door):
                    message = self.decode(sockets.receive(door))[0]
                    if isinstance(message, wire.Greet) and not message.session_known:
                        self.must_greet = True  # session unknown
                    elif isinstance(message, wire.End):
                        self._end = message

        def run() -> None:
            beats = True
            try:
                while not stop.wait(every_s):
                    self.payloads.measure()
                    self.shards.measure()
                    if beats:
                        try:
                            beat()
                        except zmq.ZMQError:  # it has given this connection up, not the channels
                            beats, self.must_greet = False, True
            finally:  # whatever has ended this thread, nobody hears any more that this peer lives
                if not stop.is_set():
                    self.must_greet = True

        self._beat_thread = threading.Thread(target=run, name="beat", daemon=True)
        self._beat_thread.start()

    def close(self) -> None:
        """Close every socket; safe to call twice."""
        self.server_search.over()
        self.shards.close(leaves=True)
        self.close_sockets()
        self.ctx.term()

    def close_sockets(self) -> None:
        if self._beat_thread is not None and self._beating is not None:
            self._beating.set()
            self._beat_thread.join()
            self._beat_thread = None
        self.payloads.close()
        self.shards.close()
        self.relays.close()
        for s in (self.handshake, self._door, self.link, self.sub):
            if s is not None:
                s.close()
        self.handshake = None
        self._door = self.link = self.sub = None
        self.shared = None

    # ------------------------------------------------------------------ for what follows the log

    def send(self, message: wire.Message, *buffers: Any) -> None:
        """Over the link. Nothing is sent where there is none any more: the run is over; nor where
        ZeroMQ has given it up: the server must be greeted again. Raises `UserError` where it has
        been found meanwhile that the server does not let this peer in any more."""
        if self.link is None:
            return
        try:
            frames = wire.to_frames(message, *buffers)
            sockets.send(self.link, frames, copy=not buffers, wait=False)
        except zmq.Again:  # it has no mark, so ZeroMQ has given this connection up
            if self.handshake is not None:
                self.handshake.check()
            self.must_greet = True

    def decode(self, frames: Sequence[zmq.Frame]) -> tuple[Any, list[Any]]:
        try:
            return wire.from_frames(frames)
        except PeerError as e:
            raise UserError(
                f"{host_port(self.host, self.port)} does not speak this protocol: {e}",
                "is another program listening there, or another version of this one?",
            ) from None


class ServerSearch:
    """Looks for a server that is silent at other addresses, while its peer goes on trying the
    last one."""

    def __init__(self, peer: Connection, search: Callable[..., Search] | None) -> None:
        self._peer, self._begin = peer, search
        self._search: Search | None = None
        self._before: tuple[str, int, sockets.PeerKeys | None] | None = None

    def found(self, now: float) -> bool:
        """Has the server moved? Then the peer uses its new address from now on. Call it again and
        again while the server is silent."""
        peer = self._peer
        if self._begin is None:
            return False
        try:
            if self._search is None:
                peer.log.info(
                    f"{host_port(peer.host, peer.port)} is silent: looking for the server "
                    "elsewhere, too"
                )
                self._search = self._begin(run=peer.run, known=(peer.host, peer.port))
            there = self._search.look(now)
        except UserError as e:  # no multicast, or several servers and no token
            peer.log.info(f"the server can only be waited for where it was: {e.problem}")
            self._begin = None
            return False
        if there is None or (there.host, there.port) == (peer.host, peer.port):
            return False
        self._before = peer.move(there.host, there.port, there.keys)
        peer.log.info(f"found it at {host_port(there.host, there.port)}")
        return True

    @property
    def moved(self) -> bool:
        """Does the peer use an address that was found, and was not welcomed there yet?"""
        return self._before is not None

    def was_wrong(self, reject: wire.Reject) -> bool:
        """The server at this address refuses the peer. Where the address was found, and is not that
        of the peer's own run, the peer gets its former address back, and this returns True."""
        run = self._peer.run
        own = run is not None and (reject.end is not None or reject.run == run)
        if self._before is None or own:
            return False
        self._peer.log.info(
            f"the server at {host_port(self._peer.host, self._peer.port)} is another one: "
            f"{reject.reason}"
        )
        self._peer.move(*self._before)
        self._before = None
        return True

    def over(self) -> None:
        """The server answers: end the search."""
        self._before = None
        if self._search is not None:
            self._search.close()
            self._search = None


__all__ = ["Connection", "RunOver"]
