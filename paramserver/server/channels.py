"""The server's ends of the channels: hands out their keys, opens pushes, seals averages.

A channel belongs to one session. Its header messages travel on the link and on PUB, under CURVE;
here are only the numbers that they tell of, by the payload's number. For what this protects from
what, see docs/protocol.md, "Sealed payloads".
"""

from __future__ import annotations

import errno
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import msgspec
import zmq

from paramserver.protocol import messages as wire
from paramserver.transport import sealing, sockets
from paramserver.transport.handshake import Strangers
from paramserver.transport.passwords import VALID_S, Passwords
from paramserver.transport.sealing import Ends, Kind, Opener, Payload, Sealer, Share, Unopened

LOSSES_MAX = 3
"""Channels of one session that ended in the middle; after that it does without."""

UNCLAIMED, UNCLAIMED_BYTES = 16, 64 * 2**20
"""Payloads that wait for their headers, at most: those are sent first, over another connection."""

CONNECTIONS_TOLD = 100
SERVER = 0  # as a sender, and as a shard
Tell = Callable[[str, wire.Channel], object]


class Lost(Exception):
    """This payload does not come any more."""


class Sharing(Protocol):
    """Shares memory with peers on this host."""

    @property
    def folder(self) -> str:
        """Where it lies; empty where there is none."""

    def bound(self, id: bytes, ready: Share) -> Share:
        """The channel with this key is bound, and its peer is ready to use so much: what is used
        from now on."""

    def forget(self, id: bytes) -> None:
        """That channel is over."""


class _Channel(msgspec.Struct):
    session: str
    sealer: Sealer
    opener: Opener
    heard_at: float
    share: Share = Share.NOTHING
    route: bytes = b""
    """Of its connection, once the peer has proven there that it has the key."""
    payloads: dict[int, Payload] = msgspec.field(default_factory=dict)
    """By number: their headers have not come yet."""


class Channels:
    """The channels of one server process; see the module's docstring.

    `tell` sends a message to a peer over its link; `say` gets sentences for people. `port` is that
    of the `socket`; a buffer has at most `largest` bytes. `shard` is the number of the process; at
    most `unclaimed` payloads of a peer wait for their headers. Without `passwords` and `strangers`
    the run has no keys, and nothing is sealed. `sharing`: the memory that is shared with peers.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        passwords: Passwords | None,
        strangers: Strangers | None,
        port: int,
        nonce: str,
        largest: int,
        tell: Tell,
        say: Callable[[str], object],
        *,
        shard: int = SERVER,
        unclaimed: int = UNCLAIMED,
        sharing: Sharing | None = None,
    ) -> None:
        self.socket = socket
        self.unopened = 0
        """Records of all connections that did not open."""
        self._strangers = strangers
        self._passwords, self._port, self._nonce, self._largest = passwords, port, nonce, largest
        self._tell, self._say = tell, say
        self._shard, self._unclaimed, self._sharing = shard, unclaimed, sharing
        self._costs = sealing.measured()
        self._channels: dict[str, _Channel] = {}  # by the id of their keys
        self._live: dict[str, _Channel] = {}  # by session: averages go there
        self._next: dict[str, _Channel] = {}  # by session: not connected yet
        self._old: dict[str, _Channel] = {}  # by session: pushes may still come through it
        self._losses: dict[str, int] = {}  # by session
        self._spared: set[str] = set()  # sessions that get averages from a relay
        self._number = 0  # of the newest average
        self._told: set[str] = set()

    @property
    def live(self) -> int:
        """The number of peers that get averages through a channel."""
        return len(self._live.keys() - self._spared)

    def spare(self, session: str, on: bool) -> None:
        """Send this peer no averages, through any of its channels; or send them again."""
        if on:
            self._spared.add(session)
        else:
            self._spared.discard(session)

    # ------------------------------------------------------------------ keys

    def dial(self, session: str, worker: int, costs: Mapping[str, float], now: float) -> None:
        """The peer wants a channel in place of the one that it had, or, with no ciphers, none."""
        self.lose(session, "")
        self._close(session)
        if not costs and self._passwords is not None:
            return
        cipher = sealing.PLAIN
        if self._passwords is not None:
            cipher = sealing.cheapest(self._costs, costs) or ""
        if not cipher:
            self._tell(session, wire.Channel(reason="this server has none of your ciphers"))
        elif self._losses.get(session, 0) >= LOSSES_MAX:
            why = f"{LOSSES_MAX} channels ended in the middle"
            self._tell(session, wire.Channel(reason=why))
        else:
            self._hand_out(session, worker, cipher, now)

    def forgive(self, session: str) -> None:
        """Channels that this peer lost are of no account any more."""
        self._losses.pop(session, None)

    def _hand_out(self, session: str, worker: int, cipher: str, now: float) -> None:
        before = self._next.pop(session, None)
        if before is not None:
            self._forget(before)
        id, up, down = (
            secrets.token_bytes(n) for n in (sealing.ID_BYTES, sealing.KEY_BYTES, sealing.KEY_BYTES)
        )
        ours = Ends(cipher, down, id, self._nonce, self._shard, SERVER)
        theirs = Ends(cipher, up, id, self._nonce, self._shard, worker)
        channel = _Channel(
            session,
            Sealer(ours),
            Opener(theirs, (Kind.PUSH,), self._largest, wire.BUFFERS_MAX),
            now,
        )
        self._next[session] = self._channels[id.hex()] = channel
        password = "" if self._passwords is None else self._passwords.hand_out(id.hex(), now)
        self._tell(
            session,
            wire.Channel(
                port=self._port,
                cipher=cipher,
                id=id.hex(),
                password=password,
                up=up.hex(),
                down=down.hex(),
                shard=self._shard,
                shared="" if self._sharing is None else self._sharing.folder,
            ),
        )

    def _forget(self, channel: _Channel) -> None:
        id = channel.sealer.ends.id.hex()
        self._channels.pop(id, None)
        if self._passwords is not None:
            self._passwords.take_back(id)
        if self._sharing is not None:
            self._sharing.forget(channel.sealer.ends.id)
        channel.sealer.forget()
        channel.opener.forget()

    def lose(self, session: str, why: str) -> bool:
        """This session's channel is over, and `why` is told to the peer, if it does not know. One
        that is to replace it may still come up. False where there was none: then the peer has been
        told before, and nothing has ended."""
        channel = self._live.get(session)
        if channel is None:
            return False
        self._losses[session] = self._losses.get(session, 0) + 1
        self._end(session, self._live, self._old)
        if why:
            self._tell(session, wire.Channel(id=channel.sealer.ends.id.hex(), reason=why))
        return True

    def _close(self, session: str) -> None:
        self._end(session, self._live, self._next, self._old)

    def _end(self, session: str, *tables: dict[str, _Channel]) -> None:
        for table in tables:
            channel = table.pop(session, None)
            if channel is not None:
                self._forget(channel)

    def forget(self, session: str) -> None:
        """This peer is gone."""
        self._close(session)
        self._losses.pop(session, None)
        self._spared.discard(session)

    def close(self) -> None:
        """Forget all keys."""
        for session in {c.session for c in self._channels.values()}:
            self._close(session)

    def round_over(self, now: float) -> None:
        """Forget the keys that were replaced, once a worker pushes under the new ones, and replace
        those that are worn."""
        for session, old in list(self._old.items()):
            live, worker = self._live.get(session), old.opener.ends.sender  # 0: the observer
            if live is None or live.opener.newest or not worker:
                self._forget(self._old.pop(session))
        for session, channel in self._live.items():
            ends, worn = channel.opener.ends, channel.sealer.worn or channel.opener.worn
            if worn and not self._is_offered(session, now):
                self._hand_out(session, ends.sender, ends.cipher, now)

    def _is_offered(self, session: str, now: float) -> bool:
        """Has this peer got keys with which it may still connect?"""
        offered = self._next.get(session)
        return offered is not None and now - offered.heard_at <= VALID_S

    # ------------------------------------------------------------------ what comes in

    def receive(self, frames: Sequence[zmq.Frame], now: float) -> str | None:
        """One message of a channel's connection; the session of which a payload is complete now.
        Whatever is wrong with it, it is dropped, and counted for its connection."""
        route, record = frames[0].bytes, frames[-1]
        if self._strangers is not None:
            self._strangers.heard(record)
        sealed = self._passwords is not None
        id = sockets.user(record) if sealed else sealing.id_of(record.buffer).hex()
        channel = self._channels.get(id)
        if channel is None or len(frames) != 2 or channel.route not in (b"", route):
            self._drop(record, "it is of no channel that is open")
            return None
        try:
            payload = channel.opener.open(record.buffer)
        except Unopened as e:
            self._drop(record, str(e))
            return None
        channel.heard_at = now
        if not channel.route:
            if not channel.opener.bound:
                return None
            self._bind(channel, route)
            if self._strangers is not None:
                self._strangers.proven(record)
        if payload is None:
            return None
        waiting = channel.payloads
        most = UNCLAIMED_BYTES * max(1, self._unclaimed // UNCLAIMED)
        if len(waiting) >= self._unclaimed or sum(p.bytes for p in waiting.values()) > most:
            self.lose(channel.session, "its payloads have no headers")
        else:
            waiting[payload.number] = payload
        return channel.session

    def _bind(self, channel: _Channel, route: bytes) -> None:
        session = channel.session
        channel.route = route
        if self._next.get(session) is channel:
            del self._next[session]
        before = self._live.get(session)
        if before is not None:
            older = self._old.pop(session, None)
            if older is not None:
                self._forget(older)
            self._old[session] = before
        self._live[session] = channel
        if self._sharing is not None:
            channel.share = self._sharing.bound(channel.sealer.ends.id, channel.opener.share)
        self._send(channel, [channel.sealer.bind(channel.share)])

    def _drop(self, record: zmq.Frame, why: str) -> None:
        self.unopened += 1
        who = sockets.sender(record) or "somebody"
        self._say_once(who, f"a record on a channel's connection from {who} was dropped: {why}")

    def ended(self, who: str) -> None:
        """A connection from this address was ended for what it sent."""
        text = f"a channel's connection from {who} was ended: it sent a message without end"
        self._say_once(f"{who}, without end", text)

    def _say_once(self, what: str, text: str) -> None:
        if what not in self._told and len(self._told) < CONNECTIONS_TOLD:
            self._told.add(what)
            self._say(text)

    def payload(self, session: str, number: int) -> Payload | None:
        """The payload of a push, once; None if it has not come yet. Raises `Lost`."""
        channels = [c for c in (self._live.get(session), self._old.get(session)) if c is not None]
        for channel in channels:
            found = channel.payloads.pop(number, None)
            if found is not None:
                return found
        if all(channel.opener.newest > number for channel in channels):
            raise Lost
        return None

    def take(self, session: str) -> list[Payload]:
        """All payloads of this session that are complete, in the order in which they came."""
        found: list[Payload] = []
        for channel in (self._old.get(session), self._live.get(session)):
            if channel is not None:
                found += channel.payloads.values()
                channel.payloads.clear()
        return found

    def heard_at(self, session: str) -> float:
        """When the newest record of this session came."""
        return max(
            (c.heard_at for c in (self._live.get(session), self._old.get(session)) if c),
            default=0.0,
        )

    # ------------------------------------------------------------------ what goes out

    def publish(self, average: wire.Average, buffers: Sequence[Any]) -> wire.Sealed:
        """Seal the buffers of an average for each channel; returns the header that tells of them.
        Each receiver has a key of its own: that costs less than to prove to each, by a digest, that
        no other receiver has sealed them."""
        number = self.send(average.round, average.bucket, buffers)
        return wire.Sealed(number=number, **msgspec.structs.asdict(average))

    def send(
        self, round: int, bucket: int, buffers: Sequence[Any], places: bytes | None = None
    ) -> int:
        """The same without a header; returns the number of the payload. `places`: where the buffers
        lie in the ring; who reads that gets nothing else."""
        self._number += 1
        number = self._number
        for channel in [c for s, c in self._live.items() if s not in self._spared]:
            kind, sent = Kind.AVERAGE, buffers
            if places is not None and Share.RING in channel.share:
                kind, sent = Kind.SHARED, [places]
            self._send(channel, channel.sealer.seal(kind, round, bucket, number, sent))
        return number

    def _send(self, channel: _Channel, records: Iterator[memoryview] | list[memoryview]) -> None:
        """One that does not read misses the rest, as on PUB; its close shows the gap."""
        try:
            for record in records:
                sockets.send(self.socket, [channel.route, record], copy=False, wait=False)
        except zmq.ZMQError as e:
            if e.errno == errno.EHOSTUNREACH:
                self.lose(channel.session, "its connection was cut")
            elif e.errno != errno.EAGAIN:
                raise


__all__ = ["Channels", "Lost"]
