"""The buckets of one round on their way to the server: where their numbers lie, and when each goes.

Where the server is on this host, numbers are written into the slots of an outbox, which the server
reads where they lie (`paramserver.transport.shm`); shards on this host have outboxes of their own.
`paramserver.protocol.pacing` decides when the
next push may be sent. Pure: `now` comes in, and the pushes to send come out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
from torch import Tensor

from paramserver.protocol import messages as wire
from paramserver.protocol.pacing import WINDOW, Pacer
from paramserver.protocol.sharding import SERVER
from paramserver.tensors.codec import fresh
from paramserver.transport import shm

WAIT_S = 0.05


class _Taken(NamedTuple):
    """The slot of a bucket."""

    slot: shm.Slot
    outbox: shm.Outbox

    def free(self) -> None:
        self.outbox.free(self.slot.place[2])


class Pushes:
    """The pushes of a round: `room` for a bucket's numbers, `add` when it is complete, and send
    what is `due`; `forget` the others when the round is over. At most `window` buckets are under
    way (see `Pacer`). `owner_of`: the shard that averages a bucket in the open round; `outbox_of`:
    what a shard on this host reads now."""

    def __init__(
        self,
        window: int = WINDOW,
        owner_of: Callable[[int], int] = lambda bucket: SERVER,
        outbox_of: Callable[[int], shm.Outbox | None] = lambda shard: None,
        size: Callable[[Any], int] = lambda buffer: memoryview(buffer).nbytes,
    ) -> None:
        self._outbox: shm.Outbox | None = None
        self._owner_of, self._outbox_of, self._size = owner_of, outbox_of, size
        self._moves = True
        """Slots become free soon: no wait for one has failed in this round."""
        self._filled: dict[int, _Taken] = {}  # by bucket: not complete yet
        self._pacer: Pacer[tuple[wire.Push, list[Any], _Taken | None]] = Pacer(window)

    def begin(self, outbox: shm.Outbox | None, window: int = WINDOW) -> None:
        """The peer joins (again), with an outbox or without: pushes before are void."""
        self._free_waiting()
        # What is being written in a shard's outbox is freed when it is sent, or forgotten.
        before = self._outbox
        self._filled = {b: t for b, t in self._filled.items() if t.outbox is not before}
        self._outbox = outbox
        self._pacer.window = window

    @property
    def window(self) -> int:
        """The number of buckets that are under way, at most."""
        return self._pacer.window

    @window.setter
    def window(self, window: int) -> None:
        self._pacer.window = window

    def without_outbox(self) -> None:
        """The server does not read the outbox: its pushes go through the socket."""
        self._outbox = None

    def room(self, bucket: int, nbytes: int) -> Tensor:
        """Memory for the bytes of this bucket, uint8 [nbytes]: a slot of the outbox of its shard,
        where there is one and a slot is free. Never waits."""
        before = self._filled.pop(bucket, None)  # of a push that was not completed
        if before is not None:
            before.free()
        taken = self._take(self._owner_of(bucket), nbytes)
        if taken is None:
            return fresh(nbytes)
        self._filled[bucket] = taken
        return taken.slot.tensor

    def _read_by(self, shard: int) -> shm.Outbox | None:
        """What this shard reads now."""
        return self._outbox_of(shard) if shard else self._outbox

    def _take(self, shard: int, nbytes: int) -> _Taken | None:
        outbox = self._read_by(shard)
        slot = None if outbox is None else outbox.room(nbytes)
        return None if slot is None or outbox is None else _Taken(slot, outbox)

    @property
    def full(self) -> bool:
        """Should the worker wait until the next bucket has a slot?

        A short wait costs less than sending through the socket: the server is busy either way.
        """
        return self._moves and self._outbox is not None and self._outbox.full

    def waited_in_vain(self) -> None:
        """No slot became free, because the averages wait for other workers: do not wait again in
        this round."""
        self._moves = False

    def add(self, push: wire.Push, buffers: list[Any], now: float) -> None:
        """A bucket is complete; its buffers are not the caller's from now on."""
        taken = self._filled.pop(push.bucket, None)
        self._pacer.add(push.bucket, (push, buffers, taken), now)

    def averaged(self, bucket: int, now: float) -> None:
        """The average of a bucket has come."""
        self._pacer.averaged(bucket, now)

    def hurry(self) -> None:
        """The round went on without them, and they may enter a later one: all are due."""
        self._pacer.hurry()

    def due(self, now: float) -> list[tuple[wire.Push, list[Any]]]:
        """The pushes to send now, each with its `shard`, and with the buffers that travel with it:
        none where they are read from an outbox."""
        found: list[tuple[wire.Push, list[Any]]] = []
        for push, buffers, taken in self._pacer.due(now):
            shard = self._owner_of(push.bucket)
            if taken is not None and taken.outbox is not self._read_by(shard):
                buffers = [taken.slot.copy()]  # it was written for another shard, or channel
                taken.free()
                taken = None
            if taken is None and shard:
                taken = self._moved(shard, buffers)
            places = () if taken is None else (taken.slot.place,)
            push = msgspec.structs.replace(push, places=places, shard=shard)
            found.append((push, [] if taken is not None else buffers))
        return found

    def _moved(self, shard: int, buffers: list[Any]) -> _Taken | None:
        """Buffers that found no slot when they were made have one now, if one is free: a copy costs
        less than the way through a socket. (The server's outbox is waited for before, see
        `full`.)"""
        if len(buffers) != 1:
            return None
        taken = self._take(shard, self._size(buffers[0]))
        if taken is not None:
            taken.slot.fill(buffers[0])
        return taken

    def forget(self) -> None:
        """The round is over: drop the pushes that were not sent."""
        self._moves = True
        self._free_waiting()
        for taken in self._filled.values():
            taken.free()
        self._filled.clear()

    def _free_waiting(self) -> None:
        for _, _, taken in self._pacer.begin():
            if taken is not None:
                taken.free()
