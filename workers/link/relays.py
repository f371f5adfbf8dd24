"""Averages of other hosts, handed on from one replica of a host to the others there.

Of several replicas on one host the server makes a worker their relay (docs/protocol.md, "Relays").
It hands on what its channels and PUB bring it, through a ring where there is shared memory, else
through a socket within the host. Nothing depends on that but time: who lacks an average asks the
server for it, which then lets it have its own copies again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from paramserver.errors import PeerError
from paramserver.protocol import messages as wire
from paramserver.protocol.sharding import SERVER
from paramserver.tensors.bucket import BucketPlan
from paramserver.transport import shm, sockets
from paramserver.transport.sealing import Kind, Payload

from .channel import READS_MAX

if TYPE_CHECKING:
    from .connection import Connection

RINGS = 2
"""A ring takes one part in so many of what may be taken: the rest is for outboxes and others."""

Key = tuple[int, int, int]
"""Of an average: the shard it came from (0: the server), round and bucket. The sender writes round
and bucket itself, so each sender's are looked up apart: none can stand in for another one's."""


def key_of(average: wire.Average) -> Key:
    shard = average.shard if isinstance(average, wire.Sharded) else SERVER
    return shard, average.round, average.bucket


class Relay:
    """The end that hands on, in a private folder, what this `connection` brings of averages with
    this plan. Raises OSError where no socket can be had."""

    def __init__(self, connection: Connection, plan: BucketPlan) -> None:
        assert connection.welcome is not None
        self._nonce = connection.welcome.nonce
        self._heard = False  # somebody has begun to listen
        memory = shm.shared_folder() if connection.share_memory else None
        folder = memory or sockets.ipc_folder()
        if folder is None:
            raise OSError("no folder for a socket")
        self._private = folder
        self._ring: shm.Ring | None = None
        least = plan.nbytes + 4 * plan.largest_bytes
        wanted = max(least, int(connection.settings.history_mb * 2**20))
        if memory is not None and (room := shm.room(memory.path) // RINGS) >= least:
            with suppress(OSError):  # averages go through the socket
                self._ring = shm.Ring(shm.ring_path(memory.path), min(wanted, room))
        try:
            self._socket = sockets.relay_publisher(connection.ctx, self.folder, connection.mark)
        except zmq.ZMQError as e:
            folder.close()
            raise OSError(e.errno, str(e)) from None

    @property
    def folder(self) -> str:
        return str(self._private.path)

    def look(self) -> None:
        """Let those hear it who have begun to listen."""
        while sockets.readable(self._socket):
            if sockets.receive(self._socket)[0].bytes[:1] == b"\1":
                self._heard = True
                self._send(wire.Passed(nonce=self._nonce, shard=SERVER, round=0, bucket=0))

    def hand_on(self, shard: int, round: int, bucket: int, buffers: Sequence[Any]) -> None:
        """Hand on an average that has come from this shard, if somebody listens."""
        self.look()
        if not self._heard:
            return
        passed = wire.Passed(nonce=self._nonce, shard=shard, round=round, bucket=bucket)
        ring, sizes = self._ring, [memoryview(b).nbytes for b in buffers]
        if ring is None or min(sizes) == 0 or 2 * sum(sizes) > ring.nbytes:
            self._send(passed, *buffers)
            return
        places = []
        for buffer, size in zip(buffers, sizes, strict=True):
            slot = ring.room(size)
            slot.fill(buffer)
            places.append(slot.place)
        self._send(msgspec.structs.replace(passed, places=tuple(places)))

    def _send(self, passed: wire.Passed, *buffers: Any) -> None:
        """Who does not read misses it, as on PUB."""
        sockets.send(self._socket, wire.to_frames(passed, *buffers), copy=not buffers, wait=False)

    def close(self) -> None:
        """Remove the folder; who has mapped the ring keeps that."""
        self._socket.close()
        self._ring = None
        self._private.close()


class Source:
    """The end that listens, to the relay that this message tells of. Raises OSError where that
    cannot be used."""

    def __init__(self, connection: Connection, plan: BucketPlan, told: wire.Listen) -> None:
        folder = told.folder
        if not sockets.ipc_usable(folder):
            raise OSError("its folder is not one of this user, on this host")
        self.server = told.server
        """It hands on the server's own averages, too."""
        self.heard = False
        assert connection.welcome is not None
        self._nonce = connection.welcome.nonce
        self._most = 2 * len(plan.buckets)  # averages that were not asked for yet
        path = shm.ring_path(Path(folder))
        self._ring = shm.Ring(path) if path.exists() else None
        self._passed: dict[Key, list[Any] | shm.Blocks] = {}
        self.socket = sockets.subscriber(connection.ctx, connection.mark)
        try:
            sockets.subscribe(self.socket, b"")
            sockets.connect(self.socket, sockets.relay_endpoint(folder))
        except zmq.ZMQError as e:
            self.socket.close()
            raise OSError(e.errno, str(e)) from None

    def read(self) -> bool:
        """Take in one message, if there is one. Raises `PeerError`."""
        if not sockets.readable(self.socket):
            return False
        passed, buffers = wire.from_frames(sockets.receive(self.socket))
        if not isinstance(passed, wire.Passed):
            raise PeerError("it hands on what is no average")
        if passed.nonce != self._nonce:
            return True
        self.heard = True
        if passed.round:
            key = passed.shard, passed.round, passed.bucket
            self._passed[key] = self._located(passed, buffers)
            while len(self._passed) > self._most:
                del self._passed[next(iter(self._passed))]
        return True

    def _located(self, passed: wire.Passed, buffers: list[Any]) -> list[Any] | shm.Blocks:
        if not passed.places:
            return buffers
        if self._ring is None:
            raise PeerError("it has no ring")
        try:
            return self._ring.blocks(passed.places)
        except ValueError as e:
            raise PeerError(str(e)) from None

    def payload(self, key: Key) -> list[Any] | shm.Blocks | None:
        """The buffers of this average, once; None if they have not come. Raises `PeerError`."""
        for _ in range(READS_MAX):
            if key in self._passed or not self.read():
                break
        return self._passed.pop(key, None)

    def close(self) -> None:
        self.socket.close()


class Relays:
    """What one peer hands on to others on its host, and what it hears of another one there."""

    def __init__(
        self,
        connection: Connection,
        make_relay: type[Relay] = Relay,
        make_source: type[Source] = Source,
    ) -> None:
        self._connection = connection
        self._make_relay, self._make_source = make_relay, make_source
        self.plan: BucketPlan | None = None
        """Of the replica."""
        self._relay: Relay | None = None
        self._source: Source | None = None
        self._coming: Source | None = None  # not heard yet
        self.announced = False
        """The server publishes what a relay is to bring of its own without numbers."""

    # ------------------------------------------------------------------ handing on

    def hand_on(self, message: wire.HandOn) -> None:
        """The server wants this worker to hand on, or not any more."""
        connection, plan = self._connection, self.plan
        if not message.on:
            if self._relay is not None:
                self._relay.close()
                self._relay = None
            return
        if self._relay is None and plan is not None:
            with suppress(OSError):  # it says so, and others get copies of their own
                self._relay = self._make_relay(connection, plan)
        folder = "" if self._relay is None else self._relay.folder
        connection.send(wire.HandsOn(folder=folder))

    def opened(self, shard: int, payload: Payload) -> None:
        """A payload has come through the channel to this shard; one that lies in the ring of a
        shard on this host is there for all."""
        if self._relay is not None and payload.kind is Kind.AVERAGE:
            self._relay.hand_on(shard, payload.round, payload.bucket, payload.buffers)

    def published(self, message: Any, buffers: list[Any]) -> None:
        """A message has come from PUB."""
        if self.from_server and not self.announced and isinstance(message, wire.Sealed):
            self.announced = True
            self._connection.relayed()
        if self._relay is not None and buffers and isinstance(message, wire.Average):
            self._relay.hand_on(SERVER, message.round, message.bucket, buffers)

    # ------------------------------------------------------------------ listening

    @property
    def from_server(self) -> bool:
        """Do the server's own averages come from a relay, too?"""
        return self._source is not None and self._source.server

    def brings(self, average: wire.Average) -> bool:
        """Is a relay to bring the numbers of this average?"""
        return self.from_server if isinstance(average, wire.Sealed) else self._source is not None

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        """From which averages may come."""
        return [] if self._source is None else [self._source.socket]

    def listen(self, message: wire.Listen) -> None:
        """The server lets this peer hear a relay, or not any more."""
        self.stop()
        if not message.folder or self.plan is None:
            return
        try:
            self._coming = self._make_source(self._connection, self.plan, message)
        except OSError as e:
            self._connection.send(wire.Listens(problem=str(e)))

    def payload(self, average: wire.Average) -> list[Any] | shm.Blocks | None:
        """What a relay has brought of an average; None: nothing yet."""
        if self._source is None or not self.brings(average):
            return None
        try:
            return self._source.payload(key_of(average))
        except PeerError as e:
            self.quit(f"what the relay hands on cannot be used: {e}")
            return None

    def tick(self) -> None:
        """Time has passed."""
        if self._relay is not None:
            self._relay.look()
        coming = self._coming
        if coming is None:
            return
        try:
            heard = coming.heard or (coming.read() and coming.heard)
        except PeerError as e:
            self.quit(str(e))
            return
        if heard:
            self._source, self._coming = coming, None
            self._connection.relayed()
            self._connection.send(wire.Listens())

    def quit(self, why: str) -> None:
        """Listen no more, and say so: the server lets this peer have its own copies."""
        self.stop()
        self._connection.send(wire.Listens(problem=why))

    def stop(self) -> None:
        """Listen no more. Averages that were announced meanwhile may be missing on channels."""
        source, self._source = self._source, None
        self.announced = False
        if self._coming is not None:
            self._coming.close()
            self._coming = None
        if source is None:
            return
        source.close()
        missing = 2 * len(self.plan.buckets) if self.plan is not None else 0
        self._connection.forgive(missing)
        self._connection.relayed()

    def close(self) -> None:
        """This session is over."""
        for source in (self._source, self._coming):
            if source is not None:
                source.close()
        self._source = self._coming = None
        self.announced = False
        if self._relay is not None:
            self._relay.close()
            self._relay = None


__all__ = ["Relay", "Relays", "Source"]
