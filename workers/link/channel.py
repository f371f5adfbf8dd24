"""A peer's end of its channel: seals its pushes, opens averages.

The headers travel on link and SUB, under CURVE (docs/protocol.md, "Sealed payloads"). Where a
channel does not come up, or does not bring what was announced, the peer does without: payloads
travel under CURVE then, which is slower.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from paramserver.errors import PeerError
from paramserver.protocol import messages as wire
from paramserver.transport import sealing, shm, sockets
from paramserver.transport.inflow import Inflow
from paramserver.transport.passwords import is_password
from paramserver.transport.sealing import Ends, Kind, Opener, Payload, Sealer, Share, Unopened

from .shared import Shared

SERVER = 0  # as a sender
SKIPS_MAX = 16
"""Averages that one channel may leave out; then it is given up."""


READS_MAX = 1024
"""Records that are read before the caller may do something else."""


class Lost(Exception):
    """This payload does not come any more."""


class Channel:
    """One connection, with a key for each direction, as the server has `told` them."""

    def __init__(
        self,
        ctx: zmq.Context[zmq.Socket[bytes]],
        host: str,
        told: wire.Channel,
        nonce: str,
        worker: int,
        largest: int,
        mark: int,
        now: float,
        *,
        plain: bool = False,
        shared: Shared | None = None,
        opened: Callable[[Payload], object] = lambda payload: None,
    ) -> None:
        """`nonce` is the server's; `worker` the peer's own number; a buffer has at most `largest`
        bytes, and so many records as `mark` may wait here. `plain`: the run has no keys, and
        nothing is sealed. `shared`: memory that this peer can share with the other end.
        `opened` gets each payload. Raises `PeerError` where the server has told nothing that can be
        used, whatever it was: a shard may have said it."""
        id, up, down = _keys(told, plain=plain)
        self.bound = False
        """The server has proven that it has the key, and knows that this peer has it."""
        self.skips = 0
        self.since = self.heard_at = now
        self.id = told.id
        self._sealer = Sealer(Ends(told.cipher, up, id, nonce, told.shard, worker))
        self._shared, self._tell_opened = shared, opened
        kinds = (Kind.AVERAGE,) if shared is None else (Kind.AVERAGE, Kind.SHARED)
        self._opener = Opener(
            Ends(told.cipher, down, id, nonce, told.shard, SERVER),
            kinds,
            largest,
            wire.BUFFERS_MAX,
        )
        self._payloads: dict[int, Payload] = {}
        record_bytes = sealing.RECORD_BYTES + sealing.OVERHEAD_BYTES
        self.port = told.port
        user = "" if plain else told.id
        self.socket = sockets.channel_dealer(ctx, record_bytes, mark, user, told.password)
        self._inflow: Inflow | None = None
        self._most_bytes = (mark + sealing.RECORDS_SPARE) * record_bytes
        self._watch = sockets.monitor(ctx, self.socket, zmq.EVENT_CONNECTED)
        self._watching = threading.Lock()
        try:
            sockets.connect(self.socket, sockets.tcp(host, told.port))
        except (zmq.ZMQError, ValueError) as e:
            self.close()
            raise PeerError(f"nobody can connect to {host!r}: {e}") from None
        ready = Share.NOTHING if shared is None else shared.ready
        sockets.send(self.socket, [self._sealer.bind(ready)])

    @property
    def outbox(self) -> shm.Outbox | None:
        """The slots that the other end reads; None: pushes go through the channel."""
        return None if self._shared is None else self._shared.outbox

    @property
    def unopened(self) -> int:
        """Records that did not open."""
        return self._opener.unopened

    def push(self, push: wire.Push, buffers: Sequence[Any]) -> None:
        """Send the buffers of a push that has `sealed` set. Raises `Lost` where the connection is
        gone."""
        try:
            for record in self._sealer.seal(
                Kind.PUSH, push.round, push.bucket, push.sealed, buffers
            ):
                sockets.send(self.socket, [record], copy=False, wait=False)
        except zmq.Again:
            raise Lost from None

    def come_up(self, now: float) -> bool:
        """Take in what has come until this channel is bound; is it?"""
        for _ in range(READS_MAX):
            if self.bound or not self.read(now):
                break
        if self.bound and self._shared is not None:
            self._shared.agreed(self._opener.share)
        return self.bound

    def read(self, now: float, wanted: int = 0) -> bool:
        """Take in one record, if there is one. Payloads with lower numbers than `wanted` are not
        kept, and do not count as heard: or their sender could fill the memory, and hold up a wait
        for as long as it likes."""
        if not sockets.readable(self.socket):
            return False
        frames = sockets.receive(self.socket)
        if self._inflow is not None:
            self._inflow.heard()
        if len(frames) != 1:
            return True
        try:
            payload = self._opener.open(frames[0].buffer)
        except Unopened:
            return True
        self.bound |= self._opener.bound
        if self._opener.number >= wanted:
            self.heard_at = now
        # The other end binds before it sends averages, and nobody looks for any until then.
        if payload is not None and self.bound:
            if payload.number >= wanted:
                self._payloads[payload.number] = payload
            self._tell_opened(payload)
        return True

    def payload(
        self, average: wire.Sealed | wire.Sharded, now: float
    ) -> list[Any] | shm.Blocks | None:
        """The buffers of an average, once; None if they have not come yet. Raises `Lost`."""
        number = average.number
        for older in [n for n in self._payloads if n < number]:
            del self._payloads[older]  # its header was lost, or was not needed
        for _ in range(READS_MAX):
            if number in self._payloads:
                break
            if self._opener.newest > number:
                self.skips += 1
                raise Lost
            if not self.read(now, number):
                return None
        found = self._payloads.pop(number, None)
        if found is None:
            return None
        if (found.round, found.bucket) != (average.round, average.bucket):
            raise Lost
        if found.kind is not Kind.SHARED:
            return found.buffers
        assert self._shared is not None
        blocks = self._shared.blocks(found.buffers[0])
        if blocks is None:
            raise Lost
        return blocks

    def measure(self) -> None:
        """End the connection if more waits here than a server sends. Call it from time to time; any
        thread may."""
        with self._watching:
            if self._watch.closed:
                return
            while sockets.readable(self._watch):
                descriptor = recv_monitor_message(self._watch)["value"]
                self._inflow = Inflow(descriptor, self._most_bytes)
            if self._inflow is not None and self._inflow.too_much():
                self._inflow.end()

    def close(self) -> None:
        """Forget the keys, and leave."""
        self._sealer.forget()
        self._opener.forget()
        with self._watching:
            sockets.end_monitor(self.socket, self._watch)
        self.socket.close()
        if self._shared is not None:
            self._shared.close()


def brought(
    channels: Sequence[Channel],
    average: wire.Sealed | wire.Sharded,
    now: float,
    *,
    patient: bool,
) -> tuple[Channel, list[Any] | shm.Blocks] | None:
    """The buffers of an average, and which of these channels has brought them; None if they may be
    on their way. Raises `Lost` where they come through none. `patient`: no channel is to blame."""
    lost = 0
    for channel in channels:
        skips = channel.skips
        try:
            found = channel.payload(average, now)
        except Lost:
            lost += 1
            if patient:
                channel.skips = skips
            continue
        if found is not None:
            return channel, found
    if lost == len(channels):
        raise Lost
    return None


def _keys(told: wire.Channel, *, plain: bool) -> tuple[bytes, bytes, bytes]:
    """The id and both keys that were told. Raises `PeerError` where anything is not as
    `paramserver.server.channels` makes it."""
    texts = told.id, told.up, told.down
    try:
        id, up, down = (bytes.fromhex(text) for text in texts)
    except ValueError:
        raise PeerError("the keys of a channel are not numbers") from None
    if (len(id), len(up), len(down)) != (
        *(sealing.ID_BYTES, sealing.KEY_BYTES, sealing.KEY_BYTES),
    ) or (id.hex(), up.hex(), down.hex()) != texts:
        raise PeerError("the keys of a channel do not fit a cipher")
    if told.cipher not in ((sealing.PLAIN,) if plain else tuple(sealing.CIPHERS)):
        raise PeerError("a channel has a cipher that is none of ours")
    if bool(told.password) if plain else not is_password(told.password):
        raise PeerError("the password of a channel is none")
    if not 0 < told.port < 2**16:
        raise PeerError("the port of a channel is none")
    return id, up, down


__all__ = ["Channel", "Lost", "brought"]
