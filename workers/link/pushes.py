"""The buckets of one round on their way to the server: where their numbers lie, and when each goes.

Where the server is on this host, numbers are written into the slots of an outbox, which the server
reads where they lie (`paramserver.transport.shm`). `paramserver.protocol.pacing` decides when the
next push may be sent. Pure: `now` comes in, and the pushes to send come out.
"""

from __future__ import annotations

from typing import Any

import msgspec
from torch import Tensor

from paramserver.protocol import messages as wire
from paramserver.protocol.pacing import WINDOW, Pacer
from paramserver.tensors.codec import fresh
from paramserver.transport import shm

WAIT_S = 0.05


class Pushes:
    """The pushes of a round: `room` for a bucket's numbers, `add` when it is complete, and send
    what is `due`; `forget` the others when the round is over. At most `window` buckets are under
    way (see `Pacer`)."""

    def __init__(self, window: int = WINDOW) -> None:
        self._outbox: shm.Outbox | None = None
        self._moves = True
        """Slots become free soon: no wait for one has failed in this round."""
        self._filled: dict[int, shm.Slot] = {}  # by bucket: not complete yet
        self._pacer: Pacer[tuple[wire.Push, list[Any], shm.Slot | None]] = Pacer(window)

    def begin(self, outbox: shm.Outbox | None, window: int = WINDOW) -> None:
        """The peer joins (again), with an outbox or without: pushes before are void."""
        self._outbox = outbox
        self._filled.clear()
        self._pacer.begin()
        self._pacer.window = window

    @property
    def window(self) -> int:
        """The number of buckets that are under way, at most."""
        return self._pacer.window

    @window.setter
    def window(self, window: int) -> None:
        self._pacer.window = window

    def without_outbox(self) -> None:
        """The server does not read the outbox: all pushes go through the socket."""
        self._outbox = None
        self._filled.clear()

    def room(self, bucket: int, nbytes: int) -> Tensor:
        """Memory for the bytes of this bucket, uint8 [nbytes]: a slot of the outbox where one is
        free. Never waits."""
        self._free(self._filled.pop(bucket, None))  # of a push that was not completed
        slot = None if self._outbox is None else self._outbox.room(nbytes)
        if slot is None:
            return fresh(nbytes)
        self._filled[bucket] = slot
        return slot.tensor

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
        slot = self._filled.pop(push.bucket, None)
        self._pacer.add(push.bucket, (push, buffers, slot), now)

    def averaged(self, bucket: int, now: float) -> None:
        """The average of a bucket has come."""
        self._pacer.averaged(bucket, now)

    def hurry(self) -> None:
        """The round went on without them, and they may enter a later one: all are due."""
        self._pacer.hurry()

    def due(self, now: float) -> list[tuple[wire.Push, list[Any]]]:
        """The pushes to send now, each with the buffers that travel with it: none where the server
        reads them from the outbox."""
        found: list[tuple[wire.Push, list[Any]]] = []
        for push, buffers, slot in self._pacer.due(now):
            if slot is None or self._outbox is None:
                found.append((push, buffers))
            else:
                found.append((msgspec.structs.replace(push, places=(slot.place,)), []))
        return found

    def forget(self) -> None:
        """The round is over: drop the pushes that were not sent."""
        self._moves = True
        for _, _, slot in self._pacer.begin():
            self._free(slot)
        for slot in self._filled.values():
            self._free(slot)
        self._filled.clear()

    def _free(self, slot: shm.Slot | None) -> None:
        if slot is not None and self._outbox is not None:
            self._outbox.free(slot.place[2])
